"""Classification of digits by an MLP without bias, LeakyReLU 0.1, cross entropy, plain and teleported.

    digits   scikit-learn's 8×8 digits, 64-128-128-10: the demo
    mnist    28×28 digits, 784-512-512-10: the training runs of Zhao et al. 2022, section 6.3, and their reproduction

Both split their data 80/20 into training and validation. For each seed the plain run and the teleported ones have the
same split, start and mini-batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn.functional as F

from experiments import figures
from experiments.data import Dataset, split
from experiments.records import Run, by_label, save_json
from experiments.tables import epoch_table, format_table, summary_table, teleport_table
from experiments.training import Task, TeleportSettings, TrainingSettings, compare

PLAIN = "plain"
OUR_ALGORITHM, PUBLISHED_ALGORITHM = "ours", "published"

DIGITS_WIDTHS = (128, 128)
DIGITS_TRAINING = TrainingSettings(epochs=20, batch_size=20, optimizer="sgd", lr=0.02)
MNIST_WIDTHS = (512, 512)
MNIST_TRAINING = TrainingSettings(epochs=80, batch_size=20, optimizer="sgd", lr=2e-3)

# The published algorithm on all hidden layers: ten steps of fixed rate up ‖∇L‖², with the published action and g⁻¹ to
# first order, on four mini-batches of an epoch.
PUBLISHED = TeleportSettings(
    teleports_per_epoch=4,
    objective="grad_norm",
    action="paper",
    inverse="first_order",
    layers=None,
    steps=10,
    holdout_size=0,
)


@dataclass(frozen=True)
class Preset:
    """One figure of the published MNIST experiments: a curve for each schedule of the teleports.

    Teleports are this library's ("ours") or the published algorithm's on mini-batches of training ("published"), which
    also needs rates: it has a curve for each of them too.
    """

    schedules: tuple[tuple[int, ...], ...]
    epochs: int = 80
    batch_size: int = 20
    published_rates: tuple[float, ...] = (1e-2,)

    def teleports(self, algorithms: Collection[str] = (OUR_ALGORITHM,)) -> list[TeleportSettings]:
        """The ways of teleporting of all curves but the plain one, for OUR_ALGORITHM, PUBLISHED_ALGORITHM or both."""
        ours = [TeleportSettings(epochs=schedule) for schedule in self.schedules]
        return (ours if OUR_ALGORITHM in algorithms else []) + (
            self._published() if PUBLISHED_ALGORITHM in algorithms else []
        )

    def _published(self) -> list[TeleportSettings]:
        return [
            replace(PUBLISHED, epochs=schedule, batch_size=self.batch_size, step_size=rate)
            for schedule in self.schedules
            for rate in self.published_rates
        ]


FROM_EPOCH_1 = ((1, 2, 3, 4, 5), (1, 3, 5, 7, 9), (1, 5, 9, 13, 17))
FROM_EPOCH_4 = ((4, 5, 6, 7, 8), (4, 6, 8, 10, 12), (4, 8, 12, 16, 20))
DEFAULT_PRESET = "one"
PRESETS = {
    "paper-one": Preset(schedules=((0,), (1,), (2,), (4,), (16,)), epochs=120),
    "paper-several": Preset(schedules=(*FROM_EPOCH_1, *FROM_EPOCH_4), epochs=120),
    "one": Preset(schedules=((1,), (2,), (4,), (16,))),
    "six": Preset(schedules=((1,), (7,), (13,), (19,), (25,), (31,))),
    "several": Preset(schedules=FROM_EPOCH_1),
    "batch-200": Preset(schedules=((1, 7, 13, 19),), batch_size=200, published_rates=(1e-2, 3e-3)),
}


def run(
    name: str,
    dataset: Dataset,
    widths: tuple[int, ...],
    training: TrainingSettings,
    teleports: list[TeleportSettings],
    seeds: range,
    out: Path,
    on_epoch: Callable[[Run], None],
) -> str:
    """The plain run and one for each of `teleports`, for every seed; figure and JSON in `out`, the tables returned."""
    arms = labelled(teleports)
    runs = compare(lambda seed: make_task(dataset, widths, seed), training, arms, seeds, on_epoch)
    draw(name, dataset.name, training, runs, out / f"{name}.png")
    settings = {"data": dataset.name, "widths": widths, "training": training, "arms": arms, "seeds": list(seeds)}
    save_json(out / f"{name}.json", name, settings, runs=runs)
    first = [member for member in runs if member.seed == seeds[0]]
    sections = [
        f"Seed {seeds[0]}, epoch by epoch:\n{epoch_table(first)}",
        f"Teleports (‖∇L‖ and loss of the teleport's own batch of n samples):\n{teleport_table(runs)}",
        f"All runs at the end:\n{summary_table(runs)}",
        f"Teleported against plain, number of seeds:\n{comparison_table(runs)}",
    ]
    return "\n\n".join(sections)


def make_task(dataset: Dataset, widths: tuple[int, ...], seed: int) -> Task:
    """The classification of `dataset` with hidden layers of `widths`, split by `seed`."""
    train, validation = split(dataset, seed)
    dims = (dataset.inputs.shape[1], *widths, int(dataset.targets.max()) + 1)
    return Task(dims, F.cross_entropy, train, validation)


def comparison_table(runs: list[Run]) -> str:
    """For each way of teleporting: on how many seeds it was better than the plain run, and the median wall-clocks."""
    plain = {member.seed: member for member in runs if member.label == PLAIN}
    header = ("run", "train loss lower at every later epoch", "val. loss at the end no worse", "time (s)", "plain (s)")
    rows = [
        (
            label,
            f"{sum(lower_after_teleports(member, plain[member.seed]) for member in members)} of {len(members)}",
            f"{sum(no_worse_at_end(member, plain[member.seed]) for member in members)} of {len(members)}",
            f"{statistics.median(member.final.seconds for member in members):.2f}",
            f"{statistics.median(member.final.seconds for member in plain.values()):.2f}",
        )
        for label, members in by_label(runs).items()
        if label != PLAIN
    ]
    return format_table(header, rows)


def lower_after_teleports(teleported: Run, plain: Run) -> bool:
    """Whether the train loss is lower than the plain run's after every epoch that ends after the last teleport."""
    if not teleported.teleports:
        return False
    last = teleported.teleports[-1].position
    pairs = zip(teleported.epochs, plain.epochs, strict=False)
    return len(teleported.epochs) >= len(plain.epochs) and all(
        ours.train_loss < theirs.train_loss for ours, theirs in pairs if ours.epoch > last
    )


def no_worse_at_end(teleported: Run, plain: Run) -> bool:
    """Whether the validation loss at the end is at most the plain run's."""
    ours, theirs = teleported.final.validation_loss, plain.final.validation_loss
    return ours is not None and theirs is not None and ours <= theirs


def labelled(teleports: list[TeleportSettings]) -> dict[str, TeleportSettings | None]:
    """The plain arm and the others, under names that say what differs between the ways of teleporting."""
    several_rules = len({settings.step_size for settings in teleports}) > 1

    def label(settings: TeleportSettings) -> str:
        epochs = ", ".join(str(epoch) for epoch in settings.epochs)
        rule = f", {_rule(settings)}" if several_rules else ""
        return f"teleports in epoch{'s' if len(settings.epochs) > 1 else ''} {epochs}{rule}"

    return {PLAIN: None, **{label(settings): settings for settings in teleports}}


def _rule(settings: TeleportSettings) -> str:
    """The fixed rate of the ascent, or what the trust region searches for."""
    return str(settings.objective) if isinstance(settings.step_size, str) else f"rate {settings.step_size:g}"


def draw(name: str, data: str, training: TrainingSettings, runs: list[Run], path: Path) -> None:
    panels = [
        figures.Panel("epochs", "train loss", figures.epoch_series(runs, "train_loss")),
        figures.Panel("epochs", "validation loss", figures.epoch_series(runs, "validation_loss")),
        figures.Panel("epochs", "gradient norm ‖∇L‖", figures.epoch_series(runs, "gradient_norm")),
    ]
    figures.curves(path, f"{name}: {data}, {training.optimizer}, lr {training.lr:g}", panels)
