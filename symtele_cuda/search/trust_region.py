"""The ascent over the group: a trust region on the orbit, or the paper's fixed step.

Both follow the direction of steepest ascent on the group, T = ∇_T f with g ← (I + εT)g, that is B ← B + ε (B Bᵀ) ∂f/∂B
(Zhao et al. 2022, arXiv 2205.10637, Algorithm 1), and of the positive diagonal group its like, B ← B exp(ε diag T). The
trust region moves bounded activations along Y = σ⁻¹(B) instead, see `Plan.along_targets`. ‖∇L‖² grows without bound on
either group, so ascending it ends at the growth cap; the trust region accepts a step only if the objective improves,
everything is finite and the losses and the sensitivity to noise keep their bounds.

Every decision is taken on the host here; `device_search` takes the same ones on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.network import Network
from ..orbits.action import (
    Direction,
    Hindrance,
    Plan,
    State,
    Waypoint,
    advance,
    domain_limit,
    scale_limit,
    steepest_direction,
)
from ..orbits.activation_space import Evaluation
from ..orbits.paths import Path
from ..report import StepRecord

# The radius doubles until a step fails, and grows carefully after that: a radius that has failed once is near the right
# one.
GROWTH, LATER_GROWTH, SHRINKAGE = 2.0, 1.2, 0.25
# A search whose radius has shrunk by this factor will find nothing more.
SMALLEST_RADIUS = 1e-6
# A value this close to the cap counts as having reached it.
CAP_SHARE = 0.98

# Where a step to above the cap is cut to this share of the way that seems to lead there, within these limits.
CAP_AIM, LEAST_SHARE, LARGEST_SHARE = 0.97, 0.1, 0.9
# A step is called shortened where its limits left less than this share of the radius.
SHORTENED_BELOW = 0.999

ACCEPTED = "accepted"
SHORTENED = "accepted, shortened at the edge of the activation's domain, or of the change of a scale"
NOT_FINITE, NO_IMPROVEMENT, ABOVE_CAP = "not finite", "no improvement", "above the growth cap"
ZERO_GRADIENT, GRADIENT_NOT_FINITE = "the gradient on the group is zero", "the gradient on the group is not finite"
CAP_REACHED, ALL_STEPS = "growth cap reached", "all steps taken"
NO_STEP_LEFT = "no acceptable step left"
NONE_IMPROVED = "no trial step improved the objective"
STEPS_LONG_ENOUGH = "the step ahead does not lower the loss, so that a larger gradient is no gain"


@dataclass(frozen=True)
class Bounds:
    """What a state must keep to be accepted: `figures` of it, float64 scalars, each between its two `limits`.

    texts: for each figure, what a value of it has broken.
    """

    figures: Callable[[State], list[Tensor]]
    limits: tuple[tuple[float | Tensor, float | Tensor], ...]
    texts: tuple[Callable[[float], str], ...]

    def broken_by(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Which of the figures lie outside, or are NaN, with these values: bool scalars."""
        pairs = zip(values, self.limits, strict=True)
        return [((value >= low) & (value <= high)).logical_not() for value, (low, high) in pairs]


@dataclass(frozen=True)
class SearchResult:
    """The start and the accepted states in order; the records of all steps; why the search ended."""

    waypoints: tuple[Waypoint, ...]
    records: tuple[StepRecord, ...]
    reason: str


@dataclass(frozen=True)
class Search:
    """What is searched: the objective through its path, up or down, in at most `steps` trial steps.

    first_radius: the share of their norm by which the first step of a trust region moves the activations.
    """

    path: Path
    network: Network
    plan: Plan
    maximise: bool
    steps: int
    first_radius: float

    @property
    def sign(self) -> float:
        return 1.0 if self.maximise else -1.0

    def direction(self, state: State, evaluation: Evaluation) -> Direction:
        """Of steepest ascent from `state`."""
        return steepest_direction(self.network, self.plan, state, evaluation.gradient())

    def limit(self, state: State, direction: Direction, size: Tensor) -> Tensor:
        """`size`, shortened where an activation would leave its domain or a scale change too much."""
        return scale_limit(direction, domain_limit(self.network, state, direction, size))

    def advance(self, state: State, direction: Direction, size: Tensor) -> tuple[State, tuple[Hindrance, ...]]:
        """The state a step of `size` further, and what may hinder the step."""
        return advance(self.network, self.plan, state, direction, size)

    def moved_norm(self, state: State) -> Tensor:
        """The Frobenius norm of all activations that the plan moves: a float64 scalar."""
        moved = [b for b, moved in zip(state.inputs[1:], self.plan.moved, strict=False) if moved]
        return self.network.products.dot_sum(moved, moved, root=True)


@dataclass(frozen=True)
class _Trial:
    """A step tried on the host: its state, evaluation and value where it has them, and why it cannot be taken."""

    state: State
    evaluation: Evaluation | None
    value: float
    hindrance: str | None


def ascend(
    search: Search, start: State, evaluation: Evaluation, *, cap: float, bounds: Bounds
) -> SearchResult:
    """A trust region of the activations' Frobenius norm over all moved layers.

    Args:
        evaluation: of the state `start`.
        cap: the value that a maximised objective may reach (math.inf for none); reaching it ends the search.
        bounds: what a state that improves the objective must keep besides.
    """
    state, value, sign = start, float(evaluation.value), search.sign
    waypoints, records = [start.waypoint], list[StepRecord]()
    radius = first_radius = search.first_radius * float(search.moved_norm(start))
    direction: Direction | None = None
    norm, failed = math.nan, False

    def ended(reason: str) -> SearchResult:
        return SearchResult(tuple(waypoints), tuple(records), why_ended(reason, records))

    for _ in range(search.steps):
        if direction is None:
            direction = search.direction(state, evaluation)
            norm = float(direction.norm)
            if norm == 0:
                return ended(ZERO_GRADIENT)
            if not math.isfinite(norm):
                return ended(GRADIENT_NOT_FINITE)
        size = search.limit(state, direction, _scalar(sign * radius / norm, direction))
        length = abs(float(size)) * norm
        shortened, radius = length < SHORTENED_BELOW * radius, length
        trial = _try(search, state, direction, size)
        note, shrinkage = trial.hindrance, SHRINKAGE
        if note is None and sign * trial.value <= sign * value:
            note = NO_IMPROVEMENT
        elif note is None and trial.value > cap:
            note, shrinkage = ABOVE_CAP, _share_to_cap(value, trial.value, cap)
        elif note is None:
            note = _broken(bounds, trial.state)
        records.append(
            StepRecord(trial.value, float(size), note is None, note or (SHORTENED if shortened else ACCEPTED))
        )
        if note is None:
            assert trial.evaluation is not None
            state, evaluation, value, direction = trial.state, trial.evaluation, trial.value, None
            waypoints.append(state.waypoint)
            radius *= LATER_GROWTH if failed else GROWTH
            if value >= CAP_SHARE * cap:
                return ended(CAP_REACHED)
        else:
            radius *= shrinkage
            failed = True
        if radius < SMALLEST_RADIUS * first_radius:
            return ended(NO_STEP_LEFT)
    return ended(ALL_STEPS)


def ascend_fixed(search: Search, start: State, evaluation: Evaluation, *, step_size: float) -> SearchResult:
    """The paper's rule, g ← (I ± step_size·∇_T f) g; a step is taken unless its result is not finite."""
    state = start
    waypoints, records = [start.waypoint], list[StepRecord]()
    for _ in range(search.steps):
        direction = search.direction(state, evaluation)
        size = search.limit(state, direction, _scalar(search.sign * step_size, direction))
        trial = _try(search, state, direction, size)
        if trial.hindrance is not None:
            records.append(StepRecord(math.nan, float(size), False, trial.hindrance))
            return SearchResult(tuple(waypoints), tuple(records), not_taken(len(records), trial.hindrance))
        assert trial.evaluation is not None
        state, evaluation = trial.state, trial.evaluation
        note = SHORTENED if abs(float(size)) < step_size else ACCEPTED
        records.append(StepRecord(trial.value, float(size), True, note))
        waypoints.append(state.waypoint)
    return SearchResult(tuple(waypoints), tuple(records), ALL_STEPS)


def holding(hindrances: Sequence[Hindrance]) -> str | None:
    """The first of the hindrances that holds."""
    return next((text for flag, text in hindrances if bool(flag)), None)


def why_ended(reason: str, records: Sequence[StepRecord]) -> str:
    """What the end of a trust region's search says: `reason`, or where it took no step why it took none."""
    refused = [record.note for record in records if not record.accepted]
    if not refused or len(refused) < len(records):
        return reason
    if set(refused) == {NO_IMPROVEMENT}:
        return NONE_IMPROVED
    return f"no trial step was accepted: {next(note for note in reversed(refused) if note != NO_IMPROVEMENT)}"


def not_taken(step: int, hindrance: str) -> str:
    """Why a search with fixed steps ends."""
    return f"step {step} could not be taken: {hindrance}"


def _try(search: Search, state: State, direction: Direction, size: Tensor) -> _Trial:
    trial, hindrances = search.advance(state, direction, size)
    if (hindrance := holding(hindrances)) is not None:
        return _Trial(trial, None, math.nan, hindrance)
    evaluation = search.path.evaluate(trial)
    value = float(evaluation.value)
    if not math.isfinite(value):
        return _Trial(trial, None, math.nan, NOT_FINITE)
    return _Trial(trial, evaluation, value, None)


def _broken(bounds: Bounds, state: State) -> str | None:
    """What the first of the figures says that `state` does not keep within its limits."""
    values = bounds.figures(state)
    broken = zip(bounds.broken_by(values), bounds.texts, values, strict=True)
    return next((text(float(value)) for flag, text, value in broken if bool(flag)), None)


def _scalar(value: float, direction: Direction) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=direction.norm.device)


def _share_to_cap(value: float, trial: float, cap: float) -> float:
    """The share of a step from `value` to `trial` that ends just below `cap` if the logarithm grows evenly."""
    if not 0 < value < cap:  # the paper's action may start above the cap, the network's own gradient being smaller
        return SHRINKAGE
    share = math.log(cap / value) / math.log(trial / value)
    return min(LARGEST_SHARE, max(LEAST_SHARE, CAP_AIM * share))
