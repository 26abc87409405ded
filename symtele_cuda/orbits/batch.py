"""GL on the activations of a chain, held in the coordinates of one batch; the notation is that of `layers`.

The direction of steepest ascent is that of the group, g ← (I + εT)g with T = ∇_T f = ∂f/∂Bᵀ B − Rᵀ ∂f/∂R. It moves B by
B Tᵀ = (B Bᵀ) ∂f/∂B − Σ (B cᵀ)(a R) (Zhao et al. 2022, arXiv 2205.10637, Algorithm 1). Bounded activations move along
Y = σ⁻¹(B) instead, by (B Bᵀ) ∂f/∂Y. No d×d matrix is formed: T enters through products with n×n matrices, and through
its factors where a layer is carried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.library import Linear, Products, together
from ..kernels.pinv import MAX_CONDITION
from ..measure import Measurement, measure, read, weight_changes
from ..model.network import Network, parameter_list
from ..model.objective import Objective, has_fast_path
from ..model.problem import Problem
from ..model.surroundings import Surroundings
from . import Candidate, Evaluation, Hindrance
from .batch_weights import form_weights, predict, pull_back_weights, weights_of
from .layers import BatchPoint, Fit, LayerGoal, LayerPlan, LayerState, Match, Move, form_thin
from .passes import LayerGradient

# A step towards the edge of σ⁻¹'s domain goes at most this share of the way there.
DOMAIN_SHARE = 0.5


@dataclass(frozen=True)
class LayerStep:
    """How ε = 1 moves one layer's input: `change` is that of B, or of the Y before it for `Move.TARGETS`.

    generator: (U, V) with T = UᵀV, where the layer is carried.
    """

    change: Tensor
    generator: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        return [self.change, *(self.generator or ())]


@dataclass(frozen=True)
class BatchDirection:
    """How the inputs of the layers move (None: not at all), and the Frobenius norm of the change of all activations at
    ε = 1, to first order in ε where the Y move: a float64 scalar."""

    steps: tuple[LayerStep | None, ...]
    norm: Tensor

    def tensors(self) -> list[Tensor]:
        """All that the next step depends on."""
        return [self.norm, *(tensor for step in self.steps if step is not None for tensor in step.tensors())]


@dataclass(frozen=True)
class BatchOrbit:
    """The orbit of a problem's batch under GL, with the objective that a search of it follows.

    around: what is measured besides the batch. matches: those of the layers' inputs. plans: those of the layers.
    bounds_noise: whether the guards look at noise during the search.
    """

    problem: Problem
    around: Surroundings
    matches: tuple[Match, ...]
    plans: tuple[LayerPlan, ...]
    objective: Objective
    bounds_noise: bool = False

    @property
    def network(self) -> Network:
        return self.problem.network

    @property
    def products(self) -> Products:
        return self.problem.network.products

    @property
    def parts(self) -> int:
        """How many parts of the weights a report counts: the weight layers."""
        return len(self.network)

    @property
    def device(self) -> torch.device:
        return self.problem.samples.device

    @property
    def fast(self) -> bool:
        """Whether activation space knows objective and loss, so that no weights are formed during the search."""
        return has_fast_path(self.objective) and self.problem.sees_logits_alone

    # --- points -------------------------------------------------------------------------------------------------------

    def start(self) -> BatchPoint:
        """With R = W the residuals E are 0 exactly, so that g = I changes nothing."""
        network, outputs = self.network, self.problem.outputs
        dtype = outputs[0].dtype
        befores = (None, *outputs)[: len(network)]
        layers = []
        for plan, match, weight, bias, before, output in zip(
            self.plans, self.matches, network.weights, network.biases, befores, outputs, strict=True
        ):
            inverse = None if match.gram_inverse is None else match.gram_inverse.to(dtype)
            absorbs = plan.fit is Fit.ABSORBED and before is not None and inverse is not None
            coefficients = torch.zeros_like(output) if absorbs else None
            state = LayerState(
                plan=plan,
                bias=bias,
                inputs=match.inputs,
                source=before,
                slope=None if before is None else plan.sigma.derivative(before),
                gram=match.gram.to(dtype),
                gram_inverse=inverse,
                reference=weight,
                coefficients=coefficients,
                formed=form_thin(self.products, match.inputs, weight, coefficients),
                image=None if plan.moves else output,
            )
            layers.append(state)
        return BatchPoint(tuple(layers), outputs[-1], self.problem.loss, self.products)

    def scale(self, point: BatchPoint) -> Tensor:
        """The Frobenius norm of all activations that move."""
        moved = [at.inputs for at in point.layers if at.plan.moves]
        return self.products.dot_sum(moved, moved, root=True)

    def waypoint(self, point: BatchPoint) -> tuple[LayerGoal, ...]:
        return tuple(at.goal for at in point.layers)

    def figures(self, point: BatchPoint) -> list[Tensor]:
        """The loss of the holdout, if there is one, and the sensitivity to noise, if the guards look at it."""
        around = self.around
        if around.held == 0 and not self.bounds_noise:
            return []
        others = around.others if self.bounds_noise else around.others.first(around.held)
        logits = predict(self.network, point, others)
        found = [around.holdout_loss(logits).double()] if around.held > 0 else []
        return [*found, around.sensitivity(logits, point.logits)] if self.bounds_noise else found

    # --- the objective ------------------------------------------------------------------------------------------------

    def evaluate(self, point: BatchPoint) -> Evaluation:
        """In activation space where loss and objective allow it, else with the weights formed."""
        if self.problem.sees_logits_alone and has_fast_path(self.objective):
            return self.objective.evaluate(point, self.problem.output_delta)
        return self._evaluate_formed(point)

    def _evaluate_formed(self, point: BatchPoint) -> Evaluation:
        """One Hessian-vector product gives ∂f/∂[W', b'], the closed form of the action the rest."""
        problem, formed = self.problem, weights_of(self.network, point)
        with torch.enable_grad():
            parameters = problem.leaves(formed)
            value = self.objective.value(problem.loss_of_trainable(formed), parameters)
        if not (isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad):
            raise ValueError("objective.value must return a scalar tensor that depends on the parameters")

        def gradient() -> list[LayerGradient]:
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            nothing = formed.with_parameters([torch.zeros_like(tensor) for tensor in parameter_list(formed)])
            by_weights = formed.with_parameters(problem.merge(nothing, filled))
            return pull_back_weights(point, formed, by_weights)

        return Evaluation(value.detach(), gradient)

    # --- steps --------------------------------------------------------------------------------------------------------

    def direction(self, point: BatchPoint, evaluation: Evaluation) -> BatchDirection:
        """The direction of steepest ascent, see the module's text."""
        # The gradient is that in the layers behind the first, whose input nothing moves.
        pairs = list(zip(point.layers[1:], evaluation.gradient(), strict=True))
        wholes = _whole_gradients(pairs)
        moved = [(at, gradient, whole) for (at, gradient), whole in zip(pairs, wholes, strict=True) if at.plan.moves]
        found = together(self.products, *(_metric_step(at, whole) for at, _, whole in moved if whole is not None))
        steps: list[LayerStep | None] = [None] * len(point.layers)
        norms = []
        places = (place for place, at in enumerate(point.layers) if at.plan.moves)
        for place, (at, gradient, whole), change in zip(places, moved, found, strict=True):
            assert whole is not None
            if at.plan.move is Move.TARGETS:
                along, move = change
                steps[place] = LayerStep(along)
            else:
                step = _group_step(at, change, whole, gradient.references)
                steps[place], move = step, step.change
            norms.append(move)
        return BatchDirection(tuple(steps), self.products.dot_sum(norms, norms, root=True))

    def limit(self, point: BatchPoint, direction: BatchDirection, size: Tensor) -> Tensor:
        """`size`, shortened where an activation would come too near to the edge of the domain of σ⁻¹."""
        edged = [pair for pair in _moved(point, direction) if pair[0].plan.edged]
        if not edged:
            return size
        sign, limit = torch.sign(size), size.abs()
        for at, step in edged:
            low, high = at.plan.sigma.domain
            for bound, side in ((high, 1.0), (low, -1.0)):
                if math.isfinite(bound):
                    away = step.change * (side * sign)
                    room = (at.inputs - bound).abs()
                    reach = torch.where(away > 0, room / away, math.inf).min()
                    limit = torch.minimum(limit, DOMAIN_SHARE * reach)
        return sign * limit

    def advance(
        self, point: BatchPoint, direction: BatchDirection, size: Tensor
    ) -> tuple[BatchPoint, tuple[Hindrance, ...]]:
        """The point after g ← (I + size·T)g, or its like along the targets.

        A step is hindered by an activation that left the domain of σ⁻¹, by a singular group element, and by a matched
        input that lost its full row rank.
        """
        layers, singular = _take_steps(self.products, point, direction, size)
        hindrances = [*_leave_domain(self.products, layers), *singular]
        layers, dependent = _factorize_moved(self.products, point.layers, layers)
        layers = _with_coefficients(self.products, replace(point, layers=tuple(layers)))
        return replace(point, layers=tuple(layers)), (*hindrances, *dependent)

    # --- weights ------------------------------------------------------------------------------------------------------

    def weights(self, waypoint: Sequence[LayerGoal]) -> Candidate:
        """The weights of a waypoint, formed, rounded to the dtype of the model's parameters, and measured."""
        return self.candidate(*form_weights(self.problem, self.plans, self.matches, waypoint))

    def candidate(
        self, formed: Network, outputs: Sequence[Tensor], hindrances: tuple[Hindrance, ...] = ()
    ) -> Candidate:
        """Weights with the pre-activations that they produce on the batch, rounded and measured."""
        written, outputs = self.problem.rounded(formed, outputs)
        measured = self.measure(written, outputs)
        return Candidate(parameter_list(written), measured, weight_changes(self.network, written), hindrances)

    def measure(self, network: Network, outputs: Sequence[Tensor]) -> Tensor:
        """The values of a `Measurement` of `network`, whose pre-activations on the batch are `outputs`."""
        return measure(self.problem, self.objective, self.around, network, outputs, self.matches[0].gram)

    def measure_start(self) -> Tensor:
        """The same of the model's own weights."""
        return self.measure(self.network, self.problem.outputs)

    def read(self, values: Tensor) -> Measurement:
        return read(values)


# ---------------------------------------------------------------------------------------------------------------------
# steps
# ---------------------------------------------------------------------------------------------------------------------


def _moved(point: BatchPoint, direction: BatchDirection) -> list[tuple[LayerState, LayerStep]]:
    """The layers whose input a direction moves, with their steps."""
    pairs = zip(point.layers, direction.steps, strict=True)
    return [(at, step) for at, step in pairs if step is not None]


def _whole_gradients(pairs: Sequence[tuple[LayerState, LayerGradient]]) -> list[Tensor | None]:
    """The gradient in what a layer's input is moved by: ∂f/∂B + ∂f/∂Y ⊘ σ'(Y), or along the targets
    ∂f/∂Y + ∂f/∂B ⊙ σ'(Y); None where it is not moved."""
    found: list[Tensor | None] = []
    sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # along the targets, of all layers in one pass
    for place, (at, gradient) in enumerate(pairs):
        by_inputs, by_source, slope = gradient.inputs, gradient.source, at.slope
        if not at.plan.moves:
            found.append(None)
        elif at.plan.move is Move.ACTIVATIONS:
            assert by_inputs is not None and slope is not None
            found.append(by_inputs if by_source is None else torch.addcdiv(by_inputs, by_source, slope))
        else:
            assert by_source is not None and slope is not None  # such an activation is curved
            found.append(by_source)
            if by_inputs is not None:
                sums[place] = by_source, by_inputs, slope
    if sums:
        summed = torch._foreach_addcmul(*(list(kind) for kind in zip(*sums.values(), strict=True)))
        for place, whole in zip(sums, summed, strict=True):
            found[place] = whole
    return found


def _metric_step(at: LayerState, gradient: Tensor) -> Linear:
    """(B Bᵀ) times a gradient; K is B Bᵀ + 1 with bias. Along the targets Y also times σ'(Y), the change of B."""
    row = None if at.bias is None else gradient.sum(0).neg_()
    return Linear(at.gram, gradient, row=row, mask=at.slope if at.plan.move is Move.TARGETS else None)


def _group_step(
    at: LayerState, change: Tensor, by_inputs: Tensor, by_reference: Sequence[tuple[Tensor, Tensor]]
) -> LayerStep:
    """B Tᵀ of one layer, given its share `change` through B, and T where the layer is carried."""
    if at.plan.fit is not Fit.CARRIED:
        return LayerStep(change)
    lefts = [(left @ at.reference).neg() for left, _ in by_reference]
    rights = [right for _, right in by_reference]
    for left, right in zip(lefts, rights, strict=True):
        change = change + _apply(at.inputs, right, left)
    return LayerStep(change, generator=(torch.cat([by_inputs, *lefts]), torch.cat([at.inputs, *rights])))


def _apply(batch: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """(B cᵀ) a in the cheaper order of the two products."""
    n, width = batch.shape
    return (batch @ right.T) @ left if n <= width else batch @ (right.T @ left)


def _take_steps(
    products: Products, point: BatchPoint, direction: BatchDirection, size: Tensor
) -> tuple[list[LayerState], list[Hindrance]]:
    """The layers with their moved B, Y and σ'(Y), and with R of those that are carried."""
    moved = _moved(point, direction)
    sigmas = [at.plan.sigma.sigma for at, _ in moved]
    along = [at.plan.move is Move.TARGETS for at, _ in moved]
    results = products.take_steps(
        [at.behind if targets else at.inputs for (at, _), targets in zip(moved, along, strict=True)],
        [step.change for _, step in moved],
        size,
        along,
        [name for name, _ in sigmas],
        [number for _, numbers in sigmas for number in numbers],
    )
    stepped = iter(zip(*results, strict=True))
    layers, hindrances = [], list[Hindrance]()
    for at, step in zip(point.layers, direction.steps, strict=True):
        if step is None:
            layers.append(at)
            continue
        inputs, source, slope = next(stepped)
        reference = at.reference
        if step.generator is not None:
            reference, singular = right_inverse(reference, step.generator, size)
            hindrances.append((singular, "the group element of the step is singular"))
        layers.append(replace(at, inputs=inputs, source=source, slope=slope, reference=reference))
    return layers, hindrances


def _leave_domain(products: Products, layers: Sequence[LayerState]) -> list[Hindrance]:
    """Whether the targets Y = σ⁻¹(B) of a layer moved by its B are not finite, where σ⁻¹ has a domain to leave.

    Seen in their norms, of all layers in one pass: a square that overflows is as far outside as an infinite one.
    """
    edged = [at for at in layers if at.plan.edged]
    if not edged:
        return []
    norms = products.squared_norms([at.behind for at in edged])
    left = (norms < math.inf).logical_not()  # NaN is not below
    texts = (f"an activation left the domain of the inverse of {at.plan.sigma}" for at in edged)
    return list(zip(left.unbind(), texts, strict=True))


def _factorize_moved(
    products: Products, before: Sequence[LayerState], layers: Sequence[LayerState]
) -> tuple[list[LayerState], list[Hindrance]]:
    """The layers with K and, where they absorb, K⁻¹ of the inputs that a step has moved.

    The arithmetic is float64, the results have the dtype of the inputs.
    """
    moved = [at for at, old in zip(layers, before, strict=True) if at.inputs is not old.inputs]
    if not moved:
        return list(layers), []
    exact, rounded = products.grams([at.inputs for at in moved], [at.bias is not None for at in moved], True)
    absorbing = [matrix for at, matrix in zip(moved, exact, strict=True) if at.plan.fit is Fit.ABSORBED]
    inverses, hindrances = list[Tensor](), list[Hindrance]()
    if absorbing:
        dtype = moved[0].inputs.dtype
        exact_inverses, infos, in_float32 = products.invert_grams(absorbing, dtype == torch.float32)
        inverses = in_float32 or exact_inverses
        dependent = products.near_dependence(absorbing, exact_inverses, infos.unbind(), MAX_CONDITION[dtype])
        hindrances.append((dependent, "the activations of the batch came too close to linear dependence"))
    grams, remaining = iter(rounded), iter(inverses)
    found = []
    for at, old in zip(layers, before, strict=True):
        if at.inputs is not old.inputs:
            inverse = next(remaining) if at.plan.fit is Fit.ABSORBED else at.gram_inverse
            at = replace(at, gram=next(grams), gram_inverse=inverse)
        found.append(at)
    return found, hindrances


def _with_coefficients(products: Products, point: BatchPoint) -> list[LayerState]:
    """The layers with A = K⁻¹ E, E = Y − B Rᵀ − b, where they absorb; nothing asks for that of the first."""
    absorbing = [
        (at, target)
        for at, target in zip(point.layers, point.targets, strict=True)
        if at.source is not None and at.plan.fit is Fit.ABSORBED
    ]
    fitted = [
        Linear(at.inputs, at.reference.T, target, at.bias, alpha=-1.0) if at.image is None else None
        for at, target in absorbing
    ]
    residuals = [
        found if at.image is None else target - at.image
        for (at, target), found in zip(absorbing, together(products, *fitted), strict=True)
    ]
    linears = (Linear(at.inverse, residual) for (at, _), residual in zip(absorbing, residuals, strict=True))
    solved = iter(together(products, *linears))
    layers = []
    for at in point.layers:
        if at.source is not None and at.plan.fit is Fit.ABSORBED:
            coefficients = next(solved)
            formed = form_thin(products, at.inputs, at.reference, coefficients)
            at = replace(at, coefficients=coefficients, formed=formed)
        layers.append(at)
    return layers


def right_inverse(reference: Tensor, generator: tuple[Tensor, Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
    """R (I + εUᵀV)⁻¹ for the generator (U, V), through the smaller of the two sides (Woodbury), and whether there is
    none."""
    left, right = generator
    size = size.to(reference.dtype)
    if left.shape[0] < left.shape[1]:
        inner = torch.eye(left.shape[0], dtype=left.dtype, device=left.device) + size * (right @ left.T)
        solution, info = torch.linalg.solve_ex(inner, right)
        return reference - size * (reference @ left.T) @ solution, info != 0
    group_step = torch.eye(left.shape[1], dtype=left.dtype, device=left.device) + size * (left.T @ right)
    result, info = torch.linalg.solve_ex(group_step, reference, left=False)
    return result, info != 0
