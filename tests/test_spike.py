"""The experiment on the loss spike: what its variants share, what they measure, and the medians of its table."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import __main__ as command_line
from experiments import spike
from experiments.classification import PLAIN
from experiments.data import Dataset, split
from experiments.spike import Course, Jump, Point, SpikeRun
from experiments.training import Task, TeleportSettings, TrainingSettings, train
from tests.test_experiments import write_mnist

needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("matplotlib", "tqdm")),
    reason="needs symtele_cuda[demo]",
)
TRAINING = TrainingSettings(epochs=1, batch_size=8, optimizer="sgd", lr=0.05)


def small_task(samples: int = 1300) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 12, generator=generator)
    dataset = Dataset("noise", inputs, inputs[:, :3].argmax(dim=1))
    return Task((12, 16, 16, 3), torch.nn.functional.cross_entropy, *split(dataset, 0))


@pytest.fixture(scope="module")
def course() -> Course:
    return Course.make(small_task(), TRAINING, seed=0)


SEARCH_DEFAULTS = {"steps", "first_radius", "margin", "min_gain"}


@pytest.fixture(scope="module")
def ladder() -> dict[str, spike.Variant]:
    return {variant.label: variant for variant in spike.variants(batch_size=8, rate=1e-3)}


def test_every_variant_differs_in_one_thing_from_its_base(ladder: dict[str, spike.Variant]) -> None:
    for variant in ladder.values():
        if variant.base == PLAIN:
            continue
        base = ladder[variant.base]
        settings, before = asdict(variant.settings), asdict(base.settings)
        changed = {name for name in settings if settings[name] != before[name]}
        if variant.settings.step_size == "auto":
            changed -= {"inverse", "action"}  # choices of the published rule
        search_defaults = SEARCH_DEFAULTS if variant.label == spike.DEFAULTS else set()
        assert len(changed - search_defaults) + (variant.guarded != base.guarded) <= 1
        assert changed or variant.guarded


def test_the_last_rung_is_the_study_s_teleporter(ladder: dict[str, spike.Variant]) -> None:
    expected = replace(TeleportSettings(), teleports_per_epoch=spike.TELEPORTS, holdout_size=0)
    assert ladder[spike.DEFAULTS].settings == expected


def test_the_plain_run_is_the_training_run(course: Course) -> None:
    run = course.run(None)
    expected = train(small_task(), replace(TRAINING, epochs=2), None, "plain", seed=0)
    at_start = next(point for point in run.points if point.iteration == 0)
    assert (at_start.train, at_start.validation) == pytest.approx(
        (expected.epochs[1].train_loss, expected.epochs[1].validation_loss)
    )
    assert run.points[-1].train == pytest.approx(expected.final.train_loss)
    assert run.points[-1].accuracy == pytest.approx(expected.final.validation_accuracy)
    assert run.jumps == () and run.label == PLAIN


def test_all_variants_start_from_the_same_weights(course: Course, ladder: dict[str, spike.Variant]) -> None:
    before = copy.deepcopy(course.trainee.model.state_dict())
    runs = [course.run(variant) for variant in ladder.values() if variant.settings.batch_size == 8]
    assert len(runs) == 7
    for run in runs:
        assert [jump.iteration for jump in run.jumps] == [0, 1, 2, 3]
        assert run.jumps[0].before == runs[0].jumps[0].before
        assert {jump.samples for jump in run.jumps} == {8}
    for name, value in course.trainee.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_variant_without_ascent_is_the_projection(course: Course, ladder: dict[str, spike.Variant]) -> None:
    jump = course.run(ladder[spike.PROJECTION]).jumps[0]
    inputs, _ = course.trainee.batch(course.batches[0])
    weights = [p.detach().double() for p in course.trainee.model.parameters()]
    projected, h = [], inputs.double()
    for weight in weights[:-1]:
        projected.append(weight @ torch.linalg.pinv(h) @ h)
        h = torch.nn.functional.leaky_relu(h @ weight.T, 0.1)

    def loss(layers: list[Tensor], data: Dataset) -> float:
        h = data.inputs.double()
        for weight in layers[:-1]:
            h = torch.nn.functional.leaky_relu(h @ weight.T, 0.1)
        return torch.nn.functional.cross_entropy(h @ layers[-1].T, data.targets).item()

    task = course.trainee.task
    assert task.validation is not None
    assert jump.before.train == pytest.approx(loss(weights, task.train), rel=1e-5)
    after = [*projected, weights[-1]]
    assert jump.after.train == pytest.approx(loss(after, task.train), rel=1e-4)
    assert jump.after.validation == pytest.approx(loss(after, task.validation), rel=1e-4)
    assert jump.after.train > 1.01 * jump.before.train  # or the test would see nothing


def test_the_least_change_without_ascent_is_no_change(course: Course, ladder: dict[str, spike.Variant]) -> None:
    variant = ladder[spike.LEAST_CHANGE]
    still = replace(variant, settings=replace(variant.settings, step_size=spike.NO_ASCENT))
    for jump in course.run(still).jumps:
        assert jump.after.train == pytest.approx(jump.before.train, rel=1e-5)


def test_a_guard_that_allows_nothing_holds_the_loss_on_samples_the_search_has_not_seen(course: Course) -> None:
    steep = TeleportSettings(
        objective="lookahead", steps=20, batch_size=8, holdout_size=0, holdout_tol=math.inf, margin=50.0, min_gain=0.0
    )
    free = spike.Variant("free", PLAIN, "", replace(steep, layers=None))
    guarded = replace(free, label="guarded", guarded=True, settings=replace(free.settings, holdout_tol=0.0))
    held = course.trainee.batch(torch.cat(course.batches)[-spike.HOLDOUT :])

    def rise(variant: spike.Variant) -> float:
        trainee = course.trainee_for(variant)
        losses = []
        for _ in range(2):
            losses.append(trainee.task.loss_fn(trainee.model(held[0]), held[1]).item())
            trainee.teleport(trainee.batch(course.batches[0]), epoch=0)
        return losses[1] / losses[0] - 1

    assert rise(free) > 0.01
    assert rise(guarded) <= 1e-6


def test_medians_of_made_up_runs() -> None:
    def jump(growth: float, batch: float, train: float, validation: float, accuracy: float) -> Jump:
        before, after = Point(0, 1.0, 2.0, 0.9), Point(0, train, 2 * validation, 0.9 + accuracy)
        return Jump(0, 8, True, "", 1.0, growth, 4.0, 4 * batch, before, after)

    jumps = [(jump(2.0, 1.0, 1.1, 1.2, -0.1), jump(9.0, 0.5, 1.2, 1.5, 0.0)), (jump(4.0, 1.0, 1.3, 1.2, -0.3),)]
    runs = [
        SpikeRun("a", seed, (Point(9, end, 1.0, 0.5),), made)
        for seed, (end, made) in enumerate(zip((0.5, 0.7), jumps, strict=True))
    ]
    rises = spike.rises_of([*runs, SpikeRun(PLAIN, 0, (Point(9, 3.0, 1.0, 0.5),), ())])
    own = rises["a"]
    assert (own.accepted, own.teleports) == (3, 3)
    assert own.gradient_norm == pytest.approx(3.0)
    assert own.drift == pytest.approx((0.5 + 0.0) / 2)
    assert own.first_train == pytest.approx((0.1 + 0.3) / 2)
    assert own.all_train == pytest.approx((1.1 * 1.2 - 1 + 0.3) / 2)
    assert own.first_validation == pytest.approx(0.2)
    assert own.all_validation == pytest.approx((1.2 * 1.5 - 1 + 0.2) / 2)
    assert own.first_accuracy == pytest.approx(-0.2)
    assert own.end == pytest.approx(0.6)
    assert rises[PLAIN].end == 3.0 and rises[PLAIN].first_train == 0.0


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1000 training samples, .* got 960"):
        Course.make(small_task(samples=1200), TRAINING, seed=0)


@needs_extras
def test_spike_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spike, "MNIST_WIDTHS", (24, 24))
    write_mnist(tmp_path, "t10k", count=1300)
    out = tmp_path / "out"
    options = ["--data-dir", str(tmp_path), "--out", str(out), "--seeds", "2", "--batch-size", "10"]
    assert command_line.main(["spike", *options]) == 0
    assert (out / "spike.png").is_file()
    document = json.loads((out / "spike.json").read_text(encoding="utf-8"))
    ladder = spike.variants(10, spike.PUBLISHED_RATE)
    assert [run["label"] for run in document["runs"]] == 2 * [PLAIN, *(variant.label for variant in ladder)]
    assert document["settings"]["seeds"] == [0, 1]
    printed = capsys.readouterr().out
    for variant in ladder:
        assert variant.label in printed
    for values in document["runs"]:
        run = spike.restore(values)
        assert len(run.jumps) == (0 if run.label == PLAIN else spike.TELEPORTS)
        assert np.isfinite([jump.before.train for jump in run.jumps]).all()
        assert {jump.after for jump in run.jumps} <= set(run.points)
