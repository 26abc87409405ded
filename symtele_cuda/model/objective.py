"""What an objective of a teleport is: an object with an attribute `maximise` and a method `value`.

    maximise                       True to ascend, False to descend
    value(loss_of, parameters)     the objective as a differentiable scalar tensor; `parameters` is the list of the
                                   network's weights and biases in the order of `model.parameters()` of its Linear
                                   layers, each with requires_grad, and `loss_of(parameters)` the loss on the batch.
                                   Gradients inside must be taken with create_graph=True.

That is the general path: the weights are formed at every step. An objective may have a fast path besides, in activation
space, for losses that depend on the parameters only through the logits: see `FastObjective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor

from .loss import LossOfParameters


@runtime_checkable
class Objective(Protocol):
    """See the module's text."""

    @property
    def maximise(self) -> bool: ...

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor: ...


@runtime_checkable
class LooksAhead(Objective, Protocol):
    """An objective that is the loss at other parameters, those that a step from the given ones would reach.

    ahead(loss_of, parameters)     these parameters, as tensors differentiable in the given ones
    """

    def ahead(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> list[Tensor]: ...


class MeasuredObjective(Objective, Protocol):
    """An objective with a value of its own for formed weights, without autograd.

    measure(weights)               its value for `WeightsOnBatch`; and where it looks ahead the s_l of the step
                                   W_l ← W_l + s_lᵀ B_l that it looks to, else None
    """

    def measure(self, weights: Any) -> tuple[Tensor, list[Tensor] | None]: ...


class FastObjective(MeasuredObjective, Protocol):
    """An objective that activation space knows.

    evaluate(point, output_delta)  its value at a `BatchPoint` with ∂L/∂logits, and its gradient there, an `Evaluation`
    """

    def evaluate(self, point: Any, output_delta: Tensor) -> Any: ...


class GivenGradients(Objective, Protocol):
    """An objective that is a function of the parameters and of ∇L, which an exact symmetry knows along its orbit.

    value_given(loss_of, parameters, gradients)    its value, with ∇L(parameters) given
    """

    def value_given(
        self, loss_of: LossOfParameters, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Tensor: ...


def knows_gradients(objective: Objective) -> TypeGuard[GivenGradients]:
    """Whether the objective's own class says what it is for given gradients; a subclass may have another value."""
    return "value_given" in vars(type(objective))


def has_fast_path(objective: Objective) -> TypeGuard[FastObjective]:
    """Whether activation space knows the objective: by its own class, for a subclass may have another value."""
    return "evaluate" in vars(type(objective))


def knows_weights(objective: Objective) -> TypeGuard[MeasuredObjective]:
    """Whether the objective's own class measures formed weights."""
    return "measure" in vars(type(objective))
