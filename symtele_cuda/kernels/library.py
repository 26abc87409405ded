"""The compiled kernels as torch operators, and the choice between them and their twins in plain torch.

`csrc/ops.cpp` defines the operators `symtele_cuda::linear`, ... and their CUDA kernels. Once that library is loaded,
each gets its twin of `products` as its CPU kernel and a fake kernel, which knows the shapes without computing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..checks import check_name
from . import extension
from . import torch_kernels as products

BACKENDS = ("auto", "torch", "cuda")


class Products(Protocol):
    """The functions of `products`, computed by whatever kernels."""

    def linear(
        self,
        a: Tensor,
        b: Tensor,
        source: Tensor | None = None,
        column: Tensor | None = None,
        row: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> Tensor: ...

    def linear_activation(
        self, a: Tensor, b: Tensor, row: Tensor | None, activation: str, numbers: Sequence[float]
    ) -> tuple[Tensor, Tensor]: ...

    def inverse_activation(
        self, a: Tensor, b: Tensor, origin: Tensor, rho: float, activation: str, numbers: Sequence[float]
    ) -> tuple[Tensor, Tensor]: ...

    def over_slope(
        self,
        a: Tensor,
        b: Tensor,
        column: Tensor | None,
        row: Tensor | None,
        at: Tensor,
        activation: str,
        numbers: Sequence[float],
    ) -> tuple[Tensor, Tensor]: ...

    def times_slope(
        self, a: Tensor, b: Tensor, at: Tensor, source: Tensor, beta: float, activation: str, numbers: Sequence[float]
    ) -> Tensor: ...

    def grouped_linear(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        sources: Sequence[Tensor | None],
        rows: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
        alphas: Sequence[float],
        betas: Sequence[float],
    ) -> list[Tensor]: ...

    def grams(self, rows: Sequence[Tensor], biases: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]: ...

    def invert_grams(
        self, grams: Sequence[Tensor], rounds: bool = False
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]: ...

    def pseudo_inverse(self, inverse: Tensor, rows: Tensor, bias: bool) -> Tensor: ...

    def take_steps(
        self,
        bases: Sequence[Tensor],
        changes: Sequence[Tensor],
        size: Tensor,
        along_targets: Sequence[bool],
        activations: Sequence[str],
        numbers: Sequence[float],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...

    def times_curvature(
        self, left: Tensor, right: Tensor, at: Tensor, source: Tensor | None, activation: str, numbers: Sequence[float]
    ) -> Tensor: ...

    def dot_sum(
        self, left: Sequence[Tensor], right: Sequence[Tensor], scale: float = 1.0, root: bool = False
    ) -> Tensor: ...

    def squared_norms(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def identity_remainder(self, g: Tensor, vectors: int, rounds: int) -> Tensor: ...

    def commit(self, accept: Tensor, current: Sequence[Tensor], trial: Sequence[Tensor]) -> None: ...

    def near_dependence(
        self, grams: Sequence[Tensor], inverses: Sequence[Tensor], infos: Sequence[Tensor], largest: float
    ) -> Tensor: ...

    def judge(
        self,
        control: Tensor,
        size: Tensor,
        norm: Tensor,
        value: Tensor,
        hindered: Tensor,
        broken: Tensor,
        cap: Tensor,
        maximise: bool,
        rules: Sequence[float],
    ) -> tuple[Tensor, Tensor]: ...


class Linear(NamedTuple):
    """The arguments of one of the products of a `grouped_linear`, with their names in `linear`."""

    a: Tensor
    b: Tensor
    source: Tensor | None = None
    row: Tensor | None = None
    mask: Tensor | None = None
    alpha: float = 1.0
    beta: float = 1.0


def together(products: Products, *linears: Linear | None) -> list[Any]:
    """The results of independent products, small ones in one launch: for each D, the pair (D, D ⊙ M) where it has a
    mask, None for None."""
    given = [one for one in linears if one is not None]
    results = iter(products.grouped_linear(*map(list, zip(*given, strict=True))) if given else ())
    return [
        None if one is None else next(results) if one.mask is None else (next(results), next(results))
        for one in linears
    ]


def products_for(device: torch.device, backend: str) -> Products:
    """The products for tensors on `device`: the compiled ones, or the module `products`.

    Args:
        device: where the tensors are.
        backend: "torch" for plain torch, "cuda" for the compiled kernels, "auto" for these where they can be had.

    Raises:
        ValueError: an unknown name, or "cuda" where the compiled kernels cannot be had, with the reason.
    """
    check_backend(backend)
    if backend == "torch":
        return products
    obstacle = _obstacle(device)
    if obstacle is None:
        return _compiled()
    if backend == "cuda":
        _refuse(obstacle)
    return products


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is a known name whose kernels this installation has."""
    check_name("backend", backend, BACKENDS)
    reason = extension.unavailable_reason() if backend == "cuda" else None
    if reason is not None:
        _refuse(reason)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(
        f"backend='cuda' is not available: {reason}. Use backend='auto' or backend='torch', "
        "which run the same formulas with torch's own kernels, on CUDA tensors too"
    )


@cache
def _obstacle(device: torch.device) -> str | None:
    """Why the compiled kernels cannot take tensors on `device`, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    return extension.unavailable_reason() or extension.device_obstacle(torch.cuda.get_device_capability(device))


@cache
def _compiled() -> Products:
    extension.load()
    complete("symtele_cuda")
    return operators_of("symtele_cuda")


def complete(namespace: str) -> None:
    """Give the operators of `namespace` their twins as CPU kernels, and their fake kernels."""
    for name, fake in FAKES.items():
        operator = f"{namespace}::{name}"
        torch.library.impl(operator, "cpu")(_contiguous(getattr(products, name)))
        torch.library.register_fake(operator, fake)


def operators_of(namespace: str) -> Products:
    """The operators that a library defined in `namespace`."""
    library = getattr(torch.ops, namespace)
    return cast(Products, SimpleNamespace(**{name: getattr(library, name).default for name in FAKES}))


def _contiguous(twin: Callable[..., Any]) -> Callable[..., Any]:
    """`twin`, whose several results are contiguous, as are those of the compiled operators."""

    @wraps(twin)
    def kernel(*arguments: Any) -> Any:
        results = twin(*arguments)
        return tree_map(Tensor.contiguous, results) if isinstance(results, tuple | list) else results

    return kernel


# ---------------------------------------------------------------------------------------------------------------------
# fake kernels
# ---------------------------------------------------------------------------------------------------------------------


def _check_operand(name: str, operand: Tensor | None, first: Tensor, shape: Sequence[int]) -> None:
    """An operand of this shape, in the dtype and on the device of `first`, or none."""
    if operand is None:
        return
    torch._check_value(
        tuple(operand.shape) == tuple(shape),
        lambda: f"{name} must have shape {tuple(shape)}, got {tuple(operand.shape)}",
    )
    torch._check_type(
        operand.dtype == first.dtype, lambda: f"{name} must be of dtype {first.dtype}, got {operand.dtype}"
    )
    torch._check_value(
        operand.device == first.device,
        lambda: f"{name} must be on the device of the first tensor, {first.device}, got {operand.device}",
    )


def _check_matrix(name: str, tensor: Tensor) -> None:
    torch._check_value(tensor.ndim == 2, lambda: f"{name} must be a matrix, got shape {tuple(tensor.shape)}")
    torch._check_type(
        tensor.dtype in (torch.float32, torch.float64),
        lambda: f"{name} must be of dtype float32 or float64, got {tensor.dtype}",
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Memory for a b."""
    _check_matrix("a", a)
    _check_matrix("b", b)
    _check_operand("b", b, a, (a.shape[1], b.shape[1]))
    return a.new_empty(a.shape[0], b.shape[1])


def _linear(
    a: Tensor,
    b: Tensor,
    source: Tensor | None = None,
    column: Tensor | None = None,
    row: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    product = _product(a, b)
    _check_operand("source", source, a, product.shape)
    _check_operand("column", column, a, product.shape[:1])
    _check_operand("row", row, a, product.shape[1:])
    return product


def _linear_activation(
    a: Tensor, b: Tensor, row: Tensor | None, activation: str, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    product = _linear(a, b, row=row)
    return product, torch.empty_like(product)


def _inverse_activation(
    a: Tensor, b: Tensor, origin: Tensor, rho: float, activation: str, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    product = _product(a, b)
    _check_operand("origin", origin, a, product.shape)
    return product, torch.empty_like(product)


def _over_slope(
    a: Tensor,
    b: Tensor,
    column: Tensor | None,
    row: Tensor | None,
    at: Tensor,
    activation: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    product = _linear(a, b, column=column, row=row)
    _check_operand("at", at, a, product.shape)
    return product, torch.empty_like(product)


def _times_slope(
    a: Tensor, b: Tensor, at: Tensor, source: Tensor, beta: float, activation: str, numbers: Sequence[float]
) -> Tensor:
    product = _linear(a, b, source)
    _check_operand("at", at, a, product.shape)
    return product


def _grouped_linear(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> list[Tensor]:
    results: list[Tensor] = []
    for left, right, source, row, mask, _, _ in zip(a, b, sources, rows, masks, alphas, betas, strict=True):
        _check_operand("a", left, a[0], left.shape)
        results.append(_linear(left, right, source, row=row))
        _check_operand("mask", mask, left, results[-1].shape)
        results += [] if mask is None else [torch.empty_like(results[-1])]
    return results


def _grams(rows: Sequence[Tensor], biases: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    first = rows[0]
    _check_matrix("rows", first)
    for matrix in rows:
        _check_operand("rows", matrix, first, (first.shape[0], *matrix.shape[1:]))
        _check_matrix("rows", matrix)
    rounded = [first.new_empty(first.shape[0], first.shape[0]) for _ in rows]
    return [torch.empty_like(one, dtype=torch.float64) for one in rounded], rounded


def _invert_grams(grams: Sequence[Tensor], rounds: bool = False) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    first, size = grams[0], grams[0].shape[0]
    _check_matrix("grams", first)
    for matrix in grams:
        _check_operand("grams", matrix, first.new_empty(0, dtype=torch.float64), (size, size))
    inverses = [first.new_empty(size, size) for _ in grams]
    rounded = [torch.empty_like(inverse, dtype=torch.float32) for inverse in inverses if rounds]
    return inverses, first.new_empty(len(grams), dtype=torch.int32), rounded


def _pseudo_inverse(inverse: Tensor, rows: Tensor, bias: bool) -> Tensor:
    _check_matrix("rows", rows)
    n, columns = rows.shape
    _check_operand("inverse", inverse, rows.new_empty(0, dtype=torch.float64), (n, n))
    return products.padded_memory(rows, n, columns + int(bias))


def _take_steps(
    bases: Sequence[Tensor],
    changes: Sequence[Tensor],
    size: Tensor,
    along_targets: Sequence[bool],
    activations: Sequence[str],
    numbers: Sequence[float],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    first = bases[0]
    _check_operand("size", size, first.new_empty((), dtype=torch.float64), ())
    for base, change in zip(bases, changes, strict=True):
        _check_operand("bases", base, first, base.shape)
        _check_operand("changes", change, first, base.shape)
    moved, targets, slopes = ([base.new_empty(base.shape) for base in bases] for _ in range(3))
    return moved, targets, slopes


def _times_curvature(
    left: Tensor, right: Tensor, at: Tensor, source: Tensor | None, activation: str, numbers: Sequence[float]
) -> Tensor:
    for name, operand in {"right": right, "at": at, "source": source}.items():
        _check_operand(name, operand, left, left.shape)
    return left.new_empty(left.shape)


def _dot_sum(left: Sequence[Tensor], right: Sequence[Tensor], scale: float = 1.0, root: bool = False) -> Tensor:
    for one, other in zip(left, right, strict=True):
        _check_operand("left", one, left[0], one.shape)
        _check_operand("right", other, one, one.shape)
    return left[0].new_empty((), dtype=torch.float64)


def _squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    for tensor in tensors:
        _check_operand("tensors", tensor, tensors[0].new_empty(0, dtype=tensor.dtype), tensor.shape)
    dtypes = {tensor.dtype for tensor in tensors}
    torch._check_type(
        dtypes <= {torch.float32, torch.float64, torch.int32},
        lambda: f"tensors must be of dtype float32, float64 or int32, got {dtypes}",
    )
    return tensors[0].new_empty(len(tensors), dtype=torch.float64)


def _identity_remainder(g: Tensor, vectors: int, rounds: int) -> Tensor:
    _check_matrix("g", g)
    _check_operand("g", g, g, (g.shape[0], g.shape[0]))
    return g.new_empty(vectors, g.shape[0])


def _commit(accept: Tensor, current: Sequence[Tensor], trial: Sequence[Tensor]) -> None:
    _check_operand("accept", accept, current[0].new_empty((), dtype=torch.bool), ())
    for old, new in zip(current, trial, strict=True):
        _check_operand("trial", new, old, old.shape)


def _near_dependence(
    grams: Sequence[Tensor], inverses: Sequence[Tensor], infos: Sequence[Tensor], largest: float
) -> Tensor:
    exact, info = grams[0].new_empty((), dtype=torch.float64), grams[0].new_empty((), dtype=torch.int32)
    for matrix, inverse, flag in zip(grams, inverses, infos, strict=True):
        _check_operand("grams", matrix, exact, matrix.shape)
        _check_operand("inverses", inverse, matrix, matrix.shape)
        _check_operand("infos", flag, info, ())
    return grams[0].new_empty((), dtype=torch.bool)


def _judge(
    control: Tensor,
    size: Tensor,
    norm: Tensor,
    value: Tensor,
    hindered: Tensor,
    broken: Tensor,
    cap: Tensor,
    maximise: bool,
    rules: Sequence[float],
) -> tuple[Tensor, Tensor]:
    exact, flag = control.new_empty((), dtype=torch.float64), control.new_empty((), dtype=torch.bool)
    _check_operand("control", control, exact, (5,))
    for name, number in {"size": size, "norm": norm, "value": value, "cap": cap}.items():
        _check_operand(name, number, exact, ())
    for name, flags in {"hindered": hindered, "broken": broken}.items():
        _check_operand(name, flags, flag, (flags.numel(),))
    torch._check_value(len(rules) == 9, lambda: f"rules must have 9 numbers, got {len(rules)}")
    return flag, control.new_empty(6)


FAKES: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "linear_activation": _linear_activation,
    "inverse_activation": _inverse_activation,
    "over_slope": _over_slope,
    "times_slope": _times_slope,
    "grouped_linear": _grouped_linear,
    "grams": _grams,
    "invert_grams": _invert_grams,
    "pseudo_inverse": _pseudo_inverse,
    "take_steps": _take_steps,
    "times_curvature": _times_curvature,
    "dot_sum": _dot_sum,
    "squared_norms": _squared_norms,
    "identity_remainder": _identity_remainder,
    "commit": _commit,
    "near_dependence": _near_dependence,
    "judge": _judge,
}
"""The operators of `csrc/ops.cpp` by their names."""
