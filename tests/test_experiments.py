"""The experiments and the command line: small runs in process, into a folder of the test."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import _muon

from experiments import __main__ as command_line
from experiments import classification, minima, planar, regression, require_extra
from experiments.data import Dataset, load_digits, load_mnist, read_idx, split
from experiments.records import EpochRecord, Run, save_json
from experiments.training import (
    OPTIMIZERS,
    Task,
    TeleportSettings,
    TrainingSettings,
    compare,
    start,
    train,
)
from symtele_cuda.errors import TeleportError
from symtele_cuda.objectives.next_step import read_step

EXTRAS = ("matplotlib", "sklearn", "tqdm")
needs_extras = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in EXTRAS), reason="needs symtele_cuda[experiments]"
)
PNG = b"\x89PNG\r\n\x1a\n"


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, part: str, count: int = 120, compress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images of two kinds, bright on the left (0) or on the right (1), in MNIST's format."""
    generator = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.uint8) % 2
    images = generator.integers(0, 256, size=(count, 6, 6), dtype=np.uint8)
    images[labels == 0, :, 3:] //= 4
    images[labels == 1, :, :3] //= 4
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        content = idx_bytes(array)
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return images, labels


def small_task(seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 12, generator=generator)
    targets = (inputs[:, :3].argmax(dim=1)).long()
    train_set, validation = split(Dataset("noise", inputs, targets), seed)
    return Task((12, 16, 16, 3), torch.nn.functional.cross_entropy, train_set, validation)


SMALL = TrainingSettings(epochs=3, batch_size=8, optimizer="sgd", lr=0.05)


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("part", ["train", "t10k"])
def test_mnist_folder(tmp_path: Path, part: str, compress: bool) -> None:
    images, labels = write_mnist(tmp_path, part, compress=compress)
    dataset = load_mnist(tmp_path)
    assert dataset.inputs.dtype == torch.float32 and dataset.targets.dtype == torch.int64
    np.testing.assert_array_equal(np.rint(dataset.inputs.numpy() * 255), images.reshape(len(images), -1))
    np.testing.assert_array_equal(dataset.targets.numpy(), labels)
    assert f"{part} files" in dataset.name


def test_train_files_come_before_test_files(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", count=10)
    write_mnist(tmp_path, "t10k", count=20)
    assert len(load_mnist(tmp_path)) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number must be 0x00000803, got 0x$"),
        (b"\x00\x00\x08\x01" + bytes(12), "magic number must be 0x00000803, got 0x00000801"),
        (b"\x00\x00\x08\x03" + bytes(5), "the header must have 16 bytes, got 9"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8))[:-1], r"shape \(2, 3, 3\) needs 18 bytes of data, got 17"),
        (idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"\x00", r"shape \(2, 3, 3\) needs 18 bytes of data, got 19"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, r"needs \d+ bytes of data, got 0"),
        (gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8)), mtime=0)[:-9], "damaged gzip file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte: .*{message}"):
        read_idx(path, dimensions=3)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_mnist(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte"):
        load_mnist(tmp_path)
    write_mnist(tmp_path, "train")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="holds no train-labels-idx1-ubyte"):
        load_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(7, np.uint8)))
    with pytest.raises(ValueError, match="120 images but 7 labels"):
        load_mnist(tmp_path)


def test_real_mnist_digits() -> None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
    folder = Path(os.environ.get("SYMTELE_MNIST", beside))
    if not folder.is_dir():
        pytest.skip("no MNIST files: set SYMTELE_MNIST to their folder")
    dataset = load_mnist(folder)
    train_set, validation = split(dataset, seed=0)
    assert dataset.inputs.shape[1] == 784
    assert dataset.inputs.min() >= 0 and dataset.inputs.max() == 1
    assert sorted(dataset.targets.unique().tolist()) == list(range(10))
    assert len(train_set) == 4 * len(validation)


def test_split_is_seeded_and_complete() -> None:
    dataset = Dataset("numbers", torch.arange(10.0)[:, None], torch.arange(10))
    first, again, other = (split(dataset, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].targets, again[0].targets)
    assert not torch.equal(first[0].targets, other[0].targets)
    assert sorted(torch.cat([part.targets for part in first]).tolist()) == list(range(10))
    assert len(first[1]) == 2


def test_a_missing_extra_says_how_to_get_it() -> None:
    with pytest.raises(ImportError, match=r'pip install "\.\[experiments\]"'):
        require_extra("no_such_module_anywhere")


# --- training --------------------------------------------------------------------------------------------------------


def test_both_runs_share_start_and_batches_until_the_first_teleport() -> None:
    arms = {
        "plain": None,
        "teleported": TeleportSettings(epochs=(1,), teleports_per_epoch=1, batch_size=8, holdout_size=0),
    }
    plain, teleported = compare(small_task, SMALL, arms, range(1))
    for epoch in (0, 1):
        assert plain.epochs[epoch].train_loss == teleported.epochs[epoch].train_loss
    assert plain.epochs[2].train_loss != teleported.epochs[2].train_loss
    assert [record.epoch for record in plain.epochs] == [0, 1, 2, 3]
    assert len(teleported.teleports) == 1 and not plain.teleports
    teleport = teleported.teleports[0]
    assert teleport.accepted and teleport.position == 1.0 and teleport.samples == 8
    assert teleport.drift < 1e-4
    assert plain.final.seconds > 0


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(small_task(0), SMALL, TeleportSettings(epochs=(0,), batch_size=8), "run", seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("objective", ["grad_norm", "lookahead"])
def test_every_optimizer_teleports(optimizer: str, objective: str) -> None:
    settings = TrainingSettings(epochs=1, batch_size=8, optimizer=optimizer, lr=1e-2)
    teleports = TeleportSettings(teleports_per_epoch=1, batch_size=8, objective=objective, holdout_size=0, min_gain=0.0)
    run = train(small_task(0), settings, teleports, "run", seed=0)
    (teleport,) = run.teleports
    assert teleport.accepted and teleport.drift < 1e-4
    assert teleport.gradient_norm_after > teleport.gradient_norm_before
    assert run.final.epoch == 1 and np.isfinite(run.final.train_loss)


def test_on_a_cpu_muon_orthogonalizes_in_the_dtype_of_the_weights() -> None:
    task = small_task(0)
    trainee = start(task, TrainingSettings(1, 16, "muon", 0.1), None, 0)
    batch = trainee.batch(trainee.shuffled_batches()[0])
    parameters = list(trainee.model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    step, torchs_own = read_step(trainee.optimizer, parameters), _muon._zeropower_via_newtonschulz
    trainee.descend(batch)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for old, new, taken in zip(before, parameters, step(before, gradients), strict=True):
        torch.testing.assert_close(new.detach(), old - taken, rtol=1e-4, atol=1e-5)  # bfloat16 has three digits
    assert _muon._zeropower_via_newtonschulz is torchs_own


def test_a_diverging_run_ends_early() -> None:
    run = train(small_task(0), TrainingSettings(50, 8, "sgd", lr=1e6), None, "run", seed=0)
    assert len(run.epochs) < 51
    assert not np.isfinite(run.final.train_loss)


def test_a_run_that_has_diverged_is_not_teleported_and_ends() -> None:
    schedule = TeleportSettings(epochs=(0, 1, 2), batch_size=8, holdout_size=0)
    run = train(small_task(0), TrainingSettings(3, 8, "sgd", lr=1e12), schedule, "run", seed=0)
    assert not np.isfinite(run.final.train_loss) and run.final.epoch < 3
    assert len(run.teleports) < schedule.teleports_per_epoch


def test_other_errors_of_a_teleport_are_not_hidden() -> None:
    trainee = start(small_task(0), SMALL, TeleportSettings(epochs=(0,), batch_size=8, holdout_size=0), seed=0)
    trainee.model[2].weight.requires_grad_(False)
    with pytest.raises(TeleportError, match=r"'2.weight', which is frozen"):
        trainee.teleport_unless_diverged(trainee.batch(torch.arange(8)), epoch=0)


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie below the 3 epochs of the run, got \[1, 3\]"):
        compare(small_task, SMALL, {"run": TeleportSettings(epochs=(1, 3))}, range(1))
    with pytest.raises(ValueError, match="at most the 51 training samples, got 52"):
        compare(small_task, SMALL, {"run": TeleportSettings(batch_size=52)}, range(1))


def test_the_mlp_is_the_one_of_the_task() -> None:
    model = small_task(0).make_model(torch.Generator().manual_seed(0))
    layers = [module for module in model if isinstance(module, torch.nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(16, 12), (16, 16), (3, 16)]
    assert all(layer.bias is None and layer.weight.abs().max() <= layer.in_features**-0.5 for layer in layers)
    assert isinstance(model[-1], torch.nn.Linear)


# --- the experiments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_rosenbrock_with_teleports_reaches_the_minimum_that_plain_descent_does_not(seed: int) -> None:
    settings = planar.ROSENBROCK
    plain = planar.descend(settings, planar.PLAIN)
    teleported = planar.descend(settings, planar.ASCENT, seed, planar.ascent(settings, seed))
    assert plain.losses[-1] > 1e-2
    assert teleported.losses[-1] < 1e-6
    assert [jump.step for jump in teleported.jumps] == list(range(100, 1001, 100))


@pytest.mark.parametrize("seed", range(5))
def test_booth_with_one_teleport_is_ten_times_lower(seed: int) -> None:
    settings = planar.BOOTH
    plain = planar.descend(settings, planar.PLAIN)
    teleported = planar.descend(settings, planar.ASCENT, seed, planar.ascent(settings, seed))
    assert teleported.losses[10] < plain.losses[10] / 10
    assert teleported.losses[:5] == plain.losses[:5]
    assert teleported.jumps[0].gradient_norm_after > teleported.jumps[0].gradient_norm_before


def test_newton_reaches_the_minimum_in_a_few_steps() -> None:
    run = planar.newton(planar.ROSENBROCK)
    assert len(run.points) < 12
    assert run.losses[-1] < 1e-20


def test_regression_data_follow_the_weights_in_one_stream() -> None:
    task = regression.make_task(12345)
    torch_stream = torch.Generator().manual_seed(12345)
    weights = [torch.rand(out, size, generator=torch_stream) for size, out in ((5, 6), (6, 7), (7, 8))]
    model = task.make_model(torch.Generator().manual_seed(12345))
    for ours, expected in zip(model.parameters(), weights, strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(task.train.inputs, torch.rand(5, 4, generator=torch_stream).T)
    assert torch.equal(task.train.targets, torch.rand(8, 4, generator=torch_stream).T)


def test_presets_are_the_published_figures() -> None:
    for preset in classification.PRESETS.values():
        assert all(max(schedule) < preset.epochs for schedule in preset.schedules)
        assert len(preset.teleports()) == len(preset.schedules)
    both = classification.PRESETS["batch-200"].teleports(
        (classification.OUR_ALGORITHM, classification.PUBLISHED_ALGORITHM)
    )
    assert [settings.step_size for settings in both] == ["auto", 1e-2, 3e-3]
    assert all(settings.teleports_per_epoch == 4 for settings in both[1:])
    assert all(settings.layers is None for settings in (*both[1:], regression.TELEPORT))
    assert [schedule for schedule in classification.PRESETS["six"].schedules if len(schedule) > 1] == []


def ended(label: str, seed: int, train_loss: float, validation_loss: float) -> Run:
    """A run of one record."""
    return Run(label, seed, (EpochRecord(0, train_loss, 1.0, validation_loss, 0.5, 0.0),), ())


def test_the_endings_of_the_minima_are_means_and_spreads_over_the_seeds() -> None:
    runs = [
        ended("plain", 0, 0.1, 0.30),
        ended("plain", 1, 0.3, 0.40),
        ended("flat", 0, 0.2, 0.29),
        ended("flat", 1, 0.2, 0.41),
    ]
    plain, flat = minima.ending_table(runs).splitlines()[2:]
    assert plain.split() == ["plain", "0.2000", "0.1414", "0.3500", "0.0707", "50.00%", "0.00%", "0", "of", "2"]
    assert flat.split() == ["flat", "0.2000", "0.0000", "0.3500", "0.0849", "50.00%", "0.00%", "1", "of", "2"]


def test_the_endings_of_the_minima_show_what_diverged_and_what_has_no_spread() -> None:
    runs = [ended("plain", 0, 0.1, 0.3), ended("sharp", 0, float("inf"), float("nan"))]
    plain, sharp = minima.ending_table(runs).splitlines()[2:]
    assert plain.split() == ["plain", "0.1000", "-", "0.3000", "-", "50.00%", "-", "0", "of", "1"]
    assert sharp.split() == ["sharp", "inf", "-", "nan", "-", "50.00%", "-", "0", "of", "1"]
    runs = [ended("plain", 0, 0.1, 0.3), ended("plain", 1, float("inf"), float("inf"))]
    (both,) = minima.ending_table(runs).splitlines()[2:]
    assert both.split()[1:5] == ["inf", "nan", "inf", "nan"]


def test_the_minima_go_both_ways() -> None:
    arms = minima.make_arms(minima.TELEPORTS)
    assert list(arms) == ["plain", "sharpness down", "sharpness up", "curvature down", "curvature up"]
    for label, settings in arms.items():
        assert (settings is None) == (label == "plain")
        assert settings is None or settings.objective.maximise == label.endswith("up")


# --- the command line ------------------------------------------------------------------------------------------------


def run_command(*arguments: str | Path) -> int:
    return command_line.main([str(argument) for argument in arguments])


def results(folder: Path, name: str) -> dict:
    """The JSON of a command, strict, with what every experiment records."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["experiment"] == name
    assert {"torch", "symtele_cuda", "numpy", "python", "cuda"} <= set(document["versions"])
    assert document["settings"] and document["runs"]
    return document


def assert_figures(folder: Path, *names: str) -> None:
    assert {path.name for path in folder.glob("*.png")} == set(names)
    for name in names:
        assert (folder / name).read_bytes().startswith(PNG)


@needs_extras
def test_booth_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("booth", "--out", tmp_path, "--seeds", 2) == 0
    document = results(tmp_path, "booth")
    assert_figures(tmp_path, "booth_trajectory.png", "booth_curves.png")
    assert [run["label"] for run in document["runs"]] == [
        planar.PLAIN,
        planar.ASCENT,
        planar.ASCENT,
        planar.EXACT,
    ]
    for run in document["runs"]:
        assert len(run["points"]) == len(run["losses"]) == len(run["gradient_norms"]) == 11
    assert planar.EXACT in capsys.readouterr().out


@needs_extras
def test_rosenbrock_command(tmp_path: Path) -> None:
    options = ("--epochs", 40, "--teleport-epochs", "10,30", "--seeds", 1, "--optimizer", "adam", "--lr", 0.01)
    assert run_command("rosenbrock", "--out", tmp_path, *options) == 0
    document = results(tmp_path, "rosenbrock")
    assert_figures(tmp_path, "rosenbrock_trajectory.png", "rosenbrock_curves.png", "rosenbrock_figure1.png")
    assert document["settings"]["planar"]["optimizer"] == "adam"
    assert [jump["step"] for jump in document["runs"][1]["jumps"]] == [10, 30]
    assert document["runs"][-1]["label"] == planar.NEWTON


@needs_extras
def test_regression_command(tmp_path: Path) -> None:
    assert run_command("regression", "--out", tmp_path, "--epochs", 8, "--seeds", 2) == 0
    document = results(tmp_path, "regression")
    assert_figures(tmp_path, "regression.png")
    assert [run["label"] for run in document["runs"][::8]] == ["GD", "AdaGrad"]
    assert document["settings"]["seeds"] == [0, 12345]
    for run in document["runs"]:
        assert len(run["epochs"]) == 9
        assert [teleport["position"] for teleport in run["teleports"]] == ([5.0] if "teleport" in run["label"] else [])


@needs_extras
@pytest.mark.parametrize("extra", [(), ("--published",), ("--optimizer", "adam", "--objective", "grad_norm")])
def test_mnist_command(tmp_path: Path, extra: tuple[str, ...]) -> None:
    write_mnist(tmp_path, "t10k", compress=True)
    out = tmp_path / "out"
    options = ("--epochs", 2, "--teleport-epochs", "0,1", "--teleport-batch-size", 20, "--teleports-per-epoch", 1)
    options += ("--holdout-size", 20)
    assert run_command("mnist", "--data-dir", tmp_path, "--out", out, *options, *extra) == 0
    document = results(out, "mnist")
    assert_figures(out, "mnist.png")
    assert [run["label"] for run in document["runs"]] == ["plain", "teleports in epochs 0, 1"]
    assert [teleport["position"] // 1 for teleport in document["runs"][1]["teleports"]] == [0, 1]
    assert "t10k files" in document["settings"]["data"]
    assert str(tmp_path) not in json.dumps(document)


@pytest.mark.parametrize("command", ["trade --data-dir X", "guards"])
def test_an_experiment_with_rates_of_its_own_takes_no_other(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.make_parser().parse_args(command.split()).seeds > 0
    with pytest.raises(SystemExit):
        command_line.make_parser().parse_args([*command.split(), "--lr", "0.1"])
    assert "--lr" in capsys.readouterr().err


@needs_extras
def test_minima_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path, "t10k")
    out = tmp_path / "out"
    options = ("--epochs", 3, "--teleport-epochs", 1, "--teleport-batch-size", 80, "--seeds", 2, "--lr", 0.1)
    assert run_command("minima", "--data-dir", tmp_path, "--out", out, *options) == 0
    document = results(out, "minima")
    assert_figures(out, "minima.png")
    plain, *teleported = document["runs"][:5]
    assert plain["label"] == "plain" and not plain["teleports"]
    for run in teleported:
        (teleport,) = run["teleports"]
        assert teleport["accepted"] and teleport["samples"] == 80 and teleport["drift"] < 1e-4
        grown = teleport["objective_after"] > teleport["objective_before"]
        assert grown == run["label"].endswith("up")
        assert run["epochs"][1]["train_loss"] == plain["epochs"][1]["train_loss"]
        assert run["epochs"][2]["train_loss"] != plain["epochs"][2]["train_loss"]
    assert "val. loss below plain" in capsys.readouterr().out


@needs_extras
def test_digits_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("digits", "--out", tmp_path, "--epochs", 3, "--seeds", 2, "--seed", 1) == 0
    document = results(tmp_path, "digits")
    assert_figures(tmp_path, "digits.png")
    assert document["settings"]["seeds"] == [1, 2]
    assert document["settings"]["training"]["epochs"] == 3
    for run in document["runs"]:
        assert [record["epoch"] for record in run["epochs"]] == [0, 1, 2, 3]
        assert run["epochs"][-1]["validation_accuracy"] > 0.2  # chance is 0.1
    printed = capsys.readouterr().out
    assert "train loss lower at every later epoch" in printed and "2 of 2" in printed


@needs_extras
def test_the_demo_gains_by_teleporting() -> None:
    """At the demo's settings, one seed of its five: less train loss after every later epoch, validation no worse."""
    dataset = load_digits()
    plain, teleported = compare(
        lambda seed: classification.make_task(dataset, classification.DIGITS_WIDTHS, seed),
        classification.DIGITS_TRAINING,
        {"plain": None, "teleported": TeleportSettings()},
        range(2, 3),
    )
    assert classification.lower_after_teleports(teleported, plain)
    assert classification.no_worse_at_end(teleported, plain)
    assert not classification.lower_after_teleports(plain, teleported)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits", "--epochs", "0"), "--epochs: must be a whole number >= 1, got '0'"),
        (("digits", "--lr", "nan"), "--lr: must be a finite number > 0, got 'nan'"),
        (("digits", "--teleport-epochs", "1,x"), "--teleport-epochs: must be a whole number >= 0, got 'x'"),
        (("digits", "--teleport-batch-size", "some"), "must be a whole number >= 1, got 'some'"),
        (("digits", "--objective", "speed"), "invalid choice: 'speed'"),
        (("digits", "--device", "abacus"), "cannot use device 'abacus'"),
        (("mnist",), "the following arguments are required: --data-dir"),
        ((), "the following arguments are required: command"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in printed
    assert printed.count("\n") == 1


@needs_extras
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "--data-dir", "no/such/folder"), "error: no such folder: no/such/folder"),
        (("digits", "--teleport-epochs", "99"), "must lie below the 20 epochs"),
        (("booth", "--teleport-epochs", "11"), "precede steps from 1 to 10, got [11]"),
    ],
)
def test_errors_of_a_run_are_one_line_and_exit_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*arguments, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@needs_extras
def test_an_interrupt_ends_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(planar, "run", interrupted)
    assert run_command("booth", "--out", tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_json_writes_what_is_not_finite_as_null(tmp_path: Path) -> None:
    path = save_json(tmp_path / "x.json", "x", {"rate": float("inf")}, runs=[{"loss": [1.0, float("nan")]}])
    document = json.loads(path.read_text())
    assert document["settings"]["rate"] is None
    assert document["runs"][0]["loss"] == [1.0, None]
