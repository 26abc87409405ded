"""The tables of docs/standardise.md on starts, made from the files whose experiment is `starts`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import symtele_cuda as st
from bench.evidence_files import read
from bench.tables import table
from experiments.records import finite_or_infinity
from experiments.starts.arms import ALL, ALL_ANYWAY, PLAIN, TRAINED_ANYWAY
from experiments.starts.problems import PROBLEMS
from experiments.starts.results import FIGURES
from symtele_cuda.teleporter import WORTHWHILE

STARTS = "starts"
BEYOND_CHANCE = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t that a mean over so many pairs exceeds, up or down, with a chance of 5 %."""

Document = dict[str, Any]


def read_starts(folder: Path) -> list[Document]:
    """The documents of all rows on starts, in the order of the problems."""
    documents = [read(path) for path in sorted(folder.glob(f"{STARTS}*.json"))]
    return sorted(documents, key=lambda document: [*PROBLEMS].index(next(iter(document["settings"]["levels"]))))


def epochs_of(
    documents: Sequence[Document], problem: str, activation: str, optimizer: str, level: float
) -> dict[str, float]:
    """The epochs to a level of each arm at its best rate; infinite where it is not reached."""
    (document,) = (document for document in documents if problem in document["settings"]["levels"])
    place = document["settings"]["levels"][problem].index(level)
    setting = Setting(problem, activation, optimizer)
    own = {row["arm"]: row["epochs"][place] for row in document["rows"] if Setting.of(row) == setting}
    return {arm: math.inf if epochs is None else epochs for arm, epochs in own.items()}


def best_rates_table(document: Document) -> str:
    """A table a problem, a line for each arm at its best rate."""
    found: dict[str, list[list[str]]] = {}
    for row in document["rows"]:
        cells = [f"{row['activation']}, {row['optimizer']}", row["arm"], f"{row['lr']:.3g}"]
        cells += [_cell(value, ".2f") for value in (*row["epochs"], row["spread"])]
        cells += [f"{row['cost']:.2f}" if row["teleports"] else ""]
        cells += [_cell(row[name], ".3f") for name in ("lowest", "final")]
        cells += [_cell(row[name], ".1f") for name in ("clean", "noisy", "norm")]
        cells[1] += f" ({row['refused']} of {row['teleports']} refused)" if row["refused"] else ""
        found.setdefault(row["problem"], []).append(cells)
    tables = []
    for problem, rows in found.items():
        levels = document["settings"]["levels"][problem]
        header = ["activation, optimizer", "start", "rate", *(f"epochs to {level:g}" for level in levels), "±"]
        header += ["teleports, epochs", "validation loss, lowest", "at the end", "accuracy", "under noise", "‖W‖"]
        tables.append(f"**{problem}**\n\n{table(header, rows)}")
    return "\n\n".join(tables)


def _cell(value: float | None, form: str) -> str:
    """A number, or a dash where a JSON file has null for one that is not finite."""
    return "–" if value is None else format(value, form)


@dataclass(frozen=True)
class Setting:
    problem: str
    activation: str
    optimizer: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Setting:
        """That of a row, or of the runs of an arm."""
        return cls(entry["problem"], entry["activation"], entry["optimizer"])

    def __str__(self) -> str:
        return f"{self.problem}: {self.activation}, {self.optimizer}"


@dataclass(frozen=True)
class Pair:
    """An arm and the plain arm in one setting at one rate: their figures, lists over the seeds."""

    setting: Setting
    lr: float
    plain: dict[str, Any]
    other: dict[str, Any]

    def ratios(self, name: str) -> list[float]:
        """Of each seed, with the arm over without; infinite or 0 where one of the two is not finite, NaN where both."""
        values = zip(self.other[name], self.plain[name], strict=True)
        return [_ratio(*(math.inf if value is None else value for value in pair)) for pair in values]

    def epoch_ratios(self) -> list[float]:
        """Of each seed, of the epochs to the lowest level that both reach; NaN where there is none."""
        return [_epoch_ratio(*runs) for runs in zip(self.other["epochs"], self.plain["epochs"], strict=True)]


def _ratio(one: float, other: float) -> float:
    if math.isfinite(other):
        return one / other
    return 0.0 if math.isfinite(one) else math.nan


def _epoch_ratio(one: Sequence[float | None], other: Sequence[float | None]) -> float:
    both = [(mine, its) for mine, its in zip(one, other, strict=True) if mine is not None and its is not None]
    return both[-1][0] / both[-1][1] if both and both[-1][1] > 0 else math.nan


def pairs_of(documents: Sequence[Document], arm: str) -> list[Pair]:
    """All settings that have both arms, at all rates that both have."""
    rates: dict[tuple[Setting, str], dict[float, dict[str, Any]]] = {}
    for entry in (entry for document in documents for entry in document["runs"]):
        rates[Setting.of(entry), entry["arm"]] = {figures["lr"]: figures for figures in entry["rates"]}
    return [
        Pair(setting, lr, plain[lr], figures)
        for (setting, name), own in rates.items()
        if name == arm and (plain := rates.get((setting, PLAIN)))
        for lr, figures in own.items()
        if lr in plain
    ]


@dataclass(frozen=True)
class Comparison:
    """What an arm does to one figure at one rate. ratio: the geometric mean over the seeds on which both are finite.
    lost: on how many more seeds it is not finite with the arm than without."""

    setting: Setting
    lr: float
    ratio: float
    t: float
    seeds: int
    lost: int

    @classmethod
    def make(cls, pair: Pair, name: str) -> Comparison:
        ratios = pair.ratios(name)
        logs = [math.log(ratio) for ratio in ratios if 0 < ratio < math.inf]
        lost = sum(ratio == math.inf for ratio in ratios) - sum(ratio == 0 for ratio in ratios)
        mean, t = statistics.fmean(logs) if logs else math.nan, math.nan
        if len(logs) > 1:
            error = statistics.stdev(logs) / math.sqrt(len(logs))
            t = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
        return cls(pair.setting, pair.lr, math.exp(mean), t, len(logs), lost)

    @property
    def is_worse(self) -> bool:
        """Whether the figure is larger beyond chance, by a paired t test of its logarithm, or runs are lost."""
        return self.lost > 0 or self.t > BEYOND_CHANCE.get(self.seeds, math.inf)

    @property
    def is_better(self) -> bool:
        return self.lost < 0 or (self.lost == 0 and -self.t > BEYOND_CHANCE.get(self.seeds, math.inf))

    def __str__(self) -> str:
        told = [f"×{self.ratio:.2f}"] if math.isfinite(self.ratio) else []
        told += [f"{self.lost} more diverge"] if self.lost > 0 else []
        return f"{self.lr:.3g} ({', '.join(told)})"


def default_table(folder: Path) -> str:
    """A line a setting: what the default does at all rates that were run with and without it."""
    pairs: dict[Setting, list[Pair]] = {}
    for pair in pairs_of(read_starts(folder), ALL):
        pairs.setdefault(pair.setting, []).append(pair)
    rows = []
    for setting, own in pairs.items():
        cells = [str(setting), f"{len(own)}"]
        for name in ("train", "lowest"):
            made = [Comparison.make(pair, name) for pair in own]
            ratios = [one.ratio for one in made if math.isfinite(one.ratio)]
            cells += [f"×{min(ratios):.2f} to ×{max(ratios):.2f}" if ratios else ""]
            cells += [f"{sum(one.is_better for one in made)}"]
            cells += ["; ".join(str(one) for one in made if one.is_worse) or "none"]
        rows.append(cells)
    header = ["setting", "rates"]
    header += ["final train loss", "better at", "worse at rate", "lowest validation loss", "better at", "worse at rate"]
    return table(header, rows)


@dataclass(frozen=True)
class Guard:
    """A guard by what it looks at. name: the field of a teleport; limit: its largest value, or its least."""

    text: str
    name: str
    limit: float
    at_least: bool = False

    def allows(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit

    def __str__(self) -> str:
        return self.text.format(self.limit)


GAIN = "best step lowers the loss at least {:g} times as much"
GUARDS = (
    Guard("holdout's loss rises by at most {:.0%}", "rise", WORTHWHILE.holdout_tol),
    Guard(GAIN, "gain", WORTHWHILE.min_gain, at_least=True),
    Guard(GAIN, "gain", 1.4, at_least=True),
    Guard("noise moves the logits at most {:g} times as far", "noise", WORTHWHILE.max_sensitivity),
    Guard("a layer's weights change by at most {:g} times their norm", "change", st.Standardise.usual_change),
    Guard("{:.0%} of the predictions on the holdout stay", "kept", st.Standardise().least_kept, at_least=True),
)


@dataclass(frozen=True)
class Judged:
    """The ratios to the plain runs of the same seeds and rates of runs that a guard refuses, or lets pass."""

    epochs: tuple[float, ...]
    train: tuple[float, ...]
    lowest: tuple[float, ...]

    def cells(self) -> list[str]:
        lost = sum(ratio == math.inf for ratio in self.train)
        means = [_geometric_mean(ratios) for ratios in (self.epochs, self.train, self.lowest)]
        return [f"{len(self.train)}" + (f", {lost} diverge" if lost else ""), *means]


def _geometric_mean(ratios: Sequence[float]) -> str:
    logs = [math.log(ratio) for ratio in ratios if 0 < ratio < math.inf]
    return f"×{math.exp(statistics.fmean(logs)):.2f}" if logs else ""


def judge(guard: Guard, pairs: Sequence[Pair]) -> tuple[Judged, Judged]:
    """The runs whose teleports the guard would refuse, and those it would let pass."""
    found: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for pair in pairs:
        ratios = zip(pair.epoch_ratios(), pair.ratios("train"), pair.ratios("lowest"), strict=True)
        for seed, run in enumerate(ratios):
            figures = {name: pair.other[name][seed] for name in FIGURES}
            if any(value is not None for value in figures.values()):  # else it had diverged before
                found[guard.allows(finite_or_infinity(figures)[guard.name])].append(run)
    refused, passed = (Judged(*zip(*runs, strict=True)) if runs else Judged((), (), ()) for runs in found.values())
    return refused, passed


def guarded(documents: Sequence[Document]) -> dict[str, list[Pair]]:
    """By problem, activation and time: the pairs of the arm whose teleports are made whatever the guards say.

    Where the guards refuse nothing at the start, the default itself is such an arm.
    """
    unguarded = pairs_of(documents, ALL_ANYWAY)
    known = {pair.setting.problem for pair in unguarded}
    default = [pair for pair in pairs_of(documents, ALL) if pair.setting.problem not in known]
    at = {"at the start": default + unguarded, "after two epochs": pairs_of(documents, TRAINED_ANYWAY)}
    found: dict[str, list[Pair]] = {}
    for when, pairs in at.items():
        for pair in pairs:
            found.setdefault(f"{pair.setting.problem}, {pair.setting.activation}, {when}", []).append(pair)
    return found


def guards_table(folder: Path) -> str:
    """A line for each guard and time at which it would refuse a teleport: what the runs are like that it would refuse,
    and what the others."""
    rows = []
    for where, pairs in guarded(read_starts(folder)).items():
        for guard in GUARDS:
            refused, passed = judge(guard, pairs)
            if refused.train:
                rows.append([where, str(guard), *refused.cells(), *passed.cells()])
    header = ["where", "guard", "refused runs", "epochs", "train loss", "validation loss"]
    return table([*header, "others", "epochs", "train loss", "validation loss"], rows)
