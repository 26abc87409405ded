"""Training with early teleports against training without: 10,000 MNIST digits, five seeds.

    python -m bench.training --data-dir DIR [--shape NAME ...] [--seeds 1 2 3 4 5] [--processes 2] [--out FILE]
    python -m bench.training --device cuda --shape digits-0.05 ...

DIR holds MNIST's IDX files; the first 10,000 samples are used, 8,000 of them for training. The shape for a GPU
without such a folder takes scikit-learn's 1,797 digits. Every seed has its own split, initial weights and order of
batches, which its arms share. The file is written after every seed, and a seed that it already holds is not run again,
so that an interrupted command can be given again. Each process computes with `--threads` threads. What an arm needs to
a train loss is the wall-clock at the end of its first epoch with a loss no larger.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.harness import Check, begin, machine_line, make_parser, plain, read_arguments, render, write_json
from experiments import classification
from experiments.data import Dataset, load_digits, load_mnist, split
from experiments.records import Run
from experiments.training import Task, TeleportSettings, TrainingSettings, train

SAMPLES = 10_000
MUST_SEEDS = 5
PLAIN, TELEPORTED, PUBLISHED = "plain", "teleported", "published rule"


@dataclass(frozen=True)
class Shape:
    """One comparison, and the share of the plain train loss that the teleported one may have at the end.

    published_rate: the largest of 1e-2, 3e-3, 1e-3, 3e-4 at which the published rule overflows for none of five seeds.
    target_loss: the train loss whose wall-clock is compared, about that of the plain run at its end; must_seconds_ratio
    the share of the plain run's that the teleported run may need.
    data: "mnist" or "digits".
    """

    dims: tuple[int, ...]
    training: TrainingSettings
    must_loss_ratio: float
    published_rate: float
    target_loss: float
    must_seconds_ratio: float | None = None
    data: str = "mnist"
    teleport_epoch: int = 0
    teleports: int = 3
    teleport_samples: int = 200
    holdout_samples: int = 200

    def arms(self) -> dict[str, TeleportSettings | None]:
        """Plain training, our teleports without bounds on weights and noise, and the published rule (ten fixed steps,
        R = 0, I − T).

        Both teleport as often, and on as many samples; ours looks at as many more besides, its holdout.
        """
        schedule: dict[str, Any] = {
            "epochs": (self.teleport_epoch,),
            "teleports_per_epoch": self.teleports,
            "batch_size": self.teleport_samples,
        }
        published = replace(classification.PUBLISHED, **schedule, step_size=self.published_rate)
        return {
            PLAIN: None,
            TELEPORTED: TeleportSettings(**schedule, holdout_size=self.holdout_samples),
            PUBLISHED: published,
        }


_MNIST = (784, 512, 512, 10)
SHAPES = {
    "mnist-0.01": Shape(
        _MNIST,
        TrainingSettings(8, 20, "sgd", 0.01),
        must_loss_ratio=0.4,
        published_rate=1e-2,
        target_loss=0.3,
        must_seconds_ratio=1.0,
    ),
    "mnist-0.1": Shape(
        _MNIST, TrainingSettings(8, 20, "sgd", 0.1), must_loss_ratio=0.6, published_rate=3e-3, target_loss=0.05
    ),
}
# The published rule moves all layers, and 50 samples are what the always dark pixels allow the first of them.
DIGITS = {
    "digits-0.05": Shape(
        (64, 128, 128, 10),
        TrainingSettings(20, 20, "sgd", 0.05),
        must_loss_ratio=0.4,
        published_rate=1e-2,
        target_loss=0.1,
        must_seconds_ratio=1.0,
        data="digits",
        teleport_samples=40,
    ),
}
REGISTRY = {"cpu": SHAPES, "cuda": SHAPES | DIGITS}


def on_device(shape: Shape, device: torch.device) -> Shape:
    return replace(shape, training=replace(shape.training, device=str(device)))


def first_samples(dataset: Dataset, count: int) -> Dataset:
    return dataset.take(torch.arange(min(count, len(dataset))))


def load(shape: Shape, data_dir: Path | None) -> Dataset:
    if shape.data == "digits":
        return load_digits()
    if data_dir is None:
        raise ValueError("--data-dir must name a folder of MNIST's IDX files for the shapes called mnist, got none")
    return first_samples(load_mnist(data_dir), SAMPLES)


def run_seed(name: str, shape: Shape, seed: int, data_dir: Path | None, threads: int) -> dict[str, Any]:
    """All arms of one seed, one after the other in this process; what the JSON file keeps of them."""
    torch.set_num_threads(threads)
    task = Task(shape.dims, F.cross_entropy, *split(load(shape, data_dir), seed)).to(shape.training.device)
    train(task, replace(shape.training, epochs=1), None, "the device's own start", seed)  # discarded
    runs = [
        train(task, shape.training, teleports, label, seed, partial(_report_progress, name))
        for label, teleports in shape.arms().items()
    ]
    machine = machine_line(torch.device(shape.training.device), torch.float32)
    return plain({"seed": seed, "machine": machine, "runs": {run.label: run for run in runs}})


def summarise(shape: Shape, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds at the end of training, and the verdicts on them."""
    finals = {label: [seed["runs"][label]["epochs"][-1] for seed in seeds] for label in shape.arms()}
    means = {
        label: {
            key: _mean([epoch[key] for epoch in epochs])
            for key in ("train_loss", "validation_loss", "validation_accuracy", "seconds")
        }
        for label, epochs in finals.items()
    }
    for label in means:
        reached = [_seconds_to(shape.target_loss, seed["runs"][label]["epochs"]) for seed in seeds]
        means[label]["seconds_to_target_loss"] = _mean(reached)
    return {"means": means, "requirements": _requirements(shape, means, seeds)}


def _requirements(
    shape: Shape, means: dict[str, dict[str, float]], seeds: Sequence[dict[str, Any]]
) -> dict[str, Check]:
    plain_mean, teleported = means[PLAIN], means[TELEPORTED]
    teleported_seeds = sum(any(made["accepted"] for made in seed["runs"][TELEPORTED]["teleports"]) for seed in seeds)
    gain = teleported["validation_accuracy"] - plain_mean["validation_accuracy"]
    return {
        "seeds": Check(len(seeds), at_least=MUST_SEEDS),
        "epochs of every run": Check(_fewest_epochs(seeds), at_least=shape.training.epochs),
        "seeds with an accepted teleport": Check(teleported_seeds, at_least=len(seeds)),
        "train loss, teleported / plain": Check(
            teleported["train_loss"] / plain_mean["train_loss"], at_most=shape.must_loss_ratio
        ),
        # Accuracies are multiples of one sample's share, far above this bound on a gain that is more than zero.
        "validation accuracy, teleported − plain": Check(gain, at_least=1e-9),
        f"seconds to train loss {shape.target_loss:g}, teleported / plain": Check(
            teleported["seconds_to_target_loss"] / plain_mean["seconds_to_target_loss"],
            at_most=shape.must_seconds_ratio,
        ),
    }


def _seconds_to(loss: float, epochs: Sequence[dict[str, Any]]) -> float | None:
    """The wall-clock at the end of the first epoch whose train loss is no larger than `loss`; None if there is none."""
    reached = (epoch["seconds"] for epoch in epochs if epoch["train_loss"] is not None and epoch["train_loss"] <= loss)
    return next(reached, None)


def _fewest_epochs(seeds: Sequence[dict[str, Any]]) -> int:
    """The least over the plain and the teleported runs; a run ends early where its loss is no longer finite."""
    return min(seed["runs"][label]["epochs"][-1]["epoch"] for seed in seeds for label in (PLAIN, TELEPORTED))


def _mean(values: Sequence[float | None]) -> float:
    """The mean; NaN where a run has diverged or has not got there."""
    return statistics.fmean(math.nan if value is None else value for value in values)


def _report_progress(name: str, run: Run) -> None:
    last = run.final
    print(
        f"{name} seed {run.seed} {run.label}: epoch {last.epoch}, train loss {last.train_loss:.4g}, "
        f"validation accuracy {last.validation_accuracy or math.nan:.4f}, {last.seconds:.1f} s",
        flush=True,
    )


@dataclass
class Results:
    """The JSON file: what it holds of every shape, and the settings that its numbers belong to."""

    path: Path
    shapes: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: Path, shapes: dict[str, Shape]) -> Results:
        """Read what is there.

        Raises:
            ValueError: the file holds results of a shape of the same name with other settings.
        """
        found = json.loads(path.read_text(encoding="utf-8"))["shapes"] if path.exists() else {}
        for name, shape in shapes.items():
            if name in found and found[name]["shape"] != plain(asdict(shape)):
                raise ValueError(f"--out must name a file of the same settings; {name} in {path} was made with others")
        return cls(path, found)

    def missing(self, name: str, seeds: Sequence[int]) -> list[int]:
        done = {seed["seed"] for seed in self.shapes.get(name, {}).get("seeds", [])}
        return [seed for seed in seeds if seed not in done]

    def add(self, name: str, shape: Shape, seed: dict[str, Any]) -> None:
        """Take in a finished seed and write the file."""
        seeds = sorted([*self.shapes.get(name, {}).get("seeds", []), seed], key=lambda entry: entry["seed"])
        self.shapes[name] = {"shape": plain(shape), **summarise(shape, seeds), "seeds": seeds}
        write_json(self.path, {"benchmark": "training", "shapes": self.shapes})


def run(
    shapes: dict[str, Shape], seeds: Sequence[int], data_dir: Path | None, out: Path, processes: int, threads: int
) -> Results:
    """Run what `out` does not hold yet, `processes` seeds at a time."""
    results = Results.open(out, shapes)
    # A forked child may hang in a thread pool of its parent's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        pending = {
            pool.submit(run_seed, name, shape, seed, data_dir, threads): name
            for name, shape in shapes.items()
            for seed in results.missing(name, seeds)
        }
        for future in as_completed(pending):
            results.add(pending[future], shapes[pending[future]], future.result())
    return results


def main(arguments: argparse.Namespace) -> None:
    begin(arguments)
    registry = REGISTRY[arguments.device.type]
    shapes = {name: on_device(registry[name], arguments.device) for name in arguments.shape}
    results = run(shapes, arguments.seeds, arguments.data_dir, arguments.out, arguments.processes, arguments.threads)
    for name, shape in shapes.items():
        summary = summarise(shape, results.shapes[name]["seeds"])
        print(render(name, summary))
        for label, means in summary["means"].items():
            print(f"  {label}: " + ", ".join(f"{what.replace('_', ' ')} {mean:.4g}" for what, mean in means.items()))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Training with teleports against training without.", REGISTRY)
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files, for the shapes called mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="which seeds, by default 1 to 5")
    parser.add_argument("--processes", type=int, default=2, help="how many seeds run at a time, by default 2")
    arguments = read_arguments(parser, REGISTRY, "training", words)
    if arguments.data_dir is None and any(name in SHAPES for name in arguments.shape):
        parser.error("--data-dir must name a folder of MNIST's IDX files for the shapes called mnist, got none")
    return arguments


if __name__ == "__main__":
    main(parse())
