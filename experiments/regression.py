"""Multi-layer regression, GD and AdaGrad with one teleport (Zhao et al. 2022, section 6.2).

L = ½‖Y − W₃ σ(W₂ σ(W₁ X))‖² with LeakyReLU 0.1, full batch. The published sizes 4-5-6-7-8 are: 4 samples, 5 inputs,
hidden widths 6 and 7, 8 outputs. So 4 samples ≤ 5 inputs, and every layer can be matched exactly without a bias.
Weights and data are uniform on [0, 1). The teleport is the published one, before the update of epoch 5: the published
action, g⁻¹ to first order, a fixed number of ascent steps on ‖∇L‖² at a fixed rate. The seeds are the published ones
too, for which these rates were chosen: with others the teleport can take the loss up by orders of magnitude, because
g⁻¹ to first order does not keep it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from experiments import figures
from experiments.data import Dataset
from experiments.records import Run, by_label, save_json
from experiments.tables import summary_table, teleport_table
from experiments.training import Task, TeleportSettings, TrainingSettings, compare

SAMPLES = 4
DIMS = (5, 6, 7, 8)
TELEPORT = TeleportSettings(
    epochs=(5,),
    teleports_per_epoch=1,
    batch_size=SAMPLES,
    objective="grad_norm",
    action="paper",
    inverse="first_order",
    layers=None,
    steps=8,
    step_size=1e-7,
    holdout_size=0,
)


@dataclass(frozen=True)
class Baseline:
    """One optimizer of the comparison, run without and with the teleports; `teleports` is the published one."""

    name: str
    training: TrainingSettings
    teleports: TeleportSettings

    def arms(self) -> dict[str, TeleportSettings | None]:
        published = self.teleports
        ours = TeleportSettings(
            epochs=published.epochs,
            teleports_per_epoch=published.teleports_per_epoch,
            batch_size=published.batch_size,
            # There are no other samples: what is gained on the batch is gained on the whole training set.
            holdout_size=0,
            min_gain=0.0,
        )
        return {
            self.name: None,
            f"{self.name} + teleport": published,
            f"{self.name} + teleport, exact g⁻¹": replace(published, inverse="exact"),
            f"{self.name} + teleport, lookahead": ours,
        }


# The published settings of sgd and adagrad; the others take AdaGrad's teleport.
ADAPTIVE_TELEPORT = replace(TELEPORT, steps=2, step_size=1e-5)
BASELINES = {
    "sgd": Baseline("GD", TrainingSettings(300, SAMPLES, "sgd", lr=1e-4), TELEPORT),
    "momentum": Baseline("momentum", TrainingSettings(300, SAMPLES, "momentum", lr=1e-5), TELEPORT),
    "adagrad": Baseline("AdaGrad", TrainingSettings(300, SAMPLES, "adagrad", lr=1e-1), ADAPTIVE_TELEPORT),
    "rmsprop": Baseline("RMSprop", TrainingSettings(300, SAMPLES, "rmsprop", lr=1e-3), ADAPTIVE_TELEPORT),
    "adam": Baseline("Adam", TrainingSettings(300, SAMPLES, "adam", lr=1e-3), ADAPTIVE_TELEPORT),
}
PUBLISHED = ("sgd", "adagrad")


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖Y − Ŷ‖², summed over samples and outputs."""
    return 0.5 * (targets - outputs).square().sum()


def published_seeds(numbers: range) -> list[int]:
    """12345 i² for run number i."""
    return [12345 * number**2 for number in numbers]


def make_task(seed: int) -> Task:
    """The data of `seed`, which follow the weights in the same stream of random numbers, as published."""
    generator = torch.Generator().manual_seed(seed)
    weights = sum(d_in * d_out for d_in, d_out in pairwise(DIMS))
    torch.rand(weights, generator=generator)  # the run draws them itself
    inputs, targets = (torch.rand(size, SAMPLES, generator=generator).T.contiguous() for size in (DIMS[0], DIMS[-1]))
    return Task(DIMS, half_squared_error, Dataset("uniform noise", inputs, targets), weight_range=(0.0, 1.0))


def run(baselines: list[Baseline], seeds: list[int], out: Path, on_epoch: Callable[[Run], None]) -> str:
    """All runs, their figure and JSON in `out`; returns the tables to print."""
    runs = [
        finished
        for baseline in baselines
        for finished in compare(make_task, baseline.training, baseline.arms(), seeds, on_epoch)
    ]
    _draw(runs, out / "regression.png")
    save_json(out / "regression.json", "regression", {"baselines": baselines, "seeds": seeds}, runs=runs)
    return f"{summary_table(runs)}\n\n{teleport_table(runs)}"


def _draw(runs: list[Run], path: Path) -> None:
    losses = figures.epoch_series(runs, "train_loss")
    panels = [
        figures.Panel("epochs", "loss", losses),
        figures.Panel("wall-clock (s)", "loss", [_against_time(series, runs) for series in losses]),
        figures.Panel("epochs", "gradient norm ‖∇L‖", figures.epoch_series(runs, "gradient_norm")),
    ]
    figures.curves(path, "regression, 4 samples, 5-6-7-8", panels)


def _against_time(series: figures.Series, runs: list[Run]) -> figures.Series:
    """The series over the training time, the median of the seeds."""
    times = [[record.seconds for record in run.epochs] for run in by_label(runs)[series.label]]
    common = [statistics.median(seconds) for seconds in zip(*times, strict=False)]
    return replace(series, x=common, ys=[y[: len(common)] for y in series.ys], marks=())
