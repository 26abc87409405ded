"""The options of a teleport, checked once and then plain values."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from .checks import check_int, check_name, check_number
from .kernels.library import check_backend
from .objectives import GradNorm, Lookahead, LooksAhead, Objective
from .operator.teleport_layer import ACTIONS

INVERSES = ("exact", "first_order")
GROUPS = GL, POSITIVE_DIAGONAL, AUTO = ("gl", "positive_diagonal", "auto")
METRICS = ("euclidean",)


@dataclass(frozen=True)
class Options:
    """`teleport_mlp`'s options after their checks; `step_size` None stands for the trust region."""

    objective: Objective
    steps: int
    step_size: float | None
    first_radius: float
    max_growth: float
    action: str
    inverse: str
    group: str
    backend: str
    layers: tuple[int, ...] | None
    drift_tol: float
    holdout_tol: float
    min_gain: float
    max_weight_change: float
    max_sensitivity: float

    @property
    def wants_gain(self) -> bool:
        """Whether `min_gain` counts: the objective is then the loss after a step, and the search a trust region."""
        return self.min_gain > 0 and self.step_size is None and isinstance(self.objective, LooksAhead)


def make_options(
    *,
    objective: str | Objective,
    lr: float | None,
    margin: float,
    steps: int,
    step_size: str | float,
    first_radius: float,
    max_growth: float,
    action: str,
    metric: str,
    inverse: str,
    group: str,
    layers: Sequence[int] | None,
    hidden_layers: int,
    drift_tol: float,
    holdout_tol: float,
    min_gain: float,
    max_weight_change: float,
    max_sensitivity: float,
    backend: str,
) -> Options:
    """Check every option of `teleport_mlp`, for a network of `hidden_layers` hidden layers.

    Raises:
        TypeError, ValueError: the text names the option, what was expected and what came.
    """
    check_name("action", action, ACTIONS)
    check_name("inverse", inverse, INVERSES)
    check_name("group", group, GROUPS)
    check_name("metric", metric, METRICS)
    check_backend(backend)
    check_int("steps", steps, at_least=1)
    if isinstance(step_size, str) and step_size != "auto":
        raise ValueError(f'step_size must be "auto" or a number > 0, got {step_size!r}')
    check_number("first_radius", first_radius, above=0.0)
    check_number("max_growth", max_growth, above=1.0, finite=False)
    check_number("margin", margin, above=0.0)
    check_number("drift_tol", drift_tol, above=0.0, finite=False)
    check_number("holdout_tol", holdout_tol, at_least=0.0, finite=False)
    check_number("min_gain", min_gain, at_least=0.0)
    check_number("max_weight_change", max_weight_change, above=0.0, finite=False)
    check_number("max_sensitivity", max_sensitivity, above=0.0, finite=False)
    return Options(
        objective=_make_objective(objective, lr, margin),
        steps=steps,
        step_size=None if isinstance(step_size, str) else check_number("step_size", step_size, above=0.0),
        first_radius=float(first_radius),
        max_growth=float(max_growth),
        action=action,
        inverse=inverse,
        group=group,
        backend=backend,
        layers=None if layers is None else check_layers(layers, hidden_layers),
        drift_tol=float(drift_tol),
        holdout_tol=float(holdout_tol),
        min_gain=float(min_gain),
        max_weight_change=float(max_weight_change),
        max_sensitivity=float(max_sensitivity),
    )


def _make_objective(objective: str | Objective, lr: float | None, margin: float) -> Objective:
    if lr is not None:
        check_number("lr", lr, above=0.0)
    if objective == "grad_norm":
        return GradNorm()
    if objective == "lookahead":
        if lr is None:
            raise ValueError('lr must be given for objective "lookahead": the learning rate of plain gradient descent')
        return Lookahead(rate=float(margin) * float(lr))
    if isinstance(objective, str):
        raise ValueError(f"objective must be one of 'grad_norm', 'lookahead' or an object, got {objective!r}")
    if isinstance(objective, type) or not (
        isinstance(getattr(objective, "maximise", None), bool) and callable(getattr(objective, "value", None))
    ):
        raise TypeError(
            "objective must have an attribute maximise (bool) and a method value(loss_of, parameters), "
            f"got {type(objective).__name__}"
        )
    return objective


def check_layers(layers: Sequence[int], hidden_layers: int) -> tuple[int, ...]:
    """`layers` as a tuple; raise unless they are distinct hidden layer numbers 1..hidden_layers."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of hidden layer numbers 1..{hidden_layers}, got {layers!r}")
    named = tuple(layers)
    if not named or len(set(named)) != len(named) or not all(_is_layer(k, hidden_layers) for k in named):
        raise ValueError(f"layers must be distinct hidden layer numbers in 1..{hidden_layers}, got {list(layers)}")
    return named


def _is_layer(value: object, hidden_layers: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 1 <= int(value) <= hidden_layers
