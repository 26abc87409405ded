"""The compiled kernels as torch operators, and the choice between them and their twins in plain torch.

`csrc/ops.cpp` defines the operators `symtele_cuda::linear`, ... and their CUDA kernels. Once that library is loaded,
each gets its twin of `torch_kernels` as its CPU kernel, and its fake kernel.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..checks import check_name
from . import extension
from . import torch_kernels as products
from .operands import OPERATORS

BACKENDS = ("auto", "torch", "cuda")


Products = ModuleType | SimpleNamespace
"""The functions of `torch_kernels`, computed by whatever kernels."""


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
    for name, operator in OPERATORS.items():
        torch.library.impl(f"{namespace}::{name}", "cpu")(operator.kernel)
        torch.library.register_fake(f"{namespace}::{name}", operator.fake)


def operators_of(namespace: str) -> Products:
    """The operators that a library defined in `namespace`."""
    library = getattr(torch.ops, namespace)
    return SimpleNamespace(**{name: getattr(library, name).default for name in OPERATORS})
