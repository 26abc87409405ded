"""The options of a teleport, checked once and then plain values."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .objectives import GradNorm, Lookahead, Objective
from .ops import ACTIONS, BACKENDS, cuda_unavailable_reason

INVERSES = ("exact", "first_order")
METRICS = ("euclidean",)


@dataclass(frozen=True)
class Options:
    """`teleport_mlp`'s options after their checks; `step_size` None stands for the trust region."""

    objective: Objective
    steps: int
    step_size: float | None
    max_growth: float
    action: str
    inverse: str
    layers: tuple[int, ...] | None
    drift_tol: float
    holdout_tol: float


def make_options(
    *,
    objective: str | Objective,
    lr: float | None,
    margin: float,
    steps: int,
    step_size: str | float,
    max_growth: float,
    action: str,
    metric: str,
    inverse: str,
    layers: Sequence[int] | None,
    hidden_layers: int,
    drift_tol: float,
    holdout_tol: float,
    backend: str,
) -> Options:
    """Check every option of `teleport_mlp`, for a network of `hidden_layers` hidden layers.

    Raises:
        TypeError, ValueError: the text names the option, what was expected and what came.
    """
    check_name("action", action, ACTIONS)
    check_name("inverse", inverse, INVERSES)
    check_name("metric", metric, METRICS)
    check_name("backend", backend, BACKENDS)
    if backend == "cuda":
        raise ValueError(f'backend "cuda" is not available: {cuda_unavailable_reason()}')
    check_int("steps", steps, at_least=1)
    if isinstance(step_size, str) and step_size != "auto":
        raise ValueError(f'step_size must be "auto" or a number > 0, got {step_size!r}')
    check_number("max_growth", max_growth, above=1.0, finite=False)
    check_number("margin", margin, above=0.0)
    check_number("drift_tol", drift_tol, above=0.0, finite=False)
    check_number("holdout_tol", holdout_tol, at_least=0.0, finite=False)
    return Options(
        objective=_make_objective(objective, lr, margin),
        steps=steps,
        step_size=None if isinstance(step_size, str) else check_number("step_size", step_size, above=0.0),
        max_growth=float(max_growth),
        action=action,
        inverse=inverse,
        layers=None if layers is None else check_layers(layers, hidden_layers),
        drift_tol=float(drift_tol),
        holdout_tol=float(holdout_tol),
    )


def check_name(argument: str, value: object, known: Collection[str]) -> None:
    """Raise unless `value` is one of the `known` names."""
    if value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_int(argument: str, value: object, *, at_least: int) -> int:
    """`value` as an int; raise unless it is an integer >= `at_least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be an int, got {value!r} of type {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{argument} must be >= {at_least}, got {value}")
    return int(value)


def check_number(
    argument: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf, finite: bool = True
) -> float:
    """`value` as a float; raise unless it is a number > `above`, ≥ `at_least`, and finite if asked."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    number = float(value)
    if not (number > above and number >= at_least) or (finite and not math.isfinite(number)):
        bound = f"> {above:g}" if above > -math.inf else f">= {at_least:g}"
        raise ValueError(f"{argument} must be a {'finite ' if finite else ''}number {bound}, got {value!r}")
    return number


def _make_objective(objective: str | Objective, lr: float | None, margin: float) -> Objective:
    if lr is not None:
        check_number("lr", lr, above=0.0)
    if objective == "grad_norm":
        return GradNorm()
    if objective == "lookahead":
        if lr is None:
            raise ValueError('lr must be given for objective "lookahead": the learning rate of plain gradient descent')
        return Lookahead(rate=margin * lr)
    if isinstance(objective, str):
        raise ValueError(f"objective must be one of 'grad_norm', 'lookahead' or an object, got {objective!r}")
    if not (isinstance(getattr(objective, "maximise", None), bool) and callable(getattr(objective, "value", None))):
        raise TypeError(
            "objective must have an attribute maximise (bool) and a method value(loss_of, parameters), "
            f"got {type(objective).__name__}"
        )
    return objective


def check_layers(layers: Sequence[int], hidden_layers: int) -> tuple[int, ...]:
    """`layers` as a tuple; raise unless they are distinct hidden layer numbers 1..hidden_layers."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of hidden layer numbers 1..{hidden_layers}, got {layers!r}")
    numbers = tuple(layers)
    if (
        not numbers
        or len(set(numbers)) != len(numbers)
        or not all(isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= hidden_layers for k in numbers)
    ):
        raise ValueError(f"layers must be distinct hidden layer numbers in 1..{hidden_layers}, got {list(layers)}")
    return numbers
