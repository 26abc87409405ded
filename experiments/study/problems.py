"""The problems of the study: what is trained, on which data, for how long."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.data import Dataset, load_diabetes, load_digits, load_mnist, split, standardise
from experiments.training import Loss, Task

# As many as the t10k files hold, so that the study takes as long with the full set of MNIST.
SAMPLES = 10_000


@dataclass(frozen=True)
class Problem:
    """An MLP with hidden layers of `widths`, without bias, LeakyReLU 0.1, trained for `epochs` in batches.

    data: a name of DATA, of which the first `samples` are used. check_every: iterations between two looks at the loss
    on the whole training set.
    """

    name: str
    data: str
    widths: tuple[int, ...]
    batch_size: int
    epochs: int
    check_every: int
    samples: int = SAMPLES

    @property
    def needs_folder(self) -> bool:
        """Whether its data are files that the user must have."""
        return self.data == "mnist"


def _load_mnist(data_dir: Path | None) -> Dataset:
    if data_dir is None:
        raise ValueError("--data-dir must name a folder of files in MNIST's format for the problems on mnist, got none")
    return load_mnist(data_dir)


DATA: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": lambda data_dir: load_digits(),
    "mnist": _load_mnist,
    "diabetes": lambda data_dir: load_diabetes(),
}

PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("digits", "digits", (128, 128), batch_size=20, epochs=20, check_every=36),
        Problem("mnist-512", "mnist", (512, 512), batch_size=20, epochs=8, check_every=100),
        Problem("mnist-512-muon", "mnist", (512, 512), batch_size=20, epochs=3, check_every=100),
        Problem("mnist-128", "mnist", (128,), batch_size=200, epochs=40, check_every=40),
        Problem("diabetes", "diabetes", (64, 64), batch_size=20, epochs=40, check_every=36),
    )
}


def load(problem: Problem, data_dir: Path | None) -> Dataset:
    """The samples of the problem, before the split.

    Raises:
        ValueError, FileNotFoundError: it needs a folder of files in MNIST's format and `data_dir` is none.
    """
    dataset = DATA[problem.data](data_dir)
    return dataset.take(torch.arange(min(problem.samples, len(dataset))))


def make_task(problem: Problem, dataset: Dataset, seed: int) -> Task:
    """The task of `seed`: the data split 80/20 and, in a regression, all columns standardised on the training part."""
    parts = split(dataset, seed)
    train, validation = standardise(*parts) if is_regression(dataset) else parts
    dims = (dataset.inputs.shape[1], *problem.widths, _outputs(dataset))
    return Task(dims, _loss(dataset), train, validation)


def is_regression(dataset: Dataset) -> bool:
    return dataset.targets.is_floating_point()


def fingerprint(dataset: Dataset) -> str:
    """The data's name and the beginning of a hash of what it holds: results of other data are not taken for these."""
    content = hashlib.sha256()
    for tensor in (dataset.inputs, dataset.targets):
        content.update(tensor.numpy().tobytes())
    return f"{dataset.name}, {len(dataset)} samples, {content.hexdigest()[:8]}"


def _outputs(dataset: Dataset) -> int:
    return dataset.targets.shape[1] if is_regression(dataset) else int(dataset.targets.max()) + 1


def _loss(dataset: Dataset) -> Loss:
    return F.mse_loss if is_regression(dataset) else F.cross_entropy
