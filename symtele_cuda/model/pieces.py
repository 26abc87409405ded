"""What a model does before its first Linear and behind its last one: flattening, constants, squeeze(-1), log_softmax.

A piece is a map of a batch. One behind the last Linear belongs to the loss, as its function and the pull-back of a
gradient; one before the first Linear is applied to the samples. An `Activation` is a piece as well.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spelling import Spelling

Constant = float | Tensor
"""A number, or a tensor that broadcasts over the samples."""


class Piece(Protocol):
    """A map of outputs that a loss can be differentiated through."""

    def forward(self, z: Tensor) -> Tensor:
        """What becomes of z."""
        ...

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        """A gradient with respect to forward(z) as one with respect to z."""
        ...


@dataclass(frozen=True)
class Flatten:
    """Flattening to (n, width); width is None where the model does not spell it out."""

    width: int | None = None

    def forward(self, z: Tensor) -> Tensor:
        return z.flatten(1) if z.dim() > 2 else z


@dataclass(frozen=True)
class Affine:
    """z ↦ f ⊙ z + o with the factor f and the offset o, each a number or a tensor, finite; a number f is not 0."""

    factor: Constant = 1.0
    offset: Constant = 0.0

    def __post_init__(self) -> None:
        for constant in (self.factor, self.offset):
            finite = torch.isfinite(constant).all() if isinstance(constant, Tensor) else math.isfinite(constant)
            if not bool(finite):
                raise ValueError("a constant with NaN or Inf")
        if isinstance(self.factor, float) and self.factor == 0:
            raise ValueError("a factor 0")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The constants that are no numbers."""
        return tuple(constant for constant in (self.factor, self.offset) if isinstance(constant, Tensor))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether batches of samples of this shape keep their shape."""
        try:
            return all(torch.broadcast_shapes((1, *shape), one.shape) == (1, *shape) for one in self.tensors)
        except RuntimeError:  # no shape that both broadcast to
            return False

    def __str__(self) -> str:
        factor, offset = (
            f"a tensor of shape {tuple(one.shape)}" if isinstance(one, Tensor) else "a number"
            for one in (self.factor, self.offset)
        )
        return f"z times {factor} plus {offset}"

    def forward(self, z: Tensor) -> Tensor:
        return z * _alike(self.factor, z) + _alike(self.offset, z)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient * _alike(self.factor, gradient)


@dataclass(frozen=True)
class Squeeze:
    """(n, 1) ↦ (n,). always: the model asks for it at any width; squeeze(-1) leaves other widths than 1 alone."""

    always: bool = False

    def forward(self, z: Tensor) -> Tensor:
        return z.squeeze(1)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient.unsqueeze(1)


@dataclass(frozen=True)
class LogSoftmax:
    """log p with p = softmax(z) of each sample."""

    def forward(self, z: Tensor) -> Tensor:
        return F.log_softmax(z, dim=1)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient - F.softmax(z, dim=1) * gradient.sum(1, keepdim=True)


@dataclass(frozen=True)
class InTurn:
    """Several pieces, one after the other."""

    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.pieces))

    def forward(self, z: Tensor) -> Tensor:
        return functools.reduce(lambda value, piece: piece.forward(value), self.pieces, z)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        points = [z]
        for piece in self.pieces[:-1]:
            points.append(piece.forward(points[-1]))
        for piece, point in zip(reversed(self.pieces), reversed(points), strict=True):
            gradient = piece.pull_back(gradient, point)
        return gradient


def holds_tensors(piece: Piece) -> bool:
    """Whether a constant of `piece` is a tensor."""
    pieces = piece.pieces if isinstance(piece, InTurn) else (piece,)
    return any(isinstance(one, Affine) and one.tensors for one in pieces)


def _alike(constant: Constant, like: Tensor) -> Constant:
    return constant.to(like) if isinstance(constant, Tensor) else constant


# ---------------------------------------------------------------------------------------------------------------------
# how torch spells them
# ---------------------------------------------------------------------------------------------------------------------


def _add(input: Any, other: Any, *, alpha: float = 1) -> Affine:
    """input + α other."""
    constant = _constant_beside_the_value(input, other)
    return Affine(1.0, alpha * constant) if other is not None else Affine(float(alpha), constant)


def _subtract(input: Any, other: Any, *, alpha: float = 1) -> Affine:
    """input − α other."""
    return _add(input, other, alpha=-alpha)


def _multiply(input: Any, other: Any) -> Affine:
    return Affine(_constant_beside_the_value(input, other))


def _divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Affine:
    constant = _constant_beside_the_value(input, other)
    if other is None or rounding_mode is not None:
        raise ValueError("a division by the value itself, or one that rounds")
    if isinstance(constant, float) and constant == 0:
        raise ValueError("a division by 0")
    return Affine(1 / constant)


def _negate(input: None) -> Affine:
    return Affine(-1.0)


def _constant_beside_the_value(input: Any, other: Any) -> Constant:
    """The operand that is not the value, for which None stands: a float where it is one number.

    Raises:
        ValueError: neither is the value or both are, or the operand is no constant.
    """
    if (input is None) == (other is None):
        raise ValueError("an operation of the value with itself")
    constant = other if input is None else input
    if isinstance(constant, (int, float)):
        return float(constant)
    if not isinstance(constant, Tensor):
        raise ValueError(f"an operation with a {type(constant).__name__}, neither a number nor a tensor")
    if constant.requires_grad:
        raise ValueError(
            f"an operation with a trainable tensor of shape {tuple(constant.shape)}, where a constant is understood "
            "(a number, a buffer, a tensor without gradient)"
        )
    if constant.is_meta:
        raise ValueError("an operation with a tensor on the meta device, which holds no data")
    return float(constant) if constant.dim() <= 1 and constant.numel() == 1 else constant.detach()


def _squeeze(input: None, dim: int | None = None) -> Squeeze:
    if dim not in (1, -1):
        raise ValueError(f"squeeze({'' if dim is None else dim}), where squeeze(-1) is understood")
    return Squeeze()


def _log_softmax(
    input: None, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> LogSoftmax:
    if dim not in (1, -1, None) or dtype is not None:  # None is 1 for the outputs of a Linear
        raise ValueError(f"log_softmax over dimension {dim} with dtype {dtype}, where dimension 1 or -1 is understood")
    return LogSoftmax()


SPELLINGS = (
    Spelling((nn.LogSoftmax,), (F.log_softmax, torch.log_softmax, "log_softmax"), _log_softmax, " (at the end)"),
    Spelling((), (torch.squeeze, "squeeze"), _squeeze),
    Spelling((), (operator.add, torch.add, "add"), _add),
    Spelling((), (operator.sub, torch.sub, torch.subtract, "sub", "subtract"), _subtract),
    Spelling((), (operator.mul, torch.mul, torch.multiply, "mul", "multiply"), _multiply),
    Spelling((), (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide"), _divide),
    Spelling((), (operator.neg, torch.neg, torch.negative, "neg", "negative"), _negate),
)
"""The pieces as modules and calls of torch; flattening is read where shapes are."""
