"""What the runs say: the best rate of each arm, its row in the table, and every run in short."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.data import Dataset
from experiments.records import Ledger, save_json
from experiments.starts.arms import ALL, ALL_ANYWAY, TRAINED_ANYWAY
from experiments.starts.problems import BATCH_SIZE, FIRST_RATES, NOISE, NOISE_LEVEL, PROBLEMS
from experiments.starts.runs import Job, Look, Outcome, restore, run_job
from experiments.tables import format_table

TEXT = "epochs to a loss from PyTorch's start, initialisations and standardised teleports; goes on where it stopped"
FIRST_SEED = 300  # none of these had a part in the choice of spread and guards
FACTOR = 1.6
FEWEST_RATES, MOST_RATES = 5, 9
JUDGED = (ALL, ALL_ANYWAY, TRAINED_ANYWAY)  # the arms from which the guards are judged: one teleport a run
FIGURES = ("rise", "gain", "noise", "change", "kept")


def epochs_to(level: float, losses: Sequence[float]) -> float:
    """Where the losses, one an epoch, first come down to `level`, between two by the logarithm; inf: nowhere."""
    for epoch, (before, after) in enumerate(itertools.pairwise(losses)):
        if after <= level < before:
            return epoch + math.log(before / level) / math.log(before / after)
    return math.inf


@dataclass(frozen=True)
class Run:
    """One run in short. epochs: to each of the problem's levels, infinite where it is not reached. lowest, final: the
    validation loss. clean, noisy: accuracies in % where the train loss comes down to `NOISE_LEVEL`, NaN where it does
    not, and in a regression. norm: of all parameters at the end."""

    epochs: tuple[float, ...]
    train: float
    lowest: float
    final: float
    clean: float
    noisy: float
    norm: float


def runs_of(outcome: Outcome) -> list[Run]:
    """The runs of a job, seed by seed."""
    levels = PROBLEMS[outcome.job.problem].levels
    return [_run_of([look.of(k) for look in outcome.looks], levels) for k in range(len(outcome.job.seeds))]


def _run_of(looks: Sequence[Look], levels: Sequence[float]) -> Run:
    losses, validation = ([getattr(look, name)[0] for look in looks] for name in ("train", "validation"))
    when = epochs_to(NOISE_LEVEL, losses)

    def there(name: str) -> float:
        if not math.isfinite(when):
            return math.nan
        epoch = min(int(when), len(looks) - 2)
        before, after = (getattr(look, name)[0] for look in looks[epoch : epoch + 2])
        return 100 * (before + (when - epoch) * (after - before))

    epochs = tuple(epochs_to(level, losses) for level in levels)
    lowest = min(value if math.isfinite(value) else math.inf for value in validation)
    return Run(epochs, losses[-1], lowest, validation[-1], there("accuracy"), there("noisy"), looks[-1].norm[0])


def score(outcome: Outcome) -> tuple[float, float]:
    """What the best rate is least in: the epochs to the problem's level, mean over the seeds, then the final loss."""
    problem, runs = PROBLEMS[outcome.job.problem], runs_of(outcome)
    place = problem.levels.index(problem.level)
    final = statistics.fmean(run.train if math.isfinite(run.train) else math.inf for run in runs)
    return statistics.fmean(run.epochs[place] for run in runs), final


def run(
    datasets: Mapping[str, Dataset], seeds: int, epochs: int | None, out: Path, on_run: Callable[[str], None]
) -> str:
    """All arms of the problems at all their rates; each outcome is kept as soon as it is done.

    datasets: those of the problems, by the names of these. epochs: of each run, in place of the problem's own.
    """
    ledger = Ledger(out / "starts.jsonl", restore)
    rows, found = list[Row](), list[dict[str, Any]]()
    numbers = tuple(FIRST_SEED + seed for seed in range(seeds))
    for problem, activation, optimizer, arm in settings(datasets):
        own = PROBLEMS[problem]
        job = Job(problem, activation, optimizer, arm, 0.0, epochs or own.epochs, numbers)

        def work(lr: float, job: Job = job) -> Outcome:
            outcome = ledger.outcome(replace(job, lr=lr), lambda one: run_job(one, datasets[one.problem]))
            on_run(f"{job.problem}, {job.activation}, {job.optimizer}, {job.arm}, {lr:.3g}")
            return outcome

        outcomes = at_its_rates(work, FIRST_RATES[optimizer])
        found.append(_in_short(outcomes))
        rows.append(describe(outcomes))
    described: dict[str, Any] = {"data": {name: dataset.name for name, dataset in datasets.items()}}
    described |= {"batch": BATCH_SIZE, "levels": {name: PROBLEMS[name].levels for name in datasets}}
    described |= {"seeds": list(numbers), "noise": NOISE, "noise_level": NOISE_LEVEL}
    save_json(out / "starts.json", "starts", described, rows=rows, runs=found)
    return table(rows)


def _in_short(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every run of an arm at all its rates, as much as comparisons at one rate need: a list over the seeds each."""
    job = outcomes[0].job
    setting = {name: getattr(job, name) for name in ("problem", "activation", "optimizer", "arm")}
    rates = []
    for outcome in outcomes:
        runs, teleports = runs_of(outcome), {teleport.seed: teleport for teleport in outcome.teleports}
        figures: dict[str, Any] = {"lr": outcome.job.lr}
        figures |= {name: [getattr(run, name) for run in runs] for name in ("epochs", "train", "lowest")}
        if job.arm in JUDGED:
            made = [teleports.get(seed) for seed in job.seeds]
            figures |= {name: [getattr(teleport, name, math.nan) for teleport in made] for name in FIGURES}
        rates.append(figures)
    return setting | {"rates": rates}


def settings(problems: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """(problem, activation, optimizer, arm)."""
    return [
        (name, activation, optimizer, arm)
        for name in problems
        for activation in PROBLEMS[name].activations
        for optimizer, arms in PROBLEMS[name].arms.items()
        for arm in arms
    ]


def at_its_rates(work: Callable[[float], Outcome], first: float) -> list[Outcome]:
    """The outcomes at `FEWEST_RATES` rates around the first, and at more while the best is the last on either side."""
    exponents = list(range(-(FEWEST_RATES // 2), FEWEST_RATES // 2 + 1))
    outcomes = {exponent: work(first * FACTOR**exponent) for exponent in exponents}
    while len(outcomes) < MOST_RATES:
        best = min(outcomes, key=lambda exponent: score(outcomes[exponent]))
        if best == max(outcomes):
            outcomes[best + 1] = work(first * FACTOR ** (best + 1))
        elif best == min(outcomes):
            outcomes[best - 1] = work(first * FACTOR ** (best - 1))
        else:
            break
    return [outcomes[exponent] for exponent in sorted(outcomes)]


@dataclass(frozen=True)
class Row(Run):
    """One arm at its best rate: the means of its `Run`s. spread: the standard deviation of the epochs to the problem's
    own level. teleports: how many all runs together have tried, and refused: how many of these. cost: how many epochs
    of one network take as long as its teleports, at any rate."""

    problem: str
    activation: str
    optimizer: str
    arm: str
    lr: float
    spread: float
    teleports: int
    refused: int
    cost: float


def describe(outcomes: Sequence[Outcome]) -> Row:
    """The row of the outcomes at all rates."""
    outcome = min(outcomes, key=score)
    job, runs = outcome.job, runs_of(outcome)
    problem = PROBLEMS[job.problem]
    times = [run.epochs[problem.levels.index(problem.level)] for run in runs]
    means = {
        name: statistics.fmean(getattr(run, name) for run in runs)
        for name in ("train", "lowest", "final", "clean", "noisy", "norm")
    }
    return Row(
        problem=job.problem,
        activation=job.activation,
        optimizer=job.optimizer,
        arm=job.arm,
        lr=job.lr,
        epochs=tuple(map(statistics.fmean, zip(*(run.epochs for run in runs), strict=True))),
        spread=statistics.stdev(times) if len(times) > 1 and all(map(math.isfinite, times)) else math.nan,
        teleports=len(outcome.teleports),
        refused=sum(not teleport.accepted for teleport in outcome.teleports),
        cost=statistics.median(map(cost, outcomes)),
        **means,
    )


def cost(outcome: Outcome) -> float:
    """How many epochs of one network take as long as its teleports: the median of these, times their number."""
    if not outcome.teleports:
        return 0.0
    a_run = len(outcome.teleports) / len(outcome.job.seeds)
    return a_run * statistics.median(teleport.seconds for teleport in outcome.teleports) / outcome.epoch_seconds


def table(rows: Sequence[Row]) -> str:
    header = ["problem", "activation", "optimizer", "arm", "rate", "epochs to", "its levels", "", "±", "teleports"]
    header += ["train", "val low", "val end", "clean", "noisy", "‖W‖", "refused"]
    return format_table(
        header,
        [
            (
                row.problem,
                row.activation,
                row.optimizer,
                row.arm,
                f"{row.lr:.3g}",
                *(_cell(value, ".2f") for value in (*row.epochs, row.spread, row.cost)),
                *(_cell(value, ".3f") for value in (row.train, row.lowest, row.final)),
                *(_cell(value, ".1f") for value in (row.clean, row.noisy, row.norm)),
                f"{row.refused} of {row.teleports}" if row.teleports else "",
            )
            for row in rows
        ],
    )


def _cell(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
