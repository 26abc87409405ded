"""The settings of a teleport: methods and guards. Each checks itself and is plain values afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from torch import Tensor

from .checks import check_int, check_name, check_number
from .objectives import GradNorm, Lookahead, LooksAhead, Objective

GROUPS = GL, POSITIVE_DIAGONAL = ("gl", "positive_diagonal")
GRAD_NORM, LOOKAHEAD, NEXT_STEP = OBJECTIVES = ("grad_norm", "lookahead", "next_step")


@dataclass(frozen=True)
class Ascent:
    """A search in a trust region, in the direction of steepest ascent on the group.

    Args:
        objective: "grad_norm" maximises ‖∇L‖² up to `max_growth`; "lookahead" minimises the loss after one gradient
            step of length margin·lr; "next_step", in a `Teleporter`, that after `margin` times the optimizer's own next
            step; or an object as described in `symtele_cuda.model.objective`.
        lr: the learning rate of plain gradient descent, for "lookahead". A `Teleporter` reads it off its optimizer.
        margin: how many times longer than lr the step of "lookahead" is.
        steps: trial steps of the search.
        first_radius: the length of the first step, > 0, as a share of the norm of all that moves. The region adapts;
            a larger start saves steps where there are few.
        max_growth: the factor by which "grad_norm" may raise ‖∇L‖ (> 1, math.inf for no cap).
        group: "gl" moves hidden layers whose activation has an inverse and whose input the batch can match;
            "positive_diagonal" those with a positively homogeneous activation (LeakyReLU, ReLU or none), on any batch.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """

    objective: str | Objective = GRAD_NORM
    lr: float | None = None
    margin: float = 4.0
    steps: int = 10
    first_radius: float = 0.02
    max_growth: float = 2.0
    group: str = GL

    usual_change: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        _check_objective(self.objective)
        if self.lr is not None:
            check_number("lr", self.lr, above=0.0)
        if self.lr is not None and self.objective == NEXT_STEP:
            raise ValueError(f'lr must not be given for objective "{NEXT_STEP}", got {self.lr!r}')
        check_number("margin", self.margin, above=0.0)
        check_int("steps", self.steps, at_least=1)
        check_number("first_radius", self.first_radius, above=0.0)
        check_number("max_growth", self.max_growth, above=1.0, finite=False)
        check_name("group", self.group, GROUPS)

    @property
    def reads_step(self) -> bool:
        """Whether it takes an optimizer to say how far ahead the objective looks."""
        return self.objective == NEXT_STEP or (self.objective == LOOKAHEAD and self.lr is None)

    @property
    def looks_ahead(self) -> bool:
        """Whether the objective is the loss after a step."""
        return self.objective in (LOOKAHEAD, NEXT_STEP) or isinstance(self.objective, LooksAhead)

    def make_objective(self) -> Objective:
        """The objective of a teleport of its own.

        Raises:
            ValueError: it takes an optimizer to say what it is, or a rate that is not given.
        """
        if self.objective == GRAD_NORM:
            return GradNorm()
        if self.objective == NEXT_STEP:
            raise ValueError(f'objective must not be "{NEXT_STEP}" without an optimizer: it is for a Teleporter')
        if isinstance(self.objective, str):
            if self.lr is None:
                raise ValueError(
                    'lr must be given for objective "lookahead": the learning rate of plain gradient descent'
                )
            return Lookahead(rate=float(self.margin) * float(self.lr))
        return self.objective

    def cap(self, objective: Objective, gradient_norm: float | Tensor) -> float | Tensor:
        """The value that ‖∇L‖² may reach from a start with ‖∇L‖ = `gradient_norm`; no cap for other objectives."""
        if type(objective) is not GradNorm:  # a subclass has a scale of its own
            return math.inf
        largest = float(self.max_growth) * gradient_norm
        return largest * largest


def _check_objective(objective: object) -> None:
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            names = ", ".join(map(repr, OBJECTIVES))
            raise ValueError(f"objective must be one of {names} or an object, got {objective!r}")
        return
    if isinstance(objective, type) or not (
        isinstance(getattr(objective, "maximise", None), bool) and callable(getattr(objective, "value", None))
    ):
        raise TypeError(
            "objective must have an attribute maximise (bool) and a method value(loss_of, parameters), "
            f"got {type(objective).__name__}"
        )


class Method(Protocol):
    """What all methods say of themselves: `Ascent`, `Published` and `Standardise`.

    group: that of the sites. usual_change: what `Guards.max_weight_change` is for it unless it is given. looks_ahead:
    whether its objective is the loss after a step. reads_step: whether it takes an optimizer to say which.
    """

    @property
    def group(self) -> str: ...
    @property
    def usual_change(self) -> float: ...
    @property
    def looks_ahead(self) -> bool: ...
    @property
    def reads_step(self) -> bool: ...


@dataclass(frozen=True)
class Guards:
    """What a teleport must keep to be written; nothing is written where one of them is broken.

    Args:
        drift_tol: the largest |loss_after − loss_before| / |loss_before| on the batch, a loss's weight terms held at
            the old weights. The rounding of 16-bit models counts: 1e-4 is tight for them.
        holdout: (x, y) of a second batch; holdout_tol: by what share of its value its loss may rise. What a look ahead
            gains on the batch must also gain there: the step that the batch's gradient makes must leave the holdout
            with a lower loss than it would without the teleport. math.inf only reports.
        min_gain: where the objective looks ahead, how many times as much the step must lower the loss on the batch as
            it does without the teleport. Where it does not lower it even so, the steps are not too short there,
            whatever the gradient: there is no search, and no teleport. 0 asks for nothing but a lower objective.
        max_weight_change: the largest ‖[W', b'] − [W, b]‖_F / ‖[W, b]‖_F of a weight layer; math.inf bounds nothing.
            None is what suits the method: 2 for `Ascent`, 25 for `Standardise`, which scales whole layers.
        max_sensitivity: how many times as far as before noise in the inputs may move the logits. The samples are those
            of the holdout, or of the batch without one, see `TeleportReport`; math.inf only reports.
        rate: with `Standardise`, the rate at which training goes on: two gradient steps of this rate must not take the
            loss on the batch above both what it is now and what they take it to without the teleport. None asks for
            nothing. A `Teleporter` reads it off torch.optim.SGD.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """

    drift_tol: float = 1e-4
    holdout: tuple[Tensor, Tensor] | None = None
    holdout_tol: float = 0.05
    min_gain: float = 0.0
    max_weight_change: float | None = None
    max_sensitivity: float = 1.5
    rate: float | None = None

    def __post_init__(self) -> None:
        check_number("drift_tol", self.drift_tol, above=0.0, finite=False)
        check_number("holdout_tol", self.holdout_tol, at_least=0.0, finite=False)
        check_number("min_gain", self.min_gain, at_least=0.0)
        if self.max_weight_change is not None:
            check_number("max_weight_change", self.max_weight_change, above=0.0, finite=False)
        check_number("max_sensitivity", self.max_sensitivity, above=0.0, finite=False)
        if self.rate is not None:
            check_number("rate", self.rate, at_least=0.0)

    def suited_to(self, method: Method) -> Guards:
        """The same with what suits the method in the place of None."""
        if self.max_weight_change is not None:
            return self
        return replace(self, max_weight_change=method.usual_change)

    @property
    def bound_noise(self) -> bool:
        return math.isfinite(self.max_sensitivity)
