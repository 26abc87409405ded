"""The search of `search`, with every decision taken on the device: nothing is read back before it has ended.

Acceptance, radius, growth cap and bounds are arithmetic on scalar tensors; a refused step is computed like any other
and not committed. The whole program, from the state at g = I to the new weights and what is measured on them, is one
function of tensors, which a CUDA graph can hold (`graphs`); the host reads its numbers once, at the end.

The steps taken are those of `search.ascend` and `search.ascend_fixed`, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import graphs
from ..measure import read
from ..objectives import has_fast_path
from ..orbits.action import Direction, Hindrance, State, Waypoint
from ..orbits.activation_space import Evaluation
from ..report import StepRecord
from ..task import Candidate, Found, Task, describe_backend
from .trust_region import (
    ABOVE_CAP,
    ACCEPTED,
    ALL_STEPS,
    CAP_AIM,
    CAP_REACHED,
    CAP_SHARE,
    GRADIENT_NOT_FINITE,
    GROWTH,
    LARGEST_SHARE,
    LATER_GROWTH,
    LEAST_SHARE,
    NO_IMPROVEMENT,
    NO_STEP_LEFT,
    NOT_FINITE,
    SHORTENED,
    SHORTENED_BELOW,
    SHRINKAGE,
    SMALLEST_RADIUS,
    STEPS_LONG_ENOUGH,
    ZERO_GRADIENT,
    Bounds,
    Search,
    SearchResult,
    not_taken,
    why_ended,
)

_RULES = (
    GROWTH,
    LATER_GROWTH,
    SHRINKAGE,
    SMALLEST_RADIUS,
    CAP_SHARE,
    CAP_AIM,
    LEAST_SHARE,
    LARGEST_SHARE,
    SHORTENED_BELOW,
)
# What `products.judge` says of the end of a search.
_AFTER_THE_END, _ZERO, _NOT_FINITE, _CAP, _RADIUS = range(1, 6)


@dataclass
class Trace:
    """A search on the device: the state accepted last, all states tried after the start, and a row of figures for each.

    hindrances: the texts of the flags that the rows count first. fixed: whether the steps were of a fixed size.
    """

    state: State
    waypoints: list[Waypoint]
    rows: list[Tensor]
    hindrances: tuple[str, ...]
    fixed: bool

    def result(self, rows: Sequence[Sequence[float]], texts: Sequence[Callable[[float], str]]) -> SearchResult:
        """What the host's search would have said, from the rows as numbers; texts: those of the search's bounds."""
        notes = (*self.hindrances, NOT_FINITE, NO_IMPROVEMENT, ABOVE_CAP)
        waypoints, records, reason = [self.waypoints[0]], list[StepRecord](), ALL_STEPS
        for (value, size, accepted, shortened, note, end, *losses), tried in zip(rows, self.waypoints[1:], strict=True):
            place = int(note)
            if end == _AFTER_THE_END:
                reason = reason if records else STEPS_LONG_ENOUGH  # the one reason to begin a search as ended
                break
            if end in (_ZERO, _NOT_FINITE):
                reason = ZERO_GRADIENT if end == _ZERO else GRADIENT_NOT_FINITE
                break
            if place == 0:
                text = SHORTENED if shortened else ACCEPTED
            elif place <= len(notes):
                text = notes[place - 1]
            else:
                broken = place - len(notes) - 1
                text = texts[broken](losses[broken])
            reached = math.nan if 0 < place <= len(self.hindrances) + 1 else value
            records.append(StepRecord(reached, size, bool(accepted), text))
            if accepted:
                waypoints.append(tried)
            elif self.fixed:
                reason = not_taken(len(records), text)
                break
            if end in (_CAP, _RADIUS):
                reason = CAP_REACHED if end == _CAP else NO_STEP_LEFT
                break
        reason = reason if self.fixed else why_ended(reason, records)
        return SearchResult(tuple(waypoints), tuple(records), reason)


@dataclass(frozen=True)
class Program:
    """What the program computes, all on the device: the search, and the weights of the state accepted last.

    before: the values of a `Measurement` at the start. rows: those of the trace, steps×figures.
    """

    start: State
    before: Tensor
    trace: Trace
    rows: Tensor
    last: Candidate


def can_find(task: Task) -> bool:
    """Whether the task can be searched on its device: on a GPU, in activation space."""
    fast = has_fast_path(task.options.objective) and task.problem.sees_logits_alone
    return fast and task.problem.samples.device.type == "cuda"


def find(task: Task) -> Found:
    """Search on the device, in a CUDA graph where that can be, and read the outcome back."""
    program, how = graphs.run(task, run_program)
    return read_back(task, program, describe_backend(task.problem.network, how))


def run_program(task: Task) -> Program:
    """The search, the weights of its last state and what is measured on them; no value is read back."""
    start, search, step_size = task.start(), task.search(), task.options.step_size
    evaluation = search.path.evaluate(start)
    before = task.measure(task.problem.network, task.problem.outputs)
    if step_size is None:
        loss, data_loss, objective, gradient_norm, sensitivity, *holdout = before.unbind()
        bounds = task.bounds(data_loss, sensitivity, *holdout[:1])
        ended = (objective < loss).logical_not() if task.options.wants_gain else torch.zeros_like(loss)
        trace = ascend(search, start, evaluation, cap=task.cap(gradient_norm), bounds=bounds, ended=ended)
    else:
        trace = ascend_fixed(search, start, evaluation, step_size=step_size)
    last = task.candidate(start, trace.state.waypoint)
    return Program(start, before, trace, torch.stack(trace.rows), last)


def read_back(task: Task, program: Program, backend: str) -> Found:
    """The program's numbers, in one transfer, as the host's search would have told them."""
    flags = _flags([flag for flag, _ in program.last.hindrances], program.before).double()
    parts = [program.before, program.rows.flatten(), program.last.measured, program.last.changes, flags]
    before_values, row_values, measured, changes, hindered = torch.cat(parts).cpu().split([len(part) for part in parts])
    before = read(before_values)
    bounds = task.bounds(before.data_loss, before.sensitivity, before.holdout)
    result = program.trace.result(row_values.reshape(program.rows.shape).tolist(), bounds.texts)
    texts = [text for _, text in program.last.hindrances]
    last = Candidate(program.last.network, measured, changes, tuple(zip(hindered, texts, strict=True)))
    return Found(program.start, before, result, last, backend)


def ascend(
    search: Search,
    start: State,
    evaluation: Evaluation,
    *,
    cap: float | Tensor,
    bounds: Bounds,
    ended: Tensor,
) -> Trace:
    """`search.ascend`: a step that is refused, or comes after the end, is computed and not committed.

    ended: whether there is nothing to search for, so that all steps come after the end.
    """
    products, trace = search.network.products, _begin(search, start, fixed=False)
    first_radius = search.first_radius * search.moved_norm(start)
    nought = torch.zeros_like(first_radius)
    control = torch.stack([evaluation.value.double(), first_radius, nought, ended.double(), first_radius])
    radius = control[1]
    limit = cap if isinstance(cap, Tensor) else torch.full_like(first_radius, cap)
    direction = search.direction(start, evaluation)
    for step in range(search.steps):
        size = search.limit(trace.state, direction, (radius if search.maximise else -radius) / direction.norm)
        trial, hindrances = search.advance(trace.state, direction, size)
        evaluation = search.path.evaluate(trial)
        figures = bounds.figures(trial)
        accept, row = products.judge(
            control,
            size,
            direction.norm,
            evaluation.value.double(),
            _flags([flag for flag, _ in hindrances], control),
            _flags(bounds.broken_by(figures), control),
            limit,
            search.maximise,
            _RULES,
        )
        trace.rows.append(torch.cat([row, torch.stack(figures)]) if figures else row)
        following = search.direction(trial, evaluation) if step < search.steps - 1 else None
        _take(search, trace, accept, direction, trial, hindrances, following)
    return trace


def ascend_fixed(search: Search, start: State, evaluation: Evaluation, *, step_size: float) -> Trace:
    """`search.ascend_fixed`, with rows of the same form: a step that cannot be taken ends the search."""
    trace = _begin(search, start, fixed=True)
    direction = search.direction(start, evaluation)
    wanted = torch.full_like(direction.norm, search.sign * step_size)
    end = torch.zeros_like(direction.norm)
    for step in range(search.steps):
        size = search.limit(trace.state, direction, wanted)
        trial, hindrances = search.advance(trace.state, direction, size)
        evaluation = search.path.evaluate(trial)
        value = evaluation.value.double()
        flags = _flags([*(flag for flag, _ in hindrances), torch.isfinite(value).logical_not()], value)
        note = torch.where(flags.any(), flags.double().argmax() + 1, 0)
        accept = (note == 0) & (end == 0)
        shortened = size.abs() < step_size
        trace.rows.append(torch.stack([value, size, accept.double(), shortened.double(), note.double(), end]))
        end = torch.where(accept, end, float(_AFTER_THE_END))
        following = search.direction(trial, evaluation) if step < search.steps - 1 else None
        _take(search, trace, accept, direction, trial, hindrances, following)
    return trace


def _begin(search: Search, start: State, *, fixed: bool) -> Trace:
    """A trace at `start`, with memory of its own for all that a commit overwrites."""
    owned = {
        id(tensor): tensor.clone(memory_format=torch.contiguous_format) for tensor in _state_tensors(search, start)
    }
    state = replace(
        start,
        inputs=tuple(owned.get(id(tensor), tensor) for tensor in start.inputs),
        targets=tuple(owned.get(id(tensor), tensor) for tensor in start.targets),
        references=tuple(None if tensor is None else owned.get(id(tensor), tensor) for tensor in start.references),
        offsets=tuple(None if tensor is None else owned.get(id(tensor), tensor) for tensor in start.offsets),
    )
    return Trace(state, [start.waypoint], [], (), fixed)


def _take(
    search: Search,
    trace: Trace,
    accept: Tensor,
    direction: Direction,
    trial: State,
    hindrances: Sequence[Hindrance],
    following: Direction | None,
) -> None:
    """Note the step, and where it is accepted put its state and the direction from there in place of the old ones."""
    trace.waypoints.append(trial.waypoint)
    trace.hindrances = tuple(text for _, text in hindrances)
    old, new = _state_tensors(search, trace.state), _state_tensors(search, trial)
    if following is not None:
        old, new = old + _direction_tensors(direction), new + _direction_tensors(following)
    search.network.products.commit(accept, old, new)


def _state_tensors(search: Search, state: State) -> list[Tensor]:
    """What a step changes of a state, as far as the next step and the weights depend on it."""
    plan, tensors = search.plan, list[Tensor]()
    drifts = plan.first_order_inverse  # then every layer behind a carried one may move
    for layer in range(len(search.network)):
        if layer > 0 and (plan.moved[layer - 1] or drifts):
            tensors += [state.inputs[layer], state.targets[layer - 1]]
        reference, offset = state.references[layer], state.offsets[layer]
        if plan.changes_reference(layer):
            assert reference is not None
            tensors.append(reference)
        if plan.changes_offset(layer) and offset is not None:
            tensors.append(offset)
    return [*tensors, state.logits] if drifts else tensors


def _direction_tensors(direction: Direction) -> list[Tensor]:
    tensors = [direction.norm, *direction.scales.values()]
    for step in direction.steps.values():
        tensors += [step.change, *(step.generator or ())]
    return tensors


def _flags(flags: Sequence[Tensor], like: Tensor) -> Tensor:
    if len(flags) == 1:  # to stack it would be a launch
        return flags[0].reshape(1)
    return torch.stack([*flags]) if flags else torch.zeros(0, dtype=torch.bool, device=like.device)
