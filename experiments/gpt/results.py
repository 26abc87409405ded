"""Each arm at its own best rate, warm-up and β₂; then three fresh seeds, and how many steps each takes to a loss."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.gpt.model import Text
from experiments.gpt.runs import (
    ARMS,
    CONTEXT,
    EARLY,
    EARLY_ALONE,
    LAYERS,
    LOOK_EVERY,
    PIECES,
    PLAIN,
    ROTATED,
    SOAP,
    SOAP_START,
    Job,
    Outcome,
    run_job,
    time_steps,
)
from experiments.records import Ledger, save_json
from experiments.tables import format_table

TEXT = "a small Transformer on text: AdamW in its gradients' eigenbasis, SOAP, Muon; goes on where it stopped"
TUNED_ON, FIRST_SEED = 0, 1
RATES, FACTOR, MOST_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2), 2.0, 7
WARM_UPS, BETAS = (50, 20, 120, 200), (0.95, 0.9, 0.99)


@dataclass(frozen=True)
class Setting:
    """A size of the network, a length of the run, the arms. tunes_all: warm-up and β₂ too, not the rate alone."""

    name: str
    width: int
    steps: int
    tunes_all: bool = False
    arms: tuple[str, ...] = tuple(ARMS)


LONG = Setting("long", 64, 2000, arms=(PLAIN, ROTATED, SOAP_START, SOAP))
SETTINGS = {one.name: one for one in (Setting("d = 64", 64, 400, tunes_all=True), Setting("d = 128", 128, 300), LONG)}
"""The first tunes warm-up and β₂ as well; the others take these from it and tune the rate."""

Work = Callable[[Job], Outcome]


def tune(work: Work, setting: Setting, arm: str, first: Job | None) -> Job:
    """The best job of an arm: by the rate, with neighbours while the best is the last on either side; where all is
    tuned, by warm-up and β₂ there, and by the rate's neighbours once more. first: what the search starts from."""
    start = first or Job(setting.width, setting.steps, arm, RATES[0], WARM_UPS[0], BETAS[0], TUNED_ON)
    start = replace(start, width=setting.width, steps=setting.steps, seed=TUNED_ON)
    rates = RATES if first is None else (first.lr / FACTOR, first.lr)
    best = _best_rate(work, start, rates)
    if setting.tunes_all:
        best = _best(work, [replace(best, warm_up=warm_up) for warm_up in WARM_UPS])
        best = _best(work, [replace(best, beta2=beta2) for beta2 in BETAS])
        best = _best_rate(work, best, (best.lr / FACTOR, best.lr, best.lr * FACTOR))
    return best


def _best_rate(work: Work, job: Job, rates: Sequence[float]) -> Job:
    tried = sorted(rates)
    while True:
        best = _best(work, [replace(job, lr=lr) for lr in tried])
        if best.lr == tried[-1] and len(tried) < MOST_RATES:
            tried.append(best.lr * FACTOR)
        elif best.lr == tried[0] and len(tried) < MOST_RATES:
            tried.insert(0, best.lr / FACTOR)
        else:
            return best


def _best(work: Work, jobs: Sequence[Job]) -> Job:
    return min(jobs, key=lambda job: work(job).losses[-1])


@dataclass(frozen=True)
class Plan:
    """What is run: settings and arms by name, so many seeds, and steps in the place of the settings' own."""

    settings: Sequence[str]
    arms: Sequence[str]
    seeds: int
    steps: int | None = None

    @property
    def count(self) -> int:
        """About how many runs there are, where no best rate is the last one tried."""
        tuning = {True: len(RATES) + len(WARM_UPS) + len(BETAS), False: 3}
        settings = [SETTINGS[name] for name in self.settings]
        return sum(len({*self.arms} & {*one.arms}) * (self.seeds + tuning[one.tunes_all]) for one in settings)


def run(text: Text, plan: Plan, out: Path, on_run: Callable[[str], None]) -> str:
    """All arms in all settings; each run is kept as soon as it is done."""
    ledger = Ledger(out / "transformer.jsonl", restore)

    def work(job: Job) -> Outcome:
        outcome = ledger.outcome(job, lambda one: run_job(one, text))
        on_run(f"d = {job.width}, {job.steps} steps, {job.arm}, rate {job.lr:g}: {outcome.losses[-1]:.3f}")
        return outcome

    tuned, rows = dict[str, Job](), list[Row]()
    for setting in (SETTINGS[name] for name in plan.settings):
        setting = replace(setting, steps=plan.steps or setting.steps)
        found = dict[str, list[Outcome]]()
        for arm in (arm for arm in setting.arms if arm in plan.arms):
            best = tune(work, setting, arm, tuned.get(arm))
            if setting.tunes_all:
                tuned[arm] = best
            found[arm] = [work(replace(best, seed=FIRST_SEED + seed)) for seed in range(plan.seeds)]
        seconds = time_steps({arm: outcomes[0].job for arm, outcomes in found.items()}, text)
        rows += describe(setting.name, found, seconds)
    settings: dict[str, Any] = {"layers": LAYERS, "context": CONTEXT, "pieces": PIECES, "look_every": LOOK_EVERY}
    settings |= {"seeds": [FIRST_SEED + seed for seed in range(plan.seeds)]}
    everything = [{**vars(outcome.job), "last": outcome.losses[-1]} for outcome in ledger.known.values()]
    save_json(out / "transformer.json", "transformer", settings, rows=rows, runs=everything)
    return table(rows)


def restore(values: dict[str, Any]) -> Outcome:
    """The inverse of dataclasses.asdict."""
    return Outcome(**values | {"job": Job(**values["job"]), "losses": tuple(values["losses"])})


def steps_to(level: float, losses: Sequence[float]) -> float:
    """The step at which the validation loss first comes down to `level`, linear between two looks; inf: never."""
    if losses[0] <= level:
        return LOOK_EVERY
    for look, (before, after) in enumerate(itertools.pairwise(losses), start=1):
        if after <= level < before:
            return LOOK_EVERY * (look + (before - level) / (before - after))
    return math.inf


@dataclass(frozen=True)
class Row:
    """An arm at its best: means over the seeds. last, spread: the final validation loss and its standard deviation.

    steps_to: the final loss of AdamW with the same seed, as a share of its steps; time_to: the same of its time, where
    a step takes `step_time` times as long as one of AdamW. That of the arms that end early counts for their beginning
    alone.
    rotating: the share of rotations, and of what they read, in the time of the whole run. inexact: the largest relative
    change of the logits at a rotation of any run.
    """

    setting: str
    arm: str
    lr: float
    warm_up: int
    beta2: float
    last: float
    spread: float
    steps_to: float
    step_time: float
    time_to: float
    rotating: float
    inexact: float


def describe(setting: str, found: dict[str, list[Outcome]], seconds: dict[str, float]) -> Iterator[Row]:
    """A row an arm. seconds: of a step of each arm, see `time_steps`."""
    levels = [outcome.losses[-1] for outcome in found[PLAIN]]
    for arm, outcomes in found.items():
        job, lasts = outcomes[0].job, [outcome.losses[-1] for outcome in outcomes]
        pairs = zip(levels, outcomes, strict=True)
        steps = statistics.fmean(steps_to(level, outcome.losses) for level, outcome in pairs)
        slower = seconds[arm] / seconds[PLAIN]
        slow = min(steps, EARLY) if arm in EARLY_ALONE else steps
        yield Row(
            setting,
            arm,
            job.lr,
            job.warm_up,
            job.beta2,
            last=statistics.fmean(lasts),
            spread=statistics.stdev(lasts) if len(lasts) > 1 else 0.0,
            steps_to=steps / job.steps,
            step_time=slower,
            time_to=(slow * slower + steps - slow) / job.steps if math.isfinite(steps) else math.inf,
            rotating=sum(outcome.rotating for outcome in outcomes) / sum(outcome.seconds for outcome in outcomes),
            inexact=max(outcome.inexact for outcome in outcomes),
        )


def table(rows: Sequence[Row]) -> str:
    header = ("setting", "arm", "rate", "warm-up", "β₂", "loss", "±", "steps", "time", "a step", "rotating", "inexact")
    return format_table(
        header,
        [
            (
                row.setting,
                row.arm,
                f"{row.lr:g}",
                str(row.warm_up),
                f"{row.beta2:g}",
                f"{row.last:.3f}",
                f"{row.spread:.3f}",
                f"{row.steps_to:.2f}",
                f"{row.time_to:.2f}",
                f"{row.step_time:.2f}",
                f"{row.rotating:.1%}",
                f"{row.inexact:.0e}",
            )
            for row in rows
        ],
    )
