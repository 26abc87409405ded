"""Sites: places of a model where a group acts and the outputs stay what they are on *every* input.

A site names the parameters that it changes and says how: `act` is linear in them. A new kind of site is a class with
the methods of `Site`, and where it is to be found by itself, a finder in `FINDERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .chain import Chain
from .reader import read_chain

Parameters = Mapping[str, Tensor]
"""Parameters of a model by their qualified names."""


class Site(Protocol):
    """A group and what it does to the parameters `names` of a model."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def group(self) -> str:
        """The group's name, for tables."""

    def identity(self, parameters: Parameters) -> Tensor:
        """The neutral element: a matrix (…×k×k) of a linear group, or a vector (k) of the positive diagonal one."""

    def act(self, parameters: Parameters, g: Tensor) -> dict[str, Tensor]:
        """The site's parameters after g, differentiable in both: A_g p, with A_g A_h = A_gh and A_g⁻ᵀ = A_{g*}, where
        g* is g⁻ᵀ of a matrix and 1/g of a vector."""


@dataclass(frozen=True)
class _Pair:
    """k units between two linear maps, by the names of the parameters: up (k×d), bias (k) or None, down (d'×k)."""

    up: str
    bias: str | None
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.up, self.bias, self.down) if name is not None)


class Scales(_Pair):
    """D = diag(a), a > 0, on k units behind a positively homogeneous activation (LeakyReLU, ReLU or none):

    W_up ← D W_up, b_up ← D b_up, W_down ← W_down D⁻¹.

    up: k×d; bias: k, or None; down: d'×k; the names of these parameters.
    """

    @property
    def group(self) -> str:
        return "positive diagonal"

    def identity(self, parameters: Parameters) -> Tensor:
        return torch.ones_like(parameters[self.up][:, 0])

    def act(self, parameters: Parameters, g: Tensor) -> dict[str, Tensor]:
        moved = {self.up: parameters[self.up] * g.unsqueeze(1), self.down: parameters[self.down] / g}
        return moved if self.bias is None else moved | {self.bias: parameters[self.bias] * g}


class LinearPair(_Pair):
    """GL(k) between two linear maps with nothing in between: U ← g U, u ← g u, D ← D g⁻¹.

    up: U, k×d; bias: u, k, or None; down: D, d'×k; the names of these parameters.
    """

    @property
    def group(self) -> str:
        return "GL"

    def identity(self, parameters: Parameters) -> Tensor:
        up = parameters[self.up]
        return torch.eye(len(up), dtype=up.dtype, device=up.device)

    def act(self, parameters: Parameters, g: Tensor) -> dict[str, Tensor]:
        down = torch.linalg.solve(g, parameters[self.down], left=False)
        moved = {self.up: g @ parameters[self.up], self.down: down}
        return moved if self.bias is None else moved | {self.bias: g @ parameters[self.bias]}


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites that were found in a model; `str` of it is a table of them."""

    found: tuple[Site, ...]

    def __getitem__(self, index: int) -> Site:  # type: ignore[override]  # a slice makes no table
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        rows = [("site", "group", "exact on", "parameters")]
        rows += [(type(site).__name__, site.group, "every input", ", ".join(site.names)) for site in self.found]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def find_sites(model: nn.Module) -> Sites:
    """The sites of any model, in the order of its modules: what `FINDERS` know.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return Sites(tuple(site for finder in FINDERS for site in finder(model)))


def scales_of(chain: Chain, index: int, prefix: str = "") -> Scales:
    """The scales of hidden layer `index` (1..m) of a chain that stands at `prefix` in its model."""
    up, down = (f"{prefix}{name}" for name in chain.names[index - 1 : index + 1])
    bias = None if chain.linears[index - 1].bias is None else f"{up}.bias"
    return Scales(f"{up}.weight", bias, f"{down}.weight")


def _in_chains(model: nn.Module, prefix: str = "") -> Iterator[Site]:
    """The sites of the largest parts of a model that are chains."""
    try:
        chain = read_chain(model)
    except ValueError:
        for name, child in model.named_children():
            yield from _in_chains(child, f"{prefix}{name}.")
    else:
        for index, sigma in enumerate(chain.activations, start=1):
            if sigma.positively_homogeneous and not chain.frozen_beside(index):
                site = scales_of(chain, index, prefix)
                yield LinearPair(*dataclasses.astuple(site)) if sigma.name == "identity" else site


FINDERS: list[Callable[[nn.Module], Iterator[Site]]] = [_in_chains]
"""What looks for sites in a model. Each is called with the whole model."""
