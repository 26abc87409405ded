"""The suites of jobs, and what is recorded of one: all seeds on one protocol, with one arm at one rate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.plasticity.arms import (
    ANYHOW,
    ARMS,
    DORMANT,
    FRESH,
    MAIN,
    PLAIN,
    RESET,
    SELECTED,
    SHRUNK,
    Learners,
)
from experiments.plasticity.tasks import PROTOCOLS, Task
from symtele_cuda.guards import STANDARDISED
from symtele_cuda.methods.standardise import share_kept

FIRST_SEED = 200  # none of these had a part in the choice of the ridge
BOTH = ("tanh", "LeakyReLU 0.01")


@dataclass(frozen=True)
class Suite:
    """Jobs that belong together: each protocol with each activation, arm and rate.

    rates: None: the protocols' own. tasks: so many of a protocol at most. drawn: whether they have figures.
    """

    protocols: tuple[str, ...]
    activations: tuple[str, ...] = BOTH
    arms: tuple[str, ...] = MAIN
    optimizer: str = "adamw"
    rates: tuple[float, ...] | None = None
    tasks: int | None = None
    drawn: bool = False


NAMES, RANDOM = "relabelled", "random labels"
WHOLE = "whole"
SUITES = {
    WHOLE: Suite((NAMES, "permuted inputs", "more classes", "warm start", RANDOM), arms=tuple(ARMS), drawn=True),
    "gradual": Suite(("gradually relabelled", "online permuted"), drawn=True),
    "regression": Suite(("slow regression",), ("tanh",), (PLAIN, RESET, SHRUNK, SELECTED, FRESH, ANYHOW)),
    "relu": Suite((NAMES, RANDOM), ("ReLU",), (PLAIN, RESET, SHRUNK, DORMANT, FRESH, ANYHOW), tasks=10),
    "sgd": Suite((NAMES, RANDOM), ("tanh",), (PLAIN, SHRUNK, FRESH, ANYHOW), "sgd", (0.1, 0.2, 0.4), tasks=10),
    "control": Suite(("CartPole",), ("ReLU",), (PLAIN, RESET, SHRUNK, FRESH, ANYHOW)),
    "short": Suite((NAMES,), BOTH, (PLAIN, RESET, SHRUNK, FRESH, ANYHOW), tasks=10),
}


@dataclass(frozen=True)
class Job:
    """The runs of one setting, one a seed."""

    protocol: str
    activation: str
    arm: str
    lr: float
    tasks: int
    seeds: tuple[int, ...]
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Outcome:
    """What came of a job, seed by seed. accuracies: of each task; kept: by each act, on the samples it was given and on
    others. refused: how many teleports the guards have refused, of all seeds. jumps: accuracy after each act less that
    before, where the protocol measures it."""

    job: Job
    accuracies: tuple[tuple[float, ...], ...]
    kept_own: tuple[tuple[float, ...], ...]
    kept_others: tuple[tuple[float, ...], ...]
    refused: int
    jumps: tuple[tuple[float, ...], ...] = ()


def jobs_of(suite: Suite, seeds: int, protocols: Sequence[str] | None = None, tasks: int | None = None) -> list[Job]:
    """All jobs of the suite. protocols: these alone. tasks: so many of them at most, in place of the protocol's own."""
    numbers = tuple(range(FIRST_SEED, FIRST_SEED + seeds))
    names = [name for name in suite.protocols if protocols is None or name in protocols]
    settings = [
        (name, activation, arm, lr)
        for name in names
        for activation, arm in itertools.product(suite.activations, suite.arms)
        for lr in suite.rates or PROTOCOLS[name].rates
    ]
    limits = [limit for limit in (tasks, suite.tasks) if limit is not None]
    counts = {name: min([PROTOCOLS[name].tasks, *limits]) for name in names}
    return [Job(*setting, counts[setting[0]], numbers, suite.optimizer) for setting in settings]


class Runs:
    """The learners of a job and what is recorded of them, a list of a value a seed for each task or act."""

    def __init__(self, job: Job, dims: Sequence[int]) -> None:
        self.job = job
        self.learners = Learners(job.activation, job.lr, ARMS[job.arm], job.seeds, dims, job.optimizer)
        self.accuracies, self.jumps = list[list[float]](), list[list[float]]()
        self.kept_own, self.kept_others = list[list[float]](), list[list[float]]()

    def act(self, task: Task, others: Tensor) -> None:
        classes = not task.y.is_floating_point()
        before = [self.learners.outputs(x) for x in (task.x, others)]
        self.learners.act(task)
        for record, x, old in zip((self.kept_own, self.kept_others), (task.x, others), before, strict=True):
            pairs = zip(old, self.learners.outputs(x), strict=True)
            shares = torch.stack([share_kept(*pair, classes=classes) for pair in pairs])
            record.append(shares.nan_to_num(nan=1.0).clamp(min=0.0).tolist())  # NaN: constant outputs that stay

    def outcome(self) -> Outcome:
        refused = sum(reason != STANDARDISED for reason in self.learners.reasons)
        records = [_by_seed(record) for record in (self.accuracies, self.kept_own, self.kept_others, self.jumps)]
        return Outcome(self.job, records[0], records[1], records[2], refused, records[3])


def _by_seed(lines: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*lines, strict=True))


def restore(values: dict[str, Any]) -> Outcome:
    """The inverse of dataclasses.asdict."""
    job = values["job"] | {"seeds": tuple(values["job"]["seeds"])}
    names = ("accuracies", "kept_own", "kept_others", "jumps")
    figures = {name: tuple(map(tuple, values.get(name, ()))) for name in names}
    return Outcome(Job(**job), refused=values["refused"], **figures)
