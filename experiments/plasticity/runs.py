"""How a job is run on tasks and on streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.data import Dataset
from experiments.plasticity import control
from experiments.plasticity.jobs import RANDOM, Job, Outcome, Runs
from experiments.plasticity.tasks import (
    BATCH_SIZE,
    PROTOCOLS,
    SAMPLES,
    Control,
    Protocol,
    Stream,
    Task,
    blend,
    draw,
    stack,
)

WIDTH, CLASSES = 128, 10


def run_job(job: Job, dataset: Dataset) -> Outcome:
    protocol = PROTOCOLS[job.protocol]
    if isinstance(protocol, Control):
        return control.run_job(job, protocol)
    generators = [torch.Generator().manual_seed(seed) for seed in job.seeds]
    data = [draw(dataset, generator) for generator in generators]
    if isinstance(protocol, Stream):
        return _run_stream(job, protocol, data, generators)
    return _run_tasks(job, protocol, data, generators)


def _run_tasks(job: Job, protocol: Protocol, data: Sequence[Task], generators: Sequence[torch.Generator]) -> Outcome:
    """An arm acts at each change; a task is judged at its end."""
    runs = Runs(job, (data[0].x.shape[1], WIDTH, WIDTH, CLASSES))
    before: Task | None = None
    for number in range(job.tasks):
        task = stack([protocol.make(one, number, g) for one, g in zip(data, generators, strict=True)])
        blends = [] if before is None else _blends(before, task, protocol.blended)
        if before is not None:
            others = torch.stack([one.test_x for one in data]) if job.protocol == RANDOM else task.test_x
            runs.act([*blends, task][0], others)
        for one in blends:
            runs.learners.learn(one, 1)
        runs.learners.learn(task, protocol.epochs)
        runs.accuracies.append(scores(runs.learners.outputs(task.test_x), task.test_y))
        before = task
    return runs.outcome()


def _blends(before: Task, after: Task, count: int) -> list[Task]:
    return [blend(before, after, (step + 1) / (count + 1)) for step in range(count)]


def _run_stream(job: Job, stream: Stream, data: Sequence[Task], generators: Sequence[torch.Generator]) -> Outcome:
    """An arm acts after every so many steps, on the last samples; others are those that come next. A task is judged by
    all its batches, each before it is learned from."""
    parts = [stream.make(one, job.tasks, g) for one, g in zip(data, generators, strict=True)]
    x, y = (torch.stack(part) for part in zip(*parts, strict=True))
    outputs = CLASSES if y.ndim == 2 else y.shape[-1]
    runs = Runs(job, (x.shape[-1], stream.width, stream.width, outputs))
    learners, judged = runs.learners, list[Tensor]()
    for step in range(job.tasks * stream.steps):
        at = step * BATCH_SIZE
        if step > 0 and step % stream.every == 0:
            last = slice(at - SAMPLES, at)
            runs.act(Task(x[:, last], y[:, last], x[:, last], y[:, last]), x[:, at : at + SAMPLES])
        batch = slice(at, at + BATCH_SIZE)
        judged.append(learners.step(x[:, batch], y[:, batch], learners.offset(x[:, batch])))
        if len(judged) == stream.steps:
            task = slice(at + BATCH_SIZE - stream.steps * BATCH_SIZE, at + BATCH_SIZE)
            runs.accuracies.append(scores(torch.cat(judged, 1), y[:, task]))
            judged.clear()
    return runs.outcome()


def scores(outputs: Tensor, y: Tensor) -> list[float]:
    """The share of classes that are right, seed by seed; otherwise 1 − the mean squared error of targets of variance 1.

    A class of −1 counts for nothing.
    """
    if y.is_floating_point():
        return (1 - (outputs - y).square().double().mean((1, 2))).tolist()
    counted = y >= 0
    right = (outputs.argmax(-1) == y) & counted
    return (right.sum(1).double() / counted.sum(1)).tolist()
