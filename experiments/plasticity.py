"""Continual learning: what restores the ability to learn, and how much of what a network computes it keeps.

One multilayer perceptron learns one task after another. At each change of the task an arm may act on it. A network that
keeps its predictions and learns the next task as well as a fresh one has lost nothing. Each run records the accuracy at
the end of every task, and the share of the predictions that each act has kept, on the task's samples and on others.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import symtele_cuda as st
from experiments import figures
from experiments.data import Dataset
from experiments.records import Ledger, save_json
from experiments.side_by_side import SideBySide, make_mlp
from experiments.tables import format_table
from symtele_cuda.guards import STANDARDISED

TEXT = "one task after another: what restores the ability to learn, and what it keeps; goes on where it stopped"
FIRST_SEED = 200  # none of these had a part in the choice of the ridge
SAMPLES, TESTED, BATCH_SIZE, WIDTH = 600, 1000, 20, 128
LAST_TASKS = 5
RATES = (1e-3, 2e-3, 4e-3)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "LeakyReLU 0.01": lambda: nn.LeakyReLU(0.01)}


@dataclass(frozen=True)
class Task:
    """What is learned next, `x` and `y`, and what the accuracy is taken on; a target of −1 counts for nothing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Protocol:
    """How the tasks of a run follow from its data; so many of them, so many epochs on each."""

    tasks: int
    epochs: int
    make: Callable[[Task, int, torch.Generator], Task]


def _random_labels(data: Task, _: int, generator: torch.Generator) -> Task:
    y = torch.randint(10, (len(data.x),), generator=generator)
    return Task(data.x, y, data.x, y)


def _relabelled(data: Task, _: int, generator: torch.Generator) -> Task:
    names = torch.randperm(10, generator=generator)
    return Task(data.x, names[data.y], data.test_x, names[data.test_y])


def _permuted(data: Task, _: int, generator: torch.Generator) -> Task:
    order = torch.randperm(data.x.shape[1], generator=generator)
    return Task(data.x[:, order], data.y, data.test_x[:, order], data.test_y)


def _more_classes(data: Task, task: int, _: torch.Generator) -> Task:
    """Two more classes at a time, those before among them: as many samples of them in every run."""
    seen = data.y < 2 * (task + 1)
    count = int(0.17 * (task + 1) * len(data.x))
    test_y = torch.where(data.test_y < 2 * (task + 1), data.test_y, -1)
    return Task(data.x[seen][:count], data.y[seen][:count], data.test_x, test_y)


def _warm_start(data: Task, task: int, _: torch.Generator) -> Task:
    """Half of the data, then all of it."""
    count = len(data.x) if task > 0 else len(data.x) // 2
    return Task(data.x[:count], data.y[:count], data.test_x, data.test_y)


PROTOCOLS = {
    "relabelled": Protocol(30, 4, _relabelled),
    "permuted inputs": Protocol(30, 4, _permuted),
    "more classes": Protocol(5, 12, _more_classes),
    "warm start": Protocol(2, 60, _warm_start),
    "random labels": Protocol(30, 25, _random_labels),
}


class Learners:
    """The networks of all seeds on their way through the tasks.

    frozen: networks whose logits are added, with their signs. reasons: what the teleports have said.
    """

    def __init__(self, activation: str, lr: float, arm: Arm, seeds: Sequence[int], inputs: int) -> None:
        self.lr, self.arm, self.dims = lr, arm, (inputs, WIDTH, WIDTH, 10)
        self.activation = ACTIVATIONS[activation]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.frozen: list[tuple[SideBySide, float]] = []
        self.reasons: list[str] = []
        self.models = self.make_models()
        self.networks = SideBySide(self.models)
        self.initial = [parameter.detach().clone() for parameter in self.networks.parameters()]
        self.reset_optimizer()

    def make_models(self) -> list[nn.Sequential]:
        """New networks of torch's own start, each from the generator of its seed."""
        models = []
        for generator in self.generators:
            with torch.random.fork_rng([]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                models.append(make_mlp(self.dims, self.activation, self.arm.layer_norm))
        return models

    def reset_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(), self.lr, weight_decay=self.arm.weight_decay, fused=True
        )

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self.networks(x) + self.offset(x)

    @torch.no_grad()
    def offset(self, x: Tensor) -> Tensor:
        return sum((sign * networks(x) for networks, sign in self.frozen), torch.zeros(()))

    def accuracies(self, task: Task) -> list[float]:
        counted = task.test_y >= 0
        right = (self.logits(task.test_x).argmax(-1) == task.test_y) & counted
        return (right.sum(1).double() / counted.sum(1)).tolist()

    def learn(self, task: Task, epochs: int) -> None:
        offset = self.offset(task.x) if self.frozen else None
        for _ in range(epochs):
            orders = torch.stack([torch.randperm(task.x.shape[1], generator=g) for g in self.generators])
            for indices in orders.split(BATCH_SIZE, dim=1):
                logits = self.networks(_rows(task.x, indices))
                logits = logits if offset is None else logits + _rows(offset, indices)
                targets = task.y.gather(1, indices)
                loss = len(logits) * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
                self.optimizer.zero_grad()
                loss.backward()
                if self.arm.pull:
                    for parameter, start in zip(self.networks.parameters(), self.initial, strict=True):
                        assert parameter.grad is not None
                        parameter.grad.add_(parameter.detach() - start, alpha=2 * self.arm.pull)
                self.optimizer.step()

    def act(self, task: Task) -> None:
        """What the arm does at a change of the task; all but some have a new optimizer afterwards."""
        if self.arm.act is None:
            return
        self.networks.read(self.models)
        self.arm.act(self, task)
        self.networks.write(self.models)
        self.reset_optimizer()


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def nothing(learners: Learners, _: Task) -> None:
    """A new optimizer is all."""


def shrink_and_perturb(share: float) -> Act:
    """θ ← s θ + (1 − s) θ' with a new start θ' (Ash and Adams 2020)."""

    @torch.no_grad()
    def act(learners: Learners, _: Task) -> None:
        for model, fresh in zip(learners.models, learners.make_models(), strict=True):
            for parameter, new in zip(model.parameters(), fresh.parameters(), strict=True):
                parameter.lerp_(new, 1 - share)

    return act


def redo(threshold: float) -> Act:
    """ReDo (Sokar et al. 2023): new incoming and zero outgoing weights for units with a small mean |h|.

    threshold: small is below this share of the layer's mean.
    """

    @torch.no_grad()
    def act(learners: Learners, task: Task) -> None:
        for model, fresh, x in zip(learners.models, learners.make_models(), task.x, strict=True):
            hidden = x
            linears, news = ([one for one in net if isinstance(one, nn.Linear)] for net in (model, fresh))
            for linear, following, new in zip(linears, linears[1:], news, strict=False):
                hidden = learners.activation()(linear(hidden))
                size = hidden.abs().mean(0)
                dormant = size <= threshold * size.mean()
                linear.weight[dormant], linear.bias[dormant] = new.weight[dormant], new.bias[dormant]
                following.weight[:, dormant] = 0.0

    return act


def start_over(learners: Learners, _: Task) -> None:
    learners.models = learners.make_models()


def inject(learners: Learners, _: Task) -> None:
    """Freeze the networks and add new ones minus their own start (Nikishin et al. 2023): twice as many parameters more
    each time."""
    learners.frozen.append((SideBySide(learners.models), 1.0))
    learners.models = learners.make_models()
    learners.frozen.append((SideBySide(learners.models), -1.0))


def standardise(**options: Any) -> Act:
    """The library's teleport."""

    def act(learners: Learners, task: Task) -> None:
        method = st.Standardise(refit="all", **options)
        for model, x, y in zip(learners.models, task.x, task.y, strict=True):
            learners.reasons.append(st.teleport_mlp(model, (x, y), method=method).reason)

    return act


Act = Callable[[Learners, Task], None]


@dataclass(frozen=True)
class Arm:
    """What is done at each change of the task, None for nothing at all, and all along.

    weight_decay: AdamW's. pull: the L2 penalty on the distance to the initial weights (arXiv 2308.11958).
    """

    act: Act | None = None
    weight_decay: float = 0.0
    pull: float = 0.0
    layer_norm: bool = False


STANDARDISE, FRESH, PLAIN = "standardise", "fresh network", "plain"
ARMS = {
    PLAIN: Arm(),
    "optimizer reset": Arm(nothing),
    "weight decay 0.01": Arm(weight_decay=0.01),
    "weight decay 0.1": Arm(weight_decay=0.1),
    "L2 to the start 1e-3": Arm(pull=1e-3),
    "L2 to the start 1e-2": Arm(pull=1e-2),
    "shrink and perturb 0.4": Arm(shrink_and_perturb(0.4)),
    "shrink and perturb 0.8": Arm(shrink_and_perturb(0.8)),
    "ReDo 0.1": Arm(redo(0.1)),
    "LayerNorm": Arm(layer_norm=True),
    "plasticity injection": Arm(inject),
    FRESH: Arm(start_over),
    STANDARDISE: Arm(standardise()),
    "standardise, whatever is kept": Arm(standardise(least_kept=0.0)),
}


DRAWN = (PLAIN, "optimizer reset", "shrink and perturb 0.8", FRESH, "standardise, whatever is kept")
DRAWN_PROTOCOLS = ("relabelled", "random labels")


@dataclass(frozen=True)
class Job:
    """The runs of one setting, one a seed."""

    protocol: str
    activation: str
    arm: str
    lr: float
    tasks: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a job, seed by seed. accuracies: at the end of each task; kept: by each act, on the task's samples
    and on others. refused: how many teleports the guards have refused, of all seeds."""

    job: Job
    accuracies: tuple[tuple[float, ...], ...]
    kept_own: tuple[tuple[float, ...], ...]
    kept_others: tuple[tuple[float, ...], ...]
    refused: int


def jobs(seeds: int, protocols: Sequence[str], tasks: int | None = None) -> list[Job]:
    """All jobs. tasks: so many of them at most, in place of the protocol's own."""
    numbers = tuple(FIRST_SEED + seed for seed in range(seeds))
    kinds = itertools.product(protocols, ACTIVATIONS, ARMS, RATES)
    return [
        Job(name, activation, arm, lr, min(PROTOCOLS[name].tasks, tasks or PROTOCOLS[name].tasks), numbers)
        for name, activation, arm, lr in kinds
    ]


def run_job(job: Job, dataset: Dataset) -> Outcome:
    protocol = PROTOCOLS[job.protocol]
    generators = [torch.Generator().manual_seed(seed) for seed in job.seeds]
    data = [_draw(dataset, generator) for generator in generators]
    learners = Learners(job.activation, job.lr, ARMS[job.arm], job.seeds, dataset.inputs.shape[1])
    accuracies, kept_own, kept_others = list[list[float]](), list[list[float]](), list[list[float]]()
    for number in range(job.tasks):
        task = _stack([protocol.make(one, number, g) for one, g in zip(data, generators, strict=True)])
        if number > 0:
            others = torch.stack([one.test_x for one in data]) if job.protocol == "random labels" else task.test_x
            before = learners.logits(task.x), learners.logits(others)
            learners.act(task)
            kept_own.append(_kept(before[0], learners.logits(task.x)))
            kept_others.append(_kept(before[1], learners.logits(others)))
        learners.learn(task, protocol.epochs)
        accuracies.append(learners.accuracies(task))
    refused = sum(reason != STANDARDISED for reason in learners.reasons)
    return Outcome(job, _by_seed(accuracies), _by_seed(kept_own), _by_seed(kept_others), refused)


def _by_seed(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*rows, strict=True))


def _kept(before: Tensor, after: Tensor) -> list[float]:
    return (before.argmax(-1) == after.argmax(-1)).double().mean(1).tolist()


def _draw(dataset: Dataset, generator: torch.Generator) -> Task:
    """`SAMPLES` samples to learn from, and others; inputs of mean 0 and variance 1 over all elements."""
    order = torch.randperm(len(dataset), generator=generator)
    x = (dataset.inputs - dataset.inputs.mean()) / dataset.inputs.std()
    own, others = order[:SAMPLES], order[SAMPLES : SAMPLES + TESTED]
    return Task(x[own], dataset.targets[own], x[others], dataset.targets[others])


def _stack(tasks: Sequence[Task]) -> Task:
    return Task(*(torch.stack(parts) for parts in zip(*(vars(task).values() for task in tasks), strict=True)))


def run(dataset: Dataset, wanted: Sequence[Job], out: Path, on_run: Callable[[str], None]) -> str:
    """All jobs that `out` has no record of yet, each kept as soon as it is done; the summary as a table."""
    def work(job: Job) -> Outcome:
        on_run(f"{job.protocol}, {job.activation}, {job.arm}, {job.lr:g}")
        return run_job(job, dataset)

    ledger = Ledger(out / "plasticity.jsonl", restore)
    outcomes = [ledger.outcome(job, work) for job in wanted]
    everything = [describe(outcome) for outcome in outcomes]
    rows = best_of(everything)
    settings = {"data": dataset.name, "samples": SAMPLES, "tested": TESTED, "batch": BATCH_SIZE, "width": WIDTH}
    draw(rows, out / "plasticity.png")
    lasts = [[statistics.fmean(run[1:][-LAST_TASKS:]) for run in outcome.accuracies] for outcome in outcomes]
    runs = [{**vars(outcome.job), "last": last} for outcome, last in zip(outcomes, lasts, strict=True)]
    save_json(out / "plasticity.json", "plasticity", settings, rows=rows, all_rates=everything, runs=runs)
    return table(rows)


def restore(values: dict[str, Any]) -> Outcome:
    """The inverse of dataclasses.asdict."""
    job = values["job"] | {"seeds": tuple(values["job"]["seeds"])}
    figures = {name: tuple(map(tuple, values[name])) for name in ("accuracies", "kept_own", "kept_others")}
    return Outcome(Job(**job), refused=values["refused"], **figures)


@dataclass(frozen=True)
class Row:
    """One arm at one rate: means over the seeds, accuracies in %. curve: of each task.

    first, last: of the first task and of the last `LAST_TASKS`; spread: the standard deviation of `last` over the
    seeds. kept, kept_least: of the predictions on other samples, over all acts, and the least of them.
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


def describe(outcome: Outcome) -> Row:
    job = outcome.job
    lasts = [100 * statistics.fmean(run[1:][-LAST_TASKS:]) for run in outcome.accuracies]
    own, others = (_percent(kept) for kept in (outcome.kept_own, outcome.kept_others))
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
    )


def best_of(rows: Sequence[Row]) -> list[Row]:
    """Each arm at the rate with which its last tasks went best."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.protocol, row.activation, row.arm)
        if key not in best or row.last > best[key].last:
            best[key] = row
    return [*best.values()]


def draw(rows: Sequence[Row], path: Path) -> None:
    """The accuracy task by task, of the arms and protocols that say most."""
    shown = [row for row in rows if row.arm in DRAWN and row.protocol in DRAWN_PROTOCOLS]
    groups: dict[tuple[str, str], list[figures.Series]] = {}
    for row in shown:
        curve = figures.Series(row.arm, list(range(1, len(row.curve) + 1)), [row.curve])
        groups.setdefault((row.protocol, row.activation), []).append(curve)
    panels = [
        figures.Panel("task", "accuracy, %", series, f"{protocol}, {activation}", y_scale="linear")
        for (protocol, activation), series in groups.items()
        if len(series[0].x) > 2
    ]
    if panels:
        figures.curves(path, "Accuracy at the end of each task, mean over the seeds, each arm at its best rate", panels)


def _percent(kept: Sequence[Sequence[float]]) -> list[float]:
    return [100 * share for run in kept for share in run]


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
