"""What a teleport says of itself: plain numbers, nothing of the data."""

from __future__ import annotations

import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LONGEST_LINE = 120

# What a report says of a hidden layer.
TELEPORTED = "teleported"
NOT_ASKED_FOR = "not asked for"
NOT_LOOKED_AT = "no search"


def frozen_text(name: str) -> str:
    return f"it would change {name!r}, which is frozen"


@dataclass(frozen=True)
class StepRecord:
    """One step of a search: the objective it reached (NaN if it has none), the ε taken, and what was decided."""

    objective: float
    size: float
    accepted: bool
    note: str


@dataclass(frozen=True)
class LayerReport:
    """One hidden layer k = 1..m of width d_k: the batch of n samples as its input [B_{k−1}, 1], and whether it was
    moved.

    rank and condition (κ₂, an estimate; inf where the rank is below n) are those of the n×(d_{k−1}+1) input; None where
    group="positive_diagonal" was asked for, which needs no match, and where a `Teleporter` has seen that no search is
    worth it before it chose among the n samples. group: what moved the layer, "gl" or "positive_diagonal", None where
    it was not moved.
    """

    index: int
    n: int
    width: int
    rank: int | None
    condition: float | None
    teleported: bool
    reason: str
    group: str | None


@dataclass(frozen=True, repr=False)
class TeleportReport:
    """The outcome of `teleport_mlp`. `print(report)` is one line of it, `report.describe()` all that matters.

    accepted: whether the weights were written; reason: why the search ended, or why nothing was written.
    steps: accepted ascent steps; trace: every step tried.
    loss_*: on the teleport batch; drift: |loss_after − loss_before| / |loss_before|, with the weight terms of a loss
    that has them held at the old weights.
    grad_norm_*: ‖∇L‖ (not squared) over the weights and biases of all layers; objective_*: the objective's own value.
    holdout_*: the loss on the holdout batch, None without one.
    kept, holdout_kept: the share of the predictions on the batch and on the holdout that the new weights keep, see
    `Standardise`; None where it was not measured.
    weight_changes: ‖[W', b'] − [W, b]‖_F / ‖[W, b]‖_F of every weight layer, of every module that has trainable
    parameters for `teleport`; weight_change: of all of them together.
    sensitivity_*: √(1/N Σ ‖z(x + ε) − z(x)‖²), by how much noise ε in the inputs moves the logits z. The samples x are
    those of the holdout, or of the batch without one. ε has 0.1 times the standard deviation of all elements of x. None
    where it was not measured.
    seconds: wall-clock of the whole call.
    backend: what has computed, "torch" or the compiled "cuda" kernels, on which device, and whether a CUDA graph ran
    the search, or why not.
    If not accepted the *_after fields equal the *_before fields and the changes are 0: nothing has changed.
    """

    accepted: bool
    reason: str
    steps: int
    loss_before: float
    loss_after: float
    grad_norm_before: float
    grad_norm_after: float
    objective_before: float
    objective_after: float
    drift: float
    holdout_before: float | None
    holdout_after: float | None
    weight_changes: tuple[float, ...]
    weight_change: float
    sensitivity_before: float | None
    sensitivity_after: float | None
    layers: tuple[LayerReport, ...]
    trace: tuple[StepRecord, ...]
    seconds: float
    backend: str
    kept: float | None = None
    holdout_kept: float | None = None

    def __str__(self) -> str:
        if not self.accepted:
            return _shortened(f"not teleported: {self.reason}")
        noise = ""
        if self.sensitivity_before and self.sensitivity_after is not None:
            noise = f", noise ×{self.sensitivity_after / self.sensitivity_before:.3g}"
        return _shortened(
            f"teleported: objective {self.objective_before:.4g} → {self.objective_after:.4g}, "
            f"‖∇L‖ {self.grad_norm_before:.4g} → {self.grad_norm_after:.4g}, "
            f"‖ΔW‖/‖W‖ {self.weight_change:.2g}{noise}"
        )

    __repr__ = __str__

    def timed(self, started: float) -> TeleportReport:
        """The same with the seconds since `started`, a time of `time.perf_counter`."""
        return replace(self, seconds=time.perf_counter() - started)

    def describe(self) -> str:
        """The outcome in several lines: figures before and after, the layers, and every step tried."""
        figures = [
            ("loss on the batch", self.loss_before, self.loss_after),
            ("loss on the holdout", self.holdout_before, self.holdout_after),
            ("objective", self.objective_before, self.objective_after),
            ("‖∇L‖", self.grad_norm_before, self.grad_norm_after),
            ("sensitivity to noise", self.sensitivity_before, self.sensitivity_after),
        ]
        lines = [f"{'teleported' if self.accepted else 'not teleported'}: {self.reason}"]
        lines += [
            f"  {name:<22}{before:.6g} → {after:.6g}"
            for name, before, after in figures
            if before is not None and after is not None
        ]
        lines.append(f"  {'drift of the loss':<22}{self.drift:.1e}")
        for name, share in (("batch", self.kept), ("holdout", self.holdout_kept)):
            if share is not None:
                lines.append(f"  {'kept on the ' + name:<22}{100 * share:.1f} % of the predictions")
        changes = ", ".join(f"{change:.3g}" for change in self.weight_changes)
        lines.append(f"  {'‖ΔW‖/‖W‖':<22}{self.weight_change:.3g} in all; by weight layer {changes}")
        for layer in self.layers:
            condition = "" if layer.condition is None else f", condition {layer.condition:.2g}"
            moved = f"moved by {layer.group}" if layer.teleported else f"not moved: {layer.reason}"
            lines.append(f"  hidden layer {layer.index:<9}{layer.width} units, n = {layer.n}{condition}; {moved}")
        lines += [
            f"  step {number:<17}objective {step.objective:.6g}, size {step.size:.3g}: {step.note}"
            for number, step in enumerate(self.trace, start=1)
        ]
        return "\n".join([*lines, f"  {self.backend}, {1e3 * self.seconds:.1f} ms"])


def _shortened(line: str) -> str:
    """At most `LONGEST_LINE` characters of it."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"


def restore(record: type[Any], values: object) -> Any:
    """The inverse of dataclasses.asdict for a report or a part of one; raise unless `values` is what that gives."""
    kinds = typing.get_type_hints(record)
    if not isinstance(values, Mapping) or set(values) != set(kinds):
        got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        raise ValueError(f"state: a {record.__name__} must have the entries {sorted(kinds)}, got {got}")
    return record(**{name: _restore_field(record, name, kind, values[name]) for name, kind in kinds.items()})


def _restore_field(record: type[Any], name: str, kind: Any, value: object) -> Any:
    """The field `name` of a record, annotated with `kind`."""
    parts: tuple[Any, ...] = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:  # of any length, of one kind
        entries = check_list(f"state: report's {name}", value)
        if parts[0] in (LayerReport, StepRecord):
            return tuple(restore(parts[0], entry) for entry in entries)
        return tuple(_restore_field(record, name, parts[0], entry) for entry in entries)
    allowed = kind | int if float in (kind, *parts) else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        kind = getattr(kind, "__name__", kind)
        raise TypeError(f"state: {name} of a {record.__name__} must be of type {kind}, got {value!r}")
    return value


def check_list(argument: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{argument} must be a list, got {type(value).__name__}")
    return value
