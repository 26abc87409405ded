"""The ascent over the group: a trust region on the orbit, or the paper's fixed step.

Both walk along the metric step B ← B + ε (B Bᵀ) ∂f/∂B, that is g ← (I + εT)g with T = ∇_T f (Zhao et al. 2022,
arXiv 2205.10637, Algorithm 1). ‖∇L‖² grows without bound on GL(n), so ascending it ends at the growth cap; a step is
accepted only if the objective improves, everything is finite and the guards agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .action import (
    Direction,
    Gradient,
    Network,
    Plan,
    State,
    StepFailed,
    advance,
    domain_limit,
    parameter_list,
    pull_back_weights,
    squared_norm,
    steepest_direction,
    weights_of,
)
from .activation_space import Evaluation
from .loss import BatchLoss
from .objectives import GradNorm, Lookahead, LossOfParameters, Objective

# The first step moves the activations by this share of their norm; the radius then follows the successes.
FIRST_RADIUS = 0.02
GROWTH, SHRINKAGE = 2.0, 0.25
# A search whose radius has shrunk by this factor will find nothing more.
SMALLEST_RADIUS = 1e-6
# A growth factor this close to the cap counts as having reached it.
CAP_SHARE = 0.98


@dataclass(frozen=True)
class StepRecord:
    """One step of a search: the objective it reached (NaN if it could not be evaluated), the ε taken, and what was
    decided."""

    objective: float
    size: float
    accepted: bool
    note: str


@dataclass(frozen=True)
class Waypoint:
    """An accepted state, as far as its weights depend on it: the targets Y_l, the references R_l; and the objective."""

    targets: tuple[Tensor, ...]
    references: tuple[Tensor | None, ...]
    value: float


@dataclass(frozen=True)
class SearchResult:
    """The start and the accepted states in order; the records of all steps; why the search ended."""

    waypoints: tuple[Waypoint, ...]
    records: tuple[StepRecord, ...]
    reason: str


class Path(Protocol):
    """How an objective is evaluated at a state."""

    def evaluate(self, state: State) -> Evaluation: ...


@dataclass(frozen=True)
class FastPath:
    """In activation space; for objectives that offer `evaluate` and losses that see the parameters through the
    logits."""

    network: Network
    plan: Plan
    objective: GradNorm | Lookahead
    loss: BatchLoss
    output_delta: Tensor

    def evaluate(self, state: State) -> Evaluation:
        delta = self.output_delta
        if self.plan.first_order_inverse:  # the logits are not quite kept
            delta = self.loss.value_and_gradient(state.logits)[1]
        return self.objective.evaluate(self.network, self.plan, state, self.loss, delta)


@dataclass(frozen=True)
class GeneralPath:
    """With the weights formed at every step; for any objective and any loss of the parameters."""

    network: Network
    plan: Plan
    objective: Objective
    loss_of: LossOfParameters

    def evaluate(self, state: State) -> Evaluation:
        formed = weights_of(self.network, self.plan, state)
        with torch.enable_grad():
            parameters = parameter_list(formed, requires_grad=True)
            value = self.objective.value(self.loss_of, parameters)
        if not (isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad):
            raise ValueError("objective.value must return a scalar tensor that depends on the parameters")

        def gradient() -> Gradient:
            # One Hessian-vector product gives ∂f/∂[W', b'], the closed form of the action the rest.
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
            pairs = [(next(filled), None if bias is None else next(filled)) for bias in formed.biases]
            return pull_back_weights(self.network, self.plan, state, formed, pairs)

        return Evaluation(float(value.detach()), gradient)


def ascend(
    path: Path,
    network: Network,
    plan: Plan,
    start: State,
    evaluation: Evaluation,
    *,
    maximise: bool,
    steps: int,
    cap: float,
    guard: Callable[[State], str | None],
) -> SearchResult:
    """At most `steps` trial steps in a trust region of the activations' Frobenius norm over all moved layers.

    Args:
        evaluation: of the state `start`.
        cap: the value that a maximised objective may reach (math.inf for none); reaching it ends the search.
        guard: called with every state that improves the objective; a text it returns is the reason to refuse the state.
    """
    sign = 1.0 if maximise else -1.0
    state, value = start, evaluation.value
    waypoints, records = [_waypoint(start, value)], list[StepRecord]()
    radius = first_radius = FIRST_RADIUS * _moved_norm(plan, start)
    direction: Direction | None = None
    reason = "all steps taken"
    for _ in range(steps):
        if direction is None:
            direction = steepest_direction(network, plan, state, evaluation.gradient())
            if not (math.isfinite(direction.norm) and direction.norm > 0):
                reason = "the gradient on the group is zero" if direction.norm == 0 else "the gradient is not finite"
                break
        size = domain_limit(network, state, direction, sign * radius / direction.norm)
        taken = abs(size) * direction.norm
        trial_value, note, shrinkage = math.nan, None, SHRINKAGE
        try:
            trial = advance(network, plan, state, direction, size)
            trial_evaluation = path.evaluate(trial)
            trial_value = trial_evaluation.value
            if not math.isfinite(trial_value):
                note = "not finite"
            elif sign * trial_value <= sign * value:
                note = "no improvement"
            elif trial_value > cap:
                note, shrinkage = "above the growth cap", _share_to_cap(value, trial_value, cap)
            else:
                note = guard(trial)
        except StepFailed as failure:
            note = str(failure)
        records.append(StepRecord(trial_value, size, note is None, note or "accepted"))
        if note is None:
            state, value, evaluation, direction = trial, trial_value, trial_evaluation, None
            waypoints.append(_waypoint(state, value))
            radius = taken * GROWTH
            if value >= CAP_SHARE * cap:
                reason = "growth cap reached"
                break
        else:
            radius = taken * shrinkage
            if radius < SMALLEST_RADIUS * first_radius:
                reason = f"no acceptable step left ({note})"
                break
    return SearchResult(tuple(waypoints), tuple(records), reason)


def ascend_fixed(
    path: Path,
    network: Network,
    plan: Plan,
    start: State,
    evaluation: Evaluation,
    *,
    maximise: bool,
    steps: int,
    step_size: float,
) -> SearchResult:
    """The paper's rule, g ← (I ± step_size·∇_T f) g, `steps` times; a step is taken unless its result is not finite."""
    sign = 1.0 if maximise else -1.0
    state = start
    waypoints, records = [_waypoint(start, evaluation.value)], list[StepRecord]()
    reason = "all steps taken"
    for _ in range(steps):
        direction = steepest_direction(network, plan, state, evaluation.gradient())
        size = domain_limit(network, state, direction, sign * step_size)
        value, note = math.nan, None
        try:
            trial = advance(network, plan, state, direction, size)
            evaluation = path.evaluate(trial)
            value = evaluation.value
            if not math.isfinite(value):
                note = "not finite"
        except StepFailed as failure:
            note = str(failure)
        shortened = "accepted, shortened at the domain's edge" if abs(size) < step_size else "accepted"
        records.append(StepRecord(value, size, note is None, note or shortened))
        if note is not None:
            reason = f"step {len(records)} could not be taken: {note}"
            break
        state = trial
        waypoints.append(_waypoint(state, value))
    return SearchResult(tuple(waypoints), tuple(records), reason)


def _waypoint(state: State, value: float) -> Waypoint:
    return Waypoint(state.targets, state.references, value)


def _moved_norm(plan: Plan, state: State) -> float:
    """The Frobenius norm of all activations that the plan moves."""
    squares = [float(squared_norm(b)) for b, moved in zip(state.inputs[1:], plan.moved, strict=False) if moved]
    return math.sqrt(sum(squares))


def _share_to_cap(value: float, trial: float, cap: float) -> float:
    """The share of a step from `value` to `trial` that ends just below `cap` if the logarithm grows evenly."""
    share = math.log(cap / value) / math.log(trial / value)
    return min(0.9, max(0.1, 0.97 * share))
