"""What an experiment leaves behind: the records of its runs, and one JSON file with every number of its figures."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from symtele_cuda._version import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class EpochRecord:
    """The state after `epoch` complete epochs (0: the initial point), evaluated on the whole of the data.

    `seconds` is the training time so far, teleports included and evaluations not; gradient_norm is that of the train
    loss; the validation fields are None where there is no validation set.
    """

    epoch: int
    train_loss: float
    gradient_norm: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class TeleportRecord:
    """One teleport; `position` is its place in the run in epochs (1.5: halfway through the second epoch)."""

    position: float
    samples: int
    accepted: bool
    reason: str
    loss_before: float
    loss_after: float
    gradient_norm_before: float
    gradient_norm_after: float
    objective_before: float
    objective_after: float
    drift: float
    seconds: float


@dataclass(frozen=True)
class Run:
    """One training run: what it is called in figures, its seed, its epochs and its teleports."""

    label: str
    seed: int
    epochs: tuple[EpochRecord, ...]
    teleports: tuple[TeleportRecord, ...]

    @property
    def final(self) -> EpochRecord:
        return self.epochs[-1]


@dataclass(frozen=True)
class Jump:
    """One teleport: the step it precedes, the point before and after, and ‖∇L‖ there."""

    step: int
    before: tuple[float, float]
    after: tuple[float, float]
    gradient_norm_before: float
    gradient_norm_after: float


@dataclass(frozen=True)
class PlanarRun:
    """points, losses and gradient norms after 0, 1, 2, … steps, and the teleports in between."""

    label: str
    seed: int | None
    points: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    jumps: tuple[Jump, ...] = ()


class Labelled(Protocol):
    """A run of any experiment."""

    @property
    def label(self) -> str: ...


LabelledRun = TypeVar("LabelledRun", bound=Labelled)


def by_label(runs: Iterable[LabelledRun]) -> dict[str, list[LabelledRun]]:
    """The runs of each label, one a seed, in the order in which the labels first appear."""
    grouped: dict[str, list[LabelledRun]] = {}
    for run in runs:
        grouped.setdefault(run.label, []).append(run)
    return grouped


def save_json(path: Path, experiment: str, settings: dict[str, Any], **results: Any) -> Path:
    """Write {experiment, settings, versions, **results} as strict JSON, dataclasses as objects, NaN and Inf as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"experiment": experiment, "settings": settings, "versions": versions(), **results}
    path.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def versions() -> dict[str, str]:
    """What produced the numbers; no path and no name of a machine."""
    return {
        "symtele_cuda": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "numpy": np.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


JobKind = TypeVar("JobKind")
OutcomeKind = TypeVar("OutcomeKind", bound="DataclassInstance")


class Ledger(Generic[OutcomeKind]):
    """The outcomes of an experiment's jobs: a line each in a file, from which an interrupted experiment goes on.

    restore: the inverse of dataclasses.asdict for an outcome, whose `job` it knows again.
    """

    def __init__(self, path: Path, restore: Callable[[dict[str, Any]], OutcomeKind]) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        outcomes = [restore(json.loads(line)) for line in lines]
        self.known: dict[Any, OutcomeKind] = {outcome.job: outcome for outcome in outcomes}  # type: ignore[attr-defined]

    def outcome(self, job: JobKind, work: Callable[[JobKind], OutcomeKind]) -> OutcomeKind:
        """The one on record, or else that of `work`, which is kept as soon as it is done."""
        if job not in self.known:
            self.known[job] = work(job)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.known[job])) + "\n")
        return self.known[job]


def finite_or_infinity(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an object of such a file; null, what was not finite, comes back as infinity."""
    return {name: math.inf if value is None else value for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
