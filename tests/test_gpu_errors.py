"""Bad input on a GPU: one clear error, the model bit for bit as it was, and no memory kept."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from networks import make_batch, make_mlp, snapshot, unchanged
from on_gpu import DEVICE, compiled
from teleports import teleport_mlp
from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda.activations import Tanh
from symtele_cuda.kernels.library import Linear, together

TANH = Tanh().sigma

pytestmark = pytest.mark.gpu

ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError)


@pytest.fixture(autouse=True)
def operators() -> Any:
    return compiled()


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"device": DEVICE, **options})


def huge() -> Tensor:
    """More than 2^31 elements of one float's memory."""
    return zeros(1, 1).expand(2**16, 2**15 + 1)


Call = Callable[[Any], object]

# name: (the call, what its error must say: the argument, what came)
CASES: dict[str, tuple[Call, str]] = {
    "linear, a on the CPU": (
        lambda o: o.linear(zeros(3, 4, device="cpu"), zeros(4, 5), None, None, None, 1.0, 1.0),
        r"(?s)\b(a|b)\b.*cpu",
    ),
    "linear, b on the CPU": (
        lambda o: o.linear(zeros(3, 4), zeros(4, 5, device="cpu"), None, None, None, 1.0, 1.0),
        r"(?s)\bb\b.*cpu",
    ),
    "linear, source on the CPU": (
        lambda o: o.linear(zeros(3, 4), zeros(4, 5), zeros(3, 5, device="cpu"), None, None, 1.0, 1.0),
        r"(?s)source.*cpu",
    ),
    "linear, half": (
        lambda o: o.linear(zeros(3, 4).half(), zeros(4, 5).half(), None, None, None, 1.0, 1.0),
        r"(?s)\ba\b.*(float16|[Hh]alf)",
    ),
    "linear, integers": (
        lambda o: o.linear(zeros(3, 4).int(), zeros(4, 5).int(), None, None, None, 1.0, 1.0),
        r"(?s)\ba\b.*(int32|[Ii]nt)",
    ),
    "linear, dtypes that differ": (
        lambda o: o.linear(zeros(3, 4), zeros(4, 5).double(), None, None, None, 1.0, 1.0),
        r"(?s)\bb\b.*(float64|[Dd]ouble)",
    ),
    "linear, sizes that do not fit": (
        lambda o: o.linear(zeros(3, 4), zeros(5, 5), None, None, None, 1.0, 1.0),
        r"(?s)\bb\b.*got.*5",
    ),
    "linear, a vector": (
        lambda o: o.linear(zeros(4), zeros(4, 5), None, None, None, 1.0, 1.0),
        r"(?s)\ba\b.*got.*4",
    ),
    "linear, row too long": (
        lambda o: o.linear(zeros(3, 4), zeros(4, 5), None, None, zeros(6), 1.0, 1.0),
        r"(?s)row.*got.*6",
    ),
    "linear, too many elements": (
        lambda o: o.linear(huge(), zeros(2**15 + 1, 1), None, None, None, 1.0, 1.0),
        r"(?s)\ba\b.*2\^31.*got",
    ),
    "linear, a result of too many elements": (
        lambda o: o.linear(zeros(2**16, 1), zeros(1, 2**15 + 1), None, None, None, 1.0, 1.0),
        r"(?s)2\^31.*got",
    ),
    "linear_activation, an unknown name": (
        lambda o: o.linear_activation(zeros(3, 4), zeros(4, 5), None, "relu", TANH[1]),
        r"(?s)activation must be one of.*got.*relu",
    ),
    "grouped_linear, a mask of another shape": (
        lambda o: together(o, Linear(zeros(3, 4), zeros(4, 5), mask=zeros(5, 3))),
        r"(?s)mask.*\b3, 5\b.*got.*5, 3",
    ),
    "grams, too many elements": (lambda o: o.grams([huge()], [False]), r"(?s)rows.*2\^31.*got"),
    "grams, bfloat16": (lambda o: o.grams([zeros(3, 4).bfloat16()], [False]), r"(?s)rows.*(bfloat16|BFloat16)"),
    "invert_grams, float32": (lambda o: o.invert_grams([zeros(3, 3)]), r"(?s)grams.*(float64|[Dd]ouble).*got"),
    "invert_grams, not square": (lambda o: o.invert_grams([zeros(3, 4).double()]), r"(?s)grams.*got.*3, 4"),
    "invert_grams, two sizes": (
        lambda o: o.invert_grams([zeros(3, 3).double(), zeros(4, 4).double()]),
        r"(?s)grams.*3, 3.*got.*4, 4",
    ),
    "take_steps, size in float32": (
        lambda o: o.take_steps([zeros(3, 4)], [zeros(3, 4)], zeros(()), [False], [TANH[0]], TANH[1]),
        r"(?s)size.*(float64|[Dd]ouble).*got",
    ),
    "take_steps, change on the CPU": (
        lambda o: o.take_steps(
            [zeros(3, 4)], [zeros(3, 4, device="cpu")], zeros(()).double(), [True], [TANH[0]], TANH[1]
        ),
        r"(?s)changes.*cpu",
    ),
    "times_curvature, a source of another shape": (
        lambda o: o.times_curvature(*[zeros(3, 4)] * 3, zeros(4, 3), *TANH),
        r"(?s)source.*3, 4.*got.*4, 3",
    ),
    "dot_sum, shapes that differ": (lambda o: o.dot_sum([zeros(3)], [zeros(4)]), r"(?s)right.*3.*got.*4"),
    "dot_sum, lists that differ": (lambda o: o.dot_sum([zeros(3)], []), r"(?s)right.*1.*got.*0"),
    "dot_sum, nothing": (lambda o: o.dot_sum([], []), r"(?s)left.*got none|no tensor arguments"),
    "commit, decision of the wrong dtype": (
        lambda o: o.commit(zeros(()), [zeros(3)], [zeros(3)]),
        r"(?s)accept.*bool.*got",
    ),
    "commit, shapes that differ": (
        lambda o: o.commit(zeros((), dtype=torch.bool), [zeros(3)], [zeros(4)]),
        r"(?s)trial.*3.*got.*4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_refuse(case: str, operators: Any) -> None:
    call, text = CASES[case]
    for _ in range(2):
        with memory_kept() as kept, pytest.raises(ERRORS, match=text):
            call(operators)
    assert kept[0] == 0  # by the second call: libraries keep the workspaces of the first


@contextmanager
def memory_kept() -> Iterator[list[int]]:
    """How much more memory of torch's allocator is in use after the block than before it, in a list once it is over."""
    kept: list[int] = []
    before = allocated()
    yield kept
    kept.append(allocated() - before)


def allocated() -> int:
    gc.collect()
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


# --- a whole teleport ----------------------------------------------------------------------------------------------


def make_problem(dims: list[int] | None = None, n: int = 20) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    dims = dims or [30, 40, 36, 5]
    x, y = make_batch(n, dims[0], dims[-1], dtype=torch.float32)
    return make_mlp(dims, dtype=torch.float32).to(DEVICE), (x.to(DEVICE), y.to(DEVICE))


def with_one_layer_on_the_cpu(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model[2].cpu()  # type: ignore[index]
    return model


def of_duplicates(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0][:1].expand(20, -1).contiguous(), batch[1]


TELEPORTS: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], object]] = {
    "batch on the CPU": lambda model, batch: teleport_mlp(model, (batch[0].cpu(), batch[1])),
    "targets on the CPU": lambda model, batch: teleport_mlp(model, (batch[0], batch[1].cpu())),
    "model on two devices": lambda model, batch: teleport_mlp(with_one_layer_on_the_cpu(model), batch),
    "holdout on the CPU": lambda model, batch: teleport_mlp(model, batch, holdout=(batch[0].cpu(), batch[1].cpu())),
    "batch of another dtype": lambda model, batch: teleport_mlp(model, (batch[0].double(), batch[1])),
    "integers": lambda model, batch: teleport_mlp(model, (batch[0].int(), batch[1])),
    "NaN in the batch": lambda model, batch: teleport_mlp(model, (batch[0] * math.nan, batch[1])),
    "NaN in the weights": lambda model, batch: teleport_mlp(poisoned(model), batch),
    "one sample twenty times": lambda model, batch: teleport_mlp(model, of_duplicates(batch)),
    "a target out of range": lambda model, batch: teleport_mlp(model, (batch[0], batch[1] + 100)),
    "a loss that raises": lambda model, batch: teleport_mlp(model, batch, failing_loss),
    "an unknown backend": lambda model, batch: teleport_mlp(model, batch, backend="metal"),
    "backend cuda on the CPU": lambda model, batch: teleport_mlp(
        copy.deepcopy(model).cpu(), (batch[0].cpu(), batch[1].cpu()), backend="cuda"
    ),
}


def poisoned(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    return model


def failing_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ValueError("this loss is none")


EXPECTED = (*ERRORS, st.TeleportError)


@pytest.mark.parametrize("case", TELEPORTS)
def test_teleports_refuse(case: str) -> None:
    model, batch = make_problem()
    assert teleport_mlp(copy.deepcopy(model), batch).accepted  # whatever is allocated once is, before it is counted
    before = snapshot(model)
    for _ in range(2):
        with memory_kept() as kept, pytest.raises(EXPECTED):
            TELEPORTS[case](model, batch)
    assert unchanged(model, before) and kept[0] == 0
    assert teleport_mlp(model, batch).accepted  # and nothing is broken for the next call


def test_a_hundred_failing_calls_keep_no_memory() -> None:
    model, batch = make_problem()
    teleport_mlp(copy.deepcopy(model), batch)
    before, calls = snapshot(model), [TELEPORTS[name] for name in TELEPORTS]
    for times in (1, 8):
        with memory_kept() as kept:
            for call in calls * times:
                with pytest.raises(EXPECTED):
                    call(model, batch)
    assert unchanged(model, before) and kept[0] == 0


def test_layers_refuse() -> None:
    weight, inputs, g = zeros(4, 6), torch.randn(3, 6, device=DEVICE), torch.eye(4, device=DEVICE)
    for arguments, text in (
        ((weight.cpu(), inputs, g), "device"),
        ((weight, inputs.cpu(), g), "device"),
        ((weight, inputs, g.cpu()), "device"),
        ((weight.double(), inputs, g), "dtype"),
        ((weight, inputs[:1].expand(3, 6), g), "rank"),
        ((weight, inputs * math.nan, g), "finite"),
        ((weight + 1, inputs, 9 * g), "domain"),
    ):
        for _ in range(2):
            with memory_kept() as kept, pytest.raises(EXPECTED, match=text):
                st.teleport_layer(*arguments, activation="tanh", backend="auto")
        assert kept[0] == 0, text


# --- out of memory ---------------------------------------------------------------------------------------------------


@contextmanager
def memory_limited(headroom: int) -> Iterator[None]:
    """The allocator gets `headroom` bytes more than it holds, inside."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + headroom) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


HEADROOMS = [0, *(2**power for power in range(20, 30))]


@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
def test_out_of_memory_anywhere_leaves_the_model_as_it_was(objective: str) -> None:
    """From no memory to enough, each time on a shape that has no graph yet: some calls fail early, some late."""
    failed = succeeded = 0
    for index, headroom in enumerate(HEADROOMS):
        model, batch = make_problem([784, 1024 + index, 1024, 10], 256)
        before = snapshot(model)
        with memory_limited(headroom):
            if runs_out(model, batch, objective=objective, lr=0.01, steps=3):
                failed += 1
                assert unchanged(model, before), headroom
            else:
                succeeded += 1
    assert failed and succeeded
    model, batch = make_problem()
    assert teleport_mlp(model, batch, objective=objective, lr=0.01).accepted


def test_a_hundred_calls_out_of_memory_keep_none() -> None:
    model, batch = make_problem([784, 1024, 1024, 10], 256)
    before = snapshot(model)
    with memory_limited(2**23):
        for times in (5, 100):
            with memory_kept() as kept:
                assert all(runs_out(model, batch, steps=1) for _ in range(times))
    assert unchanged(model, before) and kept[0] == 0


def runs_out(model: nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> bool:
    try:
        teleport_mlp(model, batch, **options)
    except torch.OutOfMemoryError:
        return True
    return False


# --- several GPUs ----------------------------------------------------------------------------------------------------

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two_gpus
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    with torch.cuda.device(0):
        model, batch = make_problem()
        here = copy.deepcopy(model).to("cuda:0")
        there = copy.deepcopy(model).to("cuda:1")
        one = teleport_mlp(here, (batch[0].to("cuda:0"), batch[1].to("cuda:0")))
        other = teleport_mlp(there, (batch[0].to("cuda:1"), batch[1].to("cuda:1")))
        assert torch.cuda.current_device() == 0
    assert other.accepted and other.objective_after == pytest.approx(one.objective_after, rel=1e-3)


@two_gpus
def test_tensors_on_two_gpus_are_refused(operators: Any) -> None:
    with pytest.raises(ERRORS, match=r"(?s)\bb\b.*cuda:1"):
        operators.linear(zeros(3, 4, device="cuda:0"), zeros(4, 5, device="cuda:1"), None, None, None, 1.0, 1.0)
