"""What a teleport has found and what it says of it: the report, from measurements of the weights before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .kernels import torch_kernels
from .measure import Measurement, relative_change
from .model.problem import Problem
from .orbits import Candidate
from .orbits.batch import BatchOrbit
from .report import LayerReport, StepRecord, TeleportReport
from .search.trust_region import SearchResult


@dataclass(frozen=True)
class Found:
    """What a search has found: the measurement at its start, its accepted points, and the weights of the last of them.

    last: None where it has not been formed yet. backend: what computed, in words.
    """

    before: Measurement
    result: SearchResult
    last: Candidate | None
    backend: str


def make_report(
    found: Found, after: Measurement, steps: int, changes: Sequence[float], reports: tuple[LayerReport, ...]
) -> TeleportReport:
    """The report (without its time) of weights that are written. changes: of their parts, and of all."""
    result = found.result
    parts = len(changes) - 1
    unchanged = report_unchanged(found.before, result.reason, reports, result.records, found.backend, parts)
    return replace(
        unchanged,
        accepted=True,
        steps=steps,
        loss_after=after.loss,
        grad_norm_after=after.gradient_norm,
        objective_after=after.objective,
        drift=relative_change(found.before.data_loss, after.data_loss),
        holdout_after=after.holdout,
        weight_changes=tuple(changes[:parts]),
        weight_change=changes[parts],
        sensitivity_after=after.sensitivity,
    )


def report_unchanged(
    before: Measurement,
    reason: str,
    layers: tuple[LayerReport, ...],
    trace: tuple[StepRecord, ...],
    backend: str,
    parts: int,
) -> TeleportReport:
    """The report (without its time) of weights that stay as they are, in so many parts."""
    return TeleportReport(
        accepted=False,
        reason=reason,
        steps=0,
        loss_before=before.loss,
        loss_after=before.loss,
        grad_norm_before=before.gradient_norm,
        grad_norm_after=before.gradient_norm,
        objective_before=before.objective,
        objective_after=before.objective,
        drift=0.0,
        holdout_before=before.holdout,
        holdout_after=before.holdout,
        weight_changes=(0.0,) * parts,
        weight_change=0.0,
        sensitivity_before=before.sensitivity,
        sensitivity_after=before.sensitivity,
        layers=layers,
        trace=trace,
        seconds=0.0,
        backend=backend,
    )


def describe_backend(orbit: Any, how: str) -> str:
    """What computes with an orbit, where, and how the search runs."""
    kernels = describe_kernels(orbit.problem) if isinstance(orbit, BatchOrbit) else "torch"
    return f"{kernels} on {orbit.device.type}, {how}"


def describe_kernels(problem: Problem) -> str:
    return "torch" if problem.network.products is torch_kernels else "cuda kernels"
