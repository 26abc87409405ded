"""The cache of CUDA graphs, with a stand-in for the graph where there is no GPU: what it reads, keeps and refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from climbs import make_climb
from test_device_search import assert_same

from symtele_cuda.kernels import graphs, pinv
from symtele_cuda.orbits import batch_weights
from symtele_cuda.search.device import Climb, Program, read_back, run_program

DIMS = [20, 24, 22, 5]


class Recorder:
    """Captures like `graphs._capture`, and replays by running the program once more on the tensors it captured."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(
        self, work: Climb, program: Callable[[Climb], Program], tensors: Sequence[torch.Tensor]
    ) -> graphs.Captured[list[Program]]:
        self.captured += 1
        inputs = [tensor.clone() for tensor in tensors]
        still, outcome = graphs.with_tensors(work, iter(inputs)), list[Program]()

        def replay() -> None:
            outcome[:] = [program(still)]

        return graphs.Captured(inputs, replay, outcome, 0, None)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    graphs.clear()
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_capture", recorder)
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 1)
    monkeypatch.setattr(graphs, "_lane", lambda: "the only one")
    monkeypatch.setattr(graphs, "_obstacle", lambda tensors: None)
    yield recorder
    graphs.clear()


@torch.no_grad()
def replayed(work: Climb) -> Program:
    outcome, how = graphs.run(work, run_program, None)
    assert how == "in a CUDA graph"
    return outcome[0]


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
@torch.no_grad()
def test_one_graph_serves_all_tasks_of_a_kind_and_reads_each_one_s_tensors(recorder, objective):
    for seed, lr in ((0, 0.1), (5, 0.3), (9, 0.02)):
        work = make_climb(DIMS, seed=seed, objective=objective, lr=lr, holdout=True)
        programs = replayed(work), run_program(work)
        (before, result, last), (wanted_before, wanted, wanted_last) = (read_back(work.guards, one) for one in programs)
        assert_same(wanted, result, rel=1e-12)
        assert before == wanted_before
        assert torch.equal(last.measured, wanted_last.measured)
    assert recorder.captured == 1


@pytest.mark.parametrize(
    "change",
    [
        dict(n=11),
        dict(activation="tanh"),
        dict(dtype=torch.float32),
        dict(bias=False),
        dict(steps=3),
        dict(max_growth=3.0),
        dict(objective="lookahead"),
        dict(layers=[1]),
        dict(holdout=True),
        dict(max_sensitivity=1.1),
    ],
    ids=str,
)
def test_another_kind_of_task_has_a_graph_of_its_own(recorder, change):
    replayed(make_climb(DIMS))
    replayed(make_climb(DIMS, **change))
    assert recorder.captured == 2


def test_the_matmul_precision_is_part_of_the_kind(recorder):
    replayed(make_climb(DIMS))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        replayed(make_climb(DIMS))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert recorder.captured == 2


def test_the_first_of_a_kind_is_not_captured(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 2)
    work = make_climb(DIMS)
    with torch.no_grad():
        assert graphs.run(work, run_program, None)[1] == "no CUDA graph: the first of its kind is not captured"
    assert recorder.captured == 0
    replayed(work)
    assert recorder.captured == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(), "float64 weights go through a solver library"),
        (dict(dtype=torch.float32), "plain torch factorizes by a solver library"),
    ],
    ids=str,
)
def test_what_goes_through_solver_libraries_is_not_captured(changes, reason):
    assert reason in make_climb(DIMS, **changes).obstacle()


def test_narrow_layers_that_carry_are_not_captured():
    assert "the inverse of g" in make_climb([20, 9, 11, 5], n=15, dtype=torch.float32).obstacle()


def test_own_kernels_factorize_up_to_a_size():
    assert graphs.solver_obstacle(object(), 512) is None
    assert "n > 512" in graphs.solver_obstacle(object(), 513)


def test_only_the_graphs_used_last_are_kept(recorder):
    kinds = [make_climb(DIMS, steps=steps) for steps in range(1, graphs.LARGEST_CACHE + 2)]
    for work in kinds[:-1]:
        replayed(work)
    replayed(kinds[0])
    replayed(kinds[-1])  # the second kind makes room for it
    assert recorder.captured == len(kinds)
    replayed(kinds[0])
    assert recorder.captured == len(kinds)
    replayed(kinds[1])
    assert recorder.captured == len(kinds) + 1


@torch.no_grad()
def test_weights_formed_after_a_graph_s_search_keep_the_layers_that_it_kept(recorder, monkeypatch):
    """The waypoints are the graph's, with copies of the weights: the layers before the first that moves are not
    computed again, and that one has the factor of its input already."""
    work = make_climb(DIMS, layers=[2], dtype=torch.float32, steps=3)
    _, result, _ = read_back(work.guards, replayed(work))
    assert len(result.waypoints) > 1
    factorized: list[torch.Tensor] = []

    def counted(inputs: torch.Tensor, *others: Any) -> Any:
        factorized.append(inputs)
        return pinv.factorize(inputs, *others)

    monkeypatch.setattr(batch_weights, "factorize", counted)
    orbit = work.orbit
    for waypoint in result.waypoints[1:]:
        factorized.clear()
        formed, outputs, _ = batch_weights.form_weights(orbit.problem, orbit.plans, orbit.matches, waypoint)
        assert formed.layers_in_common(orbit.network) == 1 and outputs[0] is orbit.problem.outputs[0]
        assert [inputs.shape[1] for inputs in factorized] == [DIMS[2]]  # the last layer alone


@torch.no_grad()
def test_a_capture_that_fails_is_not_tried_again_and_its_reason_is_told(monkeypatch):
    graphs.clear()
    tries = []

    def fail(work: Climb, program: object, tensors: object) -> str:
        tries.append(work)
        return "its capture failed (operation not permitted)"

    monkeypatch.setattr(graphs, "_capture", fail)
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 1)
    monkeypatch.setattr(graphs, "_lane", lambda: 0)
    monkeypatch.setattr(graphs, "_obstacle", lambda tensors: None)
    work = make_climb(DIMS)
    for _ in range(2):
        program, how = graphs.run(work, run_program, None)
        assert how == "no CUDA graph: its capture failed (operation not permitted)"
        assert program.rows.shape[0] == work.ascent.steps
    assert len(tries) == 1
    graphs.clear()


# --- the capture itself, on stand-ins for torch.cuda ------------------------------------------------------------------


class Device:
    """What torch keeps of captures: the pools that it is allocating for, and the references to each.

    sizes: of the pools, in their order. breaks: whether a capture in which something fails cannot be ended, as where
    the device refuses it.
    """

    def __init__(self) -> None:
        self.allocating: set[int] = set()
        self.references: Counter[int] = Counter()
        self.references_at_the_end: list[int] = []
        self.sizes: list[int] = []
        self.captures = 0
        self.breaks = True
        self.failed = False

    def end(self, device: int, pool: int) -> None:
        if pool not in self.allocating:
            raise RuntimeError("not currently recording to it")
        self.allocating.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.references[pool] -= 1
        assert self.references[pool] >= 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()

    class Pool:
        def __init__(self) -> None:
            self.id = device.captures = device.captures + 1
            device.references[self.id] += 1

        def use_count(self) -> int:
            return device.references[self.id]

        def snapshot(self) -> list[dict[str, Any]]:
            return [{"total_size": device.sizes[self.id - 1]}] if device.sizes else []

        def __del__(self) -> None:
            device.references_at_the_end.append(device.references[self.id])
            device.release(0, self.id)

    class Graph:
        ended = False

        def capture_begin(self, pool: int, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"
            self.pool = pool
            device.references[pool] += 1
            device.allocating.add(pool)

        def capture_end(self) -> None:
            if device.failed and device.breaks:
                raise RuntimeError("the capture is invalid")
            device.end(0, self.pool)
            self.ended = True

        def replay(self) -> None: ...

        def reset(self) -> None:
            if self.ended:
                self.ended = False
                device.release(0, self.pool)

        def __del__(self) -> None:
            self.reset()

    def empty_cache() -> None:
        raise AssertionError("the memory that torch keeps for the whole process is not ours to give back")

    stream = SimpleNamespace(device=torch.device("cuda", 0), wait_stream=lambda other: None)
    stand_ins: dict[str, Any] = {"CUDAGraph": Graph, "MemPool": Pool, "stream": nullcontext, "empty_cache": empty_cache}
    stand_ins |= {"current_stream": lambda: stream, "synchronize": lambda device: None}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", device.release, raising=False)
    monkeypatch.setattr(graphs, "_stream", lambda device: stream)
    monkeypatch.setattr(graphs, "_obstacle", lambda tensors: None)
    monkeypatch.setattr(graphs, "_lane", lambda: "the only one")
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 1)
    monkeypatch.setattr(graphs, "_broken", [])
    graphs.clear()
    yield device
    graphs.clear()


@dataclass(frozen=True)
class Doubling:
    """Work for `graphs.run`, of a kind that has a number."""

    numbers: torch.Tensor
    kind: int = 0


def double(work: Doubling) -> torch.Tensor:
    return 2 * work.numbers


def run_kind(kind: int) -> str:
    return graphs.run(Doubling(torch.ones(3), kind), double, None)[1]


def test_a_graph_has_memory_of_its_own_and_gives_it_back_when_it_goes(device: Device) -> None:
    assert run_kind(0) == graphs.GRAPH
    assert not device.allocating and device.references == {1: 2}  # the pool and the graph
    graphs.clear()
    assert device.references == {1: 0}
    assert device.references_at_the_end == [1]  # the graph went first, so that the pool could empty itself


@pytest.mark.parametrize("breaks", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_capture_that_fails_leaves_torch_as_it_was(device: Device, error: type[BaseException], breaks: bool) -> None:
    """Where the device refuses it torch goes on allocating for it, and keeps its memory, unless told to end."""
    device.breaks = breaks

    def fails(work: Doubling) -> torch.Tensor:
        if device.allocating:
            device.failed = True
            raise error("operation not permitted")
        return double(work)

    if error is RuntimeError:
        total, how = graphs.run(Doubling(torch.ones(3)), fails, None)
        assert how == "no CUDA graph: its capture failed (operation not permitted)"
        assert total.tolist() == [2, 2, 2]
    else:
        with pytest.raises(error):
            graphs.run(Doubling(torch.ones(3)), fails, None)
    assert not device.allocating and device.references == {1: 0}
    device.failed = False
    assert run_kind(1) == graphs.GRAPH


def test_only_so_many_bytes_of_graphs_are_kept(device: Device) -> None:
    half = graphs.LARGEST_BYTES // 2
    device.sizes = [half - 100, half - 100, half - 100]
    for kind in (0, 1, 0, 2):  # the first is used once more, so that the second goes
        assert run_kind(kind) == graphs.GRAPH
    assert device.references == {1: 2, 2: 0, 3: 2}


def test_a_graph_that_is_too_large_to_keep_is_not_captured_again(device: Device) -> None:
    device.sizes = [graphs.LARGEST_BYTES, 0]
    for _ in range(2):
        assert run_kind(0) == "no CUDA graph: it would hold 2048 MiB of the device's memory"
    assert device.captures == 1 and device.references == {1: 0}


def test_where_there_is_no_gpu_nothing_is_captured():
    assert run_kind(0) == "no CUDA graph: there is none on this device"


def test_a_loss_of_the_caller_s_own_is_never_captured():
    work = make_climb(DIMS)
    problem = replace(work.orbit.problem, loss=replace(work.orbit.problem.loss, default=False))
    own = replace(work, orbit=replace(work.orbit, problem=problem))
    assert own.obstacle().startswith("loss_fn is the caller's own")


@dataclass(frozen=True)
class Inner:
    weights: tuple[torch.Tensor | None, ...]
    name: str
    memory: object = field(compare=False)


def test_the_tensors_of_any_work_are_found_and_replaced_in_their_order():
    one, two, three = (torch.full((size,), float(size)) for size in (1, 2, 3))
    work = (Inner((one, None), "a", memory=three), [two])
    assert [len(tensor) for tensor in graphs.tensors_of(work)] == [1, 2]
    (inner, others) = graphs.with_tensors(work, iter([10 * one, 20 * two]))
    assert inner.weights[0].tolist() == [10] and inner.weights[1] is None and inner.memory is three
    assert [tensor.tolist() for tensor in others] == [[40, 40]]


def test_another_structure_is_another_signature_and_other_numbers_are_not():
    tensor = torch.ones(2)
    work = Inner((tensor, None), "a", None)
    assert graphs.signature_of(work) == graphs.signature_of(Inner((2 * tensor, None), "a", tensor))
    for other in (Inner((tensor, tensor), "a", None), Inner((tensor,), "a", None), Inner((tensor, None), "b", None)):
        assert graphs.signature_of(work) != graphs.signature_of(other)
    assert graphs.signature_of(SimpleNamespace()) != graphs.signature_of(SimpleNamespace())  # by identity
