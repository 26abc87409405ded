"""The cache of CUDA graphs, with a stand-in for the graph where there is no GPU: what it reads, keeps and refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from test_device_search import assert_same, make_task

from symtele_cuda import device_search, graphs
from symtele_cuda.device_search import Program, read_back, run_program
from symtele_cuda.task import Task

DIMS = [20, 24, 22, 5]


class Recorder:
    """Captures like `graphs._capture`, and replays by running the program once more on the tensors it captured."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(
        self, task: Task, program: Callable[[Task], Program], tensors: Sequence[torch.Tensor]
    ) -> graphs.Captured[list[Program]]:
        self.captured += 1
        inputs = [tensor.clone() for tensor in tensors]
        still, outcome = task.with_tensors(inputs), list[Program]()

        def replay() -> None:
            outcome[:] = [program(still)]

        return graphs.Captured(inputs, replay, outcome)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    graphs.clear()
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_capture", recorder)
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 1)
    monkeypatch.setattr(graphs, "_lane", lambda: "the only one")
    monkeypatch.setattr(graphs, "_obstacle", lambda work, tensors: None if isinstance(work, Task) else "only searches")
    yield recorder
    graphs.clear()


@torch.no_grad()
def replayed(task: Task) -> Program:
    outcome, how = graphs.run(task, run_program)
    assert how == "in a CUDA graph"
    return outcome[0]


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
@torch.no_grad()
def test_one_graph_serves_all_tasks_of_a_kind_and_reads_each_one_s_tensors(recorder, objective):
    for seed, lr in ((0, 0.1), (5, 0.3), (9, 0.02)):
        task = make_task(DIMS, seed=seed, objective=objective, lr=lr, holdout=True)
        got, expected = (read_back(task, program, "") for program in (replayed(task), run_program(task)))
        assert_same(expected.result, got.result, rel=1e-12)
        assert got.before == expected.before
        assert torch.equal(got.last.measured, expected.last.measured)
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
        dict(action="paper"),
        dict(objective="lookahead"),
        dict(layers=[1]),
        dict(holdout=True),
        dict(step_size=1e-3),
    ],
    ids=str,
)
def test_another_kind_of_task_has_a_graph_of_its_own(recorder, change):
    replayed(make_task(DIMS))
    replayed(make_task(DIMS, **change))
    assert recorder.captured == 2


def test_the_matmul_precision_is_part_of_the_kind(recorder):
    replayed(make_task(DIMS))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        replayed(make_task(DIMS))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert recorder.captured == 2


def test_the_first_of_a_kind_is_not_captured(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 2)
    task = make_task(DIMS)
    with torch.no_grad():
        assert graphs.run(task, run_program)[1] == "no CUDA graph: the first of its kind is not captured"
    assert recorder.captured == 0
    replayed(task)
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
    assert reason in make_task(DIMS, **changes).obstacle()


def test_narrow_layers_with_the_exact_inverse_are_not_captured():
    narrow = dict(n=15, dtype=torch.float32)
    assert "the exact inverse of g" in make_task([20, 9, 11, 5], **narrow).obstacle()
    assert "the exact inverse" not in make_task([20, 9, 11, 5], inverse="first_order", **narrow).obstacle()


def test_own_kernels_factorize_up_to_a_size():
    assert graphs.solver_obstacle(object(), 512) is None
    assert "n > 512" in graphs.solver_obstacle(object(), 513)


def test_only_the_graphs_used_last_are_kept(recorder):
    kinds = [make_task(DIMS, steps=steps) for steps in range(1, graphs.LARGEST_CACHE + 2)]
    for task in kinds[:-1]:
        replayed(task)
    replayed(kinds[0])
    replayed(kinds[-1])  # the second kind makes room for it
    assert recorder.captured == len(kinds)
    replayed(kinds[0])
    assert recorder.captured == len(kinds)
    replayed(kinds[1])
    assert recorder.captured == len(kinds) + 1


@torch.no_grad()
def test_a_capture_that_fails_is_not_tried_again_and_its_reason_is_told(monkeypatch):
    graphs.clear()
    tries = []

    def fail(task: Task, program: object, tensors: object) -> str:
        tries.append(task)
        return "its capture failed (operation not permitted)"

    monkeypatch.setattr(graphs, "_capture", fail)
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 1)
    monkeypatch.setattr(graphs, "_lane", lambda: 0)
    monkeypatch.setattr(graphs, "_obstacle", lambda work, tensors: None if isinstance(work, Task) else "only searches")
    task = make_task(DIMS)
    for _ in range(2):
        program, how = graphs.run(task, run_program)
        assert how == "no CUDA graph: its capture failed (operation not permitted)"
        assert program.rows.shape[0] == task.options.steps
    assert len(tries) == 1
    graphs.clear()


@torch.no_grad()
def test_where_there_is_no_gpu_the_report_says_so():
    found = device_search.find(make_task(DIMS))
    assert found.backend == "torch on cpu, no CUDA graph: there is none on this device"


def test_a_loss_of_the_caller_s_own_is_never_captured():
    task = make_task(DIMS)
    own = replace(task.problem, loss=replace(task.problem.loss, default=False))
    assert replace(task, problem=own).obstacle().startswith("loss_fn is the caller's own")
