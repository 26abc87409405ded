"""Sites that the user declares: by names of modules, in which each star stands for one part of a name.

Every declaration has `sites_in(names)`, the sites that it means in a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..checks import check_int
from .action import GL, ORTHOGONAL, POSITIVE_DIAGONAL, Axis, Site
from .names import ModelNames, Side


class Declaration(Protocol):
    """What stands for one or several sites of a model."""

    def sites_in(self, names: ModelNames) -> Iterator[Site]: ...


@dataclass(frozen=True)
class Scales:
    """Positive scales a on k units behind a positively homogeneous activation, φ(ax) = aᵖ φ(x):

    W_up ← diag(a) W_up,   b_up ← a b_up,   W_down ← W_down diag(a)⁻ᵖ.

    Args:
        up: the layer before the activation, or the batch normalisation between them, whose affine part it then is.
        down: the layer behind.
        power: p, 1 for ReLU and LeakyReLU, for the product with a gate, or for no activation, 2 for ReLU².
    """

    up: str
    down: str
    power: int = 1

    def __post_init__(self) -> None:
        check_int("power", self.power, at_least=1)

    def sites_in(self, names: ModelNames) -> Iterator[Site]:
        for up, down in _pairs(names, self.up, self.down):
            before, behind = names.outputs(up), names.inputs(down)
            repeat = _repeat(before, behind, up, down)
            yield Site("Scales", POSITIVE_DIAGONAL, (*before.acted(), *behind.acted(-self.power, repeat)), before.size)


class _InHeads:
    """What acts by a matrix a head on one side, and by its dual on another."""

    heads: int

    def __post_init__(self) -> None:
        check_int("heads", self.heads, at_least=1)

    def _site(self, one: Side, other: Side, name: str, its: str) -> Site:
        if one.size % self.heads:
            raise ValueError(f"heads must divide the {one.size} outputs of {name!r}, got {self.heads}")
        axes = (*one.acted(), *other.acted(-1, _repeat(one, other, name, its)))
        return Site(type(self).__name__, GL, axes, one.size // self.heads, self.heads)


@dataclass(frozen=True)
class LinearPair(_InHeads):
    """GL(k), one element a head, between two linear maps with nothing in between that acts on the units:

    U ← g U,   u ← g u,   D ← D g⁻¹.

    Value and output of attention are such a pair, LoRA's two factors, and two linear layers in a row.

    Args:
        up: the module that holds U and u; "c_attn[2/3]" is the third third of its outputs.
        down: the one that holds D. Where it has r times as many inputs as `up` has outputs, r heads in a row share one
            of `up`'s, as in grouped-query attention.
        heads: how many heads `up` has.
    """

    up: str
    down: str
    heads: int = 1

    def sites_in(self, names: ModelNames) -> Iterator[Site]:
        for up, down in _pairs(names, self.up, self.down):
            yield self._site(names.outputs(up), names.inputs(down), up, down)


@dataclass(frozen=True)
class QueryKey(_InHeads):
    """GL(k), one element a head, on queries and keys of which nothing but the product counts:

    W_k ← g W_k,   b_k ← g b_k,   W_q ← g⁻ᵀ W_q,   b_q ← g⁻ᵀ b_q.

    Args:
        query, key: the modules that hold W_q and W_k, as for `LinearPair`.
        heads: how many heads the keys have.
    """

    query: str
    key: str
    heads: int = 1

    def sites_in(self, names: ModelNames) -> Iterator[Site]:
        for query, key in _pairs(names, self.query, self.key):
            yield self._site(names.outputs(key), names.outputs(query), key, query)


@dataclass(frozen=True)
class Stream:
    """O(d) on a residual stream of d columns: with a rotation Q, what is written turns, and what reads turns back,

    W ← Q W,   b ← Q b   of writers,   E ← E Qᵀ   of embeddings and parameters that are added,   W ← W Qᵀ   of readers.

    It is exact where the stream is read through RMSNorm without gains, or with equal ones: `fold_norms` sees to that,
    and for LayerNorm `convert_layernorm`. All that reads or writes the stream must be named.

    Args:
        readers: the layers that read it other than through a norm of `norms`.
        writers: the layers, embeddings and parameters that are added to it.
        norms: of each norm on it, the layers that read its output.
    """

    readers: Sequence[str] = ()
    writers: Sequence[str] = ()
    norms: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def sites_in(self, names: ModelNames) -> Iterator[Site]:
        behind = [reader for readers in self.norms.values() for reader in readers]
        sides = [names.outputs(name) for name in names.names_of(self.writers)]
        sides += [names.inputs(name) for name in names.names_of((*self.readers, *behind))]
        if not sides:
            raise ValueError("sites must name what reads and writes a stream, got a Stream of nothing")
        if len({side.size for side in sides}) > 1:
            sizes = sorted({side.size for side in sides})
            raise ValueError(f"sites must have one width a stream, got readers and writers of {sizes} columns")
        axes = dict.fromkeys(axis for side in sides for axis in side.axes)
        yield Site("Stream", ORTHOGONAL, tuple(axes), sides[0].size)

    def norms_in(self, names: ModelNames) -> Iterator[tuple[str, list[str]]]:
        """Each norm of the model with the layers that read it."""
        for norm, readers in self.norms.items():
            for name, stars in names.match(norm):
                yield name, [_filled(reader, stars) for reader in readers]

    def written_axes(self, names: ModelNames) -> list[Axis]:
        """The dimensions along which the stream is written."""
        return [axis for name in names.names_of(self.writers) for axis in names.outputs(name).axes]


def _pairs(names: ModelNames, first: str, second: str) -> Iterator[tuple[str, str]]:
    """The names that fit the first pattern, each with the second for the same stars."""
    for name, stars in names.match(first):
        other = _filled(second, stars)
        names.match(other)  # raises where there is none
        yield name, other


def _filled(pattern: str, stars: Sequence[str]) -> str:
    if pattern.count("*") > len(stars):
        raise ValueError(f"sites must have as many stars in every name of a pair, got {pattern!r} for {list(stars)}")
    for star in stars[: pattern.count("*")]:
        pattern = pattern.replace("*", star, 1)
    return pattern


def _repeat(one: Side, other: Side, name: str, its: str) -> int:
    """How many times as large the other side is."""
    if other.size % one.size:
        sizes = f"{one.size} and {other.size} units"
        raise ValueError(f"sites must join sides of one size, got {sizes} at {name!r} and {its!r}")
    return other.size // one.size
