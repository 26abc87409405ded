"""Every refusal of a teleport, with its text: of a step during the search, and of the weights at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .measure import Measurement, relative_change
from .methods.standardise import LAST, Standardise
from .settings import Guards

# What a step of a search says of itself, and a search of its end.
ACCEPTED = "accepted"
SHORTENED = "accepted, shortened at the edge of where the group acts"
NOT_FINITE, NO_IMPROVEMENT, ABOVE_CAP = "not finite", "no improvement", "above the growth cap"
ZERO_GRADIENT, GRADIENT_NOT_FINITE = "the gradient on the group is zero", "the gradient on the group is not finite"
CAP_REACHED, ALL_STEPS = "growth cap reached", "all steps taken"
NO_STEP_LEFT = "no acceptable step left"
NONE_IMPROVED = "no trial step improved the objective"

# What a teleport says of its weights.
STANDARDISED = "standardised"
STEPS_AHEAD = 2
"""How many steps of `Guards.rate` must not raise the loss: one that is too long shows in the second at the latest."""
STEPS_LONG_ENOUGH = "the step ahead does not lower the loss, so that a larger gradient is no gain"
LATER_TAKEN_BACK = "later steps were taken back: the weights formed from them broke a guard"


@dataclass(frozen=True)
class Bounds:
    """What a point must keep to be accepted: `limit`, the largest value of each of the `figures` of its orbit.

    texts: for each figure, what a value of it has broken.
    """

    limits: tuple[float | Tensor, ...]
    texts: tuple[Callable[[float], str], ...]

    @classmethod
    def make(cls, guards: Guards, sensitivity: float | Tensor, holdout: float | Tensor | None) -> Bounds:
        """Those on the holdout's loss, where there is one, and on the sensitivity to noise, where it is bounded, given
        both at the start."""
        limits: list[float | Tensor] = []
        texts: list[Callable[[float], str]] = []
        if holdout is not None:
            limits.append(most_on_holdout(guards, holdout))
            texts.append(lambda value: on_holdout(float(holdout), value))
        if guards.bound_noise:
            limits.append(guards.max_sensitivity * sensitivity)
            texts.append(lambda value: on_noise(guards, float(sensitivity), value))
        return cls(tuple(limits), tuple(texts))

    def broken_by(self, figures: Sequence[Tensor]) -> list[Tensor]:
        """Which of the figures lie beyond their limits, or are NaN: bool scalars."""
        return [(figure <= limit).logical_not() for figure, limit in zip(figures, self.limits, strict=True)]


def most_on_holdout(guards: Guards, before: float | Tensor) -> float | Tensor:
    """The largest loss that the holdout may have, given that at the start, which may be 0."""
    size = before.abs() if isinstance(before, Tensor) else abs(before)
    return before + (math.inf if math.isinf(guards.holdout_tol) else guards.holdout_tol * size)


def is_futile(guards: Guards, looks_ahead: bool, before: Measurement) -> bool:
    """Whether no search can satisfy `min_gain`: the step ahead gains nothing that could be multiplied."""
    return looks_ahead and guards.min_gain > 0 and not before.objective < before.loss


def refusal(
    guards: Guards, maximise: bool, before: Measurement, after: Measurement, changes: Sequence[float]
) -> str | None:
    """Why weights that a search found are not acceptable, or None. changes: ‖ΔW‖/‖W‖ of the single parts."""
    return _harm(guards, before, after, changes) or _no_gain(guards, maximise, before, after)


def refusal_of_standardised(
    guards: Guards,
    rule: Standardise,
    before: Measurement,
    after: Measurement,
    changes: Sequence[float],
    kept: Sequence[float],
) -> str | None:
    """The same of standardised weights. kept: the shares of the predictions that stay, where these were measured."""
    allowed = guards if rule.refit == LAST else replace(guards, drift_tol=math.inf)
    if (broken := _harm(allowed, before, after, changes)) is not None:
        return broken
    for where, share in zip(("batch", "holdout"), kept, strict=False):
        if not share >= rule.least_kept:
            return f"{100 * share:.1f} % of the predictions on the {where} would stay, fewer than least_kept allows"
    if guards.min_gain > 0 and not after.objective >= guards.min_gain * before.objective:
        return (
            f"the best gradient step would lower the loss by {after.objective:.4g}, without the teleport by "
            f"{before.objective:.4g}: less than min_gain = {guards.min_gain:g} times as much"
        )
    return None


def on_rate(guards: Guards, before: float, alone: float, ahead: float) -> str | None:
    """The refusal where steps of the optimizer's rate take the loss from `before` to more than that, and to more than
    they do `alone`, without the teleport; or None."""
    if ahead <= max(before, alone) or not math.isfinite(alone):
        return None
    return (
        f"{STEPS_AHEAD} gradient steps of rate {guards.rate:g} would take the loss on the batch from {before:.4g} to "
        f"{ahead:.4g}, without the teleport to {alone:.4g}: the rate is too large for standardised weights"
    )


def _harm(guards: Guards, before: Measurement, after: Measurement, changes: Sequence[float]) -> str | None:
    """What weights with these figures would do that the guards do not allow, or None."""
    if (useless := not_finite(after, changes)) is not None:
        return useless
    drift = relative_change(before.data_loss, after.data_loss)
    if drift > guards.drift_tol:
        return f"the loss on the batch drifted by {drift:.1e}, more than drift_tol = {guards.drift_tol:g}"
    if guards.max_weight_change is not None and max(changes) > guards.max_weight_change:
        return on_change(guards.max_weight_change, changes)
    return _harm_elsewhere(guards, before, after)


def not_finite(after: Measurement, changes: Sequence[float]) -> str | None:
    """What is not finite of weights with these figures, or None."""
    if not all(map(math.isfinite, changes)):
        return "the new weights are not finite"
    if not math.isfinite(after.data_loss):
        return "the loss on the batch is not finite"
    if not after.finite:
        return "the loss, the objective or the gradient of the new weights is not finite"
    return None


def too_little_gain(guards: Guards, looks_ahead: bool, before: Measurement, after: Measurement) -> str | None:
    """Why the gain of the step ahead is less than `min_gain` asks for, or None."""
    if not looks_ahead or guards.min_gain == 0:
        return None
    gain, least = before.loss - after.objective, guards.min_gain * (before.loss - before.objective)
    if gain >= least:
        return None
    return f"the step ahead would lower the loss by {gain:.4g}, less than min_gain asks for, {least:.4g}"


def on_holdout(before: float, loss: float) -> str:
    """What a loss on the holdout says that is beyond `holdout_tol`."""
    return f"the holdout loss rose from {before:.4g} to {loss:.4g}"  # or is NaN


def on_noise(guards: Guards, before: float, sensitivity: float) -> str:
    """What a sensitivity to noise says that is beyond `max_sensitivity`."""
    times = sensitivity / before if before > 0 else math.inf
    return (
        f"noise in the inputs would move the logits {times:.3g} times as far, "
        f"more than max_sensitivity = {guards.max_sensitivity:g} allows"
    )


def on_change(most: float, changes: Sequence[float]) -> str:
    """The refusal where the largest of the weight layers' relative changes is beyond `max_weight_change`."""
    largest = max(range(len(changes)), key=changes.__getitem__)
    return (
        f"weight layer {largest + 1} would change by {changes[largest]:.3g} of its norm, "
        f"more than max_weight_change = {most:g} allows"
    )


def _harm_elsewhere(guards: Guards, before: Measurement, after: Measurement) -> str | None:
    """Why the new weights are not acceptable on the holdout, or under noise in the inputs, or None."""
    old, new = before.holdout, after.holdout
    if old is not None and new is not None and not new <= most_on_holdout(guards, old):
        return on_holdout(old, new)
    calm, noisy = before.sensitivity, after.sensitivity
    if guards.bound_noise and calm is not None and noisy is not None and not noisy <= guards.max_sensitivity * calm:
        return on_noise(guards, calm, noisy)
    return None


def _no_gain(guards: Guards, maximise: bool, before: Measurement, after: Measurement) -> str | None:
    """Why the objective on the weights formed is no reason to write them, or None."""
    if not (after.objective > before.objective if maximise else after.objective < before.objective):
        return "the objective did not improve"
    ahead, otherwise = after.holdout_ahead, before.holdout_ahead
    if ahead is None or otherwise is None or math.isinf(guards.holdout_tol) or ahead < otherwise:
        return None
    return f"the step ahead would take the holdout loss to {ahead:.4g}, without the teleport to {otherwise:.4g}"
