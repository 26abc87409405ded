"""Checks of single arguments: each raises one error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection

import torch


def check_alone(what: str) -> None:
    """Raise ValueError in a process group of several ranks, each of which would do `what` on its own samples."""
    distributed = torch.distributed
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if ranks > 1:
        raise ValueError(
            f"{what} must run in a single process, got a process group of {ranks} ranks: each would go by samples of "
            "its own, and their weights would drift apart"
        )


def check_name(argument: str, value: object, known: Collection[str]) -> None:
    """Raise unless `value` is one of the `known` names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_bool(argument: str, value: object) -> bool:
    """`value`; raise unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def check_int(argument: str, value: object, *, at_least: int, at_most: int | None = None) -> int:
    """`value` as an int; raise unless it is an integer >= `at_least`, and <= `at_most` if that is given."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be an int, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < at_least:
        raise ValueError(f"{argument} must be >= {at_least}, got {number}")
    if at_most is not None and number > at_most:
        raise ValueError(f"{argument} must be <= {at_most}, got {number}")
    return number


def check_number(
    argument: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf, finite: bool = True
) -> float:
    """`value` as a float; raise unless it is a number > `above`, ≥ `at_least`, and finite if asked."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (number > above and number >= at_least) or (finite and not math.isfinite(number)):
        bound = f"> {above:g}" if above > -math.inf else f">= {at_least:g}"
        raise ValueError(f"{argument} must be a {'finite ' if finite else ''}number {bound}, got {value!r}")
    return number


def check_invertible(argument: str, value: float) -> None:
    """Raise ValueError where a slope or scale or its inverse, which σ⁻¹ needs, overflows or loses digits in float32."""
    least = torch.finfo(torch.float32).tiny
    if not least <= value <= 1 / least:
        raise ValueError(
            f"{argument} must be a finite number > 0 that leaves the activation invertible in float32, "
            f"from {least:.1e} to {1 / least:.1e}, got {value!r}"
        )
