"""The trust region's rule on plain numbers: whether a step is taken, and how long the next one is.

The search on the host decides by it. The kernel csrc/judge.cuh is the same rule on a device, and is tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Rules(NamedTuple):
    """The constants of the trust region, in the order in which the kernel reads them.

    growth, later_growth: the factor of the radius after a step that was taken; the second once a step has failed, for
    then the radius is near the right one. shrinkage: that after a step that was not taken. smallest_radius: a search
    whose radius has shrunk by this factor will find nothing more. cap_share: a value this close to the cap has reached
    it. cap_aim, least_share, largest_share: a step to above the cap is cut to the share of the way that seems to lead
    to `cap_aim` of the cap, within these limits. shortened_below: a step is called shortened where the limits of its
    orbit left less than this share of the radius.
    """

    growth: float = 2.0
    later_growth: float = 1.2
    shrinkage: float = 0.25
    smallest_radius: float = 1e-6
    cap_share: float = 0.98
    cap_aim: float = 0.97
    least_share: float = 0.1
    largest_share: float = 0.9
    shortened_below: float = 0.999


RULES = Rules()

# What a verdict says of the end of a search.
GOES_ON, AFTER_THE_END, ZERO_DIRECTION, DIRECTION_NOT_FINITE, AT_THE_CAP, RADIUS_TOO_SMALL = range(6)
# The notes between the hindrances and the bounds.
FLAWS = NOT_FINITE, NO_IMPROVEMENT, ABOVE_CAP = (1, 2, 3)


@dataclass
class Control:
    """Where a trust region is: the value and the radius, whether a step has failed, how it has ended, and its first
    radius."""

    value: float
    radius: float
    failed: bool
    ended: int
    first_radius: float


@dataclass(frozen=True)
class Trial:
    """A step that was tried.

    size: ε. norm: that of its direction. value: the objective that it reached. hindered: the flags of its hindrances.
    broken: the flags of the bounds, asked for only where all else is well. cap: the largest value that is allowed.
    """

    size: float
    norm: float
    value: float
    hindered: Sequence[bool]
    broken: Callable[[], Sequence[bool]]
    cap: float
    maximise: bool


class Verdict(NamedTuple):
    """What becomes of a trial.

    note: 0, or the place, counted from 1, of the first that holds of the hindrances, `FLAWS`, the bounds. end: how the
    search stands, GOES_ON or how it has ended.
    """

    accepted: bool
    shortened: bool
    note: int
    end: int


def judge(control: Control, trial: Trial, rules: Rules = RULES) -> Verdict:
    """Whether the step is taken. `control` becomes that of the next step.

    The value counts up, or down unless `maximise`; a step is taken if the value improves, is finite and at most the
    cap, and nothing hinders it.
    """
    length = abs(trial.size) * trial.norm
    shortened = length < rules.shortened_below * control.radius
    stuck = ZERO_DIRECTION if trial.norm == 0 else GOES_ON if math.isfinite(trial.norm) else DIRECTION_NOT_FINITE
    note = _first_flaw(control, trial)
    accepted = note == 0 and control.ended == stuck == GOES_ON
    shrinkage = rules.shrinkage
    if note == len(trial.hindered) + ABOVE_CAP:
        shrinkage = _share_to_cap(control.value, trial.value, trial.cap, rules)
    growth = rules.later_growth if control.failed else rules.growth
    radius = length * (growth if accepted else shrinkage)
    if control.ended != GOES_ON:
        end = AFTER_THE_END
    elif stuck != GOES_ON:
        end = stuck
    elif accepted and trial.value >= rules.cap_share * trial.cap:
        end = AT_THE_CAP
    else:
        end = RADIUS_TOO_SMALL if radius < rules.smallest_radius * control.first_radius else GOES_ON
    control.value = trial.value if accepted else control.value
    control.radius, control.failed, control.ended = radius, control.failed or not accepted, end
    return Verdict(accepted, shortened, note, end)


def _first_flaw(control: Control, trial: Trial) -> int:
    """The note of a verdict."""
    sign = 1.0 if trial.maximise else -1.0
    if any(trial.hindered):
        return 1 + [*trial.hindered].index(True)
    flaw = 0
    if not math.isfinite(trial.value):
        flaw = NOT_FINITE
    elif sign * trial.value <= sign * control.value:
        flaw = NO_IMPROVEMENT
    elif trial.value > trial.cap:
        flaw = ABOVE_CAP
    if flaw:
        return len(trial.hindered) + flaw
    broken = [*trial.broken()]
    return len(trial.hindered) + len(FLAWS) + 1 + broken.index(True) if any(broken) else 0


def _share_to_cap(value: float, reached: float, cap: float, rules: Rules) -> float:
    """The share of a step from `value` to `reached` that ends just below `cap` if the logarithm grows evenly."""
    if not 0 < value < cap:
        return rules.shrinkage
    share = math.log(cap / value) / math.log(reached / value)
    return min(rules.largest_share, max(rules.least_share, rules.cap_aim * share))
