"""How fast a network learns from where it starts: PyTorch's own start, tuned initialisations, standardised teleports.

Each arm is run at several rates, more of them while the best is the last one on either side, and is compared at its own
best. The answer is in epochs to a train loss, and in what stands against it: the validation loss, the accuracy under
noise in the inputs at equal train loss, the norm of the weights.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda as st
from experiments.data import Dataset, split
from experiments.records import go_on, save_json
from experiments.side_by_side import SideBySide, make_mlp
from experiments.tables import format_table
from symtele_cuda.teleporter import WORTHWHILE

TEXT = "epochs to a loss from PyTorch's start, initialisations and standardised teleports; goes on where it stopped"
FIRST_SEED = 300  # none of these had a part in the choice of spread and guards
BATCH_SIZE = 20
LEVELS = (0.1, 0.03, 0.01)
NOISE, NOISE_LEVEL = 0.3, 0.05
MOST_RATES = 9
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "LeakyReLU 0.1": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
GAINS = {"LeakyReLU 0.1": math.sqrt(2 / 1.01), "tanh": 5 / 3, "sigmoid": 4.0}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, fused=True),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9, fused=True),
    "adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr, fused=True),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr, fused=True),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr, fused=True),
}
FIRST_RATES = {"sgd": 0.2, "momentum": 0.02, "adagrad": 0.02, "adam": 2e-3, "adamw": 2e-3}
FACTOR = 1.6
FEWEST_RATES = 5


@dataclass(frozen=True)
class Problem:
    """Hidden widths, epochs of a run, the level that decides which rate is best, and activations and optimizers."""

    widths: tuple[int, ...]
    epochs: int
    level: float
    activations: tuple[str, ...]
    optimizers: tuple[str, ...]
    arms: tuple[str, ...]


PLAIN, LAST, ALL = "plain", "standardise, exact", "standardise"
INITS = ("He or Glorot", "orthogonal", "LSUV")
ON_BEST = "orthogonal, then standardise"
SMALL = "standardise, spread halved"
TRAINED, TRAINED_ALL = "two epochs, plain", "two epochs, standardise"
STARTS = (PLAIN, *INITS, LAST, ALL, SMALL, ON_BEST)
PROBLEMS = {
    "digits": Problem(
        (128, 128), 12, 0.01, (*ACTIVATIONS,), ("sgd", "momentum", "adam"), (*STARTS, TRAINED, TRAINED_ALL)
    ),
    "digits, deep": Problem((128,) * 4, 8, 0.03, ("sigmoid",), ("sgd", "adam"), (PLAIN, *INITS, ALL, ON_BEST)),
    "digits, other rules": Problem(
        (128, 128), 12, 0.01, ("LeakyReLU 0.1",), ("adagrad", "adamw"), (PLAIN, *INITS, ALL)
    ),
    "mnist": Problem((512, 512), 5, 0.1, ("LeakyReLU 0.1", "tanh"), ("sgd",), (PLAIN, "He or Glorot", ALL)),
}


@dataclass(frozen=True)
class Job:
    """The runs of one setting, one a seed."""

    problem: str
    activation: str
    optimizer: str
    arm: str
    lr: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """All networks of a job after so many epochs, one number a seed; `noisy` is the accuracy under noise."""

    train: tuple[float, ...]
    validation: tuple[float, ...]
    accuracy: tuple[float, ...]
    noisy: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """looks: before the first epoch and after each. reasons: what the teleports said."""

    job: Job
    looks: tuple[Look, ...]
    reasons: tuple[str, ...]


def initialise(model: nn.Sequential, kind: str, activation: str, x: Tensor) -> None:
    """He et al. 2015 or, behind tanh and sigmoid, Glorot and Bengio 2010; orthogonal; LSUV (Mishkin and Matas 2016).

    Each has the gain of its activation, 4 behind sigmoid (Glorot and Bengio), and no biases.
    """
    linears = [module for module in model if isinstance(module, nn.Linear)]
    for linear in linears:
        gain = GAINS[activation] if linear is not linears[-1] else 1.0
        nn.init.zeros_(linear.bias)
        if kind != "He or Glorot":
            nn.init.orthogonal_(linear.weight, 1.0 if kind == "LSUV" else gain)
        elif activation == "LeakyReLU 0.1":
            nn.init.normal_(linear.weight, 0.0, gain / math.sqrt(linear.weight.shape[1]))
        else:
            nn.init.xavier_uniform_(linear.weight, gain)
    if kind == "LSUV":
        _unit_variance(model, x)


@torch.no_grad()
def _unit_variance(model: nn.Sequential, x: Tensor) -> None:
    """Scale the weights so that each layer's outputs on x have variance 1."""
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.div_(module(x).std())
        x = module(x)


class Runs:
    """The runs of a job: data, networks, optimizer."""

    def __init__(self, job: Job, dataset: Dataset) -> None:
        self.job, self.problem = job, PROBLEMS[job.problem]
        pairs = [split(dataset, seed) for seed in job.seeds]
        inputs = torch.cat([train.inputs for train, _ in pairs[:1]])
        mean, deviation = inputs.mean(), inputs.std()
        self.x, self.valid_x = (torch.stack([(p[k].inputs - mean) / deviation for p in pairs]) for k in (0, 1))
        self.y, self.valid_y = (torch.stack([p[k].targets for p in pairs]) for k in (0, 1))
        generators = [torch.Generator().manual_seed(seed) for seed in job.seeds]
        self.noise = torch.stack([torch.randn(self.valid_x[0].shape, generator=g) for g in generators]) * NOISE
        self.generators = generators
        self.reasons: list[str] = []
        self.models = [self._start(k) for k in range(len(job.seeds))]
        self.networks = SideBySide(self.models)
        self.optimizer = OPTIMIZERS[job.optimizer](list(self.networks.parameters()), job.lr)

    def _start(self, k: int) -> nn.Sequential:
        job = self.job
        dims = (self.x.shape[-1], *self.problem.widths, int(self.y.max()) + 1)
        with torch.random.fork_rng([]):
            torch.manual_seed(job.seeds[k])
            model = make_mlp(dims, ACTIVATIONS[job.activation])
            for kind in INITS:
                if job.arm.startswith(kind):
                    initialise(model, kind, job.activation, self.x[k, :200])
        if job.arm in (LAST, ALL, SMALL, ON_BEST):
            self.teleport(model, k)
        return model

    def teleport(self, model: nn.Sequential, k: int) -> None:
        """Standardise on the first samples, as a Teleporter would, with those behind them as the holdout."""
        exact, small = self.job.arm == LAST, self.job.arm == SMALL
        count = 100 if exact else 1000 if self.job.arm == TRAINED_ALL else 200
        spread = {"LeakyReLU 0.1": 1.0, "tanh": 1.0, "sigmoid": 2.0}[self.job.activation] if small else "auto"
        method = st.Standardise(spread=spread, refit="last" if exact else "all", least_kept=0.0)
        holdout = self.x[k, count : count + 200], self.y[k, count : count + 200]
        guards = st.Guards(
            holdout=holdout,
            holdout_tol=WORTHWHILE.holdout_tol,
            min_gain=0.0 if self.job.arm == TRAINED_ALL else WORTHWHILE.min_gain,
            max_sensitivity=math.inf if exact else 1.5,
        )
        batch = self.x[k, :count], self.y[k, :count]
        self.reasons.append(st.teleport_mlp(model, batch, method=method, guards=guards).reason)

    def train(self) -> None:
        """One epoch."""
        orders = torch.stack([torch.randperm(self.x.shape[1], generator=g) for g in self.generators])
        for indices in orders.split(BATCH_SIZE, dim=1):
            x = self.x.gather(1, indices.unsqueeze(-1).expand(-1, -1, self.x.shape[-1]))
            loss = len(x) * F.cross_entropy(self.networks(x).flatten(0, 1), self.y.gather(1, indices).flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def refit(self) -> None:
        """Standardise trained networks, on more samples; the optimizer starts anew."""
        self.networks.read(self.models)
        for k, model in enumerate(self.models):
            self.teleport(model, k)
        self.networks.write(self.models)

    @torch.no_grad()
    def look(self) -> Look:
        norms = sum(p.detach().flatten(1).double().square().sum(1) for p in self.networks.parameters())
        assert isinstance(norms, Tensor)
        train, _ = _judge(self.networks(self.x), self.y)
        validation, accuracy = _judge(self.networks(self.valid_x), self.valid_y)
        _, noisy = _judge(self.networks(self.valid_x + self.noise), self.valid_y)
        figures = (train, validation, accuracy, noisy, norms.sqrt())
        return Look(*(tuple(figure.tolist()) for figure in figures))


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of each network."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1), (logits.argmax(-1) == targets).double().mean(1)


def run_job(job: Job, dataset: Dataset) -> Outcome:
    runs = Runs(job, dataset)
    looks = [runs.look()]
    for epoch in range(runs.problem.epochs):
        if job.arm == TRAINED_ALL and epoch == 2:
            runs.refit()
        runs.train()
        looks.append(runs.look())
    return Outcome(job, tuple(looks), tuple(runs.reasons))


def epochs_to(level: float, losses: Sequence[float]) -> float:
    """Where the losses, one an epoch, first come down to `level`, between two by the logarithm; inf: nowhere."""
    for epoch, (before, after) in enumerate(itertools.pairwise(losses)):
        if after <= level < before:
            return epoch + math.log(before / level) / math.log(before / after)
    return math.inf


def score(outcome: Outcome) -> tuple[float, float]:
    """What the best rate is least in: the epochs to the problem's level, mean over the seeds, then the final loss."""
    level = PROBLEMS[outcome.job.problem].level
    finals = outcome.looks[-1].train
    final = statistics.fmean(value if math.isfinite(value) else math.inf for value in finals)
    return mean_epochs(outcome, level), final


def mean_epochs(outcome: Outcome, level: float) -> float:
    curves = zip(*(look.train for look in outcome.looks), strict=True)
    return statistics.fmean(epochs_to(level, curve) for curve in curves)


def run(
    problem: str, dataset: Dataset, seeds: int, out: Path, on_run: Callable[[str], None]
) -> str:
    """All arms of a problem at all their rates; each outcome is kept as soon as it is done."""
    own, numbers = PROBLEMS[problem], tuple(FIRST_SEED + seed for seed in range(seeds))
    record = out / f"starts-{problem.replace(', ', '-').replace(' ', '-')}.jsonl"
    rows, found = list[Row](), list[Outcome]()
    for activation, optimizer in itertools.product(own.activations, own.optimizers):
        for arm in own.arms:

            def work(lr: float, setting: tuple[str, str, str, str] = (problem, activation, optimizer, arm)) -> Outcome:
                (outcome,) = go_on(record, [Job(*setting, lr, numbers)], lambda job: run_job(job, dataset), restore)
                on_run(f"{', '.join(setting)}, {lr:.3g}")
                return outcome

            outcomes = at_its_rates(work, FIRST_RATES[optimizer])
            found += outcomes
            rows.append(describe(min(outcomes, key=score)))
    settings = {"data": dataset.name, "batch": BATCH_SIZE, "noise": NOISE, "noise_level": NOISE_LEVEL, "levels": LEVELS}
    save_json(record.with_suffix(".json"), "starts", settings, rows=rows, runs=found)
    return table(rows)


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


def count_jobs(problem: str) -> int:
    """How many jobs a problem has at the least."""
    own = PROBLEMS[problem]
    return len(own.activations) * len(own.optimizers) * len(own.arms) * FEWEST_RATES


def restore(values: dict[str, Any]) -> Outcome:
    """The inverse of dataclasses.asdict."""
    job = values["job"] | {"seeds": tuple(values["job"]["seeds"])}
    looks = tuple(Look(**{name: tuple(figures) for name, figures in look.items()}) for look in values["looks"])
    return Outcome(Job(**job), looks, tuple(values["reasons"]))


@dataclass(frozen=True)
class Row:
    """One arm at its best rate, means over the seeds.

    epochs: to each of `LEVELS`; spread: the standard deviation of those to the problem's own level. lowest, final: the
    validation loss. clean, noisy: accuracies in % where the train loss comes down to `NOISE_LEVEL`. norm: at the end.
    """

    problem: str
    activation: str
    optimizer: str
    arm: str
    lr: float
    epochs: tuple[float, ...]
    spread: float
    final_train: float
    lowest: float
    final: float
    clean: float
    noisy: float
    norm: float
    refused: int


def describe(outcome: Outcome) -> Row:
    job, looks = outcome.job, outcome.looks
    level = PROBLEMS[job.problem].level
    times = [epochs_to(level, curve) for curve in zip(*(look.train for look in looks), strict=True)]
    validation = list(zip(*(look.validation for look in looks), strict=True))
    return Row(
        job.problem,
        job.activation,
        job.optimizer,
        job.arm,
        job.lr,
        epochs=tuple(mean_epochs(outcome, one) for one in LEVELS),
        spread=statistics.stdev(times) if len(times) > 1 and all(map(math.isfinite, times)) else math.nan,
        final_train=statistics.fmean(looks[-1].train),
        lowest=statistics.fmean(min(curve) for curve in validation),
        final=statistics.fmean(looks[-1].validation),
        clean=_at_noise_level(outcome, "accuracy"),
        noisy=_at_noise_level(outcome, "noisy"),
        norm=statistics.fmean(looks[-1].norm),
        refused=sum(reason != "standardised" for reason in outcome.reasons),
    )


def _at_noise_level(outcome: Outcome, figure: str) -> float:
    """A figure in % where the train loss comes down to `NOISE_LEVEL`, between two looks; NaN unless every run does."""
    found = []
    for k, curve in enumerate(zip(*(look.train for look in outcome.looks), strict=True)):
        when = epochs_to(NOISE_LEVEL, curve)
        if not math.isfinite(when):
            return math.nan
        epoch = min(int(when), len(outcome.looks) - 2)
        before, after = (getattr(look, figure)[k] for look in outcome.looks[epoch : epoch + 2])
        found.append(before + (when - epoch) * (after - before))
    return 100 * statistics.fmean(found)


def table(rows: Sequence[Row]) -> str:
    header = ("activation", "optimizer", "arm", "rate", *map(str, LEVELS), "±", "train", "val low", "val end")
    header = (*header, "clean", "noisy", "‖W‖", "refused")
    return format_table(
        header,
        [
            (
                row.activation,
                row.optimizer,
                row.arm,
                f"{row.lr:.3g}",
                *(_cell(value, ".2f") for value in (*row.epochs, row.spread)),
                *(_cell(value, ".3f") for value in (row.final_train, row.lowest, row.final)),
                *(_cell(value, ".1f") for value in (row.clean, row.noisy, row.norm)),
                str(row.refused),
            )
            for row in rows
        ],
    )


def _cell(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
