"""What `make test` leaves to `make test-all`: of a large grid a part that stands for it runs always, the rest there.

The marker is `exhaustive`; a test is marked by hand, or by its parameters with `mostly`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly(values: Iterable[Any], always: Callable[[Any], bool]) -> list[Any]:
    """The values as parameters of a test, all but those for which `always` holds marked as exhaustive."""
    return [value if always(value) else pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


def first_of_each(kinds: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a name is the first one of its kind."""
    firsts = {kind: name for name, kind in reversed(kinds.items())}
    return lambda name: firsts[kinds[name]] == name
