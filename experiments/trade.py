"""What a teleport gains against what it costs: the data outside its batch pay in loss, the run in seconds.

784-512-512-10 on MNIST with SGD and the defaults of `Teleporter`, but for one option. A teleport keeps the loss of its
own batch; how much it may raise that of other samples is what `holdout_tol` bounds, and a stricter guard leaves less to
gain. The other options are those that the defaults were chosen among.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import figures
from experiments.data import Dataset
from experiments.records import save_json
from experiments.study.jobs import ANY_GAIN, DEFAULTS, FOR_ANY_GAIN
from experiments.study.measure import measure_seeds
from experiments.study.problems import PROBLEMS, Problem
from experiments.study.records import Record
from experiments.tables import format_table
from experiments.training import TeleportSettings

PROBLEM = replace(PROBLEMS["mnist-512"], check_every=400)
RATES = (0.01, 0.1)
TOLERANCES = (0.003, 0.01, 0.03, 0.1, math.inf)
PLAIN = "plain"
UNGUARDED = "no guard"
OTHERS: dict[str, TeleportSettings] = {
    "all hidden layers": replace(DEFAULTS, layers=None),
    "half the margin": replace(DEFAULTS, margin=DEFAULTS.margin / 2),
    "twice the margin": replace(DEFAULTS, margin=2 * DEFAULTS.margin),
    ANY_GAIN: FOR_ANY_GAIN,
    "one teleport": replace(DEFAULTS, teleports_per_epoch=1),
    "after epoch 0": replace(DEFAULTS, epochs=(1,)),
    "50 samples": replace(DEFAULTS, batch_size=50),
    "ten small steps": replace(DEFAULTS, steps=10, first_radius=0.02),
    "grad_norm": replace(DEFAULTS, objective="grad_norm"),
}


@dataclass(frozen=True)
class Trade:
    """One variant at one rate, over the seeds: the losses at the end, the relative rises of the train loss at all
    accepted teleports (no teleport, no rise), and the share of the training time that teleports took."""

    lr: float
    variant: str
    train_losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    rises: tuple[float, ...]
    time_shares: tuple[float, ...]

    @property
    def worst_rise(self) -> float:
        return max(self.rises, default=0.0)


def run(
    dataset: Dataset,
    problem: Problem,
    rates: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    on_run: Callable[[str], None],
) -> str:
    """All runs; figure and JSON in `out`, the table returned. `on_run` gets what has finished, for progress."""
    trades = []
    for lr in rates:
        for variant, teleports in variants().items():
            name = f"lr {lr:g}, {variant}"
            records = measure_seeds(problem, dataset, "sgd", lr, teleports, seeds, name, on_run)
            trades.append(_trade(lr, variant, records))
    _draw(f"{dataset.name}: what a teleport gains and costs", trades, out / "trade.png")
    settings = {"data": dataset.name, "problem": problem, "teleports": DEFAULTS, "seeds": list(seeds)}
    save_json(out / "trade.json", "trade", settings, trades=trades)
    return trade_table(trades)


def variants() -> dict[str, TeleportSettings | None]:
    """The ways to teleport, by name: not at all, with the guards from strict to none, and the others."""
    return {PLAIN: None, **guards(), **OTHERS}


def guards() -> dict[str, TeleportSettings]:
    return {_name(tolerance): replace(DEFAULTS, holdout_tol=tolerance) for tolerance in TOLERANCES}


def trade_table(trades: Sequence[Trade]) -> str:
    header = ("rate", "but for", "rise at a teleport", "largest", "time", "train loss", "± of seeds", "val. loss")
    rows = [
        (
            f"{trade.lr:g}",
            trade.variant,
            f"{statistics.fmean(trade.rises or (0.0,)):.1%}",
            f"{trade.worst_rise:.1%}",
            f"{statistics.fmean(trade.time_shares):.1%}",
            f"{statistics.fmean(trade.train_losses):.4f}",
            f"{statistics.stdev(trade.train_losses) if len(trade.train_losses) > 1 else 0.0:.4f}",
            f"{statistics.fmean(trade.validation_losses):.4f}",
        )
        for trade in trades
    ]
    return format_table(header, rows)


def _name(tolerance: float) -> str:
    return UNGUARDED if math.isinf(tolerance) else f"holdout_tol {tolerance:g}"


def _trade(lr: float, variant: str, records: Sequence[Record]) -> Trade:
    return Trade(
        lr,
        variant,
        train_losses=tuple(record.final.train_loss for record in records),
        validation_losses=tuple(record.validations[-1].loss for record in records),
        rises=tuple(
            teleport.loss_after / teleport.loss_before - 1 for record in records for teleport in record.accepted
        ),
        time_shares=tuple(record.teleport_share for record in records),
    )


def _draw(title: str, trades: Sequence[Trade], path: Path) -> None:
    """The train loss at the end over the largest rise, a panel for each rate; of the guards the default."""
    shown = {PLAIN: PLAIN, _name(DEFAULTS.holdout_tol): "the defaults", **{name: name for name in OTHERS}}
    panels = [
        figures.PointPanel(
            f"lr {lr:g}",
            [
                figures.Point(shown[trade.variant], 100 * trade.worst_rise, trade.train_losses)
                for trade in trades
                if trade.lr == lr and trade.variant in shown
            ],
        )
        for lr in dict.fromkeys(trade.lr for trade in trades)
    ]
    figures.points(path, title, "largest rise of the train loss at a teleport (%)", "train loss at the end", panels)
