"""The loss spike of a teleport taken apart: one run, teleported in ways that differ in one thing at a time.

The run is that of the source's MNIST experiments, 784-512-512-10: some epochs without teleports and one with four of
them, on mini-batches as published or on gathered samples. All variants of a seed share the epochs before, so that the
first teleport of each starts from the same weights: there the rises of the loss can be subtracted from each other.
Later teleports start from what the earlier ones have left.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments import figures
from experiments.classification import MNIST_TRAINING, MNIST_WIDTHS, PLAIN, make_task
from experiments.data import Dataset
from experiments.records import by_label, finite_or_infinity, save_json
from experiments.tables import format_table
from experiments.training import Task, TeleportSettings, Trainee, TrainingSettings, make_optimizer, start, validate
from symtele_cuda.report import TeleportReport
from symtele_cuda.teleporter import AUTO_BATCH_SIZE, LAST

TRAINING = replace(MNIST_TRAINING, epochs=1)  # before the epoch with teleports
TELEPORTS = 4
STEPS, FIRST_RADIUS, MARGIN = 10, 0.02, 4.0
PUBLISHED_RATE = 1e-2
NO_ASCENT = 1e-12  # a rate at which g is the identity to rounding
POINT_EVERY = 20  # iterations
POINTS_BEFORE = 100  # iterations before the epoch with teleports that the curves show
HOLDOUT = 200  # training samples that no teleport sees

PROJECTION = "projection alone, g = I"
PUBLISHED = "published"
EXACT_INVERSE = "exact inverse"
LEAST_CHANGE = "least change"
TRUST_REGION = "trust region"
LOOKAHEAD = "lookahead"
LOOKAHEAD_GUARDED = "lookahead, holdout guard"
MORE_SAMPLES = "lookahead, 200 samples"
MORE_SAMPLES_GUARDED = "lookahead, 200 samples, holdout guard"
LAST_LAYER = "lookahead, last hidden layer"
DEFAULTS = "lookahead, the defaults"


@dataclass(frozen=True)
class Variant:
    """One way to teleport: its settings, and with `guarded` a holdout of other training samples.

    base: the variant that it differs from in one thing, `change`. drawn: whether the figure shows it.
    """

    label: str
    base: str
    change: str
    settings: TeleportSettings
    guarded: bool = False
    drawn: bool = True


@dataclass(frozen=True)
class Point:
    """The losses on the whole of the training and validation set, and the accuracy on the latter.

    `iteration` counts from the start of the epoch with teleports.
    """

    iteration: int
    train: float
    validation: float
    accuracy: float


@dataclass(frozen=True)
class Jump:
    """One teleport: n samples, ‖∇L‖ and loss on them, and the losses right before and right after it."""

    iteration: int
    samples: int
    accepted: bool
    reason: str
    gradient_norm_before: float
    gradient_norm_after: float
    batch_before: float
    batch_after: float
    before: Point
    after: Point


@dataclass(frozen=True)
class SpikeRun:
    """One run: its losses along the way, both ends of every teleport among them."""

    label: str
    seed: int
    points: tuple[Point, ...]
    jumps: tuple[Jump, ...]


def variants(batch_size: int, rate: float) -> tuple[Variant, ...]:
    """The ladder from the published rule, at the ascent's `rate` on the mini-batch, to this library's defaults."""
    published = TeleportSettings(
        teleports_per_epoch=TELEPORTS,
        batch_size=batch_size,
        objective="grad_norm",
        action="paper",
        inverse="first_order",
        layers=None,
        steps=STEPS,
        step_size=rate,
        first_radius=FIRST_RADIUS,
        margin=MARGIN,
        holdout_size=0,
        min_gain=0.0,
    )
    exact = replace(published, inverse="exact")
    least_change = replace(exact, action="least_change")
    trust_region = replace(least_change, step_size="auto")
    lookahead = replace(trust_region, objective="lookahead")
    more_samples = replace(lookahead, batch_size="auto")
    last_layer = replace(more_samples, layers=LAST)
    defaults = TeleportSettings(teleports_per_epoch=TELEPORTS, holdout_size=0)
    return (
        Variant(PROJECTION, PLAIN, "W ← WΠ, nothing else", replace(exact, step_size=NO_ASCENT)),
        Variant(EXACT_INVERSE, PROJECTION, f"ascent at rate {rate:g}, exact g⁻¹", exact, drawn=False),
        Variant(PUBLISHED, EXACT_INVERSE, "g⁻¹ to first order", published),
        Variant(LEAST_CHANGE, EXACT_INVERSE, "R = W in place of R = 0", least_change),
        Variant(TRUST_REGION, LEAST_CHANGE, "steps in a trust region, ‖∇L‖ at most doubled", trust_region),
        Variant(LOOKAHEAD, TRUST_REGION, "the loss one step ahead in place of ‖∇L‖²", lookahead),
        Variant(LOOKAHEAD_GUARDED, LOOKAHEAD, "holdout guard", lookahead, guarded=True, drawn=False),
        Variant(MORE_SAMPLES, LOOKAHEAD, "up to 200 samples", more_samples),
        Variant(MORE_SAMPLES_GUARDED, MORE_SAMPLES, "holdout guard", more_samples, guarded=True, drawn=False),
        Variant(LAST_LAYER, MORE_SAMPLES_GUARDED, "the last hidden layer alone", last_layer, guarded=True, drawn=False),
        Variant(DEFAULTS, LAST_LAYER, "three large steps, a longer lookahead, twice its gain", defaults, guarded=True),
    )


@dataclass(frozen=True)
class Course:
    """What all runs of a seed share: the model before the epoch with teleports, and that epoch's mini-batches.

    points: the last ones on the way to the model.
    """

    training: TrainingSettings
    seed: int
    trainee: Trainee
    points: tuple[Point, ...]
    batches: tuple[Tensor, ...]

    @classmethod
    def make(cls, task: Task, training: TrainingSettings, seed: int) -> Course:
        """Train the settings' epochs, as `experiments.training.train` does."""
        _check_samples(task)
        trainee = start(task, training, None, seed)
        earlier = tuple(indices for _ in range(training.epochs) for indices in trainee.shuffled_batches())
        points, _ = _descend(trainee, earlier, first_iteration=-len(earlier))
        return cls(training, seed, trainee, points, trainee.shuffled_batches())

    def run(self, variant: Variant | None) -> SpikeRun:
        """The epoch on a copy of the model, teleported as `variant` says, or not at all."""
        trainee = self.trainee_for(variant)
        points, jumps = _descend(trainee, self.batches, first_iteration=0)
        points = (*self.points, *points, _point(trainee.model, trainee.task, len(self.batches)))
        return SpikeRun(PLAIN if variant is None else variant.label, self.seed, points, jumps)

    def trainee_for(self, variant: Variant | None) -> Trainee:
        """A copy of the model, with an optimizer and, unless `variant` is None, its teleporter."""
        task, model = self.trainee.task, copy.deepcopy(self.trainee.model)
        optimizer = make_optimizer(self.training.optimizer, list(model.parameters()), self.training.lr)
        teleporter = None
        if variant is not None:
            held_out = self.trainee.batch(torch.cat(self.batches)[-HOLDOUT:]) if variant.guarded else None
            teleporter = variant.settings.teleporter(model, optimizer, task.loss_fn, holdout=held_out)
        return replace(self.trainee, model=model, optimizer=optimizer, teleporter=teleporter)


def _descend(
    trainee: Trainee, batches: Sequence[Tensor], first_iteration: int
) -> tuple[tuple[Point, ...], tuple[Jump, ...]]:
    points: list[Point] = []
    jumps: list[Jump] = []
    for iteration, indices in enumerate(batches, start=first_iteration):
        batch = trainee.batch(indices)
        jump = _teleport(trainee, batch, iteration)
        if jump is not None:
            jumps.append(jump)
            points += [jump.before, jump.after]
        elif iteration % POINT_EVERY == 0 and iteration >= -POINTS_BEFORE:
            points.append(_point(trainee.model, trainee.task, iteration))
        trainee.descend(batch)
    return tuple(points), tuple(jumps)


def _teleport(trainee: Trainee, batch: tuple[Tensor, Tensor], iteration: int) -> Jump | None:
    """Offer a mini-batch to the teleporter; the losses on both sides of the teleport if it makes one."""
    if trainee.teleporter is None or len(trainee.teleporter.reports) == TELEPORTS:
        return None
    before = copy.deepcopy(trainee.model)
    report = trainee.teleport_unless_diverged(batch, epoch=0)
    if report is None:
        return None
    return _jump(report, *(_point(model, trainee.task, iteration) for model in (before, trainee.model)))


@torch.no_grad()
def _point(model: nn.Module, task: Task, iteration: int) -> Point:
    validation, accuracy = validate(model, task)
    assert validation is not None and accuracy is not None  # make_task splits, into classes
    return Point(iteration, task.loss_fn(model(task.train.inputs), task.train.targets).item(), validation, accuracy)


def run(
    dataset: Dataset,
    training: TrainingSettings,
    ladder: Sequence[Variant],
    seeds: range,
    out: Path,
    on_run: Callable[[str], None],
) -> str:
    """The plain run and every variant for every seed; figure and JSON in `out`; returns the table to print.

    on_run: gets what has finished, for progress.
    """
    runs: list[SpikeRun] = []
    for seed in seeds:
        course = Course.make(make_task(dataset, MNIST_WIDTHS, seed).to(training.device), training, seed)
        for variant in (None, *ladder):
            runs.append(course.run(variant))
            on_run(f"seed {seed}, {runs[-1].label}")
    title = f"{dataset.name}, batch {training.batch_size}, {training.optimizer}, lr {training.lr:g}"
    _draw(title, runs, ladder, out / "spike.png")
    settings = {"data": dataset.name, "widths": MNIST_WIDTHS, "training": training, "seeds": list(seeds)}
    save_json(out / "spike.json", "spike", {**settings, "variants": ladder}, runs=runs)
    return rise_table(runs, ladder)


def restore(values: Mapping[str, Any]) -> SpikeRun:
    """The run that a JSON file holds as `values`; null, what is not finite, comes back as infinity."""

    def jump(fields: Mapping[str, Any]) -> Jump:
        before, after = (Point(**finite_or_infinity(fields[end])) for end in ("before", "after"))
        return Jump(**finite_or_infinity(fields) | {"before": before, "after": after})

    points = tuple(Point(**finite_or_infinity(point)) for point in values["points"])
    return SpikeRun(values["label"], values["seed"], points, tuple(map(jump, values["jumps"])))


def rise_table(runs: Sequence[SpikeRun], ladder: Sequence[Variant]) -> str:
    """A line for each variant: medians over the seeds of the rises of the loss, at the first teleport and at all.

    Rises are relative. "part" is what the variant adds to the first rise of the train loss over that of its base.
    """
    header = (
        "variant",
        "accepted",
        "‖∇L‖",
        "drift",
        "train, first",
        "part",
        "train, all",
        "val., first",
        "val., all",
        "end",
    )
    rises = rises_of(runs)
    rows = [
        (
            variant.label,
            f"{own.accepted} of {own.teleports}",
            f"×{own.gradient_norm:.3g}",
            f"{own.drift:.1e}",
            *(f"{rise:+.1%}" for rise in (own.first_train, own.first_train - rises[variant.base].first_train)),
            *(f"{rise:+.1%}" for rise in (own.all_train, own.first_validation, own.all_validation)),
            f"{own.end:.3g}",
        )
        for variant in ladder
        for own in [rises[variant.label]]
    ]
    return format_table(header, rows)


@dataclass(frozen=True)
class Rises:
    """What a teleport of one variant does to ‖∇L‖ and to the losses: medians over the seeds.

    gradient_norm: the factor at the first teleport. drift: the largest |relative change| of the loss on a teleport's
    own batch. first_*: relative rises at the first teleport, for the accuracy its change; all_*: at all teleports of
    the run together, the steps between them left out. end: the train loss at the end of the epoch.
    """

    accepted: int
    teleports: int
    gradient_norm: float
    drift: float
    first_train: float
    first_validation: float
    first_accuracy: float
    all_train: float
    all_validation: float
    end: float


def rises_of(runs: Sequence[SpikeRun]) -> dict[str, Rises]:
    """For each label."""
    return {label: _rises(members) for label, members in by_label(runs).items()}


def _rises(runs: Sequence[SpikeRun]) -> Rises:
    def median(value: Callable[[SpikeRun], float]) -> float:
        return statistics.median(value(run) for run in runs)

    return Rises(
        accepted=sum(jump.accepted for run in runs for jump in run.jumps),
        teleports=sum(len(run.jumps) for run in runs),
        gradient_norm=median(
            lambda run: math.prod(
                _growth(jump.gradient_norm_before, jump.gradient_norm_after) for jump in run.jumps[:1]
            )
        ),
        drift=median(
            lambda run: max((abs(_growth(jump.batch_before, jump.batch_after) - 1) for jump in run.jumps), default=0.0)
        ),
        first_train=median(lambda run: _rise(run.jumps[:1], "train")),
        first_validation=median(lambda run: _rise(run.jumps[:1], "validation")),
        first_accuracy=median(lambda run: sum(j.after.accuracy - j.before.accuracy for j in run.jumps[:1])),
        all_train=median(lambda run: _rise(run.jumps, "train")),
        all_validation=median(lambda run: _rise(run.jumps, "validation")),
        end=median(lambda run: _or_infinity(run.points[-1].train)),
    )


def _rise(jumps: Sequence[Jump], field: str) -> float:
    """The relative rise of a loss at these teleports together."""
    return math.prod(_growth(getattr(jump.before, field), getattr(jump.after, field)) for jump in jumps) - 1


def _or_infinity(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _growth(before: float, after: float) -> float:
    """after / before; infinite where one of them is not finite, and for a rise from zero."""
    if before == after:
        return 1.0
    if before == 0 or not (math.isfinite(before) and math.isfinite(after)):
        return math.inf
    return after / before


def _jump(report: TeleportReport, before: Point, after: Point) -> Jump:
    return Jump(
        iteration=before.iteration,
        samples=report.layers[0].n,
        accepted=report.accepted,
        reason=report.reason,
        gradient_norm_before=report.grad_norm_before,
        gradient_norm_after=report.grad_norm_after,
        batch_before=report.loss_before,
        batch_after=report.loss_after,
        before=before,
        after=after,
    )


def _check_samples(task: Task) -> None:
    needed = TELEPORTS * AUTO_BATCH_SIZE + HOLDOUT
    if len(task.train) < needed:
        raise ValueError(
            f"data must have at least {needed} training samples, for {TELEPORTS} teleports and a holdout, "
            f"got {len(task.train)}"
        )


def _draw(title: str, runs: Sequence[SpikeRun], ladder: Sequence[Variant], path: Path) -> None:
    hidden = {variant.label for variant in ladder if not variant.drawn}
    drawn = [members for label, members in by_label(runs).items() if label not in hidden]
    x_label = "iteration of the epoch with teleports"
    panels = [
        figures.Panel(x_label, "train loss", [_series(members, "train") for members in drawn]),
        figures.Panel(x_label, "validation loss", [_series(members, "validation") for members in drawn]),
    ]
    figures.curves(path, title, panels)


def _series(runs: Sequence[SpikeRun], field: str) -> figures.Series:
    """The losses over the iterations, with both ends of each teleport: it takes no step, and changes the loss."""
    x = [point.iteration for point in runs[0].points]
    ys = [[getattr(point, field) for point in run.points] for run in runs]
    return figures.Series(runs[0].label, x, ys, marks=[jump.iteration for jump in runs[0].jumps])
