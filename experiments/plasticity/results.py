"""What came of the runs: a row an arm and rate, the best rate of each arm, tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import figures
from experiments.data import Dataset
from experiments.plasticity.arms import ANYHOW, FRESH, PLAIN, RESET, SELECTED, SHRUNK
from experiments.plasticity.jobs import NAMES, RANDOM, Job, Outcome, restore
from experiments.plasticity.runs import WIDTH, run_job
from experiments.plasticity.tasks import BATCH_SIZE, SAMPLES, TESTED
from experiments.records import Ledger, save_json
from experiments.tables import format_table

LAST_TASKS, TENTH = 5, 10
DRAWN = (PLAIN, RESET, SHRUNK, SELECTED, FRESH, ANYHOW)
SAYING_LITTLE = ("permuted inputs", "more classes", "warm start")
TRADED = (NAMES, RANDOM)


@dataclass(frozen=True)
class Row:
    """One arm at one rate: means over the seeds, accuracies in %. curve: of each task.

    first, last: of the first task and of the last `LAST_TASKS`; spread: the standard deviation of `last` over the
    seeds. kept, kept_least: of the predictions on other samples, over all acts, and the least of them. jump: of the
    accuracy at an act, where it is measured.
    """

    protocol: str
    activation: str
    arm: str
    lr: float
    first: float
    last: float
    spread: float
    kept_own: float
    kept: float
    kept_least: float
    refused: int
    curve: tuple[float, ...]
    jump: float | None = None


def run(dataset: Dataset, wanted: Sequence[Job], drawn: bool, out: Path, on_run: Callable[[str], None]) -> str:
    """All jobs that `out` has no record of yet, each kept as soon as it is done; the summary as a table.

    drawn: whether figures are made of them.
    """

    def work(job: Job) -> Outcome:
        on_run(f"{job.protocol}, {job.activation}, {job.arm}, {job.lr:g}")
        return run_job(job, dataset)

    ledger = Ledger(out / "plasticity.jsonl", restore)
    outcomes = [ledger.outcome(job, work) for job in wanted]
    everything = [describe(outcome) for outcome in outcomes]
    runs = [{**vars(outcome.job), "last": lasts_of(outcome)} for outcome in outcomes]
    settings = {"data": dataset.name, "samples": SAMPLES, "tested": TESTED, "batch": BATCH_SIZE, "width": WIDTH}
    best = [*best_of(everything).values()]
    if drawn:
        draw_tasks(best, out / "plasticity.png")
        draw_trade(outcomes, best, out / "plasticity-trade.png")
    save_json(out / "plasticity.json", "plasticity", settings, rows=everything, runs=runs)
    return table(best)


def describe(outcome: Outcome) -> Row:
    job = outcome.job
    lasts = [100 * last for last in lasts_of(outcome)]
    own, others = (_percent(kept) or [100.0] for kept in (outcome.kept_own, outcome.kept_others))  # without an act all
    jumps = _percent(outcome.jumps)
    return Row(
        job.protocol,
        job.activation,
        job.arm,
        job.lr,
        first=100 * statistics.fmean(run[0] for run in outcome.accuracies),
        last=statistics.fmean(lasts),
        spread=statistics.stdev(lasts) if len(lasts) > 1 else 0.0,
        kept_own=statistics.fmean(own),
        kept=statistics.fmean(others),
        kept_least=min(others),
        refused=outcome.refused,
        curve=tuple(100 * statistics.fmean(task) for task in zip(*outcome.accuracies, strict=True)),
        jump=statistics.fmean(jumps) if jumps else None,
    )


def lasts_of(outcome: Outcome) -> list[float]:
    """The mean accuracy on the last tasks, never on the first one, seed by seed."""
    return [statistics.fmean(run[1:][-LAST_TASKS:]) for run in outcome.accuracies]
Setting = tuple[str, str, str]


def best_of(rows: Sequence[Row], score: Callable[[Row], float] = lambda row: row.last) -> dict[Setting, Row]:
    """Each arm at the rate with which its last tasks went best, or what else `score` says."""
    best: dict[Setting, Row] = {}
    for row in rows:
        key = (row.protocol, row.activation, row.arm)
        if key not in best or score(row) > score(best[key]):
            best[key] = row
    return best


def tuned_earlier(rows: Sequence[Row]) -> dict[Setting, tuple[float, float, float]]:
    """The accuracy on the last tasks at the rate that is best on the first one, on the tenth, and on the last ones."""
    early = best_of(rows, lambda row: row.first)
    tenth = best_of(rows, lambda row: row.curve[min(TENTH, len(row.curve)) - 1])
    return {key: (early[key].last, tenth[key].last, row.last) for key, row in best_of(rows).items()}


def draw_tasks(rows: Sequence[Row], path: Path) -> None:
    """The accuracy task by task, of the arms and protocols that say most."""
    groups: dict[str, list[figures.Series]] = {}
    for row in rows:
        if row.arm in DRAWN and row.protocol not in SAYING_LITTLE:
            curve = figures.Series(row.arm, list(range(1, len(row.curve) + 1)), [row.curve])
            groups.setdefault(f"{row.protocol}, {row.activation}", []).append(curve)
    panels = [figures.Panel("task", "accuracy, %", curves, name, y_scale="linear") for name, curves in groups.items()]
    if panels:
        figures.curves(path, "Accuracy task by task, mean over the seeds, each arm at its best rate", panels)


def draw_trade(outcomes: Sequence[Outcome], rows: Sequence[Row], path: Path) -> None:
    """What each arm has kept against how it learns the last tasks, of the protocols where these differ most."""
    lasts = {outcome.job: [100 * last for last in lasts_of(outcome)] for outcome in outcomes}
    values = {(job.protocol, job.activation, job.arm, job.lr): last for job, last in lasts.items()}
    groups: dict[str, list[figures.Point]] = {}
    for where, kept in (("own samples", lambda row: row.kept_own), ("others", lambda row: row.kept)):
        for row in rows:
            if row.protocol in TRADED:
                point = figures.Point(row.arm, kept(row), values[row.protocol, row.activation, row.arm, row.lr])
                groups.setdefault(f"{row.protocol}, {row.activation}: {where}", []).append(point)
    panels = [figures.PointPanel(name, points, y_scale="linear") for name, points in groups.items()]
    if panels:
        title = "What is kept and what is learned, each arm at its best rate"
        figures.points(path, title, "predictions kept at a change, %", "accuracy on the last tasks, %", panels)


def _percent(shares: Sequence[Sequence[float]]) -> list[float]:
    return [100 * share for run in shares for share in run]


def table(rows: Sequence[Row]) -> str:
    header = ("protocol", "activation", "arm", "rate", "first", "last 5", "±", "kept", "others", "least", "refused")
    return format_table(
        header,
        [
            (
                row.protocol,
                row.activation,
                row.arm,
                f"{row.lr:g}",
                *(f"{value:.1f}" for value in (row.first, row.last, row.spread)),
                *(f"{value:.1f}" for value in (row.kept_own, row.kept, row.kept_least)),
                str(row.refused),
            )
            for row in rows
        ],
    )
