"""The group action on a network, held in the coordinates of the batch's activations.

Notation (row-major, as in torch.nn.Linear), for the weight layers l = 0..M−1 and n samples:

    B_0 = X,   Y_l = B_l W_lᵀ + b_l,   B_{l+1} = σ_l(Y_l),   Y_{M−1} = logits,   K_l = B_l B_lᵀ + 1   (+1 only with
    bias)

g acts on the activations, B_{l+1} ← B_{l+1} gᵀ. The layer before must then produce the new activations and the layer
behind must not notice them; both are the same formula, with a reference R_l, r_l and Y_l = σ_l⁻¹(B_{l+1}):

    [W_l', b_l'] = [R_l, r_l] + E_lᵀ P(B_l) = [R_l + A_lᵀ B_l, r_l + A_lᵀ 1],
    E_l = Y_l − B_l R_lᵀ − r_l,   A_l = K_l⁻¹ E_l,   P(B) = K⁻¹ [B, 1]

(Zhao et al. 2022, arXiv 2205.10637, eq. 8, with R = 0 and the pseudo-inverse written out.) It holds exactly where the
rows of [B_l, 1] are linearly independent: such an input is called *matched*. Where the input of a layer was moved
and is not matched, the layer is *carried* instead: R_l = W_l g⁻¹ with the explicit g, and E_l = 0.

Behind a positively homogeneous activation, σ(cz) = cσ(z) for c > 0, the positive diagonal matrices D = diag(exp s) act
exactly and on every input, matched or not: such a layer is *scaled*,

    B_{l+1} ← B_{l+1} D,   Y_l ← Y_l D,   [R_l, r_l] ← D [R_l, r_l],   R_{l+1} ← R_{l+1} D⁻¹

Nothing here reads a value back from the device: what may hinder a step comes as a flag beside the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.library import Linear, Products, together
from ..kernels.pinv import MAX_CONDITION, Factorization, factorize, factorize_by_inverse, is_thin
from ..model.network import Network

# A step towards the edge of σ⁻¹'s domain goes at most this share of the way there.
DOMAIN_SHARE = 0.5
# The largest change of a scale's logarithm in one step: beyond it the norm of a step to first order says nothing.
LARGEST_RATE = 1.0


Hindrance = tuple[Tensor, str]
"""A bool scalar on the device of the search, and what it means where it holds: why a step cannot be taken."""


@dataclass(frozen=True)
class Plan:
    """What happens to each weight layer l.

    moved[l]: the activations behind layer l are moved. scaled[l]: by the positive diagonal group, and not by GL.
    absorbs[l]: the layer's weights become R + EᵀP. carried[l]: its input is moved by GL and its weights become W g⁻¹.
    zero_reference[l]: R = 0, r = 0 in place of W, b.
    along_targets[l]: the activations behind layer l are moved by moving Y_l, where they have no edge to run into.
    """

    moved: tuple[bool, ...]
    scaled: tuple[bool, ...]
    absorbs: tuple[bool, ...]
    carried: tuple[bool, ...]
    zero_reference: tuple[bool, ...]
    along_targets: tuple[bool, ...]
    first_order_inverse: bool

    @classmethod
    def make(
        cls,
        network: Network,
        moved: Sequence[bool],
        matched: Sequence[bool],
        *,
        action: str,
        inverse: str,
        group_steps: bool,
        scaled: Sequence[bool] | None = None,
    ) -> Plan:
        """The plan that moves the activations behind the layers in `moved` by GL, given which inputs are matched.

        group_steps: move along g ← (I + εT)g even where any other curve on the orbit would do.
        scaled: the layers, none of `moved`, behind which the positive diagonal group acts; default: none.
        """
        last = len(moved) - 1
        scaled = [False] * len(moved) if scaled is None else scaled
        input_moved = [False, *moved[:-1]]
        carried = [
            input_moved[layer] and (not matched[layer] or (action == "paper" and layer == last))
            for layer in range(len(moved))
        ]
        absorbs = [moved[layer] or (input_moved[layer] and not carried[layer]) for layer in range(len(moved))]
        zero_reference = [action == "paper" and absorbs[layer] and layer != last for layer in range(len(moved))]
        along_targets = [
            moved[layer] and network.activations[layer].bounded and not carried[layer + 1] and not group_steps
            for layer in range(last)
        ]
        return cls(
            moved=tuple(by_gl or by_scales for by_gl, by_scales in zip(moved, scaled, strict=True)),
            scaled=tuple(scaled),
            absorbs=tuple(absorbs),
            carried=tuple(carried),
            zero_reference=tuple(zero_reference),
            along_targets=tuple(along_targets),
            first_order_inverse=inverse == "first_order",
        )

    def scales_reference(self, layer: int) -> bool:
        """Whether R_l follows the scales of the activations behind or in front of layer l."""
        beside_scaled = self.scaled[layer] or (layer > 0 and self.scaled[layer - 1])
        return beside_scaled and not self.zero_reference[layer]

    def changes_reference(self, layer: int) -> bool:
        """Whether a step changes R_l."""
        return self.carried[layer] or self.scales_reference(layer)

    def keeps_image(self, layer: int) -> bool:
        """Whether no step changes B_l R_lᵀ + r_l. With the first-order inverse an input may drift that is not moved."""
        keeps_input = layer == 0 or not (self.moved[layer - 1] or self.first_order_inverse)
        return keeps_input and not self.changes_reference(layer)

    def changes_offset(self, layer: int) -> bool:
        """Whether a step changes r_l, where the layer has one."""
        return self.scaled[layer] and not self.zero_reference[layer]

    def keeps_weights(self, layer: int) -> bool:
        """Whether W_l and b_l are those of the start at every state."""
        return not (self.absorbs[layer] or self.changes_reference(layer) or self.changes_offset(layer))


@dataclass(frozen=True)
class State:
    """A point of the orbit, per weight layer l; what a layer does not need is None.

    inputs B_l, targets Y_l, references R_l and offsets r_l (None is zero), grams K_l, gram_inverses K_l⁻¹, coefficients
    A_l, slopes σ_l'(Y_l), and formed: W_l' itself for thin layers (with fewer outputs than half the samples), where
    products with it are cheaper than those with n×n matrices. images: B_l R_lᵀ + r_l of the layers where no step
    changes it.
    """

    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    references: tuple[Tensor | None, ...]
    offsets: tuple[Tensor | None, ...]
    grams: tuple[Tensor, ...]
    gram_inverses: tuple[Tensor | None, ...]
    coefficients: tuple[Tensor | None, ...]
    slopes: tuple[Tensor, ...]
    formed: tuple[Tensor | None, ...]
    images: tuple[Tensor | None, ...]

    @property
    def logits(self) -> Tensor:
        return self.targets[-1]

    @property
    def waypoint(self) -> Waypoint:
        return Waypoint(self.targets, self.references, self.offsets)


@dataclass(frozen=True)
class Waypoint:
    """A state as far as its weights depend on it: the targets Y_l, the references R_l and the offsets r_l."""

    targets: tuple[Tensor, ...]
    references: tuple[Tensor | None, ...]
    offsets: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Match:
    """How the rows of one layer's input [B, 1] lie: B (n×d), K and K⁻¹ in float64 (None if not matched), rank, κ₂.

    rank and condition are None where nobody asked whether it is matched.
    """

    inputs: Tensor
    gram: Tensor
    gram_inverse: Tensor | None = None
    rank: int | None = None
    condition: float | None = None

    def factorization(self, bias: bool, products: Products) -> Factorization | None:
        """What `factorize` would work out again; None where the input is not matched, and for float64."""
        if self.gram_inverse is None or self.inputs.dtype != torch.float32:
            return None
        return factorize_by_inverse(self.inputs, bias, products, self.gram, self.gram_inverse)


@dataclass(frozen=True)
class Gradient:
    """The gradient of an objective f, per weight layer l; None is zero.

    inputs: ∂f/∂B_l with Y_{l−1} held; targets: ∂f/∂Y_{l−1} with B_l held, though the two move together;
    references: ∂f/∂R_l = Σ aᵀc as pairs (a, c) where a step changes R_l; offsets: ∂f/∂r_l where a step changes r_l. In
    activation space those of layer 0 are zero: it produces Y_0 whatever its weights.
    """

    inputs: tuple[Tensor | None, ...]
    targets: tuple[Tensor | None, ...]
    references: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    offsets: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerStep:
    """How ε = 1 moves one layer's input: `change` is that of B_l, or of Y_{l−1}, B_l = σ(Y_{l−1}), `along_targets`.

    generator: (U, V) with T = UᵀV, where the layer is carried.
    """

    change: Tensor
    along_targets: bool = False
    generator: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Direction:
    """How the inputs of the layers move, and the Frobenius norm of the change of all activations at ε = 1.

    steps: those of GL. scales: the rates a (d_l) of the layers whose input is scaled, B_l ← B_l diag(exp εa).
    Along targets and for scales the norm is the one to first order in ε. It is a float64 scalar.
    """

    steps: dict[int, LayerStep]
    norm: Tensor
    scales: dict[int, Tensor] = field(default_factory=dict)


def initial_state(network: Network, plan: Plan, outputs: Sequence[Tensor], matches: Sequence[Match]) -> State:
    """The state at g = I of a batch with pre-activations `outputs` and the layers' inputs in `matches`."""
    layers = range(len(network))
    dtype = outputs[0].dtype
    references = [None if plan.zero_reference[layer] else network.weights[layer] for layer in layers]
    inverses = [None if match.gram_inverse is None else match.gram_inverse.to(dtype) for match in matches]
    inputs = [match.inputs for match in matches]
    coefficients: list[Tensor | None] = [None] * len(network)
    for layer in layers[1:]:
        inverse = inverses[layer]
        if plan.absorbs[layer] and inverse is not None:
            # With R = W the residual E is 0 exactly, so that g = I changes nothing.
            target = outputs[layer]
            coefficients[layer] = inverse @ target if plan.zero_reference[layer] else torch.zeros_like(target)
    return State(
        inputs=tuple(inputs),
        targets=tuple(outputs),
        references=tuple(references),
        offsets=tuple(None if plan.zero_reference[layer] else network.biases[layer] for layer in layers),
        grams=tuple(match.gram.to(dtype) for match in matches),
        gram_inverses=tuple(inverses),
        coefficients=tuple(coefficients),
        slopes=tuple(a.derivative(y) for a, y in zip(network.activations, outputs, strict=False)),
        formed=tuple(_form_thin(network, *parts) for parts in zip(inputs, references, coefficients, strict=True)),
        images=tuple(
            None if not plan.keeps_image(layer) else torch.zeros_like(output) if plan.zero_reference[layer] else output
            for layer, output in enumerate(outputs)
        ),
    )


def steepest_direction(network: Network, plan: Plan, state: State, gradient: Gradient) -> Direction:
    """The direction of steepest ascent g ← (I + εT)g, T = ∇_T f = ∂f/∂Bᵀ B − Rᵀ ∂f/∂R, in the metric of the group.

    It moves B by B Tᵀ = (B Bᵀ) ∂f/∂B − Σ (B cᵀ)(a R) (Zhao et al. 2022, Algorithm 1). A layer of the plan's
    `along_targets` moves Y = σ⁻¹(B) by (B Bᵀ) ∂f/∂Y instead. No d×d matrix is formed: T enters through products with
    n×n matrices, and through its factors where a layer is carried. Of a scaled layer it is the diagonal of T.
    """
    scales = _steepest_scales(network, plan, state, gradient)
    gradients = _whole_gradients(network, plan, state, gradient)
    changes = together(network.products, *(_metric_step(network, plan, state, *pair) for pair in gradients.items()))
    steps: dict[int, LayerStep] = {}
    moves = [state.inputs[layer] * rates for layer, rates in scales.items()]
    for (layer, by_batch), change in zip(gradients.items(), changes, strict=True):
        if plan.along_targets[layer - 1]:
            along, move = change
            steps[layer] = LayerStep(along, along_targets=True)
        else:
            steps[layer] = _group_step(plan, state, layer, change, by_batch, gradient.references[layer])
            move = steps[layer].change
        moves.append(move)
    return Direction(steps, network.products.dot_sum(moves, moves, root=True), scales)


def _whole_gradients(network: Network, plan: Plan, state: State, gradient: Gradient) -> dict[int, Tensor]:
    """Of the layers that GL moves, in what it moves them by: ∂f/∂B + ∂f/∂Y ⊘ σ'(Y), or along the targets
    ∂f/∂Y + ∂f/∂B ⊙ σ'(Y)."""
    found: dict[int, Tensor] = {}
    sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of all layers along the targets in one pass
    for layer in range(1, len(network)):
        if not plan.moved[layer - 1] or plan.scaled[layer - 1]:
            continue
        slope, by_inputs, by_targets = state.slopes[layer - 1], gradient.inputs[layer], gradient.targets[layer]
        if not plan.along_targets[layer - 1]:
            assert by_inputs is not None
            found[layer] = by_inputs if by_targets is None else torch.addcdiv(by_inputs, by_targets, slope)
        else:
            assert by_targets is not None  # such an activation is curved
            found[layer] = by_targets
            if by_inputs is not None:
                sums[layer] = by_targets, by_inputs, slope
    if sums:
        summed = torch._foreach_addcmul(*(list(kind) for kind in zip(*sums.values(), strict=True)))
        found |= zip(sums, summed, strict=True)
    return found


def _steepest_scales(network: Network, plan: Plan, state: State, gradient: Gradient) -> dict[int, Tensor]:
    """a = ∂f/∂s of every layer l whose input is scaled by exp s, with all that follows it:

    a = Σ_n (∂f/∂B_l ⊙ B_l + ∂f/∂Y_{l−1} ⊙ Y_{l−1}) + rows(∂f/∂R_{l−1} ⊙ R_{l−1}) + ∂f/∂r_{l−1} ⊙ r_{l−1}
        − columns(∂f/∂R_l ⊙ R_l)
    """
    shares = {
        layer: _reference_share(network, state, gradient, layer)
        for layer in range(len(network))
        if plan.scales_reference(layer) and gradient.references[layer]
    }
    scaled_inputs = [layer for layer in range(1, len(network)) if plan.scaled[layer - 1]]
    return {layer: _scale_rates(state, gradient, shares, layer) for layer in scaled_inputs}


def _scale_rates(state: State, gradient: Gradient, shares: dict[int, Tensor], layer: int) -> Tensor:
    """One layer's a, with ∂f/∂R ⊙ R of the layers beside it in `shares`."""
    moved = (
        (gradient.inputs[layer], state.inputs[layer]),
        (gradient.targets[layer], state.targets[layer - 1]),
    )
    terms = [(by_batch * batch).sum(0) for by_batch, batch in moved if by_batch is not None]
    if layer - 1 in shares:
        terms.append(shares[layer - 1].sum(1))
    offset = state.offsets[layer - 1]
    if offset is not None and layer - 1 in gradient.offsets:
        terms.append(gradient.offsets[layer - 1] * offset)
    if layer in shares:
        terms.append(shares[layer].sum(0).neg())
    return torch.stack(terms).sum(0)


def _reference_share(network: Network, state: State, gradient: Gradient, layer: int) -> Tensor:
    """∂f/∂R_l ⊙ R_l (d_{l+1}×d_l)."""
    reference, by_reference = state.references[layer], None
    assert reference is not None
    for left, right in gradient.references[layer]:
        by_reference = network.products.linear(left.T, right, source=by_reference)
    assert by_reference is not None
    return by_reference * reference


def _group_step(
    plan: Plan,
    state: State,
    layer: int,
    change: Tensor,
    by_inputs: Tensor,
    by_reference: Sequence[tuple[Tensor, Tensor]],
) -> LayerStep:
    """B Tᵀ of one layer, given its share `change` through B, and T where the layer is carried."""
    batch, reference = state.inputs[layer], state.references[layer]
    if not plan.carried[layer]:
        return LayerStep(change)
    assert reference is not None
    lefts = [(left @ reference).neg() for left, _ in by_reference]
    rights = [right for _, right in by_reference]
    for left, right in zip(lefts, rights, strict=True):
        change = change + _apply(batch, right, left)
    return LayerStep(change, generator=(torch.cat([by_inputs, *lefts]), torch.cat([batch, *rights])))


def _metric_step(network: Network, plan: Plan, state: State, layer: int, gradient: Tensor) -> Linear:
    """(B Bᵀ) times a gradient; K is B Bᵀ + 1 with bias. Along the targets Y also times σ'(Y), the change of B."""
    row = None if network.biases[layer] is None else gradient.sum(0).neg_()
    mask = state.slopes[layer - 1] if plan.along_targets[layer - 1] else None
    return Linear(state.grams[layer], gradient, row=row, mask=mask)


def domain_limit(network: Network, state: State, direction: Direction, size: Tensor) -> Tensor:
    """The largest step ≤ |size| in the sense of `size` that keeps every activation well inside the domain of σ⁻¹."""
    edged = _edged_layers(network, direction)
    if not edged:
        return size
    sign, limit = torch.sign(size), size.abs()
    for layer in edged:
        step = direction.steps[layer]
        low, high = network.activations[layer - 1].domain
        for bound, side in ((high, 1.0), (low, -1.0)):
            if math.isfinite(bound):
                away = step.change * (side * sign)
                room = (state.inputs[layer] - bound).abs()
                reach = torch.where(away > 0, room / away, math.inf).min()
                limit = torch.minimum(limit, DOMAIN_SHARE * reach)
    return sign * limit


def _edged_layers(network: Network, direction: Direction) -> list[int]:
    """The layers whose B is moved by GL in the domain of a σ⁻¹ that it could leave."""
    moved = (layer for layer, step in direction.steps.items() if not step.along_targets)
    return [layer for layer in moved if network.activations[layer - 1].bounded]


def scale_limit(direction: Direction, size: Tensor) -> Tensor:
    """The largest step ≤ |size| in the sense of `size` that changes no scale by more than a factor e."""
    if not direction.scales:
        return size
    largest = torch.stack([rates.abs().max() for rates in direction.scales.values()]).max()
    return torch.sign(size) * torch.minimum(size.abs(), LARGEST_RATE / largest.double())


def advance(
    network: Network, plan: Plan, state: State, direction: Direction, size: Tensor
) -> tuple[State, tuple[Hindrance, ...]]:
    """The state after a step of `size` (a float64 scalar): g ← (I + size·T)g, or its like along the targets.

    With it what may hinder the step: an activation that left the domain of σ⁻¹, a singular group element, a matched
    input that lost its full row rank. Where one holds, the state is of no use.
    """
    inputs, targets, slopes = list(state.inputs), list(state.targets), list(state.slopes)
    references, offsets = list(state.references), list(state.offsets)
    grams, inverses = list(state.grams), list(state.gram_inverses)
    hindrances: list[Hindrance] = []
    for layer, moved in _take_steps(network, state, direction, size).items():
        inputs[layer], targets[layer - 1], slopes[layer - 1] = moved
    for layer, step in direction.steps.items():
        if step.generator is not None:
            references[layer], singular = _right_inverse(
                references[layer], step.generator, size, plan.first_order_inverse
            )
            if singular is not None:
                hindrances.append((singular, "the group element of the step is singular"))
    hindrances = _leave_domain(network, direction, targets) + hindrances
    for layer, rates in direction.scales.items():
        _scale(layer, torch.exp(size * rates), inputs, targets, references, offsets)
    if plan.first_order_inverse:
        _let_drift(network, plan, inputs, targets, references, offsets, slopes)
    hindrances += _factorize_moved(network, plan, state, inputs, grams, inverses)
    coefficients = _coefficients(network, plan, inputs, targets, references, offsets, inverses, state.images)
    trial = State(
        inputs=tuple(inputs),
        targets=tuple(targets),
        references=tuple(references),
        offsets=tuple(offsets),
        grams=tuple(grams),
        gram_inverses=tuple(inverses),
        coefficients=tuple(coefficients),
        slopes=tuple(slopes),
        formed=tuple(_form_thin(network, *parts) for parts in zip(inputs, references, coefficients, strict=True)),
        images=state.images,
    )
    return trial, tuple(hindrances)


def _take_steps(
    network: Network, state: State, direction: Direction, size: Tensor
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """The moved B_l, Y_{l−1} and σ'(Y_{l−1}) of the layers that GL moves."""
    layers, steps = list(direction.steps), list(direction.steps.values())
    if not layers:
        return {}
    activations = [network.activations[layer - 1] for layer in layers]
    moved = network.products.take_steps(
        [
            state.targets[layer - 1] if step.along_targets else state.inputs[layer]
            for layer, step in direction.steps.items()
        ],
        [step.change for step in steps],
        size,
        [step.along_targets for step in steps],
        [activation.name for activation in activations],
        [number for activation in activations for number in activation.sigma[1]],
    )
    return dict(zip(layers, zip(*moved, strict=True), strict=True))


def _leave_domain(network: Network, direction: Direction, targets: Sequence[Tensor]) -> list[Hindrance]:
    """Whether the targets Y = σ⁻¹(B) of a layer moved by its B are not finite, where σ⁻¹ has a domain to leave.

    Seen in their norms, of all layers in one pass: a square that overflows is as far outside as an infinite one.
    """
    layers = _edged_layers(network, direction)
    if not layers:
        return []
    norms = network.products.squared_norms([targets[layer - 1] for layer in layers])
    left = (norms < math.inf).logical_not()  # NaN is not below
    texts = (f"an activation left the domain of the inverse of {network.activations[layer - 1]}" for layer in layers)
    return list(zip(left.unbind(), texts, strict=True))


def _scale(
    layer: int,
    factors: Tensor,
    inputs: list[Tensor],
    targets: list[Tensor],
    references: list[Tensor | None],
    offsets: list[Tensor | None],
) -> None:
    """Put B_l D, and what follows it beside layer l, in the places of the old ones, for the diagonal D of `factors`.

    The slopes stay: σ' does not change along a ray.
    """
    inputs[layer] = inputs[layer] * factors
    targets[layer - 1] = targets[layer - 1] * factors
    before, offset, behind = references[layer - 1], offsets[layer - 1], references[layer]
    references[layer - 1] = None if before is None else before * factors.unsqueeze(1)
    offsets[layer - 1] = None if offset is None else offset * factors
    references[layer] = None if behind is None else behind / factors


def form_weights(
    network: Network, plan: Plan, start: State, goal: Waypoint, matches: Sequence[Match] = ()
) -> tuple[Network, list[Tensor], tuple[Hindrance, ...]]:
    """The weights [R, r] + Eᵀ P(B) that turn the batch of `start` into the targets of `goal` layer by layer, and what
    they produce.

    B is the activation that the new weights really produce, so that a layer mends the rounding of those before it,
    and an output layer that absorbs is corrected once more: then the logits keep the precision of the arithmetic, not
    of P. The pre-activations returned are those of the weights returned, not the targets. Where a hindrance holds,
    neither is of use. `matches` of the inputs at the start spare their factorization.
    """
    weights, biases = list(network.weights), list(network.biases)
    outputs: list[Tensor] = []
    hindrances: list[Hindrance] = []
    as_at_start = True  # whether all layers so far have kept their weights, and so this one its input
    for layer, (target, reference, offset) in enumerate(zip(goal.targets, goal.references, goal.offsets, strict=True)):
        weight, bias = weights[layer], biases[layer]
        # Asked of the plan and not of the tensors: those of a state that a CUDA graph has found are copies.
        if as_at_start and plan.keeps_weights(layer):
            outputs.append(start.targets[layer])
            continue
        inputs = start.inputs[layer] if as_at_start else network.activations[layer - 1].forward(outputs[-1])
        image = start.images[layer] if as_at_start else None  # B Rᵀ + r where it is known
        weight = torch.zeros_like(weight) if reference is None else reference
        if bias is not None:
            bias = torch.zeros_like(bias) if offset is None else offset
        if plan.absorbs[layer]:
            known = (
                matches[layer].factorization(bias is not None, network.products) if as_at_start and matches else None
            )
            found = factorize(inputs, bias is not None, network.products) if known is None else known
            hindrances.append((found.info != 0, "the activations of the batch lost their full row rank"))
            for _ in range(2 if layer == len(network) - 1 else 1):
                image = F.linear(inputs, weight, bias) if image is None else image
                (weight, bias), image = found.update(weight, bias, target - image), None
        weights[layer], biases[layer], as_at_start = weight, bias, False
        outputs.append(F.linear(inputs, weight, bias))
    return replace(network, weights=tuple(weights), biases=tuple(biases)), outputs, tuple(hindrances)


def coefficients_of(plan: Plan, state: State, layer: int) -> Tensor | None:
    """A_l, None where the layer does not absorb; that of layer 0, for which the search has no use, is worked out
    here."""
    if layer == 0 and plan.absorbs[0]:
        inverse, image = state.gram_inverses[0], state.images[0]
        assert inverse is not None and image is not None
        return inverse @ (state.targets[0] - image)
    return state.coefficients[layer]


def weights_of(network: Network, plan: Plan, state: State) -> Network:
    """The weights [R + AᵀB, r + Aᵀ1] of a state, to the precision of the search; `form_weights` has the full one."""
    weights, biases = list(network.weights), list(network.biases)
    for layer, batch in enumerate(state.inputs):
        reference, offset = state.references[layer], state.offsets[layer]
        coefficients = coefficients_of(plan, state, layer)
        if coefficients is not None:
            weights[layer] = _form(network, batch, reference, coefficients)
            if biases[layer] is not None:
                biases[layer] = coefficients.sum(0) if offset is None else offset + coefficients.sum(0)
        elif reference is not None:
            weights[layer], biases[layer] = reference, offset
    return replace(network, weights=tuple(weights), biases=tuple(biases))


def pull_back_weights(
    network: Network, plan: Plan, state: State, formed: Network, gradients: Sequence[tuple[Tensor, Tensor | None]]
) -> Gradient:
    """∂f/∂B_l, ∂f/∂Y_l, ∂f/∂R_l and ∂f/∂r_l from V = ∂f/∂W' (d_l×d_{l−1}) and v = ∂f/∂b'.

    They follow through W' = R + AᵀB, b' = r + Aᵀ1, A = K⁻¹E. `formed` are the state's weights, `gradients` the pairs
    (V, v) per layer.
    """
    by_inputs: list[Tensor | None] = []
    by_targets: list[Tensor | None] = [None]
    by_references: list[tuple[tuple[Tensor, Tensor], ...]] = []
    by_offsets: dict[int, Tensor] = {}
    for layer, (by_weight, by_bias) in enumerate(gradients):
        batch, coefficients = state.inputs[layer], coefficients_of(plan, state, layer)
        by_residual = None
        if coefficients is not None:
            by_coefficients = batch @ by_weight.T if by_bias is None else torch.addmm(by_bias, batch, by_weight.T)
            by_residual = residual_gradient(network, state, layer, by_coefficients)
            by_inputs.append(
                input_gradient(network, batch, formed.weights[layer], coefficients, by_weight, by_residual)
            )
        else:
            by_inputs.append(torch.zeros_like(batch))
        by_targets.append(by_residual)
        identity = torch.eye(by_weight.shape[0], dtype=by_weight.dtype, device=by_weight.device)
        changes = plan.changes_reference(layer)
        by_references.append(((identity, by_weight), *reference_terms(by_residual, batch)) if changes else ())
        if by_bias is not None and plan.changes_offset(layer):
            by_offsets[layer] = by_bias if by_residual is None else by_bias - by_residual.sum(0)
    return Gradient(tuple(by_inputs), tuple(by_targets), tuple(by_references), by_offsets)


def reference_terms(by_residual: Tensor | None, inputs: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """∂f/∂R = −∂f/∂Eᵀ B through E = Y − B Rᵀ − r, as pairs; none where the layer does not absorb."""
    return () if by_residual is None else ((by_residual.neg(), inputs),)


def residual_gradient(network: Network, state: State, layer: int, by_coefficients: Tensor) -> Tensor:
    """∂f/∂E = K⁻¹ ∂f/∂A, which is ∂f/∂Y as well."""
    inverse = state.gram_inverses[layer]
    assert inverse is not None
    return network.products.linear(inverse, by_coefficients)


def input_gradient(
    network: Network,
    inputs: Tensor,
    formed: Tensor,
    coefficients: Tensor,
    by_weight: Tensor,
    by_residual: Tensor,
    source: Tensor | None = None,
) -> Tensor:
    """∂f/∂B through W' = R + AᵀB, A = K⁻¹(Y − BRᵀ − r) with K = BBᵀ + 1: A (V − ∂f/∂Eᵀ B) − ∂f/∂E W' + the source."""
    through_weight, through_residual = together(
        network.products,
        Linear(by_residual.T, inputs, by_weight, alpha=-1.0),
        Linear(by_residual, formed, source, alpha=-1.0),
    )
    return network.products.linear(coefficients, through_weight, source=through_residual)


@dataclass(frozen=True)
class OtherSamples:
    """Samples Q (N×d_0) that are not the batch's, their pre-activations at the start, and Q Xᵀ + 1."""

    inputs: Tensor
    outputs: tuple[Tensor, ...]
    overlap: Tensor

    @classmethod
    def make(cls, network: Network, inputs: Tensor, batch: Tensor) -> OtherSamples:
        overlap = kernel(inputs, batch, network.biases[0] is not None)
        return cls(inputs, tuple(network.forward(inputs)), overlap)

    def first(self, count: int) -> OtherSamples:
        """The first `count` of them."""
        return OtherSamples(self.inputs[:count], tuple(y[:count] for y in self.outputs), self.overlap[:count])


def predict(network: Network, plan: Plan, state: State, others: OtherSamples) -> Tensor:
    """The logits of `others` under the state's weights, without forming them.

    z_l = q_l R_lᵀ + r_l + (q_l B_lᵀ + 1) A_l, q_{l+1} = σ_l(z_l), q_0 = Q.
    """
    hidden, as_at_start = others.inputs, True
    for layer in range(len(network)):
        as_at_start = as_at_start and state.references[layer] is network.weights[layer]
        output = others.outputs[layer] if as_at_start else reference_image(state, layer, hidden)
        if (coefficients := coefficients_of(plan, state, layer)) is not None:
            bias = network.biases[layer] is not None
            overlap = others.overlap if layer == 0 else kernel(hidden, state.inputs[layer], bias)
            output, as_at_start = network.products.linear(overlap, coefficients, source=output), False
        if layer < len(network) - 1:
            hidden = network.activations[layer].forward(output)
    return output


def reference_image(state: State, layer: int, hidden: Tensor) -> Tensor:
    """q R_lᵀ + r_l for activations q (N×d_l); zeros where the reference is zero."""
    reference = state.references[layer]
    if reference is None:
        return hidden.new_zeros(hidden.shape[0], state.targets[layer].shape[1])
    return F.linear(hidden, reference, state.offsets[layer])


def kernel(left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """left rightᵀ + 1, the +1 only with bias: how two samples' gradients of one layer overlap."""
    product = left @ right.T
    return product.add_(1) if bias else product


def _factorize_moved(
    network: Network,
    plan: Plan,
    state: State,
    inputs: Sequence[Tensor],
    grams: list[Tensor],
    inverses: list[Tensor | None],
) -> list[Hindrance]:
    """Put K and, where a layer absorbs, K⁻¹ of the inputs that are not those of `state` in the places of the old ones.

    The arithmetic is float64, the results have the dtype of the inputs.
    """
    products = network.products
    moved = [layer for layer, batch in enumerate(inputs) if batch is not state.inputs[layer]]
    if not moved:
        return []
    found, rounded = products.grams(
        [inputs[layer] for layer in moved], [network.biases[layer] is not None for layer in moved], True
    )
    exact: dict[int, Tensor] = {}  # of the layers that absorb
    for layer, matrix, gram in zip(moved, found, rounded, strict=True):
        grams[layer] = gram
        if plan.absorbs[layer]:
            exact[layer] = matrix
    if not exact:
        return []
    dtype, matrices = inputs[0].dtype, list(exact.values())
    exact_inverses, infos, in_float32 = products.invert_grams(matrices, dtype == torch.float32)
    for layer, inverse in zip(exact, in_float32 or exact_inverses, strict=True):
        inverses[layer] = inverse
    dependent = products.near_dependence(matrices, exact_inverses, infos.unbind(), MAX_CONDITION[dtype])
    return [(dependent, "the activations of the batch came too close to linear dependence")]


def _coefficients(
    network: Network,
    plan: Plan,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    references: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    inverses: Sequence[Tensor | None],
    images: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """A_l = K_l⁻¹ E_l, E_l = Y_l − B_l R_lᵀ − r_l; None where the layer does not absorb or is the first (nothing asks
    for it)."""
    absorbing = {
        layer: inverse
        for layer, inverse in enumerate(inverses)
        if layer > 0 and plan.absorbs[layer] and inverse is not None
    }
    fitted: dict[int, Linear] = {}
    residuals: dict[int, Tensor] = {}
    for layer in absorbing:
        reference, image = references[layer], images[layer]
        if image is not None:
            residuals[layer] = targets[layer] - image
        elif reference is None:
            residuals[layer] = targets[layer]
        else:
            fitted[layer] = Linear(inputs[layer], reference.T, targets[layer], offsets[layer], alpha=-1.0)
    residuals |= zip(fitted, together(network.products, *fitted.values()), strict=True)
    solved = together(network.products, *(Linear(absorbing[layer], residuals[layer]) for layer in absorbing))
    found = dict(zip(absorbing, solved, strict=True))
    return [found.get(layer) for layer in range(len(network))]


def _form(network: Network, inputs: Tensor, reference: Tensor | None, coefficients: Tensor) -> Tensor:
    """R + AᵀB; R None is zero."""
    return network.products.linear(coefficients.T, inputs, source=reference)


def _form_thin(
    network: Network, inputs: Tensor, reference: Tensor | None, coefficients: Tensor | None
) -> Tensor | None:
    """The weights of a thin layer that absorbs, None for every other."""
    if coefficients is None or not is_thin(coefficients):
        return None
    return _form(network, inputs, reference, coefficients)


def _right_inverse(
    reference: Tensor | None, generator: tuple[Tensor, Tensor], size: Tensor, first_order: bool
) -> tuple[Tensor, Tensor | None]:
    """R (I + εUᵀV)⁻¹, through the smaller of the two sides (Woodbury), and whether there is none.

    R (I − εUᵀV) to first order, which there always is.
    """
    assert reference is not None
    left, right = generator
    size = size.to(reference.dtype)
    if first_order:
        return reference - size * (reference @ left.T) @ right, None
    if left.shape[0] < left.shape[1]:
        inner = torch.eye(left.shape[0], dtype=left.dtype, device=left.device) + size * (right @ left.T)
        solution, info = torch.linalg.solve_ex(inner, right)
        return reference - size * (reference @ left.T) @ solution, info != 0
    group_step = torch.eye(left.shape[1], dtype=left.dtype, device=left.device) + size * (left.T @ right)
    result, info = torch.linalg.solve_ex(group_step, reference, left=False)
    return result, info != 0


def _let_drift(
    network: Network,
    plan: Plan,
    inputs: list[Tensor],
    targets: list[Tensor],
    references: list[Tensor | None],
    offsets: list[Tensor | None],
    slopes: list[Tensor],
) -> None:
    """With the first-order inverse a carried layer's output is not quite kept: it runs on to the next that absorbs."""
    drifted = False
    for layer, reference in enumerate(references):
        if not (plan.carried[layer] or drifted):
            continue
        drifted = not plan.absorbs[layer]
        if drifted:
            assert reference is not None
            targets[layer] = F.linear(inputs[layer], reference, offsets[layer])
            if layer < len(network) - 1:
                inputs[layer + 1] = network.activations[layer].forward(targets[layer])
                slopes[layer] = network.activations[layer].derivative(targets[layer])


def add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """left + right, where None is zero."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _apply(batch: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """(B cᵀ) a in the cheaper order of the two products."""
    n, width = batch.shape
    return (batch @ right.T) @ left if n <= width else batch @ (right.T @ left)
