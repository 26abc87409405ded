"""The committed results as tables: `python -m bench.tables > docs/measurements.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.teleport import GRAD_NORM, LOOKAHEAD, PUBLISHED, PUBLISHED_LEAN
from bench.training import PLAIN, TELEPORTED
from bench.training import PUBLISHED as PUBLISHED_RULE

RESULTS = Path(__file__).parent / "results"
Results = dict[str, Any]

TELEPORT_TEXT = """## A teleport of ten steps

`python -m bench.teleport`, file `bench/results/teleport.json`. In units of one forward+backward pass on the same batch,
measured right before in the same run; set-up and the writing of the weights included. The published algorithm (SVD
pseudo-inverse per layer and step, first-order inverse, double backward) is written in `bench/baselines.py` in two
readings: as its authors' program differentiates, through everything, and leaner, with ∇L taken at fixed weights.
"""
TRAINING_TEXT = """## Training on MNIST digits

`python -m bench.training --data-dir DIR`, file `bench/results/training.json`. 10,000 digits, 8,000 of them for
training, 784-512-512-10, LeakyReLU 0.1, no bias, batch 20, plain SGD, 8 epochs; four teleports of 200 samples in
epoch 1 (after one full epoch), `lookahead` with margin 4; means over five seeds, wall-clock with teleports and with two
processes at a time. The published rule has the largest of four fixed rates that overflowed on no seed.
"""
LAYER_TEXT = """## The operator

`python -m bench.layer`, file `bench/results/layer.json`. `teleport_layer` forward and backward, float32, one CPU
thread, against its plain-torch twin by autograd and the same with an SVD pseudo-inverse.
"""


def load(name: str) -> Results:
    with (RESULTS / f"{name}.json").open(encoding="utf-8") as file:
        return json.load(file)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub-flavoured table, numbers to the right."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def teleport_table(results: Results) -> str:
    rows = []
    for name, shape in results["shapes"].items():
        units = {label: timing["units"] for label, timing in shape["timings"].items()}
        ours = units[GRAD_NORM]
        rows.append(
            [
                f"`{name}`",
                f"{ours:.1f}",
                f"{units[LOOKAHEAD]:.1f}",
                f"{units[PUBLISHED]:.0f}",
                f"{units[PUBLISHED_LEAN]:.0f}",
                f"{units[PUBLISHED] / ours:.1f}×",
                f"{units[PUBLISHED_LEAN] / ours:.1f}×",
            ]
        )
    header = ("shape", "`grad_norm`", "`lookahead`", "published", "published, lean", "faster", "faster than lean")
    return table(header, rows)


def training_table(results: Results) -> str:
    labels = {PLAIN: "plain SGD", TELEPORTED: "teleported", PUBLISHED_RULE: "published rule"}
    rows = [
        [
            f"`{name}`, {label}",
            f"{means['train_loss']:.4f}",
            f"{means['validation_loss']:.3f}",
            f"{100 * means['validation_accuracy']:.2f} %",
            f"{means['seconds']:.1f} s",
        ]
        for name, shape in results["shapes"].items()
        for key, label in labels.items()
        for means in [shape["means"][key]]
    ]
    return table(("run", "train loss", "validation loss", "validation accuracy", "wall-clock"), rows)


def layer_table(results: Results) -> str:
    contestants = list(next(iter(results["shapes"].values()))["timings"])
    rows = [
        [f"`{name}`", *(f"{1e3 * shape['timings'][label]['seconds']:.2f} ms" for label in contestants)]
        for name, shape in results["shapes"].items()
    ]
    return table(("shape", *contestants), rows)


def page() -> str:
    """docs/measurements.md."""
    sections = ["# Measurements", "Made by `python -m bench.tables` from the files in `bench/results/`."]
    for name, text, make_table in (
        ("teleport", TELEPORT_TEXT, teleport_table),
        ("training", TRAINING_TEXT, training_table),
        ("layer", LAYER_TEXT, layer_table),
    ):
        results = load(name)
        sections += [text.rstrip(), make_table(results), f"Machine: {_machine(results)}"]
    return "\n\n".join(sections)


def _machine(results: Results) -> str:
    return results.get("machine") or next(iter(results["shapes"].values()))["seeds"][0]["machine"]


if __name__ == "__main__":
    print(page())
