"""Orbits: what a search walks on, whatever the symmetry.

A search knows an `Orbit` and nothing of the group behind it. `batch` is GL on the activations of a chain, which keeps
the outputs on one batch; `exact` are the symmetries that keep them on every input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..measure import Measurement

Hindrance = tuple[Tensor, str]
"""A bool scalar on the device of the search, and what it means where it holds: why a step cannot be taken."""


@dataclass(frozen=True)
class Evaluation:
    """An objective's value at a point, a scalar tensor, and its gradient, worked out only when asked for."""

    value: Tensor
    gradient: Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """Weights that a point stands for, as they would be written.

    parameters: in the order in which they are written. measured: what `Orbit.read` makes a `Measurement` of. changes:
    ‖ΔW‖/‖W‖ of each part of the weights, and of all behind them. hindrances: what may make them useless.
    """

    parameters: list[Tensor]
    measured: Tensor
    changes: Tensor
    hindrances: tuple[Hindrance, ...]


class Direction(Protocol):
    """Where a step leads. `norm` is the length of the step of size 1, a float64 scalar in the unit of `Orbit.scale`."""

    @property
    def norm(self) -> Tensor: ...


class Orbit(Protocol):
    """All that a search knows. Nothing here reads a value back from the device; sizes are float64 scalars there."""

    def start(self) -> Any:
        """The point at g = I."""

    def evaluate(self, point: Any) -> Evaluation:
        """The objective at a point."""

    def direction(self, point: Any, evaluation: Evaluation) -> Direction:
        """The direction of steepest ascent from there."""

    def limit(self, point: Any, direction: Any, size: Tensor) -> Tensor:
        """The largest step ≤ |size| in the sense of `size` that stays where the group acts."""

    def advance(self, point: Any, direction: Any, size: Tensor) -> tuple[Any, tuple[Hindrance, ...]]:
        """The point a step of `size` further, and what may hinder the step; where that holds the point is of no use."""

    def scale(self, point: Any) -> Tensor:
        """What the radius of a trust region is a share of."""

    def waypoint(self, point: Any) -> Any:
        """As much of a point as its weights depend on."""

    def figures(self, point: Any) -> list[Tensor]:
        """What the guards bound at a point, see `guards.Bounds`: float64 scalars."""

    def weights(self, waypoint: Any) -> Candidate:
        """The weights of a waypoint: formed, rounded to the model's dtype, measured."""

    def measure_start(self) -> Tensor:
        """What is measured on the model's own weights, as `Candidate.measured` is on others."""

    def read(self, values: Tensor) -> Measurement:
        """The numbers of what was measured."""
