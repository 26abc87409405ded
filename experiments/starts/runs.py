"""The runs of a job: data, networks, optimizer, teleports, and a look at all networks after every epoch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import Dataset, split, standardise
from experiments.side_by_side import Apart, SideBySide, make_mlp
from experiments.starts.arms import ARMS, SAMPLES, Moment, Samples, initialise
from experiments.starts.problems import (
    ACTIVATIONS,
    BATCH_SIZE,
    GRADIENT_STEPS,
    MATRICES_ONLY,
    NOISE,
    OPTIMIZERS,
    PROBLEMS,
    Optimizers,
)
from experiments.training import muon_in_own_dtype
from symtele_cuda.report import TeleportReport

TIMED_STEPS = 40


@dataclass(frozen=True)
class Job:
    """The runs of one setting, one a seed."""

    problem: str
    activation: str
    optimizer: str
    arm: str
    lr: float
    epochs: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """All networks of a job after so many epochs, one number a seed; `noisy` is the accuracy under noise, which a
    regression has not, as it has no accuracy."""

    train: tuple[float, ...]
    validation: tuple[float, ...]
    accuracy: tuple[float, ...]
    noisy: tuple[float, ...]
    norm: tuple[float, ...]

    def of(self, seed: int) -> Look:
        """The same of one network."""
        return Look(*((figure[seed],) for figure in vars(self).values()))


@dataclass(frozen=True)
class Teleport:
    """One teleport of the network of a seed before an epoch, and what guards look at.

    rise: of the holdout's loss, as a share. gain: the objective, over that before, which is the best decrease by a
    gradient step where it standardises with a `min_gain` above 0. noise: how far noise in the inputs moves the logits,
    over that before. change: the largest ‖ΔW‖/‖W‖ of a layer. kept: the share of the predictions on the holdout. NaN
    where it is refused or not measured.
    """

    seed: int
    epoch: int
    accepted: bool
    reason: str
    seconds: float
    rise: float
    gain: float
    noise: float
    change: float
    kept: float

    @classmethod
    def make(cls, seed: int, epoch: int, report: TeleportReport) -> Teleport:
        figures = (
            _ratio(report.holdout_after, report.holdout_before) - 1,
            _ratio(report.objective_after, report.objective_before),
            _ratio(report.sensitivity_after, report.sensitivity_before),
            max(report.weight_changes),
            math.nan if report.holdout_kept is None else report.holdout_kept,
        )
        known = figures if report.accepted else (math.nan,) * len(figures)
        return cls(seed, epoch, report.accepted, report.reason, report.seconds, *known)


def _ratio(after: float | None, before: float | None) -> float:
    if after is None or before is None:
        return math.nan
    return after / before if before else math.inf


@dataclass(frozen=True)
class Outcome:
    """looks: before the first epoch and after each. epoch_seconds: how long one network alone takes for an epoch, in
    the same process as the teleports; 0 where there are none."""

    job: Job
    looks: tuple[Look, ...]
    teleports: tuple[Teleport, ...]
    epoch_seconds: float


class Runs:
    """The runs of a job: data, networks, optimizers."""

    def __init__(self, job: Job, dataset: Dataset) -> None:
        self.job, self.problem, self.arm = job, PROBLEMS[job.problem], ARMS[job.arm]
        pairs = _scaled([split(dataset, seed) for seed in job.seeds])
        self.x, self.valid_x = (torch.stack([p[k].inputs for p in pairs]) for k in (0, 1))
        self.y, self.valid_y = (torch.stack([p[k].targets for p in pairs]) for k in (0, 1))
        self.loss_fn: Callable[..., Tensor] = F.mse_loss if self.is_regression else F.cross_entropy
        self.generators = [torch.Generator().manual_seed(seed) for seed in job.seeds]
        self.noise = torch.stack([torch.randn(self.valid_x[0].shape, generator=g) for g in self.generators]) * NOISE
        self.teleports: list[Teleport] = []
        self.models = [self._start(k) for k in range(len(job.seeds))]
        self.networks = (Apart if job.optimizer in MATRICES_ONLY else SideBySide)(self.models)
        self.optimizers = OPTIMIZERS[job.optimizer](self.networks, job.lr)
        self.teleport(0)

    def _start(self, k: int) -> nn.Sequential:
        outputs = self.y.shape[-1] if self.is_regression else int(self.y.max()) + 1
        with torch.random.fork_rng([]):
            torch.manual_seed(self.job.seeds[k])
            dims = (self.x.shape[-1], *self.problem.widths, outputs)
            model = make_mlp(dims, ACTIVATIONS[self.job.activation])
            if self.arm.init is not None:
                initialise(model, self.arm.init, self.job.activation, self.x[k, :SAMPLES])
        return model

    @property
    def is_regression(self) -> bool:
        return self.y.is_floating_point()

    def teleport(self, epoch: int) -> None:
        """What the arm does before this epoch; the optimizers' state stays, as a Teleporter leaves it.

        Nothing is teleported of a network that has diverged.
        """
        if self.arm.teleport is None or epoch not in self.arm.before:
            return
        self.networks.read(self.models)
        rate = self.job.lr if self.job.optimizer in GRADIENT_STEPS else None
        moment = Moment(epoch, self.job.lr, self.job.activation, rate)
        finite = self.look().train
        for k, model in enumerate(self.models):
            if not math.isfinite(finite[k]):
                continue
            samples = Samples((self.x[k], self.y[k]), (self.valid_x[k], self.valid_y[k]))
            report = self.arm.teleport(model, samples, moment)
            self.teleports.append(Teleport.make(self.job.seeds[k], epoch, report))
        self.networks.write(self.models)

    def train(self) -> None:
        """One epoch."""
        orders = torch.stack([torch.randperm(self.x.shape[1], generator=g) for g in self.generators])
        rows = torch.arange(len(self.x)).unsqueeze(1)
        for indices in orders.split(BATCH_SIZE, dim=1):
            self._descend(self.networks, self.optimizers, self.x[rows, indices], self.y[rows, indices])

    def _descend(self, networks: SideBySide | Apart, optimizers: Optimizers, x: Tensor, y: Tensor) -> None:
        """One step of all networks."""
        loss = len(x) * self.loss_fn(networks(x).flatten(0, 1), y.flatten(0, 1))
        networks.zero_grad()
        loss.backward()
        with muon_in_own_dtype():
            for optimizer in optimizers:
                optimizer.step()

    def seconds_of_an_epoch(self) -> float:
        """How long one network alone takes, as a user would train it: the median over some steps, times theirs."""
        network = Apart([deepcopy(self.models[0])])
        optimizers = OPTIMIZERS[self.job.optimizer](network, self.job.lr)
        batch, seconds = (self.x[:1, :BATCH_SIZE], self.y[:1, :BATCH_SIZE]), []
        for _ in range(TIMED_STEPS):
            started = time.perf_counter()
            self._descend(network, optimizers, *batch)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds) * math.ceil(self.x.shape[1] / BATCH_SIZE)

    @torch.no_grad()
    def look(self) -> Look:
        norms = torch.stack([p.detach().flatten(1).double().square().sum(1) for p in self.networks.stacked]).sum(0)
        train, _ = self._judge(self.x, self.y)
        validation, accuracy = self._judge(self.valid_x, self.valid_y)
        _, noisy = self._judge(self.valid_x + self.noise, self.valid_y)
        figures = (train, validation, accuracy, noisy, norms.sqrt())
        return Look(*(tuple(figure.tolist()) for figure in figures))

    def _judge(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each network; a regression has no accuracy."""
        outputs = self.networks(x)
        losses = self.loss_fn(outputs.flatten(0, 1), y.flatten(0, 1), reduction="none").view(len(y), -1).mean(1)
        if self.is_regression:
            return losses, torch.full_like(losses, math.nan)
        return losses, (outputs.argmax(-1) == y).double().mean(1)


def _scaled(pairs: Sequence[tuple[Dataset, Dataset]]) -> list[tuple[Dataset, Dataset]]:
    """Training and validation of each seed: inputs with mean 0 and variance 1, columns and targets too in a regression.

    Pixels are scaled together, by what they are on the first seed's training samples.
    """
    first = pairs[0][0]
    if first.targets.is_floating_point():
        return [standardise(*pair) for pair in pairs]
    mean, deviation = first.inputs.mean(), first.inputs.std()

    def scale(part: Dataset) -> Dataset:
        return Dataset(part.name, (part.inputs - mean) / deviation, part.targets)

    return [(scale(train), scale(validation)) for train, validation in pairs]


def run_job(job: Job, dataset: Dataset) -> Outcome:
    runs = Runs(job, dataset)
    looks = [runs.look()]
    for epoch in range(job.epochs):
        if epoch > 0:
            runs.teleport(epoch)
        runs.train()
        looks.append(runs.look())
    seconds = runs.seconds_of_an_epoch() if runs.teleports else 0.0
    return Outcome(job, tuple(looks), tuple(runs.teleports), seconds)


def restore(values: dict[str, Any]) -> Outcome:
    """The inverse of dataclasses.asdict."""
    job = values["job"] | {"seeds": tuple(values["job"]["seeds"])}
    looks = tuple(Look(**{name: tuple(figures) for name, figures in look.items()}) for look in values["looks"])
    teleports = tuple(Teleport(**teleport) for teleport in values["teleports"])
    return Outcome(Job(**job), looks, teleports, values["epoch_seconds"])
