"""What a teleport gains against what the data outside its batch pay for it: the holdout guard, from strict to none.

784-512-512-10 on MNIST with SGD and the defaults of `Teleporter`, but for `holdout_tol`. A teleport keeps the loss of
its own batch; how much it may raise that of other samples is what the guard bounds, and a stricter one leaves less to
gain.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from symtele_cuda.experiments import figures
from symtele_cuda.experiments.data import Dataset
from symtele_cuda.experiments.records import save_json
from symtele_cuda.experiments.study.jobs import DEFAULTS, Job
from symtele_cuda.experiments.study.measure import measure
from symtele_cuda.experiments.study.problems import PROBLEMS, Problem, make_task
from symtele_cuda.experiments.study.records import Record
from symtele_cuda.experiments.tables import format_table
from symtele_cuda.experiments.training import TeleportSettings

PROBLEM = replace(PROBLEMS["mnist-512"], check_every=400)
RATES = (0.01, 0.1)
TOLERANCES = (0.003, 0.01, 0.03, 0.1, math.inf)
PLAIN = "plain"
UNGUARDED = "no guard"


@dataclass(frozen=True)
class Trade:
    """One guard at one rate, over the seeds: the losses at the end, and the relative rises of the train loss at all
    accepted teleports; no teleport, no rise."""

    lr: float
    guard: str
    train_losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    rises: tuple[float, ...]

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
        for guard, teleports in guards().items():
            records = []
            for seed in seeds:
                records.append(measure(Job(problem, "sgd", lr, teleports, seed), make_task(problem, dataset, seed)))
                on_run(f"lr {lr:g}, {guard}, seed {seed}")
            trades.append(_trade(lr, guard, records))
    _draw(f"{dataset.name}: what the holdout guard allows", trades, out / "trade.png")
    settings = {"data": dataset.name, "problem": problem, "teleports": DEFAULTS, "seeds": list(seeds)}
    save_json(out / "trade.json", "trade", settings, trades=trades)
    return trade_table(trades)


def guards() -> dict[str, TeleportSettings | None]:
    """The ways to teleport, by name, from none to one without a guard."""
    named = {_name(tolerance): replace(DEFAULTS, holdout_tol=tolerance) for tolerance in TOLERANCES}
    return {PLAIN: None, **named}


def trade_table(trades: Sequence[Trade]) -> str:
    header = ("rate", "holdout_tol", "rise at a teleport, mean", "largest", "train loss", "± of seeds", "val. loss")
    rows = [
        (
            f"{trade.lr:g}",
            trade.guard,
            f"{statistics.fmean(trade.rises or (0.0,)):.1%}",
            f"{trade.worst_rise:.1%}",
            f"{statistics.fmean(trade.train_losses):.4f}",
            f"{statistics.stdev(trade.train_losses) if len(trade.train_losses) > 1 else 0.0:.4f}",
            f"{statistics.fmean(trade.validation_losses):.4f}",
        )
        for trade in trades
    ]
    return format_table(header, rows)


def _name(tolerance: float) -> str:
    return UNGUARDED if math.isinf(tolerance) else f"{tolerance:g}"


def _trade(lr: float, guard: str, records: Sequence[Record]) -> Trade:
    return Trade(
        lr,
        guard,
        train_losses=tuple(record.final.train_loss for record in records),
        validation_losses=tuple(record.validations[-1].loss for record in records),
        rises=tuple(
            teleport.loss_after / teleport.loss_before - 1
            for record in records
            for teleport in record.teleports
            if teleport.accepted
        ),
    )


def _draw(title: str, trades: Sequence[Trade], path: Path) -> None:
    """The train loss at the end over the largest rise, a curve for each rate; it begins without teleports."""
    rates = list(dict.fromkeys(trade.lr for trade in trades))
    series = []
    for lr in rates:
        own = sorted((trade for trade in trades if trade.lr == lr), key=lambda trade: trade.worst_rise)
        ys = [list(losses) for losses in zip(*(trade.train_losses for trade in own), strict=True)]
        series.append(figures.Series(f"lr {lr:g}", [100 * trade.worst_rise for trade in own], ys))
    label = "largest rise of the train loss at a teleport (%)"
    figures.curves(path, title, [figures.Panel(label, "train loss at the end", series)])
