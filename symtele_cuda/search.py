"""The ascent over the group: a trust region on the orbit, or the paper's fixed step.

Both follow the direction of steepest ascent on the group, T = ∇_T f with g ← (I + εT)g, that is B ← B + ε (B Bᵀ) ∂f/∂B
(Zhao et al. 2022, arXiv 2205.10637, Algorithm 1); the trust region moves bounded activations along Y = σ⁻¹(B) instead,
see `Plan.along_targets`. ‖∇L‖² grows without bound on GL(n), so ascending it ends at the growth cap; the trust region
accepts a step only if the objective improves, everything is finite and the guards agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .action import Direction, Network, Plan, State, StepFailed, advance, domain_limit, squared_norm, steepest_direction
from .activation_space import Evaluation
from .paths import Path

# The first step moves the activations by this share of their norm. The radius doubles until a step fails, and grows
# carefully after that: a radius that has failed once is near the right one.
FIRST_RADIUS = 0.02
GROWTH, LATER_GROWTH, SHRINKAGE = 2.0, 1.2, 0.25
# A search whose radius has shrunk by this factor will find nothing more.
SMALLEST_RADIUS = 1e-6
# A value this close to the cap counts as having reached it.
CAP_SHARE = 0.98

ACCEPTED = "accepted"
SHORTENED = "accepted, shortened at the edge of the activation's domain"


@dataclass(frozen=True)
class StepRecord:
    """One step of a search: the objective it reached (NaN if it has none), the ε taken, and what was decided."""

    objective: float
    size: float
    accepted: bool
    note: str


@dataclass(frozen=True)
class Waypoint:
    """An accepted state, as far as its weights depend on it: the targets Y_l and the references R_l."""

    targets: tuple[Tensor, ...]
    references: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class SearchResult:
    """The start and the accepted states in order; the records of all steps; why the search ended."""

    waypoints: tuple[Waypoint, ...]
    records: tuple[StepRecord, ...]
    reason: str


@dataclass(frozen=True)
class Search:
    """What is searched: the objective through its path, up or down, in at most `steps` trial steps."""

    path: Path
    network: Network
    plan: Plan
    maximise: bool
    steps: int

    @property
    def sign(self) -> float:
        return 1.0 if self.maximise else -1.0

    def direction(self, state: State, evaluation: Evaluation) -> Direction:
        """Of steepest ascent from `state`."""
        return steepest_direction(self.network, self.plan, state, evaluation.gradient())

    def limit(self, state: State, direction: Direction, size: float) -> float:
        """`size`, shortened where an activation would leave its domain."""
        return domain_limit(self.network, state, direction, size)

    def advance(self, state: State, direction: Direction, size: float) -> tuple[State, Evaluation]:
        """The state a step further and its evaluation; StepFailed if there is none or its value is not finite."""
        trial = advance(self.network, self.plan, state, direction, size)
        evaluation = self.path.evaluate(trial)
        if not math.isfinite(evaluation.value):
            raise StepFailed("not finite")
        return trial, evaluation


def ascend(
    search: Search, start: State, evaluation: Evaluation, *, cap: float, guard: Callable[[State], str | None]
) -> SearchResult:
    """A trust region of the activations' Frobenius norm over all moved layers.

    Args:
        evaluation: of the state `start`.
        cap: the value that a maximised objective may reach (math.inf for none); reaching it ends the search.
        guard: called with every state that improves the objective; a text it returns is the reason to refuse the state.
    """
    state, sign = start, search.sign
    waypoints, records = [_waypoint(start)], list[StepRecord]()
    radius = first_radius = FIRST_RADIUS * _moved_norm(search.plan, start)
    direction: Direction | None = None
    failed = False

    def ended(reason: str) -> SearchResult:
        return SearchResult(tuple(waypoints), tuple(records), reason)

    for _ in range(search.steps):
        if direction is None:
            direction = search.direction(state, evaluation)
            if direction.norm == 0:
                return ended("the gradient on the group is zero")
            if not math.isfinite(direction.norm):
                return ended("the gradient on the group is not finite")
        size = search.limit(state, direction, sign * radius / direction.norm)
        shortened, radius = abs(size) * direction.norm < 0.999 * radius, abs(size) * direction.norm
        value, note, shrinkage = math.nan, None, SHRINKAGE
        try:
            trial, trial_evaluation = search.advance(state, direction, size)
            value = trial_evaluation.value
            if sign * value <= sign * evaluation.value:
                note = "no improvement"
            elif value > cap:
                note, shrinkage = "above the growth cap", _share_to_cap(evaluation.value, value, cap)
            else:
                note = guard(trial)
        except StepFailed as failure:
            note = str(failure)
        records.append(StepRecord(value, size, note is None, note or (SHORTENED if shortened else ACCEPTED)))
        if note is None:
            state, evaluation, direction = trial, trial_evaluation, None
            waypoints.append(_waypoint(state))
            radius *= LATER_GROWTH if failed else GROWTH
            if value >= CAP_SHARE * cap:
                return ended("growth cap reached")
        else:
            radius *= shrinkage
            failed = True
        if radius < SMALLEST_RADIUS * first_radius:
            return ended(f"no acceptable step left ({records[-1].note})")
    return ended("all steps taken")


def ascend_fixed(search: Search, start: State, evaluation: Evaluation, *, step_size: float) -> SearchResult:
    """The paper's rule, g ← (I ± step_size·∇_T f) g; a step is taken unless its result is not finite."""
    state = start
    waypoints, records = [_waypoint(start)], list[StepRecord]()
    for _ in range(search.steps):
        direction = search.direction(state, evaluation)
        size = search.limit(state, direction, search.sign * step_size)
        try:
            state, evaluation = search.advance(state, direction, size)
        except StepFailed as failure:
            records.append(StepRecord(math.nan, size, False, str(failure)))
            reason = f"step {len(records)} could not be taken: {failure}"
            return SearchResult(tuple(waypoints), tuple(records), reason)
        note = SHORTENED if abs(size) < step_size else ACCEPTED
        records.append(StepRecord(evaluation.value, size, True, note))
        waypoints.append(_waypoint(state))
    return SearchResult(tuple(waypoints), tuple(records), "all steps taken")


def _waypoint(state: State) -> Waypoint:
    return Waypoint(state.targets, state.references)


def _moved_norm(plan: Plan, state: State) -> float:
    """The Frobenius norm of all activations that the plan moves."""
    squares = [float(squared_norm(b)) for b, moved in zip(state.inputs[1:], plan.moved, strict=False) if moved]
    return math.sqrt(sum(squares))


def _share_to_cap(value: float, trial: float, cap: float) -> float:
    """The share of a step from `value` to `trial` that ends just below `cap` if the logarithm grows evenly."""
    if not 0 < value < cap:  # the paper's action may start above the cap, the network's own gradient being smaller
        return SHRINKAGE
    share = math.log(cap / value) / math.log(trial / value)
    return min(0.9, max(0.1, 0.97 * share))
