"""What one training run of the study leaves: a `Record`, and the line of a file that holds it.

A line is {key, data, made, problem, optimizer, lr, arm, seed, …} and the numbers as lists, rounded to five digits; NaN
and Inf are null there and NaN when read. A run without an accepted teleport ends with its schedule of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypeVar

from experiments.study.jobs import Job

DIGITS = 5


@dataclass(frozen=True)
class Check:
    """After `iteration` steps of the optimizer (0: the start): the training time so far in seconds, teleports included
    and measurements not, and the loss on the whole training set, NaN at the end of a run that is no longer finite.
    """

    iteration: int
    seconds: float
    train_loss: float


@dataclass(frozen=True)
class Validation:
    """After an epoch, on the validation set; accuracies are NaN in a regression.

    noise_accuracy: with noise in the inputs, see `training.noisy_accuracy`; norm: ‖W‖ of all parameters. Both are NaN
    in records of before they were measured.
    """

    loss: float
    accuracy: float
    noise_accuracy: float = math.nan
    norm: float = math.nan


@dataclass(frozen=True)
class Teleport:
    """A teleport after `iteration` steps of the optimizer, the seconds of the call that made it, and the loss on the
    whole training set: right before, right after, and `measure.LATER` steps later (NaN if the run has ended by then).
    """

    iteration: int
    seconds: float
    accepted: bool
    loss_before: float
    loss_after: float
    loss_later: float


@dataclass(frozen=True)
class Record:
    """One run.

    refused: how often a teleport could not be done with the model and its batch (TeleportError), and the run went on.
    cut_short: whether it was ended with its schedule, because nothing was teleported: see `completed`.
    """

    iterations_per_epoch: int
    checks: tuple[Check, ...]
    validations: tuple[Validation, ...]
    teleports: tuple[Teleport, ...]
    refused: int
    cut_short: bool = False

    @property
    def final(self) -> Check:
        return self.checks[-1]

    @property
    def diverged(self) -> bool:
        """Whether the train loss ended above its start, or not finite."""
        return not self.final.train_loss <= self.checks[0].train_loss

    @property
    def accepted(self) -> list[Teleport]:
        """The teleports that wrote weights."""
        return [teleport for teleport in self.teleports if teleport.accepted]

    @property
    def teleport_share(self) -> float:
        """What share of the training time the teleports took."""
        return sum(teleport.seconds for teleport in self.teleports) / self.final.seconds


def completed(record: Record, plain: Record) -> Record:
    """The whole of a run that was cut short: `plain`, the run of the same seed without teleports, over again, with the
    seconds that asking for teleports took.

    Raises:
        ValueError: the run does not begin as `plain` does, so that its rest is another.
    """
    for ours, theirs in zip(record.checks, plain.checks, strict=False):
        if (ours.iteration, ours.train_loss) != (theirs.iteration, theirs.train_loss):
            raise ValueError(
                "a run without a teleport must have the train losses of the plain run of its seed, got "
                f"{ours.train_loss} for {theirs.train_loss} after {ours.iteration} iterations: were they trained on "
                "different machines?"
            )

    def asked_until(iteration: int) -> float:
        return sum(teleport.seconds for teleport in record.teleports if teleport.iteration < iteration)

    checks = tuple(replace(check, seconds=check.seconds + asked_until(check.iteration)) for check in plain.checks)
    return replace(plain, checks=checks, teleports=record.teleports)


@dataclass(frozen=True)
class Line:
    """A record with what it is known by: the key of its job, the fingerprint of its data, and what has computed it."""

    key: str
    data: str
    made: str
    record: Record


def write_line(job: Job, data: str, made: str, record: Record) -> str:
    """The line, without its end."""
    head = {
        "key": job.key,
        "data": data,
        "made": made,
        "problem": job.problem.name,
        "optimizer": job.optimizer,
        "lr": job.lr,
        "arm": job.arm,
        "seed": job.seed,
        "iterations_per_epoch": record.iterations_per_epoch,
        "refused": record.refused,
    }
    if record.cut_short:
        head["cut_short"] = True
    body = {name: _columns(kind, getattr(record, name)) for name, kind in _LISTS.items()}
    return json.dumps(head | body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def read_line(text: str) -> Line:
    """The inverse of `write_line`, up to rounding.

    Raises:
        ValueError: `text` is not what `write_line` writes.
    """
    try:
        entry = json.loads(text)
        lists: dict[str, Any] = {name: _rows(kind, entry[name]) for name, kind in _LISTS.items()}
        cut_short = entry.get("cut_short", False)
        record = Record(entry["iterations_per_epoch"], refused=entry["refused"], cut_short=cut_short, **lists)
        return Line(entry["key"], entry["data"], entry["made"], record)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"expected the record of a run, got {text[:40]!r} ({error})") from error


_LISTS: dict[str, type] = {"checks": Check, "validations": Validation, "teleports": Teleport}
Entry = TypeVar("Entry", Check, Validation, Teleport)


def _columns(kind: type[Entry], entries: Sequence[Entry]) -> dict[str, list[Any]]:
    return {field.name: [rounded(getattr(entry, field.name)) for entry in entries] for field in fields(kind)}


def _rows(kind: Any, columns: Mapping[str, Sequence[Any]]) -> tuple[Any, ...]:
    known = [field.name for field in fields(kind) if field.default is MISSING or field.name in columns]
    rows = zip(*(columns[name] for name in known), strict=True)
    return tuple(
        kind(**{name: math.nan if value is None else value for name, value in zip(known, row, strict=True)})
        for row in rows
    )


def rounded(value: Any) -> Any:
    """A float to five digits, or None if it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
