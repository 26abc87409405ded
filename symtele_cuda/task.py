"""What one teleport has to do: the problem, the plan and the options, as every way to search it needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .kernels import graphs
from .kernels import torch_kernels as torch_products
from .measure import Measurement, measure, relative_change, weight_changes
from .model.network import Network, parameter_list
from .model.pieces import holds_tensors
from .model.problem import Problem
from .objectives import GradNorm, Lookahead
from .orbits.action import Hindrance, Match, OtherSamples, Plan, State, Waypoint, form_weights, initial_state, predict
from .orbits.paths import Path, choose_path
from .search.trust_region import Bounds, Search, SearchResult
from .settings import Options
from .surroundings import Surroundings


@dataclass(frozen=True)
class Candidate:
    """Weights that a state stands for, as they would be written; their `measure`d values and `weight_changes`; what may
    hinder them."""

    network: Network
    measured: Tensor
    changes: Tensor
    hindrances: tuple[Hindrance, ...]


@dataclass(frozen=True)
class Found:
    """What a search has found: the measurement at its start, the accepted states, and the weights of the last of them.

    last is None where it has not been formed yet; backend says in words what has computed.
    """

    start: State
    before: Measurement
    result: SearchResult
    last: Candidate | None
    backend: str


@dataclass(frozen=True)
class Task:
    """A problem with its surroundings, how its layers' inputs are matched, the plan that follows, and the options."""

    problem: Problem
    around: Surroundings
    matches: tuple[Match, ...]
    plan: Plan
    options: Options

    def tensors(self) -> list[Tensor]:
        """All the tensors of the task, which differ between teleports of one `signature`."""
        problem, network = self.problem, self.problem.network
        tensors = [*parameter_list(network), problem.samples, problem.loss.targets, problem.output_delta]
        tensors += problem.outputs
        for match in self.matches:
            tensors += [match.inputs, match.gram, *([] if match.gram_inverse is None else [match.gram_inverse])]
        others, holdout = self.around.others, self.around.loss
        tensors += [others.inputs, *others.outputs, others.overlap, *([] if holdout is None else [holdout.targets])]
        if isinstance(objective := self.options.objective, Lookahead):
            rate = objective.rate
            tensors.append(rate if isinstance(rate, Tensor) else problem.samples.new_full((), rate))
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> Task:
        """The same task with other tensors, in the order of `tensors()`."""
        rest = iter(tensors)
        problem, around, options = self.problem, self.around, self.options
        network = problem.network.with_parameters([next(rest) for _ in parameter_list(problem.network)])
        samples, targets, output_delta = next(rest), next(rest), next(rest)
        problem = replace(
            problem,
            network=network,
            samples=samples,
            loss=replace(problem.loss, targets=targets),
            output_delta=output_delta,
            outputs=tuple(next(rest) for _ in problem.outputs),
        )
        matches = tuple(
            replace(
                match,
                inputs=next(rest),
                gram=next(rest),
                gram_inverse=None if match.gram_inverse is None else next(rest),
            )
            for match in self.matches
        )
        inputs, others_outputs = next(rest), tuple(next(rest) for _ in around.others.outputs)
        around = replace(around, others=OtherSamples(inputs, others_outputs, next(rest)))
        if around.loss is not None:
            around = replace(around, loss=replace(around.loss, targets=next(rest)))
        if isinstance(options.objective, Lookahead):
            options = replace(options, objective=Lookahead(next(rest)))
        return replace(self, problem=problem, around=around, matches=matches, options=options)

    def signature(self) -> Hashable:
        """What a program of this task depends on besides its tensors."""
        problem, network = self.problem, self.problem.network
        return (
            tuple(bias is None for bias in network.biases),
            network.activations,
            id(network.products),
            tuple(match.gram_inverse is None for match in self.matches),
            (problem.loss.function, problem.loss.output, problem.parameter_dtype),
            self.plan,
            type(self.options.objective),
            replace(self.options, objective=GradNorm()),
        )

    def obstacle(self) -> str | None:
        """Why a CUDA graph should not hold the search, or None."""
        problem = self.problem
        if not problem.loss.default:
            return "loss_fn is the caller's own, which may do anything"
        if holds_tensors(problem.loss.output):
            return "tensors of the model are applied to its outputs, which a graph would not read anew"
        if problem.samples.dtype == torch.float64:
            return "float64 weights go through a solver library, which may not be captured"
        if any(self.plan.carried) and not self.plan.first_order_inverse:
            return "the exact inverse of g goes through a solver library, which may not be captured"
        return graphs.solver_obstacle(problem.network.products, len(problem.samples))

    def start(self) -> State:
        """The state at g = I."""
        return initial_state(self.problem.network, self.plan, self.problem.outputs, self.matches)

    def path(self) -> Path:
        return choose_path(self.problem, self.plan, self.options.objective)

    def search(self) -> Search:
        options, network = self.options, self.problem.network
        return Search(self.path(), network, self.plan, options.objective.maximise, options.steps, options.first_radius)

    def measure(self, network: Network, outputs: Sequence[Tensor]) -> Tensor:
        """The values of a `Measurement` of `network`, whose pre-activations on the batch are `outputs`."""
        return measure(self.problem, self.options.objective, self.around, network, outputs, self.matches[0].gram)

    def cap(self, gradient_norm: float | Tensor) -> float | Tensor:
        """The value that ‖∇L‖² may reach from a start with ‖∇L‖ = `gradient_norm`; no cap for other objectives."""
        if type(self.options.objective) is not GradNorm:  # a subclass has a scale of its own
            return math.inf
        largest = self.options.max_growth * gradient_norm
        return largest * largest

    def bounds(
        self, data_loss: float | Tensor, sensitivity: float | Tensor | None, holdout: float | Tensor | None = None
    ) -> Bounds:
        """What an accepted state keeps, given the measurement at the start: the batch's loss where it can drift, the
        holdout's where there is one, and the sensitivity to noise where it is bounded."""
        options, around = self.options, self.around
        limits: list[tuple[float | Tensor, float | Tensor]] = []
        texts: list[Callable[[float], str]] = []
        drifts, bounds_noise = self.plan.first_order_inverse, math.isfinite(options.max_sensitivity)
        if drifts:
            room = _share(options.drift_tol, data_loss)
            limits.append((data_loss - room, data_loss + room))
            texts.append(lambda value: drift_refusal(options, float(data_loss), value))
        if holdout is not None:
            limits.append((-math.inf, holdout + _share(options.holdout_tol, holdout)))
            texts.append(lambda value: holdout_refusal(float(holdout), value))
        if bounds_noise:
            assert sensitivity is not None
            limits.append((-math.inf, options.max_sensitivity * sensitivity))
            texts.append(lambda value: noise_refusal(options, float(sensitivity), value))
        others = around.others if bounds_noise else around.others.first(around.held)

        def figures(state: State) -> list[Tensor]:
            found = [self.problem.loss.value(state.logits).double()] if drifts else []
            if holdout is not None or bounds_noise:
                logits = predict(self.problem.network, self.plan, state, others)
                found += [around.holdout_loss(logits).double()] if holdout is not None else []
                found += [around.sensitivity(logits, state.logits)] if bounds_noise else []
            return found

        return Bounds(figures, tuple(limits), tuple(texts))

    def candidate(self, start: State, goal: Waypoint) -> Candidate:
        """The weights of an accepted state, formed, rounded to the dtype of the model's parameters, and measured."""
        formed, outputs, hindrances = form_weights(self.problem.network, self.plan, start, goal, self.matches)
        written, outputs = _round(formed, outputs, self.problem)
        changes = weight_changes(self.problem.network, written)
        return Candidate(written, self.measure(written, outputs), changes, hindrances)


def is_futile(options: Options, before: Measurement) -> bool:
    """Whether no search can satisfy `min_gain`: the step ahead gains nothing that could be multiplied."""
    return options.wants_gain and not before.objective < before.loss


def describe_backend(network: Network, how: str) -> str:
    """What computes with the network, where, and how the search runs."""
    kernels = "torch" if network.products is torch_products else "cuda kernels"
    return f"{kernels} on {network.weights[0].device.type}, {how}"


def drift_refusal(options: Options, before: float, loss: float) -> str:
    """What a loss on the batch says that is outside `drift_tol`."""
    if not math.isfinite(loss):
        return "the loss on the batch is not finite"
    drift = relative_change(before, loss)
    return f"the loss on the batch drifted by {drift:.1e}, more than drift_tol = {options.drift_tol:g}"


def holdout_refusal(before: float, loss: float) -> str:
    """What a loss on the holdout says that is beyond `holdout_tol`."""
    return f"the holdout loss rose from {before:.4g} to {loss:.4g}"  # or is NaN


def noise_refusal(options: Options, before: float, sensitivity: float) -> str:
    """What a sensitivity to noise says that is beyond `max_sensitivity`."""
    times = sensitivity / before if before > 0 else math.inf
    return (
        f"noise in the inputs would move the logits {times:.3g} times as far, "
        f"more than max_sensitivity = {options.max_sensitivity:g} allows"
    )


def change_refusal(options: Options, changes: Sequence[float]) -> str:
    """What the relative changes of the weight layers say of which the largest is beyond `max_weight_change`."""
    largest = max(range(len(changes)), key=changes.__getitem__)
    return (
        f"weight layer {largest + 1} would change by {changes[largest]:.3g} of its norm, "
        f"more than max_weight_change = {options.max_weight_change:g} allows"
    )


def _share(tolerance: float, loss: float | Tensor) -> float | Tensor:
    """How far a loss may move; without limit also where it is 0."""
    if math.isinf(tolerance):
        return math.inf
    return tolerance * (loss.abs() if isinstance(loss, Tensor) else abs(loss))


def _round(network: Network, outputs: list[Tensor], problem: Problem) -> tuple[Network, list[Tensor]]:
    """The network rounded to the dtype of the model's parameters, held in its own dtype, and its pre-activations."""
    if problem.parameter_dtype == problem.samples.dtype:
        return network, outputs
    rounded = [tensor.to(problem.parameter_dtype).to(tensor.dtype) for tensor in parameter_list(network)]
    network = network.with_parameters(rounded)
    return network, network.forward(problem.samples)
