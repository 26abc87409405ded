"""Flatter and sharper minima of one level set (Zhao, Gower, Walters, Yu, ICLR 2024, arXiv 2305.13404).

784-16-10-10 on MNIST, LeakyReLU 0.1, cross entropy, SGD of rate 1e-2 on mini-batches of 20, 40 epochs. In epoch 20 the
weights are teleported up or down the sharpness or the curvature, on 2,000 samples, and train on; against the plain run
from the same weights, five runs.

The group is that of the positive diagonal matrices, under which the network computes the same on every input, however
narrow its layers. The published runs act with GL(d) through a pseudo-inverse, which for 2,000 samples and layers of 16
and 10 units keeps the outputs approximately only; they take steps at fixed rates, and teleport 1 to 10 times.

On the orbit of this group the sharpness has no maximum and the curvature no minimum, and far out SGD diverges at once.
So a teleport has five steps: with radii of 2, 4, … 32 % of the activations' norm it stays within 62 % of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments import figures
from experiments.classification import PLAIN, make_task
from experiments.data import Dataset
from experiments.records import Run, by_label, save_json
from experiments.tables import format_table, teleport_table
from experiments.training import TeleportSettings, TrainingSettings, compare
from symtele_cuda.objectives import Objective
from symtele_cuda.objectives.generalization import Curvature, Sharpness

WIDTHS = (16, 10)
TRAINING = TrainingSettings(epochs=40, batch_size=20, optimizer="sgd", lr=1e-2)
TELEPORTS = TeleportSettings(
    epochs=(20,),
    teleports_per_epoch=1,
    batch_size=2000,
    group="positive_diagonal",
    steps=5,
    first_radius=0.02,
    holdout_size=0,
)
OBJECTIVES: dict[str, Objective] = {
    "sharpness down": Sharpness(maximise=False),
    "sharpness up": Sharpness(maximise=True),
    "curvature down": Curvature(maximise=False),
    "curvature up": Curvature(maximise=True),
}
# The figure begins so many epochs before the first teleport, for the first epochs would set its scale.
EPOCHS_BEFORE = 5


def run(
    dataset: Dataset,
    training: TrainingSettings,
    teleports: TeleportSettings,
    seeds: range,
    out: Path,
    on_epoch: Callable[[Run], None],
) -> str:
    """The plain run and one for each objective, for every seed; figure and JSON in `out`, the tables returned."""
    arms = make_arms(teleports)
    runs = compare(lambda seed: make_task(dataset, WIDTHS, seed), training, arms, seeds, on_epoch)
    title = f"784-16-10-10: {dataset.name}, {training.optimizer}, lr {training.lr:g}"
    _draw(title, runs, max(0, min(teleports.epochs) - EPOCHS_BEFORE), out / "minima.png")
    settings = {"data": dataset.name, "widths": WIDTHS, "training": training, "arms": arms, "seeds": list(seeds)}
    save_json(out / "minima.json", "minima", settings, runs=runs)
    sections = [
        f"Teleports (‖∇L‖ and loss of the teleport's own batch of n samples):\n{teleport_table(runs)}",
        f"The objective of each teleport:\n{objective_table(runs)}",
        f"At the end, mean and standard deviation over {len(seeds)} seeds:\n{ending_table(runs)}",
    ]
    return "\n\n".join(sections)


def make_arms(teleports: TeleportSettings) -> dict[str, TeleportSettings | None]:
    """The plain run, and the teleports for each objective."""
    return {PLAIN: None} | {label: replace(teleports, objective=wanted) for label, wanted in OBJECTIVES.items()}


def objective_table(runs: Sequence[Run]) -> str:
    """A line for each teleport: its objective before and after."""
    header = ("run", "seed", "at epoch", "before", "after", "note")
    rows = [
        (
            run.label,
            str(run.seed),
            f"{teleport.position:.2f}",
            f"{teleport.objective_before:.5g}",
            f"{teleport.objective_after:.5g}",
            teleport.reason,
        )
        for run in runs
        for teleport in run.teleports
    ]
    return format_table(header, rows)


def ending_table(runs: Sequence[Run]) -> str:
    """A line for each label: how its runs ended, and on how many seeds the validation loss is below the plain run's."""
    header = ("run", "train loss", "±", "val. loss", "±", "val. acc.", "±", "val. loss below plain")
    grouped = by_label(runs)
    plain = {run.seed: _validation(run)[0] for run in grouped[PLAIN]}
    rows = []
    for label, members in grouped.items():
        losses, accuracies = zip(*map(_validation, members), strict=True)
        below = sum(loss < plain[run.seed] for loss, run in zip(losses, members, strict=True))
        rows.append(
            (
                label,
                *_mean_and_spread([run.final.train_loss for run in members], ".4f"),
                *_mean_and_spread(losses, ".4f"),
                *_mean_and_spread(accuracies, ".2%"),
                f"{below} of {len(members)}",
            )
        )
    return format_table(header, rows)


def _validation(run: Run) -> tuple[float, float]:
    """Loss and accuracy at the end."""
    loss, accuracy = run.final.validation_loss, run.final.validation_accuracy
    assert loss is not None and accuracy is not None
    return loss, accuracy


def _mean_and_spread(values: Sequence[float], form: str) -> tuple[str, str]:
    """Mean and standard deviation, of one value none; NaN where a run diverged."""
    sample = torch.tensor(values, dtype=torch.float64)
    return format(sample.mean().item(), form), format(sample.std().item(), form) if len(sample) > 1 else "-"


def _draw(title: str, runs: Sequence[Run], first_epoch: int, path: Path) -> None:
    panels = [
        figures.Panel("epochs", label, [_later(series, first_epoch) for series in figures.epoch_series(runs, field)])
        for label, field in (("train loss", "train_loss"), ("validation loss", "validation_loss"))
    ]
    figures.curves(path, title, panels)


def _later(series: figures.Series, first_epoch: int) -> figures.Series:
    """The series from `first_epoch` on."""
    return replace(series, x=series.x[first_epoch:], ys=[y[first_epoch:] for y in series.ys])
