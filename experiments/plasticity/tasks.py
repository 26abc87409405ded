"""What is learned one after another: tasks, whose changes are known, and streams, whose changes are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.data import Dataset

SAMPLES, TESTED, BATCH_SIZE = 600, 1000, 20
BITS, SLOW_BITS, HIDDEN_UNITS, THRESHOLD = 20, 15, 100, 0.7  # those of Dohare et al. 2024


@dataclass(frozen=True)
class Task:
    """What is learned next, `x` and `y`, and what it is judged by, `test_x` and `test_y`, where −1 counts for nothing.

    Of one seed (n×d and n), or of all seeds, stacked.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Protocol:
    """How the tasks of a run follow from its data; so many of them, so many epochs on each.

    blended: so many epochs before these, in which more and more of the samples have the new labels. rates: AdamW's.
    """

    tasks: int
    epochs: int
    make: Callable[[Task, int, torch.Generator], Task]
    blended: int = 0
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class Stream:
    """Samples that come once, `steps` batches a task, each judged before it is learned from.

    make: x and y of all tasks from the data. every: an arm acts after so many steps, as it does not know the tasks.
    width: that of the learner's hidden layers. rates: AdamW's.
    """

    tasks: int
    steps: int
    make: Callable[[Task, int, torch.Generator], tuple[Tensor, Tensor]]
    every: int
    width: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Control:
    """Reinforcement learning: an arm acts every so many steps; the greedy policy is judged `tasks` times on the way.

    steps: of the environment between two judgements. every: so many judgements between two acts. rates: AdamW's.
    """

    tasks: int
    steps: int
    every: int
    rates: tuple[float, ...]


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


def _permuted_stream(data: Task, tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All samples once a task, in an order and with an order of the inputs of its own."""
    x, y = torch.cat([data.x, data.test_x]), torch.cat([data.y, data.test_y])
    parts = []
    for _ in range(tasks):
        samples, inputs = (torch.randperm(size, generator=generator) for size in x.shape)
        parts.append((x[samples][:, inputs], y[samples]))
    xs, ys = zip(*parts, strict=True)
    return torch.cat(xs), torch.cat(ys)


def _slow_regression(_: Task, tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Slowly changing regression: one of the slow bits of the input flips at each change, the others are random.

    The target is a random network of linear threshold units with weights ±1, made to have mean 0 and variance 1 over
    the whole stream.
    """
    count = REGRESSION_STEPS * BATCH_SIZE
    flips = torch.randint(SLOW_BITS, (tasks,), generator=generator)
    slow = torch.randint(2, (SLOW_BITS,), generator=generator) + torch.nn.functional.one_hot(flips, SLOW_BITS).cumsum(0)
    fast = torch.randint(2, (tasks * count, BITS - SLOW_BITS), generator=generator)
    x = torch.cat([(slow % 2).repeat_interleave(count, 0), fast], 1).float()
    weights = torch.randint(2, (HIDDEN_UNITS, BITS), generator=generator).float() * 2 - 1
    thresholds = THRESHOLD * BITS - (weights < 0).sum(1)
    outputs = torch.randn(HIDDEN_UNITS, generator=generator)
    y = (x @ weights.T > thresholds).float() @ outputs
    return x * 2 - 1, ((y - y.mean()) / y.std()).unsqueeze(1)


PERMUTED_STEPS, REGRESSION_STEPS = (SAMPLES + TESTED) // BATCH_SIZE, 150
PROTOCOLS: dict[str, Protocol | Stream | Control] = {
    "relabelled": Protocol(30, 4, _relabelled),
    "permuted inputs": Protocol(30, 4, _permuted),
    "more classes": Protocol(5, 12, _more_classes),
    "warm start": Protocol(2, 60, _warm_start),
    "random labels": Protocol(30, 25, _random_labels),
    "gradually relabelled": Protocol(30, 4, _relabelled, blended=3),
    "online permuted": Stream(40, PERMUTED_STEPS, _permuted_stream, 150, width=128, rates=(2e-3, 4e-3, 8e-3)),
    "slow regression": Stream(100, REGRESSION_STEPS, _slow_regression, 500, width=16, rates=(2e-3, 6e-3, 1.8e-2)),
    "CartPole": Control(15, steps=300, every=3, rates=(2.5e-4, 5e-4, 1e-3, 2e-3)),
}


def draw(dataset: Dataset, generator: torch.Generator) -> Task:
    """`SAMPLES` samples to learn from, and others; inputs of mean 0 and variance 1 over all elements."""
    order = torch.randperm(len(dataset), generator=generator)
    x = (dataset.inputs - dataset.inputs.mean()) / dataset.inputs.std()
    own, others = order[:SAMPLES], order[SAMPLES : SAMPLES + TESTED]
    return Task(x[own], dataset.targets[own], x[others], dataset.targets[others])


def stack(tasks: Sequence[Task]) -> Task:
    return Task(*(torch.stack(parts) for parts in zip(*(vars(task).values() for task in tasks), strict=True)))


def blend(before: Task, after: Task, share: float) -> Task:
    """The task on its way: this share of the samples, the first ones, has the labels of `after`."""
    count = round(share * before.y.shape[-1])
    return replace(after, y=torch.cat([after.y[..., :count], before.y[..., count:]], -1))
