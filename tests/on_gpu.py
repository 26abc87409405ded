"""What the GPU tests share: the device, every product operator with operands for it, and how results are compared."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sigmas import ONE_OF_EACH
from torch import Tensor
from torch.utils._pytree import tree_leaves

from symtele_cuda.activations import Activation, Identity, Softplus, Tanh
from symtele_cuda.kernels import torch_kernels as products

DEVICE = torch.device("cuda")

ACTIVATIONS = ONE_OF_EACH
SMOOTH = [Tanh(), Softplus(1.0)]

# Relative to the Frobenius norm of the result in float64. A product of k terms of either sign errs by about u √k / 4
# of its norm (u = 6e-8 and 1e-16), a sum of k ≤ 8192 by six times u. The epilogues' operands keep σ and its inverse
# within a factor of ten of condition one. TF32 keeps ten bits of each factor.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
TF32_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """a is rows×inner, b is inner×columns."""

    rows: int
    columns: int
    inner: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.inner}"


SMALL = [
    Sizes(*sizes)
    for sizes in [(1, 1, 1), (2, 7, 31), (31, 33, 2), (33, 65, 129), (129, 31, 65), (20, 512, 784), (200, 200, 512)]
]
# Beyond what the fused kernel takes: with 16-byte pieces in every row, without them, and with a thin side.
LARGE = [Sizes(*sizes) for sizes in [(1024, 1024, 1024), (1031, 1025, 1027), (2048, 512, 4096), (4096, 1000, 1024)]]


class Operands:
    """Random operands, drawn in float64 and rounded once, so that a dtype changes no number by more than that."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.source = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.source, dtype=torch.float64, device=DEVICE).to(self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=self.source, dtype=torch.float64, device=DEVICE)
        return (low + (high - low) * drawn).to(self.dtype)

    def a(self) -> Tensor:
        return self.normal(self.sizes.rows, self.sizes.inner)

    def b(self) -> Tensor:
        return self.normal(self.sizes.inner, self.sizes.columns) / math.sqrt(self.sizes.inner)

    def like_result(self) -> Tensor:
        return self.normal(self.sizes.rows, self.sizes.columns)

    def column(self) -> Tensor:
        return self.normal(self.sizes.rows)

    def row(self) -> Tensor:
        return self.normal(self.sizes.columns)

    def gentle(self) -> Tensor:
        """Pre-activations at which no activation is saturated."""
        return self.uniform(-1.5, 1.5, self.sizes.rows, self.sizes.columns)

    def averages(self) -> Tensor:
        """Rows of positive weights that sum to 0.9: what they average stays in an interval around 0."""
        weights = self.uniform(0.5, 1.5, self.sizes.rows, self.sizes.inner)
        return 0.9 * weights / weights.sum(1, keepdim=True)

    def inside(self, activation: Activation, *shape: int) -> Tensor:
        """Well inside the domain of σ⁻¹ and away from 0, where the slope of LeakyReLU jumps."""
        low, high = max(activation.domain[0], -1.0), min(activation.domain[1], 1.0)
        margin = 0.2 * (high - low)
        drawn = self.uniform(low + margin, high - margin, *shape)
        return torch.where(drawn.abs() < 0.08, 0.08, drawn)

    def gram_inverse(self) -> Tensor:
        """In the place of K⁻¹: any matrix of its size."""
        return self.normal(self.sizes.rows, self.sizes.rows).double()

    def size(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=DEVICE)


Arguments = tuple[Any, ...]
Build = Callable[[Operands, Activation], Arguments]

# One call or several of each operator whose results are compared by their distance, in the order of the schema's
# arguments. `invert_grams`, `commit`, `near_dependence` and `judge` have tests of their own.
MATRIX_CALLS: dict[str, tuple[str, Build]] = {
    "linear": ("linear", lambda o, f: (o.a(), o.b(), None, None, None, 1.0, 1.0)),
    "linear, scaled": ("linear", lambda o, f: (o.a(), o.b(), None, None, None, -0.75, 1.0)),
    "linear, source": ("linear", lambda o, f: (o.a(), o.b(), o.like_result(), None, None, 1.0, -0.5)),
    "linear, row": ("linear", lambda o, f: (o.a(), o.b(), None, None, o.row(), 1.0, 1.0)),
    "linear, all": ("linear", lambda o, f: (o.a(), o.b(), o.like_result(), o.column(), o.row(), -0.3, 2.0)),
    "grouped_linear, masked": (
        "grouped_linear",
        lambda o, f: ([o.a()], [o.b()], [None], [None], [o.like_result()], [1.0], [1.0]),
    ),
    "grouped_linear, all": (
        "grouped_linear",
        lambda o, f: (
            [o.a(), o.b().T, o.a()],
            [o.b(), o.a().T, o.b()],
            [o.like_result(), None, None],
            [None, o.column(), o.row()],
            [o.like_result(), None, o.like_result()],
            [1.0, -0.3, 1.0],
            [2.0, 1.0, 1.0],
        ),
    ),
}
ACTIVATION_CALLS: dict[str, tuple[str, Build]] = {
    "linear_activation": ("linear_activation", lambda o, f: (o.a(), o.b(), None, *f.sigma)),
    "linear_activation, row": ("linear_activation", lambda o, f: (o.a(), o.b(), o.row(), *f.sigma)),
    "inverse_activation": (
        "inverse_activation",
        lambda o, f: (
            o.averages(),
            o.inside(f, o.sizes.inner, o.sizes.columns),
            o.like_result(),
            1.0,
            *f.sigma,
        ),
    ),
    "over_slope": ("over_slope", lambda o, f: (o.a(), o.b(), None, None, o.gentle(), *f.sigma)),
    "over_slope, rank one": (
        "over_slope",
        lambda o, f: (o.a(), o.b(), o.column(), o.row(), o.gentle(), *f.sigma),
    ),
    "times_slope": (
        "times_slope",
        lambda o, f: (o.a(), o.b(), o.gentle(), o.like_result(), -1.0, *f.sigma),
    ),
}
ELEMENTWISE_CALLS: dict[str, tuple[str, Build]] = {
    "take_steps": (
        "take_steps",
        lambda o, f: (
            [o.inside(f, o.sizes.rows, o.sizes.columns) for _ in range(3)],
            [o.uniform(-1, 1, o.sizes.rows, o.sizes.columns) for _ in range(3)],
            o.size(0.03),
            [False, True, False],
            [f.name, f.name, "identity"],
            [*f.sigma[1], *f.sigma[1], *Identity().sigma[1]],
        ),
    ),
    "times_curvature": (
        "times_curvature",
        lambda o, f: (o.like_result(), o.like_result(), o.gentle(), None, *f.sigma),
    ),
    "times_curvature, source": (
        "times_curvature",
        lambda o, f: (o.like_result(), o.like_result(), o.gentle(), o.like_result(), *f.sigma),
    ),
}
PLAIN_CALLS: dict[str, tuple[str, Build]] = {
    "grams": ("grams", lambda o, f: ([o.a()], [False])),
    "grams, several": ("grams", lambda o, f: ([o.a(), o.like_result(), o.a()], [True, False, True], True)),
    "pseudo_inverse": ("pseudo_inverse", lambda o, f: (o.gram_inverse(), o.a(), False)),
    "pseudo_inverse, bias": ("pseudo_inverse", lambda o, f: (o.gram_inverse(), o.a(), True)),
    "dot_sum": ("dot_sum", lambda o, f: _pairs(o)),
    "squared_norms": ("squared_norms", lambda o, f: ([o.a(), o.b().double(), o.row(), o.like_result()],)),
}
CALLS = MATRIX_CALLS | ACTIVATION_CALLS | ELEMENTWISE_CALLS | PLAIN_CALLS


def _pairs(operands: Operands) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs whose dot products do not cancel."""
    left = [operands.a(), operands.b(), operands.row(), operands.like_result()]
    return left, [tensor + 0.25 * operands.normal(*tensor.shape) for tensor in left]


def run(name: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """The compiled operator, its results as a tuple; the memory it may get is full of NaN."""
    poison()
    return as_tuple(getattr(compiled(), name)(*arguments))


def compiled() -> Any:
    """The compiled operators. Where there are none, the test is skipped with the reason, and fails where they must be
    there (bench/gpu.sh)."""
    from symtele_cuda.kernels.library import products_for

    try:
        products_for(DEVICE, "cuda")
    except (RuntimeError, ValueError) as error:
        if "SYMTELE_KERNELS_REQUIRED" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))
    return torch.ops.symtele_cuda


def needs_tensor_route() -> None:
    """Skip on a device on which large float32 products do not go to the tensor cores (csrc/route.cpp)."""
    major, minor = torch.cuda.get_device_capability(DEVICE)
    if not (major in (9, 10) or (major, minor) == (8, 0)):
        pytest.skip(f"compute capability {major}.{minor} multiplies hardly faster in TF32 than in float32")


def expected(name: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """The twin in float64 on the same numbers."""
    return as_tuple(getattr(products, name)(*map_tensors(arguments, Tensor.double)))


def map_all(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(map_all(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every floating-point tensor in it changed."""
    return map_all(value, lambda tensor: change(tensor) if tensor.is_floating_point() else tensor)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, those in its lists among the others."""
    return tuple(tree_leaves(result))


def clones(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(result.clone() for result in results)


def assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """‖actual − expected‖ ≤ tolerance ‖expected‖; the worst element is named. NaN never passes."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} for {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    difference = (actual - expected).abs()
    error, scale = difference.norm().item(), expected.norm().item()
    if not error <= tolerance * scale:
        at = difference.nan_to_num(nan=math.inf).argmax().item()
        raise AssertionError(
            f"{what}: relative error {error / max(scale, 1e-300):.2e} > {tolerance:.1e}, "
            f"worst at {at} of {tuple(actual.shape)}: {actual.flatten()[at]:.9g} for {expected.flatten()[at]:.9g}"
        )


def assert_all_close(
    what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerances: Sequence[float]
) -> None:
    assert len(actual) == len(expected)
    for index, (one, other, tolerance) in enumerate(zip(actual, expected, tolerances, strict=True)):
        assert_close(f"{what}, result {index}", one, other, tolerance)


def assert_same_bits(what: str, one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for index, (left, right) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(left, right), f"{what}, result {index}: {(left != right).sum().item()} elements differ"


def tolerances(name: str, dtype: torch.dtype, results: int) -> list[float]:
    """Of so many results: Gram matrices and sums of products are computed in float64, whatever comes in."""
    if name == "grams":
        return [TOLERANCE[torch.float64]] * ((results + 1) // 2) + [TOLERANCE[dtype]] * (results // 2)
    if name in ("dot_sum", "squared_norms"):
        return [TOLERANCE[torch.float64]]
    return [TOLERANCE[dtype]] * results


# --- memory and streams ----------------------------------------------------------------------------------------------


def poison() -> None:
    """Fill memory that the allocator is about to hand out with NaN, so that an element nobody writes shows."""
    if DEVICE.type != "cuda":
        return
    blocks = [torch.full((2**power,), math.nan, device=DEVICE) for power in range(6, 25) for _ in range(3)]
    del blocks


def on_side_stream(prepare: Callable[[], Arguments], name: str) -> tuple[Tensor, ...]:
    """Run the operator on a stream of its own, behind a delay and the copies that fill its operands."""
    final = prepare()
    stream = torch.cuda.Stream(DEVICE)
    stale = map_tensors(final, lambda tensor: torch.full_like(tensor, math.nan))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms, far longer than the launches below
        for target, source in zip(tensors(stale), tensors(final), strict=True):
            target.copy_(source)
        results = as_tuple(getattr(compiled(), name)(*stale))
    stream.synchronize()
    return results


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in `value`, in order."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return iter(found)


@contextmanager
def never_waiting() -> Iterator[None]:
    """An error where the host waits for the device, inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(work: Callable[[], object]) -> list[str]:
    """The names of the kernels that the work launches, its first run not counted."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith(("Mem", "Context ", "Stream ", "Event "))]


# --- layouts ---------------------------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    """The same matrix, stored by columns."""
    return tensor.t().contiguous().t()


def padded(tensor: Tensor) -> Tensor:
    """The same matrix with rows that lie further apart than they are long, NaN between them."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 8), math.nan, dtype=tensor.dtype, device=tensor.device)
    return wide[:, : tensor.shape[1]].copy_(tensor)


def shifted(tensor: Tensor) -> Tensor:
    """The same matrix, contiguous, but beginning one element off any alignment."""
    memory = torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


def scattered(tensor: Tensor) -> Tensor:
    """The same matrix with no stride of one."""
    wide = torch.full((2 * tensor.shape[0], 2 * tensor.shape[1]), math.nan, dtype=tensor.dtype, device=tensor.device)
    return wide[::2, ::2].copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": transposed,
    "padded": padded,
    "padded, transposed": lambda tensor: padded(tensor.t()).t(),
    "shifted": shifted,
    "scattered": scattered,
}


def laid_out(layout: str) -> Callable[[Tensor], Tensor]:
    """Changes matrices; vectors get a stride of two where the layout is scattered."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.ndim == 1 and layout == "scattered":
            return torch.stack([tensor, torch.full_like(tensor, math.nan)], 1)[:, 0]
        return LAYOUTS[layout](tensor) if tensor.ndim == 2 else tensor

    return change
