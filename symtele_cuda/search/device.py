"""The search of `trust_region` with every decision taken on the device: nothing is read back before it has ended.

The rule is the kernel `judge`, csrc/judge.cuh; a refused step is computed like any other and not committed. The whole
program, from the point at g = I to the new weights and what is measured on them, is one function of tensors, which a
CUDA graph can hold (`kernels.graphs`). The host reads its numbers once, at the end. The steps taken are those of
`trust_region.ascend`, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..guards import ALL_STEPS, STEPS_LONG_ENOUGH, Bounds
from ..kernels import graphs
from ..kernels import torch_kernels as torch_products
from ..kernels.judgement import AFTER_THE_END, DIRECTION_NOT_FINITE, GOES_ON, RULES, ZERO_DIRECTION, Verdict
from ..measure import Measurement, read
from ..model.pieces import holds_tensors
from ..objectives import Lookahead
from ..orbits import Candidate, Hindrance
from ..orbits.batch import BatchDirection, BatchOrbit
from ..orbits.layers import BatchPoint, Fit, LayerGoal
from ..report import StepRecord
from ..settings import Ascent, Guards
from .trust_region import ENDS, SearchResult, record, why_ended


@dataclass(frozen=True)
class Climb:
    """What the program is a function of: an orbit, how to search it, and what to keep.

    futile_if_flat: whether there is nothing to search for where the objective is not below the loss, see `is_futile`.
    """

    orbit: BatchOrbit
    ascent: Ascent
    guards: Guards
    futile_if_flat: bool

    @classmethod
    def make(cls, orbit: BatchOrbit, ascent: Ascent, guards: Guards) -> Climb:
        """With all numbers of the objective as tensors, so that another rate is the same program."""
        objective = orbit.objective
        if isinstance(objective, Lookahead) and not isinstance(objective.rate, Tensor):
            objective = Lookahead(orbit.problem.samples.new_full((), objective.rate))
        plain = replace(ascent, objective="grad_norm", lr=None), replace(guards, holdout=None)
        return cls(replace(orbit, objective=objective), *plain, ascent.looks_ahead and guards.min_gain > 0)

    def obstacle(self) -> str | None:
        """Why a CUDA graph should not hold the search, or None."""
        problem = self.orbit.problem
        if not problem.loss.default:
            return "loss_fn is the caller's own, which may do anything"
        if holds_tensors(problem.loss.output):
            return "tensors of the model are applied to its outputs, which a graph would not read anew"
        if problem.samples.dtype == torch.float64:
            return "float64 weights go through a solver library, which may not be captured"
        if any(plan.fit is Fit.CARRIED for plan in self.orbit.plans):
            return "the inverse of g goes through a solver library, which may not be captured"
        return graphs.solver_obstacle(problem.network.products, len(problem.samples))


@dataclass
class Trace:
    """A search on the device: the point accepted last, the waypoints of all that were tried after the start, and a row
    of figures for each.

    hindrances: the texts of the flags that the rows count first.
    """

    point: BatchPoint
    waypoints: list[tuple[LayerGoal, ...]]
    rows: list[Tensor]
    hindrances: tuple[str, ...]

    def result(self, rows: Sequence[Sequence[float]], texts: Sequence[Callable[[float], str]]) -> SearchResult:
        """What the host's search would have said, from the rows as numbers; texts: those of the search's bounds."""
        waypoints, records, reason = [self.waypoints[0]], list[StepRecord](), ALL_STEPS
        for row, tried in zip(rows, self.waypoints[1:], strict=True):
            (value, size, *numbers), figures = row[:6], row[6:]
            accepted, shortened, note, end = map(int, numbers)
            verdict = Verdict(bool(accepted), bool(shortened), note, end)
            if verdict.end == AFTER_THE_END:
                reason = reason if records else STEPS_LONG_ENOUGH  # the one reason to begin a search as ended
                break
            if verdict.end not in (ZERO_DIRECTION, DIRECTION_NOT_FINITE):
                told = partial(_told, texts, figures)
                records.append(record(verdict, size, value, self.hindrances, told))
                if verdict.accepted:
                    waypoints.append(tried)
            if verdict.end != GOES_ON:
                reason = ENDS[verdict.end]
                break
        return SearchResult(tuple(waypoints), tuple(records), why_ended(reason, records))


def _told(texts: Sequence[Callable[[float], str]], figures: Sequence[float], bound: int) -> str:
    """What the figure says that has broken the bound."""
    return texts[bound](figures[bound])


@dataclass(frozen=True)
class Program:
    """What the program computes, all on the device: the search, and the weights of the point accepted last.

    before: the values of a `Measurement` at the start. rows: those of the trace, steps×figures.
    """

    before: Tensor
    trace: Trace
    rows: Tensor
    last: Candidate


def can_climb(orbit: BatchOrbit) -> bool:
    """Whether an orbit can be searched on its device: on a GPU with the compiled kernels, in activation space."""
    return orbit.fast and orbit.products is not torch_products and orbit.problem.samples.device.type == "cuda"


def climb(orbit: BatchOrbit, ascent: Ascent, guards: Guards) -> tuple[Measurement, SearchResult, Candidate, str]:
    """Search on the device, in a CUDA graph where that can be, and read the outcome back.

    What was measured at the start, the search, the weights of its last point, and in words how it ran.
    """
    work = Climb.make(orbit, ascent, guards)
    program, how = graphs.run(work, run_program, work.obstacle())
    return *read_back(guards, program), how


def run_program(work: Climb) -> Program:
    """The search, the weights of its last point and what is measured on them; no value is read back."""
    orbit = work.orbit
    before = orbit.measure_start()
    loss, _, objective, gradient_norm, sensitivity, *holdout = before.unbind()
    bounds = Bounds.make(work.guards, sensitivity, holdout[0] if orbit.around.held > 0 else None)
    ended = (objective < loss).logical_not() if work.futile_if_flat else torch.zeros_like(loss)
    trace = ascend(work, bounds, work.ascent.cap(orbit.objective, gradient_norm), ended)
    return Program(before, trace, torch.stack(trace.rows), orbit.weights(orbit.waypoint(trace.point)))


def read_back(guards: Guards, program: Program) -> tuple[Measurement, SearchResult, Candidate]:
    """The program's numbers, in one transfer, as the host's search would have told them."""
    last = program.last
    flags = _flags([flag for flag, _ in last.hindrances], program.before).double()
    parts = [program.before, program.rows.flatten(), last.measured, last.changes, flags]
    values = torch.cat(parts).cpu().split([len(part) for part in parts])
    before_values, row_values, measured, changes, hindered = values
    before = read(before_values)
    assert before.sensitivity is not None
    texts = Bounds.make(guards, before.sensitivity, before.holdout).texts
    result = program.trace.result(row_values.reshape(program.rows.shape).tolist(), texts)
    hindrances = tuple(zip(hindered, (text for _, text in last.hindrances), strict=True))
    return before, result, replace(last, measured=measured, changes=changes, hindrances=hindrances)


def ascend(work: Climb, bounds: Bounds, cap: float | Tensor, ended: Tensor) -> Trace:
    """`trust_region.ascend`: a step that is refused, or comes after the end, is computed and not committed.

    ended: whether there is nothing to search for, so that all steps come after the end.
    """
    orbit, products, maximise = work.orbit, work.orbit.products, work.orbit.objective.maximise
    point = orbit.start()
    evaluation = orbit.evaluate(point)
    trace = Trace(_with_own_memory(point), [orbit.waypoint(point)], [], ())
    first_radius = work.ascent.first_radius * orbit.scale(point)
    nought = torch.zeros_like(first_radius)
    control = torch.stack([evaluation.value.double(), first_radius, nought, ended.double(), first_radius])
    radius = control[1]
    limit = cap if isinstance(cap, Tensor) else torch.full_like(first_radius, cap)
    direction = orbit.direction(point, evaluation)
    for step in range(work.ascent.steps):
        size = orbit.limit(trace.point, direction, (radius if maximise else -radius) / direction.norm)
        trial, hindrances = orbit.advance(trace.point, direction, size)
        evaluation = orbit.evaluate(trial)
        figures = orbit.figures(trial)
        accept, row = products.judge(
            control,
            size,
            direction.norm,
            evaluation.value.double(),
            _flags([flag for flag, _ in hindrances], control),
            _flags(bounds.broken_by(figures), control),
            limit,
            maximise,
            RULES,
        )
        trace.rows.append(torch.cat([row, torch.stack(figures)]) if figures else row)
        following = orbit.direction(trial, evaluation) if step < work.ascent.steps - 1 else None
        _take(work, trace, accept, direction, (trial, hindrances, following))
    return trace


def _with_own_memory(point: BatchPoint) -> BatchPoint:
    """The point with memory of its own for all that a commit overwrites."""
    layers = []
    for at in point.layers:
        owned = {id(tensor): tensor.clone(memory_format=torch.contiguous_format) for tensor in at.moving()}
        inputs, reference = owned.get(id(at.inputs), at.inputs), owned.get(id(at.reference), at.reference)
        source = None if at.source is None else owned.get(id(at.source), at.source)
        layers.append(replace(at, inputs=inputs, source=source, reference=reference))
    return replace(point, layers=tuple(layers))


def _take(
    work: Climb,
    trace: Trace,
    accept: Tensor,
    direction: BatchDirection,
    tried: tuple[BatchPoint, tuple[Hindrance, ...], BatchDirection | None],
) -> None:
    """Note the step, and where it is accepted put its point and the direction from there in place of the old ones."""
    trial, hindrances, following = tried
    trace.waypoints.append(work.orbit.waypoint(trial))
    trace.hindrances = tuple(text for _, text in hindrances)
    old = [tensor for at in trace.point.layers for tensor in at.moving()]
    new = [tensor for at in trial.layers for tensor in at.moving()]
    if following is not None:
        old, new = old + direction.tensors(), new + following.tensors()
    work.orbit.products.commit(accept, old, new)


def _flags(flags: Sequence[Tensor], like: Tensor) -> Tensor:
    if len(flags) == 1:  # to stack it would be a launch
        return flags[0].reshape(1)
    return torch.stack([*flags]) if flags else torch.zeros(0, dtype=torch.bool, device=like.device)
