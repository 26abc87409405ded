"""The files of numbers in bench/results/evidence: JSON that is small and still shows in a comparison of versions.

Floats have five significant digits. A list of objects with the same keys, such as the epochs of a run, is one object
{"columns": {key: values}, "count": n}, where values is a list of n, the one value that all n share, or {"from": i} for
i, i + 1, … Every entry of the document, and every element of an entry that is a list, has a line of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIGITS = 5
COLUMNS, COUNT, FROM = "columns", "count", "from"


def as_text(document: dict[str, Any]) -> str:
    """The file's content; only strict JSON, so no NaN and no infinity."""

    def entry(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return _compact(_packed(value))
        return "[\n" + ",\n".join(_compact(_packed(item)) for item in value) + "\n]"

    return "{\n" + ",\n".join(f"{_compact(key)}: {entry(value)}" for key, value in document.items()) + "\n}\n"


def read(path: Path) -> dict[str, Any]:
    """The document of a file, lists of objects as such."""
    return _unpacked(json.loads(path.read_text(encoding="utf-8")))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _packed(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items = [_packed(item) for item in value]
    if len(items) < 2 or not all(isinstance(item, dict) and item.keys() == items[0].keys() for item in items):
        return items
    return {COLUMNS: {key: _shared([item[key] for item in items]) for key in items[0]}, COUNT: len(items)}


def _shared(values: list[Any]) -> Any:
    """A column, in short where its values are alike (and no lists or objects) or count up."""
    first = values[0]
    if isinstance(first, (list, dict)):
        return values
    if all(value == first for value in values):
        return first
    counts_up = type(first) is int and values == list(range(first, first + len(values)))
    return {FROM: first} if counts_up else values


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {COLUMNS, COUNT}:
        return {key: _unpacked(item) for key, item in value.items()}
    columns = {key: _column(column, value[COUNT]) for key, column in value[COLUMNS].items()}
    return [{key: column[row] for key, column in columns.items()} for row in range(value[COUNT])]


def _column(column: Any, count: int) -> list[Any]:
    """The values of a column."""
    if isinstance(column, list):
        return _unpacked(column)
    if isinstance(column, dict):
        return list(range(column[FROM], column[FROM] + count))
    return [column] * count
