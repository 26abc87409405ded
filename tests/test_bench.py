"""The benchmarks' own parts, and each benchmark end to end on shapes small enough for a test. No time is asserted."""

from __future__ import annotations

import gzip
import json
import math
import platform
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, layer, teleport, training
from bench.harness import UNIT, Check, Contestant
from bench.memory import AllocationRecorder
from symtele_cuda.experiments.training import TrainingSettings

CPU = torch.device("cpu")
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


def test_layer_measures_three_methods_that_agree() -> None:
    result = layer.measure(layer.Shape(6, 10, 8), rounds=1, device=CPU)
    assert harness.all_passed(result["checks"])
    assert set(result["timings"]) == {UNIT, *layer.METHODS}
    assert set(result["ratios"]) == {f"{name} / {layer.OPERATOR}" for name in (layer.TWIN, layer.SVD)}


def test_layer_reports_no_speed_of_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: layer.Problem) -> layer.Result:
        moved, gradient = layer.by_svd(problem)
        return moved, 1.1 * gradient

    monkeypatch.setitem(layer.METHODS, layer.SVD, wrong)
    result = layer.measure(layer.Shape(6, 10, 8), rounds=1, device=CPU)
    assert not result["checks"][f"{layer.SVD}, ∂f/∂g, relative difference"].passed
    assert "timings" not in result


# ---------------------------------------------------------------------------------------------------------------------
# teleport
# ---------------------------------------------------------------------------------------------------------------------


def test_teleport_measures_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(teleport.SHAPES, "small", SMALL)
    out = tmp_path / "teleport.json"
    teleport.main(teleport.parse(["--shape", "small", "--rounds", "1", "--out", str(out)]))
    result = json.loads(out.read_text(encoding="utf-8"))["shapes"]["small"]
    contestants = {UNIT, teleport.GRAD_NORM, teleport.LOOKAHEAD, teleport.PUBLISHED, teleport.PUBLISHED_LEAN}
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

    def drifting(problem: teleport.Problem, objective: str) -> Any:
        report = honest(problem, objective)
        with torch.no_grad():
            problem.weights[-1].mul_(1.1)
        return report

    monkeypatch.setattr(teleport, "our_teleport", drifting)
    result = teleport.measure(SMALL, rounds=1, device=CPU)
    assert not result["checks"][f"{teleport.GRAD_NORM}, loss drift"].passed
    assert "timings" not in result


@pytest.mark.parametrize("name", ["mlp-784-512-512-10-n20", "mlp-784-128-128-10-n100"])
def test_the_search_allocates_nothing_larger_than_the_activations(name: str) -> None:
    shape = teleport.SHAPES[name]
    checks = teleport.check_memory(teleport.make_problem(shape.dims, shape.n, CPU), shape)
    assert len(checks) == 2
    for what, check in checks.items():
        assert check.passed, f"{what}: {check}"


def test_the_memory_check_sees_a_weight_sized_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    search = teleport.symtele_cuda.teleport.ascend

    def wasteful(*args: Any, **kwargs: Any) -> Any:
        torch.zeros(SMALL.n, 1 + max(SMALL.dims[1], SMALL.n))
        return search(*args, **kwargs)

    monkeypatch.setattr(teleport.symtele_cuda.teleport, "ascend", wasteful)
    checks = teleport.check_memory(teleport.make_problem(SMALL.dims, SMALL.n, CPU), SMALL)
    assert not any(check.passed for check in checks.values())


# ---------------------------------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------------------------------

TINY = training.Shape(
    dims=(16, 14, 12, 3),
    training=TrainingSettings(2, 5, "sgd", 0.05),
    must_loss_ratio=10.0,
    published_rate=1e-3,
    teleports=2,
    teleport_samples=8,
    steps=2,
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


def test_training_refuses_results_of_other_settings(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    harness.write_json(out, {"shapes": {"tiny": {"shape": TINY, "seeds": []}}})
    assert training.Results.open(out, {"tiny": TINY}).missing("tiny", [1]) == [1]
    other = replace(TINY, steps=TINY.steps + 1)
    with pytest.raises(ValueError, match="--out must name a file of the same settings; tiny"):
        training.Results.open(out, {"tiny": other})


def seed_result(seed: int, losses: dict[str, float | None], accuracies: dict[str, float]) -> dict[str, Any]:
    def epoch(label: str) -> dict[str, Any]:
        return {
            "epoch": 2,
            "train_loss": losses[label],
            "validation_loss": 1.0,
            "validation_accuracy": accuracies[label],
            "seconds": 1.0,
        }

    teleports = [{"accepted": True}] * TINY.teleports
    return {"seed": seed, "runs": {label: {"epochs": [epoch(label)], "teleports": teleports} for label in losses}}


@pytest.mark.parametrize(
    ("loss", "accuracy", "loss_passes", "accuracy_passes"),
    [(0.4, 0.91, True, True), (0.41, 0.91, False, True), (0.4, 0.9, True, False), (None, 0.91, False, True)],
)
def test_training_judges_means(loss: float | None, accuracy: float, loss_passes: bool, accuracy_passes: bool) -> None:
    shape = replace(TINY, must_loss_ratio=0.4)
    losses = {training.PLAIN: 1.0, training.TELEPORTED: loss, training.PUBLISHED: None}
    accuracies = {training.PLAIN: 0.9, training.TELEPORTED: accuracy, training.PUBLISHED: 0.1}
    summary = training.summarise(shape, [seed_result(seed, losses, accuracies) for seed in range(5)])
    verdicts = summary["requirements"]
    assert verdicts["train loss, teleported / plain"].passed is loss_passes
    assert verdicts["validation accuracy, teleported − plain"].passed is accuracy_passes
    assert verdicts["seeds"].passed
    assert math.isnan(summary["means"][training.PUBLISHED]["train_loss"])


def test_every_registered_shape_can_be_asked_for() -> None:
    assert layer.parse(["--shape", *layer.SHAPES]).shape == list(layer.SHAPES)
    assert teleport.parse([]).shape == list(teleport.SHAPES)
    arguments = training.parse(["--data-dir", "somewhere", "--shape", "mnist-0.1"])
    assert (arguments.shape, arguments.seeds, arguments.threads) == (["mnist-0.1"], [1, 2, 3, 4, 5], 1)
