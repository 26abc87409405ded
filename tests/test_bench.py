"""The benchmarks' own parts, and each benchmark end to end on shapes small enough for a test. No time is asserted."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_gpu
import pytest
import torch

from bench import harness, layer, roofline, sanitize, summary, tables, teleport, training
from bench.harness import UNIT, Check, Contestant, Timing
from bench.memory import AllocationRecorder
from experiments.training import TrainingSettings
from symtele_cuda.kernels import library as kernels
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.kernels.operands import OPERATORS

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
TELEPORT_MODULE = importlib.import_module("symtele_cuda.teleport")  # the package has a function of this name
SMALL = teleport.Shape((30, 24, 20, 5), 12, must_units=1e9, aim_units=1e9, must_speedup=0.0)


class Clock:
    """A clock that only the contestants move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, calls: list[str] | None = None, name: str = "") -> Contestant:
        def run(prepared: str) -> None:
            assert prepared == "fresh"
            self.now += seconds
            if calls is not None:
                calls.append(name)

        def prepare() -> str:
            self.now += 1000.0
            return "fresh"

        return Contestant(run, prepare)


def test_times_are_medians_in_units_and_preparing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timings = harness.compare({UNIT: clock.taking(0.5), "slow": clock.taking(3.0)}, rounds=3, device=CPU)
    assert timings["slow"] == harness.Timing(3.0, (3.0, 3.0), 6.0, (6.0, 6.0), 3)
    assert timings[UNIT].units == 1.0


def test_contestants_take_turns_each_after_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), list[str]()
    contestants = {name: clock.taking(1.0, calls, name) for name in (UNIT, "a", "b")}
    harness.compare(contestants, rounds=2, device=CPU)
    assert calls[-8:] == [UNIT, "a", UNIT, "b"] * 2


def test_a_short_run_is_repeated_to_fill_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), list[str]()
    quick = clock.taking(harness.SAMPLE_SECONDS / 4, calls, "quick")
    harness.compare({UNIT: clock.taking(1.0), "quick": quick}, rounds=1, device=CPU)
    assert calls.count("quick") == 2 + 4  # two to find it out


def test_quartiles_of_a_drifting_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    seconds = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # the first two are the warm-up

    def run(_: Any) -> None:
        clock.now += next(seconds)

    timing = harness.compare({UNIT: clock.taking(1.0), "drifting": Contestant(run)}, rounds=5, device=CPU)["drifting"]
    assert (timing.seconds, timing.seconds_iqr) == (3.0, (2.0, 4.0))


def test_the_unit_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timings = harness.compare({"theirs": clock.taking(2.0), "ours": clock.taking(1.0)}, 3, CPU, "theirs")
    assert (timings["theirs"].units, timings["ours"].units) == (1.0, 0.5)


def test_a_single_piece_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def run(_: Any) -> None:
        clock.now += 0.25

    assert harness.median_seconds(run, rounds=3, device=CPU) == 0.25


def test_the_cpu_needs_no_copies() -> None:
    prepare = harness.in_turn([1.0], lambda original: pytest.fail("a copy was made"), 8, CPU)
    assert prepare() is prepare()


class Device:
    """In place of a GPU: launching work moves the host's clock a little, the work itself the device's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.host = 0.0
        self.waits = 0
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        properties = SimpleNamespace(L2_cache_size=1000)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def synchronize(self) -> None:
        self.waits += 1
        self.host = self.now = max(self.now, self.host)

    def work(self, seconds: float) -> None:
        self.host += 1e-6
        self.now = max(self.now, self.host) + seconds


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.now = max(self.device.now, self.device.host)

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


CUDA = torch.device("cuda")


def test_a_gpu_s_own_clock_sees_what_is_still_running(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    prepared = iter(range(1000))
    contestant = Contestant(lambda _: device.work(0.001), lambda: next(prepared))
    timings = harness.compare({UNIT: contestant, "same": contestant}, 3, CUDA)
    assert timings["same"].seconds == pytest.approx(0.001, rel=0.01)
    assert device.waits < next(prepared)  # the runs of a sample follow each other without a wait


def test_work_that_reads_back_is_timed_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def work(_: Any) -> None:
        device.work(0.01)
        device.synchronize()
        device.host += 0.03  # work of the host behind the last kernel

    unit = Contestant(lambda _: device.work(0.01))
    timings = harness.compare({UNIT: unit, "reading": Contestant(work, reads_back=True)}, 3, CUDA)
    assert timings["reading"].seconds == pytest.approx(0.04, rel=1e-3)


def test_on_a_gpu_the_inputs_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    for size, copies in ((400, 5), (2000, 1), (1, harness.MOST_COPIES)):
        prepare = harness.in_turn([1.0], list, size, CUDA)
        first = [id(prepare()) for _ in range(copies)]
        assert len(set(first)) == copies and [id(prepare()) for _ in range(copies)] == first


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (Check(1.0, at_most=1.0), True),
        (Check(1.1, at_most=1.0), False),
        (Check(1.0, at_least=1.0), True),
        (Check(0.9, at_least=1.0), False),
        (Check(5.0), True),
        (Check(math.nan), False),
        (Check(None, at_most=1.0), False),
    ],
)
def test_check(check: Check, passed: bool) -> None:
    assert check.passed is passed
    assert harness.plain(check)["passed"] is passed


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "result.json"
    harness.write_json(target, {"check": Check(math.inf, at_most=1.0), "pair": (1, 2.5), 3: math.nan})
    document = json.loads(target.read_text(encoding="utf-8"))
    assert document["check"] == {"value": None, "at_most": 1.0, "at_least": None, "note": "", "passed": False}
    assert (document["pair"], document["3"]) == ([1, 2.5], None)
    assert [path.name for path in target.parent.iterdir()] == ["result.json"]


def test_machine_line_says_what_matters_and_names_no_machine() -> None:
    line = harness.machine_line(CPU, torch.float32)
    assert f"torch {torch.__version__}" in line and "float32" in line and "1 thread(s)" in line
    assert platform.node() not in line and "/" not in line


def test_recorder_counts_fresh_allocations_only() -> None:
    left, right, target = torch.ones(3, 4), torch.ones(4, 5), torch.empty(3, 5)
    with AllocationRecorder() as recorder:
        left.t().expand(10, 4, 3)
        left.add_(1)
        torch.mm(left, right, out=target)
    assert recorder.allocations == 0
    with AllocationRecorder() as recorder:
        left @ right
        left.sum()
    assert (recorder.largest_elements, recorder.allocations) == (15, 2)
    assert "mm" in recorder.largest_operator


def test_recorder_counts_the_storage_behind_a_view() -> None:
    with AllocationRecorder() as recorder:
        torch.ones(100)[:1]
    assert recorder.largest_elements == 100


# ---------------------------------------------------------------------------------------------------------------------
# layer
# ---------------------------------------------------------------------------------------------------------------------


def test_layer_measures_methods_that_agree() -> None:
    result = layer.measure(layer.Shape(6, 10, 8), rounds=1, device=CPU)
    assert harness.all_passed(result["checks"])
    assert set(result["timings"]) == {UNIT, *layer.METHODS}
    others = (layer.UNCHECKED, layer.EAGER, layer.TWIN, layer.SVD)
    assert set(result["ratios"]) == {f"{name} / {layer.OPERATOR}" for name in others}


def test_layer_reports_no_speed_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: layer.Problem) -> layer.Result:
        moved, gradient = layer.by_svd(problem)
        return moved, 1.1 * gradient

    monkeypatch.setitem(layer.METHODS, layer.SVD, wrong)
    result = layer.measure(layer.Shape(6, 10, 8), rounds=1, device=CPU)
    assert not result["checks"][f"{layer.SVD}, ∂f/∂g, relative difference"].passed
    assert "timings" not in result


SMALL_LAYERS = [
    layer.Shape(6, 10, 8),
    layer.Shape(6, 10, 8, activation="tanh"),
    layer.Shape(6, 10, 8, activation="softplus"),
    layer.Shape(6, 10, 8, precision=roofline.FLOAT64),
    layer.Shape(8, 8, 8, precision=roofline.TF32, orthogonal=True),
]


@pytest.mark.parametrize("shape", SMALL_LAYERS, ids=str)
def test_the_methods_for_a_gpu_agree_too(shape: layer.Shape) -> None:
    problem = layer.make_problem(shape, CPU)
    methods = layer.methods_for(shape, torch.device("cuda"))
    assert set(methods) == {layer.OPERATOR, layer.ON_TORCH, layer.EAGER, layer.TWIN, layer.SVD}
    checks = layer.check_correct(problem, methods, layer.MAX_DIFFERENCE[shape.precision])
    assert harness.all_passed(checks), {what: str(check) for what, check in checks.items() if not check.passed}


def test_small_products_come_last_on_a_gpu() -> None:
    sizes = [shape.size for shape in roofline.CUDA_SHAPES.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_what_takes_long_to_compile_and_small_layers_come_last() -> None:
    shapes = [*layer.CUDA_SHAPES.values()]
    turns = [1 + shape.compiled if shape.compiled or shape.largest <= 784 else 0 for shape in shapes]
    assert turns == sorted(turns) and set(turns) == {0, 1, 2}
    for shape in shapes:
        methods = layer.methods_for(shape, torch.device("cuda"))
        if shape.compiled:
            assert set(methods) == {layer.OPERATOR, layer.COMPILED}
        else:
            assert layer.COMPILED not in methods


def test_an_opponent_that_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: layer.Problem) -> layer.Result:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setitem(layer.METHODS, layer.SVD, broken)
    result = layer.measure(layer.Shape(6, 10, 8), rounds=1, device=CPU)
    assert result["left out"] == {layer.SVD: "RuntimeError: no compiler"}
    assert set(result["timings"]) == {UNIT, layer.OPERATOR, layer.UNCHECKED, layer.EAGER, layer.TWIN}
    monkeypatch.setitem(layer.METHODS, layer.OPERATOR, broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        layer.measure(layer.Shape(6, 10, 8), rounds=1, device=CPU)


def test_a_shape_that_cannot_be_measured_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "SHAPES", layer.SHAPES | {"bad": layer.Shape(12, 10, 8), "good": layer.Shape(6, 10, 8)})
    monkeypatch.setattr(layer, "REGISTRY", {"cpu": layer.SHAPES})
    out = tmp_path / "layer.json"
    with pytest.raises(SystemExit, match="not measured: bad"):
        layer.main(layer.parse(["--shape", "bad", "good", "--rounds", "1", "--out", str(out)]))
    shapes = json.loads(out.read_text(encoding="utf-8"))["shapes"]
    assert "inputs" in shapes["bad"]["error"] and "timings" in shapes["good"]


def test_the_truth_of_large_layers_is_that_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = layer.make_problem(layer.Shape(6, 10, 8), CPU)
    exact = problem.map(torch.Tensor.double)
    for one, other in zip(layer.by_operator(exact, backend="torch"), layer.by_reference(exact), strict=True):
        assert harness.relative_difference(one, other) < 1e-12


def timing(seconds: float) -> Timing:
    return Timing(seconds, (seconds, seconds), seconds, (seconds, seconds), 1)


CEILINGS = roofline.Ceilings(1e12, {name: 1e13 for name in roofline.DTYPES})


@pytest.mark.parametrize(
    ("sizes", "seconds", "failing"),
    [
        ((20, 512, 512), (1.0, 3.0, 3.0, 1.3), set()),
        ((20, 512, 512), (1.0, 2.9, 3.0, 1.3), {layer.ON_TORCH}),
        ((20, 784, 512), (1.0, 1.0, 1.0, 1.3), set()),
        ((20, 784, 512), (1.0, 1.0, 0.9, 1.2), {layer.EAGER, layer.COMPILED}),
    ],
)
def test_layer_judges_the_operator(sizes: tuple[int, int, int], seconds: tuple[float, ...], failing: set[str]) -> None:
    names = (layer.OPERATOR, layer.ON_TORCH, layer.EAGER, layer.COMPILED)
    timings = {name: timing(value) for name, value in zip(names, seconds, strict=True)}
    verdicts = layer.judge(layer.Shape(*sizes), timings, CEILINGS)["requirements"]
    assert {name for name in names[1:] if not verdicts[f"faster than {name}, times"].passed} == failing
    assert verdicts["share of the ceilings"].at_least is None


def test_layer_judges_large_layers_by_the_ceilings() -> None:
    shape = layer.CUDA_SHAPES["n1024-4096-4096"]
    least = roofline.layer_work(shape.n, shape.d_in, shape.d_out, shape.precision).seconds(CEILINGS)
    for share in (0.79, 0.81):
        timings = {layer.OPERATOR: timing(least / share)}
        assert layer.judge(shape, timings, CEILINGS)["requirements"]["share of the ceilings"].passed is (share > 0.8)


# ---------------------------------------------------------------------------------------------------------------------
# roofline
# ---------------------------------------------------------------------------------------------------------------------


def test_work_takes_the_longer_of_its_two_times() -> None:
    ceilings = roofline.Ceilings(10.0, {"a": 2.0, "b": 4.0})
    assert roofline.Work(100.0, {"a": 2.0, "b": 4.0}).seconds(ceilings) == 10.0
    assert roofline.Work(10.0, {"a": 4.0, "b": 4.0}).seconds(ceilings) == 3.0


def test_work_of_a_layer_is_counted() -> None:
    """Against the operations and the elements of each product and tensor, one by one."""
    n, d_in, d_out = 3, 5, 7
    products = [(n, d_in, d_out), (n, d_out, d_out), (d_out, n, d_in), (n, d_in, d_out), (d_out, n, d_out)]
    factor = n * n * d_in + n**3 + 2 * n * n * d_in  # half of H Hᵀ; its inverse; K⁻¹ H
    work = roofline.layer_work(n, d_in, d_out, roofline.FLOAT32)
    assert work.operations[roofline.FLOAT32] == sum(2 * a * b * c for a, b, c in products)
    assert work.operations[roofline.FLOAT64] == factor
    read, written = n * d_in + 2 * d_in * d_out + d_out**2, d_in * d_out + d_out**2
    assert work.bytes == 4 * (read + written)
    double = roofline.layer_work(n, d_in, d_out, roofline.FLOAT64)
    assert double.operations == {roofline.FLOAT64: work.operations[roofline.FLOAT32] + factor}
    assert double.bytes == 2 * work.bytes


def test_roofline_measures_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(roofline.PRODUCT_SIZE, "cpu", 32)
    monkeypatch.setitem(roofline.SHAPES, "small", roofline.Shape(16, must_speedup=0.0))
    out = tmp_path / "roofline.json"
    roofline.main(roofline.parse(["--shape", "small", "--rounds", "1", "--out", str(out)]))
    document = json.loads(out.read_text(encoding="utf-8"))
    ceilings = document["settings"]["ceilings"]
    assert ceilings["bytes_per_second"] > 0 and set(ceilings["operations_per_second"]) == {"float32", "float64"}
    result = document["shapes"]["small"]
    assert all(check["passed"] for check in [*result["checks"].values(), *result["requirements"].values()])
    assert torch.get_float32_matmul_precision() == "highest"


def test_torch_s_product_has_no_time_under_the_compiled_one_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*roofline.contestants_for(CPU)] == [roofline.LIBRARY, roofline.TWIN]
    monkeypatch.setattr(roofline, "products_for", lambda device, backend: SimpleNamespace(linear=products.linear))
    assert [*roofline.contestants_for(CPU)] == [roofline.LIBRARY, roofline.OURS]


def test_precision_is_set_and_put_back() -> None:
    with roofline.precision(roofline.TF32):
        assert torch.get_float32_matmul_precision() == "high"
        with roofline.precision(roofline.FLOAT32):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------------------------------------------------------------
# teleport
# ---------------------------------------------------------------------------------------------------------------------


def test_teleport_measures_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(teleport.SHAPES, "small", SMALL)
    out = tmp_path / "teleport.json"
    teleport.main(teleport.parse(["--shape", "small", "--rounds", "1", "--out", str(out)]))
    result = json.loads(out.read_text(encoding="utf-8"))["shapes"]["small"]
    contestants = {UNIT, teleport.GRAD_NORM, teleport.LOOKAHEAD, teleport.LONGER}
    contestants |= {teleport.PUBLISHED, teleport.PUBLISHED_LEAN, *teleport.STANDARDISE}
    assert set(result["timings"]) == contestants
    assert all(check["passed"] for check in result["checks"].values())
    assert result["requirements"]["units, must"]["value"] == pytest.approx(
        result["timings"][teleport.GRAD_NORM]["units"]
    )
    assert result["requirements"]["faster than published, times"]["value"] == pytest.approx(
        result["timings"][teleport.PUBLISHED]["units"] / result["timings"][teleport.GRAD_NORM]["units"]
    )
    assert "units, must" in capsys.readouterr().out


def test_teleport_reports_no_speed_of_a_network_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = teleport.our_teleport

    def drifting(problem: teleport.Problem, objective: str, steps: int = teleport.STEPS) -> Any:
        report = honest(problem, objective, steps)
        with torch.no_grad():
            problem.weights[-1].mul_(1.1)
        return report

    monkeypatch.setattr(teleport, "our_teleport", drifting)
    result = teleport.measure(SMALL, rounds=1, device=CPU)
    assert not result["checks"][f"{teleport.GRAD_NORM}, loss drift"].passed
    assert "timings" not in result


@pytest.mark.parametrize(
    "shape",
    [
        replace(SMALL, activation="tanh", published=False),
        replace(SMALL, activation="softplus", published=False),
        teleport.Shape((24, 24, 24, 6), 24, published=False, orthogonal=True),
    ],
    ids=str,
)
def test_teleports_of_the_other_kinds_of_problems_are_right(shape: teleport.Shape) -> None:
    checks, searches = teleport.check_correct(teleport.make_problem(shape, CPU), shape)
    assert harness.all_passed(checks), {what: str(check) for what, check in checks.items() if not check.passed}
    assert all(search["layers"] == ["teleported"] * 2 for search in searches.values())


def test_teleport_judges_a_step_by_what_more_of_them_cost() -> None:
    shape = replace(SMALL, published=False, must_step_units=0.5, must_seconds=5.0)
    timings = {name: timing(5.0) for name in (UNIT, teleport.GRAD_NORM, teleport.LOOKAHEAD, *teleport.STANDARDISE)}
    for longer, passed in ((10.0, True), (11.0, False)):
        verdicts = teleport.judge(shape, timings | {teleport.LONGER: timing(longer)})
        assert verdicts["units of one step"].value == pytest.approx((longer - 5.0) / 10)
        assert verdicts["units of one step"].passed is passed and verdicts["seconds"].passed
        assert "faster than published, times" not in verdicts


@pytest.mark.parametrize("name", ["mlp-784-512-512-10-n20", "mlp-784-128-128-10-n100"])
def test_the_search_allocates_nothing_larger_than_the_activations(name: str) -> None:
    shape = teleport.SHAPES[name]
    checks = teleport.check_memory(teleport.make_problem(shape, CPU), shape)
    assert len(checks) == 2
    for what, check in checks.items():
        assert check.passed, f"{what}: {check}"


def test_the_memory_check_sees_a_weight_sized_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    search = TELEPORT_MODULE.ascend

    def wasteful(*args: Any, **kwargs: Any) -> Any:
        torch.zeros(SMALL.n, 1 + max(SMALL.dims[1], SMALL.n))
        return search(*args, **kwargs)

    monkeypatch.setattr(TELEPORT_MODULE, "ascend", wasteful)
    checks = teleport.check_memory(teleport.make_problem(SMALL, CPU), SMALL)
    assert not any(check.passed for check in checks.values())


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------

TINY = training.Shape(
    dims=(16, 14, 12, 3),
    training=TrainingSettings(2, 5, "sgd", 0.05),
    must_loss_ratio=10.0,
    published_rate=1e-3,
    target_loss=1e-9,
    teleports=2,
    teleport_epoch=1,
    teleport_samples=8,
    holdout_samples=8,
)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A folder of 50 random images of 4×4 pixels in three classes, as IDX files."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 4, 4), generator=generator, dtype=torch.uint8).numpy()
    labels = torch.randint(3, (50,), generator=generator, dtype=torch.uint8).numpy()
    folder = tmp_path / "digits"
    folder.mkdir()
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def test_training_runs_judges_and_resumes(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "training.json"
    training.run({"tiny": TINY}, [3], digits, out, processes=1, threads=1)
    first = json.loads(out.read_text(encoding="utf-8"))["shapes"]["tiny"]
    assert [seed["seed"] for seed in first["seeds"]] == [3]
    runs = first["seeds"][0]["runs"]
    assert set(runs) == set(TINY.arms())
    assert all(len(run["epochs"]) == 3 for run in runs.values())
    assert len(runs[training.PLAIN]["teleports"]) == 0
    assert len(runs[training.TELEPORTED]["teleports"]) == TINY.teleports
    # the same start and the same batches: the arms agree until the first teleport, in epoch 1
    assert len({run["epochs"][1]["train_loss"] for run in runs.values()}) == 1
    assert first["requirements"]["seeds"]["passed"] is False
    assert str(digits) not in out.read_text(encoding="utf-8")

    ran = []

    def remember(name: str, shape: training.Shape, seed: int, data_dir: Path, threads: int) -> dict[str, Any]:
        ran.append(seed)
        return {**first["seeds"][0], "seed": seed}

    monkeypatch.setattr(training, "run_seed", remember)
    monkeypatch.setattr(training, "ProcessPoolExecutor", SameProcess)
    training.run({"tiny": TINY}, [1, 3, 2], digits, out, processes=1, threads=1)
    assert ran == [1, 2]
    again = json.loads(out.read_text(encoding="utf-8"))["shapes"]["tiny"]
    assert [seed["seed"] for seed in again["seeds"]] == [1, 2, 3]
    assert again["means"][training.PLAIN] == first["means"][training.PLAIN]


class SameProcess:
    """An executor that runs in this process, where the test's patches hold."""

    def __init__(self, processes: int, mp_context: Any) -> None:
        self.processes = processes

    def __enter__(self) -> SameProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Any, *args: Any) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


def test_training_on_scikit_learn_s_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    shape = training.DIGITS["digits-0.05"]
    short = replace(shape, training=replace(shape.training, epochs=2), teleports=1)
    seed = training.run_seed("short", short, 1, None, threads=1)
    assert [record["accepted"] for record in seed["runs"][training.TELEPORTED]["teleports"]] == [True]


def test_training_needs_a_folder_for_mnist(capsys: Any) -> None:
    for words in ([], ["--device", "cuda", "--shape", "mnist-0.1"]):
        with pytest.raises(SystemExit):
            training.parse(words)
        assert "--data-dir must name a folder of MNIST's IDX files" in capsys.readouterr().err
    arguments = training.parse(["--device", "cuda", "--shape", "digits-0.05"])
    assert training.on_device(training.DIGITS["digits-0.05"], arguments.device).training.device == "cuda"


def test_training_refuses_results_of_other_settings(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    harness.write_json(out, {"shapes": {"tiny": {"shape": TINY, "seeds": []}}})
    assert training.Results.open(out, {"tiny": TINY}).missing("tiny", [1]) == [1]
    other = replace(TINY, teleports=TINY.teleports + 1)
    with pytest.raises(ValueError, match="--out must name a file of the same settings; tiny"):
        training.Results.open(out, {"tiny": other})


def seed_result(seed: int, losses: dict[str, float | None], accuracies: dict[str, float]) -> dict[str, Any]:
    def epoch(label: str) -> dict[str, Any]:
        return {
            "epoch": 2,
            "train_loss": losses[label],
            "validation_loss": 1.0,
            "validation_accuracy": accuracies[label],
            "seconds": seconds[label],
        }

    seconds = {training.PLAIN: 4.0, training.TELEPORTED: 3.0, training.PUBLISHED: 2.0}

    teleports = [{"accepted": True}] * TINY.teleports
    return {"seed": seed, "runs": {label: {"epochs": [epoch(label)], "teleports": teleports} for label in losses}}


@pytest.mark.parametrize(
    ("loss", "accuracy", "loss_passes", "accuracy_passes"),
    [(0.4, 0.91, True, True), (0.41, 0.91, False, True), (0.4, 0.9, True, False), (None, 0.91, False, True)],
)
def test_training_judges_means(loss: float | None, accuracy: float, loss_passes: bool, accuracy_passes: bool) -> None:
    shape = replace(TINY, must_loss_ratio=0.4, target_loss=1.0)
    losses = {training.PLAIN: 1.0, training.TELEPORTED: loss, training.PUBLISHED: None}
    accuracies = {training.PLAIN: 0.9, training.TELEPORTED: accuracy, training.PUBLISHED: 0.1}
    summary = training.summarise(shape, [seed_result(seed, losses, accuracies) for seed in range(5)])
    verdicts = summary["requirements"]
    assert verdicts["train loss, teleported / plain"].passed is loss_passes
    assert verdicts["validation accuracy, teleported − plain"].passed is accuracy_passes
    assert verdicts["seeds"].passed
    assert math.isnan(summary["means"][training.PUBLISHED]["train_loss"])


def test_training_compares_the_times_to_a_loss() -> None:
    shape = replace(TINY, target_loss=0.5, must_seconds_ratio=1.0)

    def seed(plain: list[float | None], teleported: list[float | None]) -> dict[str, Any]:
        def epochs(losses: list[float | None]) -> list[dict[str, Any]]:
            constant = {"validation_loss": 1.0, "validation_accuracy": 0.5}
            return [
                {"epoch": epoch, "train_loss": loss, "seconds": 2.0 * epoch, **constant}
                for epoch, loss in enumerate(losses)
            ]

        arms = {training.PLAIN: plain, training.TELEPORTED: teleported, training.PUBLISHED: [2.0, None]}
        runs = {label: {"epochs": epochs(losses), "teleports": []} for label, losses in arms.items()}
        return {"seed": 1, "runs": runs}

    name = "seconds to train loss 0.5, teleported / plain"
    judged = training.summarise(shape, [seed([2.0, 1.0, 0.7, 0.4], [2.0, 0.5, 0.1]), seed([2.0, 0.4], [2.0, 0.3])])
    assert judged["means"][training.PLAIN]["seconds_to_target_loss"] == (6.0 + 2.0) / 2
    assert judged["requirements"][name].value == 2.0 / 4.0 and judged["requirements"][name].passed
    judged = training.summarise(shape, [seed([2.0, 0.4], [2.0, 0.6])])
    assert math.isnan(judged["means"][training.TELEPORTED]["seconds_to_target_loss"])
    assert not judged["requirements"][name].passed


# ---------------------------------------------------------------------------------------------------------------------
# the commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", [layer, teleport, roofline])
def test_each_device_has_its_shapes_and_its_file(benchmark: Any, capsys: Any) -> None:
    here, there = benchmark.parse([]), benchmark.parse(["--device", "cuda"])
    assert here.shape == list(benchmark.SHAPES) and there.shape == list(benchmark.CUDA_SHAPES)
    name = benchmark.__name__.split(".")[-1]
    assert here.out == ROOT / "bench" / "results" / f"{name}.json"
    assert there.out == ROOT / "bench" / "results" / "gpu" / f"{name}.json"
    foreign = next(name for name in [*benchmark.CUDA_SHAPES][::-1] if name not in benchmark.SHAPES)
    assert benchmark.parse(["--device", "cuda", "--shape", foreign]).shape == [foreign]
    for words, text in (
        (["--shape", foreign], "--shape on cpu must be among"),
        (["--device", "meta"], "--device must be one of cpu, cuda, got meta"),
    ):
        with pytest.raises(SystemExit):
            benchmark.parse(words)
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", [layer, roofline, teleport, training])
def test_nothing_is_measured_on_a_gpu_without_the_kernels(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would measure torch's under their name."""
    monkeypatch.setattr(kernels, "_obstacle", lambda device: "they were not built")
    shape = [*benchmark.REGISTRY["cuda"]][-1]
    arguments = benchmark.parse(["--device", "cuda", "--shape", shape, "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match=r"nothing is measured: .*cuda.* is not available"):
        benchmark.main(arguments)
    assert not [*tmp_path.iterdir()]


def test_the_sanitizer_watches_nothing_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_obstacle", lambda device: "they were not built")
    for words in ([], ["--teleport"]):
        with pytest.raises(ValueError, match="is not available"):
            sanitize.main(words)


@pytest.mark.parametrize(("required", "outcome"), [(False, pytest.skip.Exception), (True, pytest.fail.Exception)])
def test_a_gpu_test_fails_where_the_kernels_must_be_there(
    required: bool, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_obstacle", lambda device: "they were not built")
    if required:
        monkeypatch.setenv("SYMTELE_KERNELS_REQUIRED", "1")
    else:
        monkeypatch.delenv("SYMTELE_KERNELS_REQUIRED", raising=False)
    with pytest.raises(outcome, match="is not available"):
        on_gpu.compiled()


def test_a_gpu_test_is_not_skipped_for_want_of_a_device_where_the_kernels_must_be_there() -> None:
    """It fails instead, by what it asks of the device; this one is run with torch's device hidden from it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["tests/test_gpu_products.py::test_opcheck", "--maxfail=1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("SYMTELE_KERNELS_REQUIRED", None)
    statuses = [
        subprocess.run(command, env={**environment, **required}, cwd=ROOT, capture_output=True, timeout=120).returncode
        for required in ({}, {"SYMTELE_KERNELS_REQUIRED": "1"})
    ]
    assert statuses == [0, 1]


def test_training_s_options() -> None:
    arguments = training.parse(["--data-dir", "somewhere", "--shape", "mnist-0.1"])
    assert (arguments.shape, arguments.seeds, arguments.threads) == (["mnist-0.1"], [1, 2, 3, 4, 5], 1)
    assert training.parse(["--data-dir", "somewhere"]).shape == list(training.SHAPES)


# ---------------------------------------------------------------------------------------------------------------------
# gpu.sh
# ---------------------------------------------------------------------------------------------------------------------

STAGES = ["machine", "build", "tests", "teleport", "layer", "roofline", "sanitizer", "training"]
STUB = """#!/bin/bash
case "$*" in
  *"$FAIL"*) echo "why it failed" >&2; exit 7;;
  *bench.layer*) echo "layer speaks"; exit 3;;
  *"$LONG"*) echo the first line; head -c 3000000 /dev/zero | tr "\\0" x; printf "\nthe last line\n";;
  *"-m pip"*) echo "ran $*";;
  *setup.py*)
    echo "setup.py sees $PYTHONPATH"
    mkdir -p build/gpu/symtele_cuda
    touch build/gpu/symtele_cuda/{_kernels.so,_build.json};;
  *test_lost*) exit 9;;
  *test_hangs*) trap 'kill $!; exit 2' INT; sleep 100 >/dev/null 2>&1 & wait;;
  *junitxml=*)
    all="$*"
    xml=${all##*junitxml=}
    echo "ran $all"
    echo "kernels required: $SYMTELE_KERNELS_REQUIRED"
    echo "<testsuites><testsuite tests='1' failures='0'><testcase name='one'/></testsuite></testsuites>" >"${xml%% *}";;
  *"$HANG"*) sleep 100;;
esac
"""
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What gpu.sh sees of a checkout, a test of each kind, and in place of Python and of CUDA's tools one stub."""
    folder = tmp_path / "checkout"
    for name in ("bench", "tests", "symtele_cuda", "bin"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", folder / "bench")
    (folder / "symtele_cuda" / "_kernels.so").write_text("of a build before")
    tests = {"products": ["small", "lost"], "teleport": ["it"], "layer": ["it"], "errors": ["out_of_memory"]}
    for name, functions in tests.items():
        text = "".join(f"def test_{function}(call: str) -> None:\n" for function in functions)
        (folder / "tests" / f"test_gpu_{name}.py").write_text(text)
    for name in ("python", "nvidia-smi", "nvcc", "compute-sanitizer"):
        (folder / "bin" / name).write_text(STUB)
        (folder / "bin" / name).chmod(0o755)
    return folder


def run_gpu_sh(checkout: Path, **environ: str) -> tuple[str, dict[str, int]]:
    """What it printed, and its stages with their statuses, in their order."""
    stub, out = checkout / "bin", checkout / "out"
    environment = {**os.environ, "PATH": f"{stub}:{os.environ['PATH']}", "PYTHON": str(stub / "python")}
    environment |= {
        "OUT": str(out),
        "HANG": "nothing hangs",
        "FAIL": "nothing fails",
        "LONG": "nothing is long",
        **environ,
    }
    command = ["bash", str(checkout / "bench" / "gpu.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    stages = json.loads((out / "summary.json").read_text(encoding="utf-8"))["stages"]
    statuses = {stage["name"]: stage["status"] for stage in stages}
    assert done.returncode == int(any(statuses.values())), done.stderr
    return done.stdout, statuses


@needs_bash
def test_gpu_sh_goes_on_after_a_stage_that_fails(checkout: Path) -> None:
    printed, statuses = run_gpu_sh(checkout)
    assert [*statuses.items()] == [(name, {"layer": 3, "tests": 1}.get(name, 0)) for name in STAGES]
    out = checkout / "out"
    log = (out / "gpu.log").read_text(encoding="utf-8")
    assert "layer speaks" in printed and "layer speaks" in log
    assert (checkout / "symtele_cuda" / "_kernels.so").read_text() == ""
    assert {path.name for path in out.iterdir()} == {"summary.json", "gpu.log", "tests.xml"}


@needs_bash
@pytest.mark.parametrize("command", ["setup.py", "symtele_cuda info"])
def test_gpu_sh_ends_where_the_build_fails_and_says_why(checkout: Path, command: str) -> None:
    printed, statuses = run_gpu_sh(checkout, FAIL=command)
    assert statuses == {"machine": 0, "build": 7}
    assert "why it failed" in printed and "why it failed" in (checkout / "out" / "gpu.log").read_text(encoding="utf-8")
    assert "=== summary" in printed


@needs_bash
def test_gpu_sh_leaves_no_library_of_a_build_before(checkout: Path) -> None:
    run_gpu_sh(checkout, FAIL="setup.py")
    assert not (checkout / "symtele_cuda" / "_kernels.so").exists()


@needs_bash
def test_gpu_sh_installs_the_wheels_that_lie_there_and_nothing_from_a_network(checkout: Path) -> None:
    run_gpu_sh(checkout, STAGES="build")
    assert "pip" not in (checkout / "out" / "gpu.log").read_text(encoding="utf-8")
    (checkout / ".whl").mkdir()
    (checkout / ".whl" / "headers-1-py3-none-any.whl").write_text("")
    run_gpu_sh(checkout, STAGES="build")
    log = (checkout / "out" / "gpu.log").read_text(encoding="utf-8")
    target = f"--target {checkout}/build/wheels .whl/headers-1-py3-none-any.whl"
    assert f"ran -m pip install --no-index --no-deps {target}" in log
    assert f"setup.py sees {checkout}/build/wheels" in log


@needs_bash
def test_gpu_sh_says_to_the_tests_that_the_kernels_must_be_there(checkout: Path) -> None:
    run_gpu_sh(checkout, STAGES="tests")
    assert "kernels required: 1" in (checkout / "out" / "gpu.log").read_text(encoding="utf-8")


@needs_bash
def test_gpu_sh_knows_its_stages(checkout: Path) -> None:
    command = ["bash", str(checkout / "bench" / "gpu.sh")]
    environment = {**os.environ, "OUT": str(checkout / "out"), "STAGES": "build test"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "got test" in done.stderr


@needs_bash
def test_gpu_sh_keeps_the_first_and_the_last_of_a_long_log(checkout: Path) -> None:
    run_gpu_sh(checkout, STAGES="roofline", LONG="bench.roofline")
    log = (checkout / "out" / "gpu.log").read_text(encoding="utf-8")
    assert len(log) < 12_000_000 / len(STAGES)
    assert "the first line" in log and "the last line" in log and "left out" in log


def test_wheels_are_neither_ignored_by_git_nor_committed() -> None:
    """A tool that copies the checkout to another machine may leave out what git ignores."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    ignored = subprocess.run(["git", "check-ignore", "--quiet", ".whl/some.whl"], cwd=ROOT, check=False)
    assert ignored.returncode == 1
    committed = subprocess.run(["git", "ls-files", ".whl"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert committed.stdout == ""


@needs_bash
def test_gpu_sh_runs_every_test_function_by_itself_and_says_which_has_no_result(checkout: Path) -> None:
    _, statuses = run_gpu_sh(checkout, STAGES="tests")
    assert statuses == {"tests": 1}
    log = (checkout / "out" / "gpu.log").read_text(encoding="utf-8")
    ran = [line.split("pytest -m gpu ")[1].split()[0] for line in log.splitlines() if line.startswith("ran ")]
    files = {"products": "small", "teleport": "it", "layer": "it", "errors": "out_of_memory"}
    assert sorted(ran) == sorted(f"tests/test_gpu_{name}.py::test_{function}" for name, function in files.items())
    told = list(summary.test_lines(checkout / "out"))
    assert told[0] == "tests: 5 tests, 0 failures, 1 errors, 0 skipped"
    assert len(told) == 2 and told[1].split() == [
        "ended",
        "early",
        "or",
        "not",
        "started,",
        "1",
        "functions:",
        "test_lost",
    ]


@needs_bash
def test_gpu_sh_ends_in_time(checkout: Path) -> None:
    """What hangs is stopped at its share of the time, and what comes after it still has its own."""
    _, statuses = run_gpu_sh(checkout, STAGES="build teleport training", BUDGET="12", HANG="bench.teleport")
    assert statuses == {"build": 0, "teleport": 124, "training": 0}


@needs_bash
def test_gpu_sh_starts_nothing_when_the_time_is_used_up(checkout: Path) -> None:
    printed, statuses = run_gpu_sh(checkout, STAGES="teleport training", BUDGET="0")
    assert statuses == {"teleport": 124, "training": 124} and printed.count("not started") == 2


@needs_bash
def test_gpu_sh_interrupts_tests_and_keeps_what_there_is(checkout: Path) -> None:
    (checkout / "tests" / "test_gpu_layer.py").write_text("def test_hangs() -> None:\n")
    _, statuses = run_gpu_sh(checkout, STAGES="tests", BUDGET="22")
    assert statuses == {"tests": 1}
    told = list(summary.test_lines(checkout / "out"))
    assert told[0] == "tests: 5 tests, 0 failures, 3 errors, 0 skipped"
    assert told[1].endswith("3 functions: test_out_of_memory, test_hangs, test_lost")


def test_gpu_sh_runs_every_file_of_gpu_tests() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8")
    named = re.search(r"tests/test_gpu_\{([\w,]+)\}\.py", script)
    assert named is not None
    marker = re.compile(r"^pytestmark = pytest\.mark\.gpu$", re.MULTILINE)
    marked = [path.stem for path in (ROOT / "tests").glob("test_*.py") if marker.search(path.read_text("utf-8"))]
    assert sorted(f"test_gpu_{name}" for name in named[1].split(",")) == sorted(marked)


def test_the_sanitizer_sees_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = set()

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            ran.add(name)
            return getattr(products, name)

    monkeypatch.setattr(sanitize, "DEVICE", CPU)
    monkeypatch.setattr(sanitize, "SIZES", [(7, 33, 2)])
    monkeypatch.setattr(sanitize, "LARGE", (2, 2, 2))
    monkeypatch.setattr(sanitize, "products_for", lambda device, backend: Recorded())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sanitize.main([])
    assert ran == set(OPERATORS)
    sanitize.main(["--teleport"])


def test_the_tables_of_a_gpu(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From results of the same form; a folder without any has no tables, and a wrong shape is left out."""
    monkeypatch.setattr(roofline, "products_for", lambda device, backend: SimpleNamespace(linear=products.linear))
    folder = tmp_path / "gpu"
    assert tables.gpu_sections(folder) == []
    operator = layer.measure(layer.Shape(6, 10, 8), rounds=1, device=CPU)
    timings = {label: timing(1e-3) for label in (UNIT, layer.OPERATOR, layer.ON_TORCH, layer.EAGER)}
    operator |= {"timings": timings} | layer.judge(layer.Shape(6, 10, 8), timings, CEILINGS)
    wrong = {"shape": None, "checks": {"drift": Check(1.0, at_most=0.0)}}
    published, ours = (teleport.measure(replace(SMALL, published=some), rounds=1, device=CPU) for some in (True, False))
    documents: dict[str, dict[str, Any]] = {
        "teleport": {"shapes": {"both": published, "ours": ours, "wrong": wrong}},
        "layer": {"shapes": {"small": operator, "wrong": wrong}},
        "roofline": {
            "shapes": {"small": roofline.measure(roofline.Shape(16), rounds=1, device=CPU)},
            "settings": {"ceilings": CEILINGS},
        },
    }
    for name, document in documents.items():
        harness.write_json(folder / f"{name}.json", {"machine": f"the machine of {name}", **document})
    training.run({"tiny": TINY}, [3], digits, folder / "training.json", processes=1, threads=1)
    page = "\n".join(tables.gpu_sections(folder))
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["both", "ours", "small", "small", *["tiny"] * 4]
    assert len({row.count("|") for row in rows[:2]}) == 1 and rows[1].endswith("|  |  |")
    assert rows[2].count("1 ms") == 4 and "wrong" not in page
    assert "copy 1000 GB/s, float32 10.00 TFLOP/s" in page and page.count("Machine: the machine of") == 3
    assert rows[-1].count("not reached") == 3


def test_the_summary_says_what_there_is(tmp_path: Path) -> None:
    text = summary.summary(tmp_path)
    assert "tests: no result" in text and "sanitizer: no result" in text and "teleport: no result" in text
    harness.write_json(
        tmp_path / "summary.json",
        {
            "stages": [
                {"name": "build", "status": 0, "seconds": 9},
                {"name": "tests", "status": 124, "seconds": 7},
                {"name": "layer", "status": 3, "seconds": 2},
            ]
        },
    )
    (tmp_path / "gpu.log").write_text(
        "=== machine\na GPU, torch 2.11\n132 multiprocessors\nmore\n=== sanitizer\n"
        "--- memcheck\nblah\n========= ERROR SUMMARY: 2 errors\n--- racecheck\n"
        "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n--- synccheck\n=== training\n"
    )
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="4" failures="2" errors="0" skipped="1"><testcase classname="a" name="b[x-1]">'
        '<failure message="off by&#10;one"/></testcase><testcase classname="a" name="b[x-2]"><failure/></testcase>'
        '<testcase classname="a" name="c"/></testsuite></testsuites>'
    )
    requirements = {"seconds": Check(2.0, at_most=1.0), "units": Check(3.0), "speedup": Check(4.0, at_least=3.0)}
    shapes: dict[str, Any] = {
        "small": {"requirements": requirements, "checks": {"drift": Check(math.nan, at_most=1e-5)}}
    }
    shapes["small"]["timings"] = {UNIT: timing(1e-3), teleport.GRAD_NORM: timing(0.5)}
    shapes["broken"] = {"error": "it broke"}
    harness.write_json(tmp_path / "teleport.json", {"machine": "a machine", "shapes": shapes})
    harness.write_json(tmp_path / "roofline.json", {"settings": {"ceilings": CEILINGS}, "shapes": {}})
    lines = [line.split() for line in summary.summary(tmp_path).splitlines()]
    for expected in (
        "a GPU, torch 2.11",
        "132 multiprocessors",
        "build ok 9 s",
        "tests OUT OF TIME 7 s",
        "layer FAILED (3) 2 s",
        "tests: 4 tests, 2 failures, 0 errors, 1 skipped",
        "FAIL a::b, 2 times: [x-1] off by one",
        "sanitizer, memcheck: ERROR SUMMARY: 2 errors",
        "sanitizer, racecheck: RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
        "sanitizer, synccheck: no summary",
        "teleport: times in ms",
        "small: f+b 1, grad_norm 500; FAIL seconds 2 (<= 1), units 3, pass speedup 4",
        "WRONG small: drift none (<= 1e-05)",
        "ERROR broken: it broke",
        "layer: no result",
    ):
        assert expected.split() in lines, expected
    assert any(line[:3] == ["roofline:", "copy", "1000"] for line in lines)


def test_the_summary_fits_the_end_of_a_log(tmp_path: Path) -> None:
    cases = "".join(
        f'<testcase classname="a" name="test_{i}[x]"><failure message="{"y" * 999}"/></testcase>' for i in range(99)
    )
    (tmp_path / "tests.xml").write_text(
        f'<testsuites><testsuite tests="99" failures="99">{cases}</testsuite></testsuites>'
    )
    text = summary.summary(tmp_path)
    assert len(text) <= 12_000 and "79 functions more" in text and "training: no result" in text
