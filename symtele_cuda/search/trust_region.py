"""The ascent over the group in a trust region, with every decision on the host; `device` takes the same ones on a GPU.

‖∇L‖² grows without bound on the group, so ascending it ends at the growth cap. A step is accepted only if the objective
improves, everything is finite and the figures of the point keep their bounds: `kernels.judgement` is the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..guards import (
    ABOVE_CAP,
    ACCEPTED,
    ALL_STEPS,
    CAP_REACHED,
    GRADIENT_NOT_FINITE,
    NO_IMPROVEMENT,
    NO_STEP_LEFT,
    NONE_IMPROVED,
    NOT_FINITE,
    SHORTENED,
    ZERO_GRADIENT,
    Bounds,
)
from ..kernels.judgement import (
    AT_THE_CAP,
    DIRECTION_NOT_FINITE,
    GOES_ON,
    RADIUS_TOO_SMALL,
    ZERO_DIRECTION,
    Control,
    Trial,
    Verdict,
    judge,
)
from ..orbits import Hindrance, Orbit
from ..report import StepRecord

ENDS = {
    ZERO_DIRECTION: ZERO_GRADIENT,
    DIRECTION_NOT_FINITE: GRADIENT_NOT_FINITE,
    AT_THE_CAP: CAP_REACHED,
    RADIUS_TOO_SMALL: NO_STEP_LEFT,
}
"""What a search says of the ends of `judgement`."""


@dataclass(frozen=True)
class Search:
    """What is searched: an orbit, up or down, in at most `steps` trial steps, the first as long as `first_radius` times
    the orbit's scale. cap: the value that a maximised objective may reach, math.inf for none; reaching it ends the
    search. bounds: what a point that improves the objective must keep besides."""

    orbit: Orbit
    maximise: bool
    steps: int
    first_radius: float
    cap: float
    bounds: Bounds


@dataclass(frozen=True)
class SearchResult:
    """The start and the accepted points in order, as waypoints; the records of all steps; why the search ended."""

    waypoints: tuple[Any, ...]
    records: tuple[StepRecord, ...]
    reason: str


def ascend(search: Search) -> SearchResult:
    """The search from g = I."""
    orbit, sign = search.orbit, 1.0 if search.maximise else -1.0
    point = orbit.start()
    evaluation = orbit.evaluate(point)
    first_radius = search.first_radius * float(orbit.scale(point))
    control = Control(float(evaluation.value), first_radius, False, GOES_ON, first_radius)
    waypoints, records = [orbit.waypoint(point)], list[StepRecord]()
    direction, norm = None, math.nan
    while len(records) < search.steps and control.ended == GOES_ON:
        if direction is None:
            direction = orbit.direction(point, evaluation)
            norm = float(direction.norm)
            if norm == 0 or not math.isfinite(norm):
                control.ended = ZERO_DIRECTION if norm == 0 else DIRECTION_NOT_FINITE
                break
        wanted = torch.tensor(sign * control.radius / norm, dtype=torch.float64, device=direction.norm.device)
        size = orbit.limit(point, direction, wanted)
        reached, hindrances = orbit.advance(point, direction, size)
        hindered = [bool(flag) for flag, _ in hindrances]
        trial_evaluation = None if any(hindered) else orbit.evaluate(reached)
        value = math.nan if trial_evaluation is None else float(trial_evaluation.value)
        look = _Look(search, reached)
        trial = Trial(float(size), norm, value, hindered, look, search.cap, search.maximise)
        verdict = judge(control, trial)
        records.append(record(verdict, trial.size, value, [text for _, text in hindrances], look.broken_text))
        if verdict.accepted and trial_evaluation is not None:
            point, evaluation, direction = reached, trial_evaluation, None
            waypoints.append(orbit.waypoint(point))
    return SearchResult(tuple(waypoints), tuple(records), why_ended(ENDS.get(control.ended, ALL_STEPS), records))


class _Look:
    """Looks at the figures of a point when it is asked which bounds they break."""

    def __init__(self, search: Search, point: Any) -> None:
        self.search, self.point = search, point
        self.figures: list[Tensor] = []

    def __call__(self) -> list[bool]:
        self.figures = self.search.orbit.figures(self.point)
        return [bool(flag) for flag in self.search.bounds.broken_by(self.figures)]

    def broken_text(self, bound: int) -> str:
        """What the figure says that has broken the bound."""
        return self.search.bounds.texts[bound](float(self.figures[bound]))


def record(
    verdict: Verdict, size: float, value: float, hindrances: Sequence[str], broken_text: Callable[[int], str]
) -> StepRecord:
    """The record of a step: its note in words, and NaN for a value that it does not have."""
    notes = (*hindrances, NOT_FINITE, NO_IMPROVEMENT, ABOVE_CAP)
    if verdict.note == 0:
        text = SHORTENED if verdict.shortened else ACCEPTED
    elif verdict.note <= len(notes):
        text = notes[verdict.note - 1]
    else:
        text = broken_text(verdict.note - len(notes) - 1)
    without_value = 0 < verdict.note <= len(hindrances) + 1
    return StepRecord(math.nan if without_value else value, size, verdict.accepted, text)


def holding(hindrances: Sequence[Hindrance]) -> str | None:
    """The first of the hindrances that holds."""
    return next((text for flag, text in hindrances if bool(flag)), None)


def why_ended(reason: str, records: Sequence[StepRecord]) -> str:
    """What the end of a search says: `reason`, or where it took no step why it took none."""
    refused = [record.note for record in records if not record.accepted]
    if not refused or len(refused) < len(records):
        return reason
    if set(refused) == {NO_IMPROVEMENT}:
        return NONE_IMPROVED
    return f"no trial step was accepted: {next(note for note in reversed(refused) if note != NO_IMPROVEMENT)}"
