"""How far one gradient step of the best length can lower the loss: what a closed-form teleport is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..measure import WeightsOnBatch
from ..model.loss import LossOfParameters

SHARES = tuple(2.0**exponent for exponent in range(-4, 3))
"""The lengths that are tried, as shares of |L| / ‖∇L‖², at which the loss's tangent along the step reaches zero."""


@dataclass(frozen=True)
class BestDecrease:
    """f = max_η L(θ) − L(θ − η∇L(θ)) over the lengths η = s |L| / ‖∇L‖², s = 1/16, 1/8, …, 4; at least 0.

    It has a value and no gradient: nothing searches for it.
    """

    maximise: ClassVar[bool] = True

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        loss = loss_of(parameters)
        gradients = torch.autograd.grad(loss, list(parameters), materialize_grads=True)
        squared = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()

        def loss_after(rate: Tensor) -> Tensor:
            return loss_of([p - rate.to(p.dtype) * g for p, g in zip(parameters, gradients, strict=True)])

        with torch.no_grad():
            return _best(loss, squared, loss_after)

    def measure(self, weights: WeightsOnBatch) -> tuple[Tensor, None]:
        """The same of formed weights: through n×n matrices where the batch is small, else through the gradient."""
        loss, squared = weights.loss.value(weights.outputs[-1]), weights.squared_gradient_norm
        if len(weights.inputs[0]) <= min(batch.shape[1] for batch in weights.inputs):
            return _best(loss, squared, lambda rate: weights.loss_after(_scaled(weights.deltas, -rate))), None
        return _best(loss, squared, lambda rate: weights.loss.value(weights.stepped(rate))), None


def _scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    return [tensor * factor.to(tensor.dtype) for tensor in tensors]


def _best(loss: Tensor, squared: Tensor, loss_after: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest decrease; a length that leads to a loss that is not finite counts for nothing."""
    unit = loss.double().abs() / squared
    after = torch.stack([loss_after(share * unit).double() for share in SHARES])
    return (loss.double() - after.nan_to_num(nan=torch.inf)).max().clamp(min=0)
