"""The tables on plasticity: each arm at its best rate, and at the rates that are best on an earlier task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.tables import table
from experiments.plasticity.arms import MAIN, VARIANTS
from experiments.plasticity.results import TENTH, Row, Setting, best_of, tuned_earlier


def plasticity_table(document: dict[str, Any]) -> str:
    """A table a protocol, a line an arm; accuracies and shares in %."""
    parts = []
    for protocol, lines in _by_protocol(best_of(rows_of(document))).items():
        activations = list(dict.fromkeys(row.activation for row in lines))
        measured = any(row.jump is not None for row in lines)
        header = ["arm"]
        for activation in activations:
            header += [f"{activation}: rate", "first → last tasks", "all", "kept: own / others / least"]
            header += ["jump"] if measured else []
        found = {(row.arm, row.activation): row for row in lines if row.arm not in VARIANTS}
        cells = []
        for arm in dict.fromkeys(arm for arm, _ in found):
            cells.append([arm])
            for activation in activations:
                row = found[arm, activation]
                cells[-1] += [*_cells(row), *([] if row.jump is None else [f"{row.jump:+.1f}"])]
        parts.append(f"**{protocol}**\n\n{table(header, cells)}")
    return "\n\n".join([*parts, *_rates(document)])


def rows_of(document: dict[str, Any]) -> list[Row]:
    """Every arm at every rate."""
    return [Row(**row) for row in document["rows"]]


def _by_protocol(best: dict[Setting, Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(protocol for protocol, _, _ in best)
    return {name: [row for row in best.values() if row.protocol == name] for name in names}


def _cells(row: Row) -> list[str]:
    kept = " / ".join(f"{share:.1f}" for share in (row.kept_own, row.kept, row.kept_least))
    refused = f" ({row.refused} refused)" if row.refused else ""
    tasks = f"{row.first:.1f} → {row.last:.1f} ± {row.spread:.1f}"
    return [f"{row.lr:g}", tasks, f"{statistics.fmean(row.curve):.1f}", kept + refused]


def _rates(document: dict[str, Any]) -> Sequence[str]:
    """How the last tasks go at the rate that is best on the first task, on the tenth, and on the last ones."""
    long = [row for row in rows_of(document) if len(row.curve) >= TENTH and row.jump is None]
    found = tuned_earlier(long)
    settings = list(dict.fromkeys((protocol, activation) for protocol, activation, _ in found))
    arms = [arm for arm in MAIN if any(arm == key[2] for key in found)]
    if not settings:
        return []
    lines = []
    for arm in arms:
        accuracies = [found[protocol, activation, arm] for protocol, activation in settings]
        lines.append([arm, *(" / ".join(f"{value:.1f}" for value in three) for three in accuracies)])
    header = ["arm", *(f"{protocol}, {activation}" for protocol, activation in settings)]
    title = "**The last tasks, at the rate that is best on the first task / on the tenth / on the last ones**"
    return [f"{title}\n\n{table(header, lines)}"]
