"""What teleports do to a network beside its train loss: its answers under noise, its weights, spikes of the loss.

A teleport keeps the outputs on its batch, and the bounds of `Teleporter` say how far it may go elsewhere. Each run
trains until the train loss is down at the last of `LEVELS`, and is looked at several times an epoch. Four arms: without
teleports, with a start that learns faster (He et al. 2015 behind LeakyReLU, Glorot and Bengio 2010 behind tanh) for
scale, with teleports without bounds, and with the teleporter as it is by default.

The accuracy under noise is that on validation samples with it, see `training.with_noise`. It is compared where two runs
of a seed first have the same train loss, between two looks by the logarithm of the loss.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import Dataset, split
from experiments.records import save_json
from experiments.tables import format_table
from experiments.training import (
    NOISE,
    BoundedTeleports,
    Task,
    TeleportSettings,
    Trainee,
    make_mlp,
    make_optimizer,
    norm_of,
    with_noise,
)
from symtele_cuda.report import TeleportReport

LEVELS = (0.3, 0.1)
FIRST_SEED = 100  # none of these had a part in the choice of the bounds
LOOKS_PER_EPOCH = 8
LOOKED_AT = 2000  # the train loss is that of the first samples, as many at most
BATCH_SIZE = 20

PLAIN, FAST_START, UNBOUNDED, BOUNDED = "plain", "He or Glorot start", "without bounds", "with the default's bounds"
ARMS: dict[str, TeleportSettings | None] = {
    PLAIN: None,
    FAST_START: None,
    UNBOUNDED: TeleportSettings(),
    BOUNDED: BoundedTeleports(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "LeakyReLU 0.01": lambda: nn.LeakyReLU(0.01),
    "LeakyReLU 0.1": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
}
RATES: dict[str, tuple[float, ...]] = {"sgd": (0.01, 0.05), "adam": (1e-4, 1e-3)}


@dataclass(frozen=True)
class Problem:
    """A data set, the widths of the hidden layers, the most epochs, and how often the validation samples are drawn."""

    widths: tuple[int, ...]
    epochs: int
    draws: int


PROBLEMS = {"digits": Problem((128, 128), epochs=60, draws=10), "mnist": Problem((128, 128), epochs=12, draws=2)}


@dataclass(frozen=True)
class Look:
    """A network at a time of its training; accuracies on the validation samples, norm of all parameters."""

    epoch: float
    train_loss: float
    noise_accuracy: float
    accuracy: float
    norm: float


@dataclass(frozen=True)
class NoiseRun:
    """One run: where it first comes down to each of `LEVELS` (None: never), the greatest ratio of its train loss to the
    best before, and of each accepted teleport the growth of the sensitivity and the largest change of a layer."""

    activation: str
    optimizer: str
    lr: float
    arm: str
    seed: int
    levels: tuple[Look | None, ...]
    spike: float
    teleports: int
    sensitivities: tuple[float, ...]
    weight_changes: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """One arm of one setting against the plain runs of its seeds, means over those where both came down to a level.

    noise, clean: by how many points the accuracy with and without noise is above the plain run's; norms: the ratios of
    ‖W‖; epochs: the ratio of the epochs to the level. spikes: the number of runs whose train loss rises above twice the
    best so far, and by more than the plain run's does.
    """

    activation: str
    optimizer: str
    lr: float
    arm: str
    noise: tuple[float | None, ...]
    clean: tuple[float | None, ...]
    norms: tuple[float | None, ...]
    epochs: tuple[float | None, ...]
    spikes: int
    worst_spike: float
    accepted: int
    teleports: int


def run(
    problem: str, dataset: Dataset, seeds: Sequence[int], epochs: int | None, out: Path, on_run: Callable[[str], None]
) -> str:
    """All runs of one of `PROBLEMS` on its data; JSON in `out`, the table returned.

    seeds: counted from FIRST_SEED. epochs: at most so many, in place of the problem's own.
    """
    seeds = [FIRST_SEED + seed for seed in seeds]
    runs, outcomes = list[NoiseRun](), list[Outcome]()
    for activation, (optimizer, lr) in itertools.product(ACTIVATIONS, settings()):
        by_arm: dict[str, list[NoiseRun]] = {}
        for arm in ARMS:
            found = by_arm.setdefault(arm, [])
            for seed in seeds:
                found.append(train(problem, dataset, activation, optimizer, lr, arm, seed, epochs))
                on_run(f"{activation}, {optimizer} {lr:g}, {arm}, seed {seed}")
            if arm != PLAIN:
                outcomes.append(compare(by_arm[PLAIN], found))
        runs += itertools.chain.from_iterable(by_arm.values())
    described = {"data": dataset.name, "problem": PROBLEMS[problem], "noise": NOISE, "levels": LEVELS, "arms": ARMS}
    save_json(out / "noise.json", "noise", described | {"seeds": seeds}, outcomes=outcomes, runs=runs)
    return outcome_table(outcomes)


def settings() -> list[tuple[str, float]]:
    """(optimizer, rate)."""
    return [(optimizer, lr) for optimizer, rates in RATES.items() for lr in rates]


def count_runs(seeds: int) -> int:
    return len(ACTIVATIONS) * len(settings()) * len(ARMS) * seeds


def train(
    problem: str,
    dataset: Dataset,
    activation: str,
    optimizer: str,
    lr: float,
    arm: str,
    seed: int,
    epochs: int | None = None,
) -> NoiseRun:
    """One run, until its train loss is down at the last of `LEVELS` or its epochs are over."""
    own = PROBLEMS[problem]
    trainee = start(own, dataset, activation, optimizer, lr, arm, seed)
    look_at = _Watcher(trainee, own.draws)
    looks, reports = [look_at(0.0)], list[TeleportReport]()
    for epoch in range(own.epochs if epochs is None else epochs):
        batches = trainee.shuffled_batches()
        every = max(1, len(batches) // LOOKS_PER_EPOCH)
        for iteration, indices in enumerate(batches, start=1):
            batch = trainee.batch(indices)
            if (report := trainee.teleport(batch, epoch)) is not None:
                reports.append(report)
            trainee.descend(batch)
            if iteration % every == 0:
                looks.append(look_at(epoch + iteration / len(batches)))
        if looks[-1].train_loss <= LEVELS[-1] or not math.isfinite(looks[-1].train_loss):
            break
    accepted = [report for report in reports if report.accepted]
    return NoiseRun(
        activation,
        optimizer,
        lr,
        arm,
        seed,
        levels=tuple(first_at(looks, level) for level in LEVELS),
        spike=greatest_rise([look.train_loss for look in looks]),
        teleports=len(reports),
        sensitivities=tuple(_growth(report) for report in accepted),
        weight_changes=tuple(max(report.weight_changes) for report in accepted),
    )


def start(
    problem: Problem, dataset: Dataset, activation: str, optimizer: str, lr: float, arm: str, seed: int
) -> Trainee:
    """The beginning of a run: the same split, weights of torch's own start and batches in every arm of a seed."""
    generator = torch.Generator().manual_seed(seed)
    training, validation = split(dataset, seed)
    dims = (dataset.inputs.shape[1], *problem.widths, int(dataset.targets.max()) + 1)
    model = make_mlp(dims, ACTIVATIONS[activation], generator, bias=True)
    if arm == FAST_START:
        _start_fast(model, generator)
    made = make_optimizer(optimizer, list(model.parameters()), lr)
    teleports = ARMS[arm]
    teleporter = None if teleports is None else teleports.teleporter(model, made, F.cross_entropy)
    task = Task(dims, F.cross_entropy, training, validation)
    return Trainee(task, BATCH_SIZE, model, made, teleporter, torch.Generator().manual_seed(seed))


def _start_fast(model: nn.Sequential, generator: torch.Generator) -> None:
    tanh = any(isinstance(module, nn.Tanh) for module in model)
    for module in model:
        if isinstance(module, nn.Linear):
            (nn.init.xavier_uniform_ if tanh else nn.init.kaiming_uniform_)(module.weight, generator=generator)
            nn.init.zeros_(module.bias)


class _Watcher:
    """Looks at a network, always on the same samples with the same noise."""

    def __init__(self, trainee: Trainee, draws: int) -> None:
        self.model, (train, validation) = trainee.model, (trainee.task.train, trainee.task.validation)
        assert validation is not None
        self.inputs, self.targets = train.inputs[:LOOKED_AT], train.targets[:LOOKED_AT]
        self.clean, self.noisy = (validation.inputs, validation.targets), with_noise(train, validation, draws)

    @torch.no_grad()
    def __call__(self, epoch: float) -> Look:
        loss = F.cross_entropy(self.model(self.inputs), self.targets).item()
        return Look(epoch, loss, self._accuracy(*self.noisy), self._accuracy(*self.clean), norm_of(self.model))

    def _accuracy(self, inputs: Tensor, targets: Tensor) -> float:
        return (self.model(inputs).argmax(1) == targets).float().mean().item()


def first_at(looks: Sequence[Look], level: float) -> Look | None:
    """Where the train loss first comes down to `level`, between two looks by its logarithm; None where it does not."""
    for before, after in itertools.pairwise(looks):
        if after.train_loss <= level < before.train_loss:
            share = math.log(before.train_loss / level) / math.log(before.train_loss / after.train_loss)
            pairs = zip(vars(before).values(), vars(after).values(), strict=True)
            return Look(*(old + share * (new - old) for old, new in pairs))
    return None


def greatest_rise(losses: Sequence[float]) -> float:
    """The largest ratio of a loss to the least before it; at least 1."""
    best = itertools.accumulate(losses, min)
    return max(loss / least for loss, least in zip(losses, best, strict=True))


def compare(plain: Sequence[NoiseRun], others: Sequence[NoiseRun]) -> Outcome:
    """The runs of one arm against the plain ones of the same seeds."""
    pairs = list(zip(plain, others, strict=True))

    def means(figure: Callable[[Look, Look], float]) -> tuple[float | None, ...]:
        return tuple(
            _mean([figure(a.levels[k], b.levels[k]) for a, b in pairs if a.levels[k] and b.levels[k]])  # type: ignore[arg-type]
            for k in range(len(LEVELS))
        )

    first = others[0]
    return Outcome(
        first.activation,
        first.optimizer,
        first.lr,
        first.arm,
        noise=means(lambda a, b: 100 * (b.noise_accuracy - a.noise_accuracy)),
        clean=means(lambda a, b: 100 * (b.accuracy - a.accuracy)),
        norms=means(lambda a, b: b.norm / a.norm),
        epochs=means(lambda a, b: b.epoch / a.epoch),
        spikes=sum(b.spike > max(2.0, a.spike) for a, b in pairs),
        worst_spike=max(b.spike for b in others),
        accepted=sum(len(b.sensitivities) for b in others),
        teleports=sum(b.teleports for b in others),
    )


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    header = ("activation", "optimizer", "rate", "arm", "teleports", "noise", "clean", "‖W‖", "epochs", "spikes")
    rows = [
        (
            outcome.activation,
            outcome.optimizer,
            f"{outcome.lr:g}",
            outcome.arm,
            f"{outcome.accepted}/{outcome.teleports}",
            _cells(outcome.noise, "+.1f"),
            _cells(outcome.clean, "+.1f"),
            _cells(outcome.norms, ".2f"),
            _cells(outcome.epochs, ".2f"),
            str(outcome.spikes),
        )
        for outcome in outcomes
    ]
    return format_table(header, rows)


def _cells(figures_: Sequence[float | None], form: str) -> str:
    return " ".join("–" if figure is None else format(figure, form) for figure in figures_)


def _growth(report: TeleportReport) -> float:
    assert report.sensitivity_before is not None and report.sensitivity_after is not None
    return report.sensitivity_after / report.sensitivity_before


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
