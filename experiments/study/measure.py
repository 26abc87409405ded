"""One run of the study: training as in the other experiments, with the clock stopped wherever something is measured."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.func import functional_call

from experiments.data import Dataset
from experiments.study.jobs import Job
from experiments.study.problems import Problem, make_task
from experiments.study.records import Check, Record, Teleport, Validation
from experiments.training import (
    Task,
    TeleportSettings,
    Trainee,
    noisy_accuracy,
    norm_of,
    start,
    validate,
    warm_up,
)
from symtele_cuda.errors import TeleportError
from symtele_cuda.teleporter import Teleporter

LATER = 100  # iterations after a teleport at which its rise of the loss is looked at again
CHUNK = 1000  # samples of one forward pass over the training set: more do not fit a core's cache


class Diverged(Exception):
    """The training loss is no longer finite."""


def measure(job: Job, task: Task, kind: type[Teleporter] = Teleporter, in_full: bool = True) -> Record:
    """Train as `job` says, with a teleporter of `kind`. A run whose training loss is no longer finite ends at the check
    that sees it; unless `in_full`, one in which nothing was teleported ends with its schedule."""
    training = job.training
    warm_up(task, training)
    gc.collect()
    gc.freeze()  # else the collector goes through all that torch has loaded, once in a while, as long as a short run
    run = _Run(job, start(task, training, job.teleports, job.seed, kind))
    try:
        run.check()
        for epoch in range(training.epochs):
            run.train_epoch(epoch)
            if not in_full and run.is_plain_over_again(epoch):
                run.cut_short = True
                break
    except Diverged:
        pass
    return run.record()


def measure_seeds(
    problem: Problem,
    dataset: Dataset,
    optimizer: str,
    lr: float,
    teleports: TeleportSettings | None,
    seeds: Sequence[int],
    name: str,
    on_run: Callable[[str], None],
    kind: type[Teleporter] = Teleporter,
) -> list[Record]:
    """One run a seed, see `measure`; `on_run` gets `name` and the seed of what has finished, for progress."""
    records = []
    for seed in seeds:
        job = Job(problem, optimizer, lr, teleports, seed)
        records.append(measure(job, make_task(problem, dataset, seed), kind))
        on_run(f"{name}, seed {seed}")
    return records


def train_loss(trainee: Trainee, parameters: Mapping[str, Tensor] | None = None) -> float:
    """The loss on the whole training set, of the model or with other values of its parameters."""
    model, train, loss_fn = trainee.model, trainee.task.train, trainee.task.loss_fn
    values: dict[str, Tensor] = dict(model.named_parameters() if parameters is None else parameters)
    with torch.no_grad():
        parts = [
            len(x) * loss_fn(functional_call(model, values, (x,)), y).item()
            for x, y in zip(train.inputs.split(CHUNK), train.targets.split(CHUNK), strict=True)
        ]
    return sum(parts) / len(train)


@dataclass
class _Clock:
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


@dataclass
class _Run:
    """A run on its way: what it works on and what has been measured."""

    job: Job
    trainee: Trainee
    clock: _Clock = field(default_factory=_Clock)
    iteration: int = 0
    checks: list[Check] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    teleports: list[Teleport] = field(default_factory=list)
    refused: int = 0
    cut_short: bool = False

    def record(self) -> Record:
        per_epoch = math.ceil(len(self.trainee.task.train) / self.trainee.batch_size)
        lists = tuple(self.checks), tuple(self.validations), tuple(self.teleports)
        return Record(per_epoch, *lists, self.refused, self.cut_short)

    def train_epoch(self, epoch: int) -> None:
        with self.clock.running():
            batches = self.trainee.shuffled_batches()
        for indices in batches:
            with self.clock.running():
                batch = self.trainee.batch(indices)
            self.teleport(batch, epoch)
            with self.clock.running():
                self.trainee.descend(batch)
            self.iteration += 1
            self.look_back()
            if self.iteration % self.job.problem.check_every == 0:
                self.check()
        if self.checks[-1].iteration != self.iteration:
            self.check()
        model, task = self.trainee.model, self.trainee.task
        figures = (*validate(model, task), noisy_accuracy(model, task), norm_of(model))
        self.validations.append(Validation(*(math.nan if value is None else value for value in figures)))

    def check(self) -> None:
        """Append a check.

        Raises:
            Diverged: its loss is not finite.
        """
        loss = train_loss(self.trainee)
        self.checks.append(Check(self.iteration, self.clock.seconds, loss))
        if not math.isfinite(loss):
            raise Diverged

    def teleport(self, batch: tuple[Tensor, Tensor], epoch: int) -> None:
        """Hand `batch` to the teleporter if there may be a teleport, and measure the one that it makes."""
        if not self.may_teleport(epoch):
            return
        old = {name: parameter.detach().clone() for name, parameter in self.trainee.model.named_parameters()}
        started = self.clock.seconds
        try:
            with self.clock.running():
                report = self.trainee.teleport(batch, epoch)
        except TeleportError:
            self.refused += 1
            return
        except ValueError:
            self.check()  # a loss or a weight that is not finite is an error for the teleporter, an end for the run
            raise
        if report is not None:
            before, after = train_loss(self.trainee, old), train_loss(self.trainee)
            seconds = self.clock.seconds - started
            self.teleports.append(Teleport(self.iteration, seconds, report.accepted, before, after, math.nan))

    def may_teleport(self, epoch: int) -> bool:
        """Whether the schedule has a teleport left in `epoch`."""
        settings = self.job.teleports
        if settings is None or epoch not in settings.epochs:
            return False
        return len(self.teleports) < settings.teleports_per_epoch * (1 + settings.epochs.index(epoch))

    def is_plain_over_again(self, epoch: int) -> bool:
        """Whether the epochs after `epoch` are as without a teleporter, and all that asking took is in `teleports`."""
        settings = self.job.teleports
        if settings is None or epoch < max(settings.epochs) or epoch + 1 == self.job.problem.epochs:
            return False
        return self.refused == 0 and not any(teleport.accepted for teleport in self.teleports)

    def look_back(self) -> None:
        """Measure the loss for the teleports that are `LATER` iterations old."""
        for index, teleport in enumerate(self.teleports):
            if teleport.iteration + LATER == self.iteration:
                self.teleports[index] = replace(teleport, loss_later=train_loss(self.trainee))
