"""`teleport_mlp` on a GPU: the searches of the CPU, the same bits in every run, and no waiting inside the search."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ACTIVATIONS, make_batch, make_mlp, snapshot, unchanged
from on_gpu import DEVICE, assert_same_bits, compiled, poison
from teleports import teleport_mlp
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.kernels import graphs
from symtele_cuda.kernels.graphs import GRAPH

pytestmark = pytest.mark.gpu

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grad_norm": {"objective": "grad_norm", "max_growth": 10.0},
    "lookahead": {"objective": "lookahead", "lr": 0.05},
}
BACKENDS = ["cuda", "torch", "auto"]
# Ten steps of float64 agree to 1e-9 of each other: the rounding of a step is carried along by the nine after it. In
# float32 the same growth leaves two digits of the objective, and the loss on the batch is kept to 1e-5.
AGREEMENT = {torch.float64: 1e-7, torch.float32: 2e-2}
DRIFT = {torch.float64: 1e-11, torch.float32: 1e-5}

every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
every_dtype = pytest.mark.parametrize("dtype", AGREEMENT, ids=str)
with_and_without_bias = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels, and a graph from the first call of a kind on."""
    compiled()
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 1)


Batch = tuple[Tensor, Tensor]


def on_device(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    return copy.deepcopy(model).to(DEVICE), (batch[0].to(DEVICE), batch[1].to(DEVICE))


def teleport(model: nn.Module, batch: Batch, objective: str, **options: Any) -> st.TeleportReport:
    poison()
    return teleport_mlp(model, batch, **{**OBJECTIVES[objective], **options})


def facts(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Loss and ‖∇L‖ of the model on the batch, in float64 on the CPU."""
    exact = copy.deepcopy(model).cpu().double()
    x, y = batch[0].cpu().double(), batch[1].cpu()
    loss = F.cross_entropy(exact(x), y)
    gradients = torch.autograd.grad(loss, list(exact.parameters()))
    return loss.item(), math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))


# --- as on the CPU ----------------------------------------------------------------------------------------------------


@every_objective
@with_and_without_bias
@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_search_is_that_of_the_cpu(activation: str, dtype: torch.dtype, bias: bool, objective: str) -> None:
    model, batch = make_mlp([30, 40, 36, 5], activation, bias=bias, dtype=dtype), make_batch(20, 30, 5, dtype=dtype)
    there, there_batch = on_device(model, batch)
    here = teleport_mlp(model, batch, **OBJECTIVES[objective])
    report = teleport(there, there_batch, objective, backend="cuda")
    assert report.backend.startswith("cuda kernels on cuda"), report.backend
    assert report.accepted and here.accepted and report.drift <= DRIFT[dtype]
    assert report.objective_before == pytest.approx(here.objective_before, rel=1e-3 * AGREEMENT[dtype])
    assert report.objective_after == pytest.approx(here.objective_after, rel=AGREEMENT[dtype])
    if dtype == torch.float64:
        assert (report.steps, report.reason) == (here.steps, here.reason)
        assert [record.accepted for record in report.trace] == [record.accepted for record in here.trace]
        for one, other in zip(there.parameters(), model.parameters(), strict=True):
            assert (one.cpu() - other).norm() <= 1e-6 * other.norm()


@every_objective
@every_dtype
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims, n", [([784, 512, 512, 10], 20), ([784, 512, 512, 10], 200)], ids=str)
def test_what_a_teleport_reports_is_true(
    dims: list[int], n: int, backend: str, dtype: torch.dtype, objective: str
) -> None:
    model, batch = on_device(make_mlp(dims, dtype=dtype, bias=False), make_batch(n, dims[0], dims[-1], dtype=dtype))
    loss, norm = facts(model, batch)
    report = teleport(model, batch, objective, backend=backend)
    loss_after, norm_after = facts(model, batch)
    assert report.accepted and sum(layer.teleported for layer in report.layers) == 2
    kernels = "torch" if backend == "torch" else "cuda kernels"
    assert report.backend.startswith(f"{kernels} on cuda, ")
    assert report.backend.endswith(GRAPH) == (backend != "torch" and dtype == torch.float32), report.backend
    assert abs(loss_after - loss) <= DRIFT[dtype] * loss
    assert report.grad_norm_before == pytest.approx(norm, rel=1e-4)
    assert report.grad_norm_after == pytest.approx(norm_after, rel=1e-3)
    if objective == "grad_norm":
        assert 1.5 * norm < norm_after <= 10.0 * norm * 1.001
    else:
        assert report.objective_after < report.objective_before


@every_objective
@pytest.mark.parametrize(
    "options",
    [
        {"layers": [2]},
        {"group": "positive_diagonal"},
        {"steps": 1},
        {"steps": 25},
        {"method": st.Published(1e-6)},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], objective: str) -> None:
    model, batch = make_mlp([30, 40, 36, 5]), make_batch(20, 30, 5)
    there, there_batch = on_device(model, batch)
    here = teleport_mlp(model, batch, **{**OBJECTIVES[objective], **options})
    report = teleport(there, there_batch, objective, **options)
    assert (report.accepted, report.steps, report.reason) == (here.accepted, here.steps, here.reason)
    assert report.objective_after == pytest.approx(here.objective_after, rel=1e-6)


@every_objective
def test_holdout(objective: str) -> None:
    model, batch, held = make_mlp([30, 40, 36, 5]), make_batch(20, 30, 5), make_batch(50, 30, 5, seed=2)
    there, there_batch = on_device(model, batch)
    here = teleport_mlp(model, batch, holdout=held, **OBJECTIVES[objective])
    report = teleport(there, there_batch, objective, holdout=(held[0].to(DEVICE), held[1].to(DEVICE)))
    assert report.holdout_before == pytest.approx(here.holdout_before, rel=1e-9)
    assert report.holdout_after == pytest.approx(here.holdout_after, rel=1e-6)


@pytest.mark.parametrize("dims", [[30, 12, 40, 5], [30, 40, 9, 5], [12, 40, 36, 5]], ids=str)
@pytest.mark.parametrize("group", ["gl", "positive_diagonal"])
@every_objective
def test_narrow_layers(dims: list[int], group: str, objective: str) -> None:
    """Layers that the batch does not fit: moved through an explicit g, or left alone; the report says which."""
    model, batch = make_mlp(dims), make_batch(20, dims[0], 5)
    there, there_batch = on_device(model, batch)
    here = teleport_mlp(model, batch, group=group, **OBJECTIVES[objective])
    report = teleport(there, there_batch, objective, group=group)
    assert [layer.group for layer in report.layers] == [layer.group for layer in here.layers]
    assert report.objective_after == pytest.approx(here.objective_after, rel=1e-6)


@every_objective
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models(dtype: torch.dtype, objective: str) -> None:
    model, batch = on_device(make_mlp([30, 40, 36, 5], dtype=dtype), make_batch(20, 30, 5, dtype=dtype))
    report = teleport(model, batch, objective, drift_tol=math.inf)
    assert report.accepted and all(parameter.dtype == dtype for parameter in model.parameters())


def test_the_mean_squared_error_and_a_loss_with_weight_terms() -> None:
    def with_decay(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets) + 1e-3 * sum(p.square().sum() for p in model.parameters())

    x, _ = make_batch(20, 30, 5)
    y = make_batch(20, 5, 5, seed=3)[0]
    for loss_fn in (None, with_decay):
        start = make_mlp([30, 40, 36, 5])
        model = start
        here = teleport_mlp(model, (x, y), loss_fn, max_growth=10.0)
        model, batch = on_device(make_mlp([30, 40, 36, 5]), (x, y))
        report = teleport_mlp(model, batch, loss_fn, max_growth=10.0)
        assert report.objective_after == pytest.approx(here.objective_after, rel=1e-6)


# --- the same in every run, captured once -----------------------------------------------------------------------------


@contextmanager
def captures_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many CUDA graphs are captured inside."""
    count = [0]
    begin = torch.cuda.CUDAGraph.capture_begin

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        begin(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)
        yield count


@every_objective
@every_dtype
@pytest.mark.parametrize("dims, n", [([30, 40, 36, 5], 20), ([784, 512, 512, 10], 200)], ids=str)
def test_a_second_call_reuses_the_graph_and_gives_the_same_bits(
    dims: list[int], n: int, dtype: torch.dtype, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, batch = on_device(make_mlp(dims, dtype=dtype, bias=False), make_batch(n, dims[0], dims[-1], dtype=dtype))
    models = [copy.deepcopy(start) for _ in range(3)]
    reports = [teleport(models[0], batch, objective)]
    with captures_counted(monkeypatch) as captured:
        reports += [teleport(model, batch, objective) for model in models[1:]]
    assert captured == [0]
    for report, model in zip(reports[1:], models[1:], strict=True):
        assert report.backend == reports[0].backend
        assert report.backend.endswith(GRAPH) == (dtype == torch.float32), report.backend
        assert report.trace == reports[0].trace
        assert_same_bits("weights", list(model.parameters()), list(models[0].parameters()))


def small(seed: int = 0) -> tuple[nn.Module, Batch]:
    """A network and a batch whose teleport a graph can hold."""
    float32: dict[str, Any] = {"dtype": torch.float32}
    return on_device(make_mlp([30, 40, 36, 5], seed=seed, **float32), make_batch(20, 30, 5, seed=seed + 1, **float32))


def kernel_by_kernel(monkeypatch: pytest.MonkeyPatch, run: Callable[[], st.TeleportReport]) -> st.TeleportReport:
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "_obstacle", lambda tensors: "a test asked for none")
        report = run()
    assert report.backend.endswith("no CUDA graph: a test asked for none")
    return report


@every_objective
def test_the_graph_s_second_call_computes_with_its_own_numbers(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, batch and targets of the same shape, after which the first ones still give what they gave."""
    found = {}
    for name, seed in {"first": 0, "second": 7, "again": 0}.items():
        model, batch = small(seed)
        found[name] = (teleport(model, batch, objective), model)
        assert found[name][0].backend.endswith(GRAPH)
    assert found["first"][0].trace == found["again"][0].trace != found["second"][0].trace
    assert_same_bits("weights", snapshot(found["first"][1]), snapshot(found["again"][1]))
    model, batch = small(7)
    plain = kernel_by_kernel(monkeypatch, lambda: teleport(model, batch, objective))
    assert plain.trace == found["second"][0].trace
    assert_same_bits("weights", snapshot(model), snapshot(found["second"][1]))


def test_graphs_hold_no_values_that_change_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate, growth cap and holdout of a call are its own, whether or not they share a graph with another call's."""
    start, batch = small()
    held = make_batch(50, 30, 5, seed=2, dtype=torch.float32)
    on_gpu = (held[0].to(DEVICE), held[1].to(DEVICE))
    for options in (
        {"objective": "lookahead", "lr": 0.05},
        {"objective": "lookahead", "lr": 0.01},
        {"objective": "lookahead", "lr": 0.01, "margin": 1.0},
        {"max_growth": 1.5},
        {"max_growth": 3.0},
        {"max_growth": 3.0, "holdout_tol": 0.01},
        {"max_growth": 3.0, "holdout_tol": 0.0},
    ):
        captured, plain = copy.deepcopy(start), copy.deepcopy(start)
        report = teleport_mlp(captured, batch, holdout=on_gpu, **options)
        assert report.backend.endswith(GRAPH)
        expected = kernel_by_kernel(
            monkeypatch, lambda model=plain, given=options: teleport_mlp(model, batch, holdout=on_gpu, **given)
        )
        assert (report.trace, report.reason) == (expected.trace, expected.reason), options
        assert_same_bits("weights", snapshot(captured), snapshot(plain))


def test_the_first_of_a_kind_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURED_CALL", 2)
    graphs.clear()
    model, batch = small()
    backends = [teleport(copy.deepcopy(model), batch, "grad_norm").backend for _ in range(3)]
    assert [backend.endswith(GRAPH) for backend in backends] == [False, True, True], backends


# --- the host does not wait -------------------------------------------------------------------------------------------


def run_without_waiting(work: Any, program: Any, obstacle: str | None) -> tuple[Any, str]:
    """In place of `graphs.run`: kernel by kernel, and an error where the host would wait for the device."""
    program(work)  # handles and workspaces are made at the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return program(work), "watched"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_objective
@every_dtype
@pytest.mark.parametrize("backend", ["cuda", "auto"])
@pytest.mark.parametrize(
    "dims, n", [([30, 40, 36, 5], 20), ([30, 12, 40, 5], 20), ([784, 512, 512, 10], 200)], ids=str
)
def test_the_search_never_reads_back(
    dims: list[int],
    n: int,
    backend: str,
    dtype: torch.dtype,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "run", run_without_waiting)
    model, batch = on_device(make_mlp(dims, "tanh", dtype=dtype), make_batch(n, dims[0], dims[-1], dtype=dtype))
    report = teleport(model, batch, objective, backend=backend)
    assert report.backend.endswith("watched") and report.steps >= 1


@every_objective
def test_the_graph_gives_the_bits_of_the_kernels_one_by_one(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    float32: dict[str, Any] = {"dtype": torch.float32}
    start, batch = on_device(make_mlp([784, 512, 512, 10], **float32), make_batch(20, 784, 10, **float32))
    captured, plain = copy.deepcopy(start), copy.deepcopy(start)
    report = teleport(captured, batch, objective)
    assert report.backend.endswith(GRAPH)
    one_by_one = kernel_by_kernel(monkeypatch, lambda: teleport(plain, batch, objective))
    assert one_by_one.trace == report.trace
    assert_same_bits("weights", snapshot(plain), snapshot(captured))


@dataclass(frozen=True)
class Doubling:
    """Work for `graphs.run`."""

    numbers: Tensor


def test_what_no_graph_can_hold_runs_kernel_by_kernel() -> None:
    """A program that reads back breaks its capture; stream and allocator are the same after it, and other graphs are
    made."""

    def reads_back(work: Doubling) -> float:
        return (2 * work.numbers).sum().item()

    stream = torch.cuda.current_stream()
    for _ in range(2):
        total, how = graphs.run(Doubling(torch.ones(5, device=DEVICE)), reads_back, None)
        assert total == 10.0 and how.startswith("no CUDA graph: its capture failed"), how
        assert torch.cuda.current_stream() == stream
        assert pool_of(torch.ones(2**20, device=DEVICE)) == (0, 0)
    model, batch = small()
    assert teleport(model, batch, "grad_norm").backend == f"cuda kernels on cuda, {GRAPH}"


def pool_of(tensor: Tensor) -> tuple[int, int]:
    """The memory pool of torch's allocator that the tensor lies in; (0, 0) is the one of the whole process."""
    at = tensor.data_ptr()
    segments = (s for s in torch.cuda.memory_snapshot() if s["address"] <= at < s["address"] + s["total_size"])
    return tuple(next(segments)["segment_pool_id"])


def test_a_capture_leaves_the_memory_that_torch_keeps_to_the_process() -> None:
    """torch.cuda.graph would give it back to the device, for the next allocation to ask for again."""
    kept = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    address = kept.data_ptr()
    del kept
    model, batch = small()
    assert teleport(model, batch, "grad_norm").backend.endswith(GRAPH)
    held = [segment for segment in torch.cuda.memory_snapshot() if segment["address"] == address]
    assert held and held[0]["total_size"] >= 2**28


def test_many_shapes_one_after_the_other() -> None:
    """More than any cache of graphs holds: memory does not grow with their number."""
    held = []
    for index in range(40):
        model = make_mlp([30, 40 + index, 36, 5], dtype=torch.float32)
        model, batch = on_device(model, make_batch(20, 30, 5, dtype=torch.float32))
        assert teleport(model, batch, "grad_norm", steps=2).accepted
        del model, batch
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[-10] + 2**25


@every_objective
def test_on_another_stream(objective: str) -> None:
    start, batch = on_device(make_mlp([784, 512, 512, 10], dtype=torch.float32), make_batch(20, 784, 10))
    batch = (batch[0].float(), batch[1])
    plain, other = copy.deepcopy(start), copy.deepcopy(start)
    report = teleport(plain, batch, objective)
    late = torch.full_like(batch[0], math.nan)
    stream = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(batch[0])
        elsewhere = teleport_mlp(other, (late, batch[1]), **OBJECTIVES[objective])
    stream.synchronize()
    assert elsewhere.trace == report.trace
    assert_same_bits("weights", snapshot(other), snapshot(plain))


def test_inside_a_training_loop() -> None:
    """The weights are written in place: the optimizer goes on from them, and the graphs see what training changed."""
    model, (x, y) = on_device(make_mlp([30, 40, 36, 5], dtype=torch.float32), make_batch(20, 30, 5))
    x = x.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    losses = []
    for _ in range(5):
        report = teleport(model, (x, y), "lookahead")
        loss = F.cross_entropy(model(x), y)
        assert report.loss_after == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_a_rejected_search_leaves_the_model_bit_for_bit() -> None:
    model, batch = on_device(make_mlp([30, 40, 36, 5]), make_batch(20, 30, 5))
    before = snapshot(model)
    held = (batch[0] + 1.0, batch[1])
    report = teleport(model, batch, "grad_norm", holdout=held, holdout_tol=0.0, max_growth=1e6, drift_tol=1e-300)
    assert not report.accepted and unchanged(model, before)
