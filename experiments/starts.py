"""How fast a network learns from where it starts: PyTorch's own start, tuned initialisations, standardised teleports.

Each arm is run at several rates, more of them while the best is the last one on either side, and is compared at its own
best. The answer is in epochs to a train loss, and in what stands against it: the validation loss, the accuracy under
noise in the inputs at equal train loss, the norm of the weights.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda as st
from experiments.data import Dataset, split
from experiments.records import Ledger, save_json
from experiments.side_by_side import SideBySide, make_mlp
from experiments.tables import format_table
from symtele_cuda.guards import STANDARDISED
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
    "softplus": nn.Softplus,
    "ELU": nn.ELU,
    "SELU": nn.SELU,
    "CELU": nn.CELU,
    "softsign": nn.Softsign,
    "ReLU": nn.ReLU,
}
STUDIED = ("LeakyReLU 0.1", "tanh", "sigmoid")
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
TRAINED = "standardise after two epochs"
SPREADS = {f"standardise, spread {spread}": float(spread) for spread in (1, 2, 4)}
STARTS = (PLAIN, *INITS, LAST, ALL, SMALL, ON_BEST)
PROBLEMS = {
    "digits": Problem(
        (128, 128), 12, 0.01, STUDIED, ("sgd", "momentum", "adam"), (*STARTS, TRAINED)
    ),
    "digits, deep": Problem((128,) * 4, 8, 0.03, ("sigmoid",), ("sgd", "adam"), (PLAIN, *INITS, ALL, ON_BEST)),
    "digits, other rules": Problem(
        (128, 128), 12, 0.01, ("LeakyReLU 0.1",), ("adagrad", "adamw"), (PLAIN, *INITS, ALL)
    ),
    "digits, spreads": Problem(
        (128, 128), 12, 0.01, tuple(name for name in ACTIVATIONS if name not in STUDIED), ("sgd",), (PLAIN, *SPREADS)
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
    epochs: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """All networks of a job after so many epochs, one number a seed; `noisy` is the accuracy under noise."""

    train: tuple[float, ...]
    validation: tuple[float, ...]
    accuracy: tuple[float, ...]
    noisy: tuple[float, ...]
    norm: tuple[float, ...]

    def of(self, seed: int) -> Look:
        """The same of one network."""
        return Look(*((figure[seed],) for figure in vars(self).values()))


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
        if job.arm in (LAST, ALL, SMALL, ON_BEST, *SPREADS):
            self.teleport(model, k)
        return model

    def teleport(self, model: nn.Sequential, k: int) -> None:
        """Standardise on the first samples, as a Teleporter would, with those behind them as the holdout.

        A network that is trained is standardised on all samples, and held to the first half of the validation's: its
        training samples are no fresh ones.
        """
        exact, small, trained = (self.job.arm == arm for arm in (LAST, SMALL, TRAINED))
        count = 100 if exact else len(self.x[k]) if trained else 200
        halves = {"LeakyReLU 0.1": 1.0, "tanh": 1.0, "sigmoid": 2.0}
        spread = halves[self.job.activation] if small else SPREADS.get(self.job.arm, "auto")
        method = st.Standardise(spread=spread, refit="last" if exact else "all", least_kept=0.0)
        holdout = self.x[k, count : count + 200], self.y[k, count : count + 200]
        if trained:
            half = len(self.valid_x[k]) // 2
            holdout = self.valid_x[k, :half], self.valid_y[k, :half]
        guards = st.Guards(
            holdout=holdout,
            holdout_tol=WORTHWHILE.holdout_tol,
            min_gain=0.0 if trained else WORTHWHILE.min_gain,
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
    for epoch in range(job.epochs):
        if job.arm == TRAINED and epoch == 2:
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


@dataclass(frozen=True)
class Run:
    """One run in short. epochs: to each of `LEVELS`, infinite where it is not reached. lowest, final: the validation
    loss. clean, noisy: accuracies in % where the train loss comes down to `NOISE_LEVEL`, NaN where it does not. norm:
    of all parameters at the end."""

    epochs: tuple[float, ...]
    train: float
    lowest: float
    final: float
    clean: float
    noisy: float
    norm: float


def runs_of(outcome: Outcome) -> list[Run]:
    """The runs of a job, seed by seed."""
    return [_run_of([look.of(k) for look in outcome.looks]) for k in range(len(outcome.job.seeds))]


def _run_of(looks: Sequence[Look]) -> Run:
    losses, validation = ([getattr(look, name)[0] for look in looks] for name in ("train", "validation"))
    when = epochs_to(NOISE_LEVEL, losses)

    def there(name: str) -> float:
        if not math.isfinite(when):
            return math.nan
        epoch = min(int(when), len(looks) - 2)
        before, after = (getattr(look, name)[0] for look in looks[epoch : epoch + 2])
        return 100 * (before + (when - epoch) * (after - before))

    epochs = tuple(epochs_to(level, losses) for level in LEVELS)
    lowest = min(value if math.isfinite(value) else math.inf for value in validation)
    return Run(epochs, losses[-1], lowest, validation[-1], there("accuracy"), there("noisy"), looks[-1].norm[0])


def score(outcome: Outcome) -> tuple[float, float]:
    """What the best rate is least in: the epochs to the problem's level, mean over the seeds, then the final loss."""
    place, runs = LEVELS.index(PROBLEMS[outcome.job.problem].level), runs_of(outcome)
    final = statistics.fmean(run.train if math.isfinite(run.train) else math.inf for run in runs)
    return statistics.fmean(run.epochs[place] for run in runs), final


def run(
    datasets: Mapping[str, Dataset], seeds: int, epochs: int | None, out: Path, on_run: Callable[[str], None]
) -> str:
    """All arms of the problems at all their rates; each outcome is kept as soon as it is done.

    datasets: those of the problems, by the names of these. epochs: of each run, in place of the problem's own.
    """
    ledger = Ledger(out / "starts.jsonl", restore)
    rows, found = list[Row](), list[Outcome]()
    numbers = tuple(FIRST_SEED + seed for seed in range(seeds))
    for problem, activation, optimizer, arm in settings(datasets):
        own = PROBLEMS[problem]
        job = Job(problem, activation, optimizer, arm, 0.0, epochs or own.epochs, numbers)

        def work(lr: float, job: Job = job) -> Outcome:
            outcome = ledger.outcome(replace(job, lr=lr), lambda one: run_job(one, datasets[one.problem]))
            on_run(f"{job.problem}, {job.activation}, {job.optimizer}, {job.arm}, {lr:.3g}")
            return outcome

        outcomes = at_its_rates(work, FIRST_RATES[optimizer])
        found += outcomes
        rows.append(describe(min(outcomes, key=score)))
    data = {name: dataset.name for name, dataset in datasets.items()}
    described: dict[str, Any] = {"data": data, "batch": BATCH_SIZE, "levels": LEVELS, "seeds": list(numbers)}
    described |= {"noise": NOISE, "noise_level": NOISE_LEVEL}
    save_json(out / "starts.json", "starts", described, rows=rows, runs=[_in_short(outcome) for outcome in found])
    return table(rows)


def _in_short(outcome: Outcome) -> dict[str, Any]:
    """Every run of a job, as much as its place among the rates depends on: a list over the seeds each."""
    job, runs = outcome.job, runs_of(outcome)
    setting = {name: getattr(job, name) for name in ("problem", "activation", "optimizer", "arm", "lr")}
    return setting | {name: [getattr(run, name) for run in runs] for name in ("epochs", "train", "lowest")}


def settings(problems: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """(problem, activation, optimizer, arm)."""
    return [
        (name, *setting)
        for name in problems
        for setting in itertools.product(PROBLEMS[name].activations, PROBLEMS[name].optimizers, PROBLEMS[name].arms)
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


def restore(values: dict[str, Any]) -> Outcome:
    """The inverse of dataclasses.asdict."""
    job = values["job"] | {"seeds": tuple(values["job"]["seeds"])}
    looks = tuple(Look(**{name: tuple(figures) for name, figures in look.items()}) for look in values["looks"])
    return Outcome(Job(**job), looks, tuple(values["reasons"]))


@dataclass(frozen=True)
class Row(Run):
    """One arm at its best rate: the means of its `Run`s. spread: the standard deviation of the epochs to the problem's
    own level. refused: how many of the teleports."""

    problem: str
    activation: str
    optimizer: str
    arm: str
    lr: float
    spread: float
    refused: int


def describe(outcome: Outcome) -> Row:
    job, runs = outcome.job, runs_of(outcome)
    times = [run.epochs[LEVELS.index(PROBLEMS[job.problem].level)] for run in runs]
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
        refused=sum(reason != STANDARDISED for reason in outcome.reasons),
        **means,
    )


def table(rows: Sequence[Row]) -> str:
    header = ("problem", "activation", "optimizer", "arm", "rate", *map(str, LEVELS), "±", "train")
    header = (*header, "val low", "val end", "clean", "noisy", "‖W‖", "refused")
    return format_table(
        header,
        [
            (
                row.problem,
                row.activation,
                row.optimizer,
                row.arm,
                f"{row.lr:.3g}",
                *(_cell(value, ".2f") for value in (*row.epochs, row.spread)),
                *(_cell(value, ".3f") for value in (row.train, row.lowest, row.final)),
                *(_cell(value, ".1f") for value in (row.clean, row.noisy, row.norm)),
                str(row.refused),
            )
            for row in rows
        ],
    )


def _cell(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
