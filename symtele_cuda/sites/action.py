"""What a group does to the parameters of a model, whatever the model: it acts along dimensions of some of them.

A site is k units, or k units of each of some heads, that stand between linear maps. An element g of its group acts on
the units, and so along those dimensions of parameters that belong to them: the rows of the maps before, the columns of
those behind. In y = x Wᵀ with W (out×in):

    W ← g W along dimension 0,   W ← W gᵀ along dimension 1,   and with g^{-T} in the place of g for the other side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
"""Parameters of a model by their qualified names."""

POSITIVE_DIAGONAL, GL, ORTHOGONAL = "positive diagonal", "GL", "O"


@dataclass(frozen=True)
class Axis:
    """A dimension of a parameter that a group acts along, or a range of it.

    Entry `start` + (h · `repeat` + r) · k + i of dimension `dim` belongs to unit i of head h: `repeat` heads in a row
    share one element. For the positive diagonal group, entry `start` + i · `repeat` + r belongs to unit i.

    Args:
        name: the parameter's qualified name.
        dim: the dimension, from 0.
        power: 1 where g acts and −1 where g^{-T} does. For the positive diagonal group any power of g.
        start: where the range begins.
        repeat: how many entries, or heads, share what one unit, or head, has.
    """

    name: str
    dim: int
    power: int = 1
    start: int = 0
    repeat: int = 1

    def apply(self, value: Tensor, matrices: Tensor) -> Tensor:
        """The parameter after `matrices` (heads×k×k), or scales (k), that act along the dimension."""
        if matrices.dim() == 1:
            return self._scaled(value, matrices)
        columns = self.columns(value, *matrices.shape[:2])
        return self.put_back(value, matrices @ columns)

    def columns(self, value: Tensor, heads: int, units: int) -> Tensor:
        """The range as heads×units×(all other entries)."""
        part = self._range(value, self.size(heads, units)).movedim(self.dim, 0)
        return part.reshape(heads, self.repeat, units, -1).transpose(1, 2).reshape(heads, units, -1)

    def size(self, heads: int, units: int) -> int:
        """How many entries of the dimension the range has."""
        return heads * self.repeat * units

    def put_back(self, value: Tensor, columns: Tensor) -> Tensor:
        """The parameter with these `columns` in the place of its own."""
        heads, units = columns.shape[:2]
        length = self.size(heads, units)
        shape = list(value.shape)
        del shape[self.dim]
        rows = columns.reshape(heads, units, self.repeat, -1).transpose(1, 2).reshape(length, *shape)
        return self._replaced(value, rows.movedim(0, self.dim), length)

    def _scaled(self, value: Tensor, scales: Tensor) -> Tensor:
        factors = scales.repeat_interleave(self.repeat) if self.repeat > 1 else scales
        shape = [1] * value.dim()
        shape[self.dim] = -1
        return self._replaced(value, self._range(value, len(factors)) * factors.view(shape), len(factors))

    def _range(self, value: Tensor, length: int) -> Tensor:
        return value.narrow(self.dim, self.start, length)

    def _replaced(self, value: Tensor, part: Tensor, length: int) -> Tensor:
        if length == value.shape[self.dim]:
            return part
        return value.slice_scatter(part, self.dim, self.start, self.start + length)


@dataclass(frozen=True)
class Site:
    """A group and the axes that it acts along; the model computes the same on every input, whatever the element.

    Args:
        kind: what it is, for tables.
        group: "positive diagonal", with elements of shape (units); "GL" or "O", with one matrix a head,
            (heads×units×units).
        axes: where an element acts, the parameters by name.
        units: k.
        heads: how many groups of units have an element each.
    """

    kind: str
    group: str
    axes: tuple[Axis, ...]
    units: int
    heads: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it changes."""
        return tuple(dict.fromkeys(axis.name for axis in self.axes))

    @property
    def described(self) -> str:
        """The group with its size."""
        return f"{self.group}({self.units})" + (f", {self.heads} heads" if self.heads > 1 else "")

    def identity(self, parameters: Parameters) -> Tensor:
        """The neutral element, of the dtype and on the device of the parameters."""
        like = parameters[self.axes[0].name]
        if self.group == POSITIVE_DIAGONAL:
            return like.new_ones(self.units)
        return torch.eye(self.units, dtype=like.dtype, device=like.device).repeat(self.heads, 1, 1)

    def contragredient(self, g: Tensor) -> Tensor:
        """g^{-T}, which moves gradients as g moves parameters; 1/g for scales, and g itself for a rotation."""
        if self.group == ORTHOGONAL:
            return g
        return g.reciprocal() if g.dim() == 1 else torch.linalg.inv(g).mT

    def moves(self, g: Tensor) -> list[tuple[Axis, Tensor]]:
        """Each axis with the matrices, or the scales, by which g acts along it."""
        acting = {1: g}
        for power in {axis.power for axis in self.axes} - {1}:
            acting[power] = g.pow(power) if g.dim() == 1 else self.contragredient(g)
        return [(axis, acting[axis.power]) for axis in self.axes]

    def act(self, parameters: Parameters, g: Tensor, squared: bool = False) -> dict[str, Tensor]:
        """The site's parameters after g, differentiable in both and linear in the parameters.

        parameters: by name; those that are missing are left out. squared: act by the squares of the matrices' entries,
        as on the variances of what is not correlated.
        """
        moved = dict[str, Tensor]()
        for axis, matrices in self.moves(g):
            if axis.name in parameters:
                value = moved.get(axis.name, parameters[axis.name])
                moved[axis.name] = axis.apply(value, matrices.square() if squared else matrices)
        return moved

    def check(self, parameters: Parameters) -> None:
        """Raise ValueError unless the dimensions of the parameters fit the units and heads."""
        for axis in self.axes:
            shape, size = tuple(parameters[axis.name].shape), axis.size(self.heads, self.units)
            if axis.dim >= len(shape) or axis.start + size > shape[axis.dim]:
                raise ValueError(
                    f"sites must fit the parameters, got {self.kind} of {self.heads} × {self.units} units with {size} "
                    f"entries from {axis.start} in dimension {axis.dim} of {axis.name!r}, of shape {shape}"
                )


def check_disjoint(sites: Sequence[Site]) -> None:
    """Raise ValueError if two sites, or two axes of one, act along the same entries of a dimension."""
    taken = dict[tuple[str, int], list[tuple[int, int, str]]]()
    for site in sites:
        for axis in site.axes:
            start, end = axis.start, axis.start + axis.size(site.heads, site.units)
            for other_start, other_end, kind in taken.setdefault((axis.name, axis.dim), []):
                if start < other_end and other_start < end:
                    where = f"dimension {axis.dim} of {axis.name!r}"
                    raise ValueError(f"sites must not overlap, got {kind} and {site.kind} along {where}")
            taken[axis.name, axis.dim].append((start, end, site.kind))
