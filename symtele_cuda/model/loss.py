"""The loss on a batch as a function of the logits: the default, the checks of its targets, value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .pieces import Piece

LossFunction = Callable[[Any, Tensor], Tensor]
"""loss_fn(outputs, targets) → scalar. The outputs are what the model returns: a tensor, or another object."""

LossOfParameters = Callable[[Sequence[Tensor]], Tensor]
"""The loss on the batch as a function of a network's weights and biases."""


@dataclass(frozen=True)
class Losses:
    """Losses as functions of a list of parameters: on the batch; the same with its weight terms, if it has any, held at
    the model's own weights (`data`); and on the holdout, if there is one."""

    batch: LossOfParameters
    data: LossOfParameters
    holdout: LossOfParameters | None
    weight_terms: bool


class LossModule(nn.Module):
    """The user's loss of the user's model, so that weights can be swapped in for both at once."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_fn(self.model(x), y)


@dataclass(frozen=True)
class BatchLoss:
    """L(logits) = loss_fn(output(logits), targets), with what the model does behind its last Linear as `output`.

    default: whether the function is `default_loss`, chosen by the targets, and not the user's.
    """

    function: LossFunction
    targets: Tensor
    output: Piece
    default: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """L as a scalar tensor."""
        loss = self.function(self.output.forward(logits), self.targets)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor (0 dimensions), got {got}")
        return loss

    def value(self, logits: Tensor) -> Tensor:
        """L as a scalar tensor without its graph."""
        with torch.no_grad():
            return self(logits)

    def value_and_gradient(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """L without its graph, and ∂L/∂logits (n×classes); of a default loss in closed form, without autograd."""
        if self.default:
            value, gradient = _default_value_and_gradient(self.output.forward(logits), self.targets)
            return value, self.output.pull_back(gradient, logits)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = self(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient


def default_loss(targets: Tensor) -> LossFunction:
    """Cross entropy (mean) for integer targets, mean squared error for floating ones.

    Of log-probabilities, as log_softmax gives them, cross entropy is the negative log-likelihood (`NLLLoss`).
    """
    return F.mse_loss if targets.is_floating_point() else F.cross_entropy


def _default_value_and_gradient(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """−1/n Σ log p_y and (p − 1_y) / n with p = softmax(o), or the mean of (o − y)² and 2 (o − y) / N, of outputs o."""
    if targets.is_floating_point():  # of another dtype than the outputs, the wider of the two counts
        gradient = (outputs - targets) * (2 / outputs.numel())
        return F.mse_loss(outputs, targets), gradient.to(outputs.dtype)
    log_p = F.log_softmax(outputs, dim=1)
    chosen, share = targets.unsqueeze(1), 1 / len(outputs)
    hit = torch.full_like(chosen, -share, dtype=outputs.dtype)
    return F.nll_loss(log_p, targets), log_p.exp().mul_(share).scatter_add_(1, chosen, hit)


def check_default_targets(targets: Tensor, shape: Sequence[int]) -> None:
    """Raise unless `targets` fit the default loss of outputs of this shape, (n, classes), or (n,) if squeezed.

    Raises:
        TypeError: targets are neither int64 class indices nor floating point.
        ValueError: class indices are not of shape (n,), not in 0..classes−1, or for outputs without classes; floating
            targets are not of the outputs' shape or not finite.
    """
    n, *classes = shape
    if targets.is_floating_point():
        if tuple(targets.shape) != tuple(shape):
            raise ValueError(
                f"targets of the mean squared error must have the shape of the outputs {tuple(shape)}, "
                f"got {tuple(targets.shape)}"
            )
        if not bool(torch.isfinite(targets).all()):
            raise ValueError("targets must be finite, got NaN or Inf")
    elif targets.dtype == torch.int64:
        if tuple(targets.shape) != (n,):
            raise ValueError(f"targets must have shape ({n},), one class index a sample, got {tuple(targets.shape)}")
        if not classes:
            raise ValueError(
                f"targets must be floating point values for outputs of shape ({n},), one number a sample, got class "
                "indices; pass a loss_fn for two classes, such as binary_cross_entropy_with_logits"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes[0]:
            raise ValueError(f"targets must be class indices in 0..{classes[0] - 1}, got values from {low} to {high}")
    else:
        raise TypeError(f"targets must be int64 class indices or floating point values, got {targets.dtype}")


@dataclass(frozen=True)
class LossAtStart:
    """L and ∂L/∂logits at the start of a teleport, and whether L sees the weights other than through the logits."""

    value: float
    gradient: Tensor
    weight_terms: bool


def examine(loss: BatchLoss, logits: Any, parameters: Sequence[Tensor], samples: str = "batch") -> LossAtStart:
    """Call the loss for the first time. logits: what the model returns, a tensor or several in any container. samples:
    what errors call those that the logits are of.

    Raises:
        ValueError: the loss is no scalar, is not finite, or does not depend on the logits.
        TypeError: the loss takes targets and outputs in the other order. Other errors of the loss arrive as they are.
    """
    if loss.default:  # it sees nothing but the logits
        value, gradient = loss.value_and_gradient(logits.detach())
        return LossAtStart(finite_loss(value, samples), gradient, False)
    with torch.enable_grad():
        leaf = tree_map(_as_leaf, logits)
        try:
            value = loss(leaf)
        except Exception as error:
            _check_order(loss, leaf, error)
            raise
        number = finite_loss(value.detach(), samples)
        if not value.requires_grad:
            raise ValueError("loss_fn must depend on the model's output, got a value that carries no gradient")
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        leaves = [each for each in tree_leaves(leaf) if isinstance(each, Tensor) and each.requires_grad]
        gradients = torch.autograd.grad(value, [*leaves, *trainable], allow_unused=True)
    gradient, direct = gradients[0], gradients[len(leaves) :]
    if all(each is None for each in gradients[: len(leaves)]):
        raise ValueError("loss_fn must depend on the model's output, got a value that does not")
    return LossAtStart(number, gradient, any(term is not None for term in direct))


def _as_leaf(value: Any) -> Any:
    """A floating tensor without its past; anything else as it is."""
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _check_order(loss: BatchLoss, logits: Tensor, error: Exception) -> None:
    """Raise if the loss, which has failed, works with its arguments swapped."""
    try:
        swapped = loss.function(loss.targets, loss.output.forward(logits))
        works = isinstance(swapped, Tensor) and swapped.ndim == 0 and swapped.requires_grad
    except Exception:
        works = False
    if works:
        raise TypeError(
            "loss_fn must take (outputs, targets) in this order, got one that fails with "
            f"{type(error).__name__} and works with the two swapped"
        ) from error


def finite_loss(value: Tensor, samples: str) -> float:
    """The loss on these samples as a number; raises ValueError unless it is finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"loss_fn must be finite on the {samples}, got {number}")
    return number
