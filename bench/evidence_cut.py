"""Rows whose runs are the beginning of another row's longer ones: cut out of its numbers, not trained once more.

Runs are deterministic, so that on one machine both ways give the same numbers, and the same seconds but for chance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from experiments import classification
from experiments.records import EpochRecord, Run, TeleportRecord, finite_or_infinity
from experiments.training import TrainingSettings


def cut(document: Mapping[str, Any], labels: Collection[str], epochs: int) -> dict[str, Any]:
    """The content of the row's JSON file: of the longer runs in `document` those of `labels`, as far as `epochs`."""
    settings = document["settings"]
    shorter = {
        "training": settings["training"] | {"epochs": epochs},
        "arms": {label: settings["arms"][label] for label in labels},
    }
    runs = [
        run
        | {
            "epochs": [record for record in run["epochs"] if record["epoch"] <= epochs],
            "teleports": [teleport for teleport in run["teleports"] if teleport["position"] < epochs],
        }
        for run in document["runs"]
        if run["label"] in labels
    ]
    return dict(document) | {"settings": settings | shorter, "runs": runs}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """The figure that the row's command draws."""
    settings = document["settings"]
    runs = [_restored(run) for run in document["runs"]]
    classification.draw(document["experiment"], settings["data"], TrainingSettings(**settings["training"]), runs, path)


def _restored(run: Mapping[str, Any]) -> Run:
    """The run of a JSON file."""
    epochs = tuple(EpochRecord(**finite_or_infinity(record)) for record in run["epochs"])
    teleports = tuple(TeleportRecord(**finite_or_infinity(teleport)) for teleport in run["teleports"])
    return Run(run["label"], run["seed"], epochs, teleports)
