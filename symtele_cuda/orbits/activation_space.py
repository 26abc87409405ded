"""The loss gradient of a teleported network, and its own gradient, without forming a weight-sized tensor.

The action keeps the logits, so δ_{M−1} = ∂L/∂logits is a constant of the search, and the whole backward pass lives in
n×d and n×n matrices (notation of `action`):

    S_l = δ_l A_lᵀ      back_l = δ_l R_l + S_l B_l      δ_{l−1} = back_l ⊙ σ'(Y_{l−1})      (l = M−1 … 1)
    ‖∇L‖² = Σ_l ⟨δ_l δ_lᵀ, K_l⟩

`pull_back` is the reverse mode of these lines written out: it takes what an objective f says of δ_l, A_l, K_l, B_l,
Y_l, R_l and r_l, and returns ∂f/∂B_l, ∂f/∂Y_l, ∂f/∂R_l and ∂f/∂r_l.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.library import Linear, together
from ..model.network import Network
from .action import Gradient, Plan, State, add, input_gradient, reference_terms, residual_gradient


@dataclass(frozen=True)
class Backpropagation:
    """δ_l (n×d_l), back_l (n×d_{l−1}), and where the layer absorbs and is not thin S_l (n×n) and δ_l R_l (n×d_{l−1};
    None where R is zero), per weight layer l."""

    deltas: tuple[Tensor, ...]
    backs: tuple[Tensor | None, ...]
    mixings: tuple[Tensor | None, ...]
    through_references: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Evaluation:
    """An objective's value at a state, a scalar tensor, and its gradient, worked out only when asked for."""

    value: Tensor
    gradient: Callable[[], Gradient]


@dataclass
class Seeds:
    """What an objective depends on directly, per weight layer: ∂f/∂δ_l, ∂f/∂A_l, the symmetric ∂f/∂K_l, ∂f/∂B_l,
    ∂f/∂Y_l, ∂f/∂R_l = aᵀc as a pair (a, c), and ∂f/∂r_l. A layer that is absent contributes nothing.

    coefficient_images: ∂f/∂A_l R_l, where it is cheaper to have than to work out. delta_images: δ_lᵀ B_l of a thin
    layer that absorbs, in place of ∂f/∂K_l = δ_l δ_lᵀ.
    """

    deltas: dict[int, Tensor] = field(default_factory=dict)
    coefficients: dict[int, Tensor] = field(default_factory=dict)
    coefficient_images: dict[int, Tensor] = field(default_factory=dict)
    grams: dict[int, Tensor] = field(default_factory=dict)
    delta_images: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    references: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    offsets: dict[int, Tensor] = field(default_factory=dict)


def backpropagate(network: Network, state: State, output_delta: Tensor) -> Backpropagation:
    """δ, back and S of every layer at `state`, from ∂L/∂logits = `output_delta` (n×classes)."""
    products = network.products
    deltas: list[Tensor] = [output_delta]
    backs: list[Tensor | None] = []
    mixings: list[Tensor | None] = []
    through_references: list[Tensor | None] = []
    for layer in range(len(network) - 1, 0, -1):
        reference, coefficients, formed = state.references[layer], state.coefficients[layer], state.formed[layer]
        delta, slope, mixing, through_reference = deltas[-1], state.slopes[layer - 1], None, None
        if formed is not None or coefficients is None:
            weight = reference if formed is None else formed
            assert weight is not None
            ((back, before),) = together(products, Linear(delta, weight, mask=slope))
        else:
            mixing, through_reference = together(
                products,
                Linear(delta, coefficients.T),
                None if reference is None else Linear(delta, reference),
            )
            ((back, before),) = together(products, Linear(mixing, state.inputs[layer], through_reference, mask=slope))
        backs.append(back)
        mixings.append(mixing)
        through_references.append(through_reference)
        deltas.append(before)
    return Backpropagation(
        deltas=tuple(reversed(deltas)),
        backs=(None, *reversed(backs)),
        mixings=(None, *reversed(mixings)),
        through_references=(None, *reversed(through_references)),
    )


def squared_gradient_norm(
    network: Network, state: State, deltas: tuple[Tensor, ...]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """‖∇L‖² = Σ_l ⟨δ_l, K_l δ_l⟩ over all weights and biases, its derivatives 2 K_l δ_l in δ_l, and that of layer 0
    times σ'(Y_0), elementwise.

    With more samples than columns δ may lie in the null space of [B, 1]ᵀ; there K δ = B (Bᵀ δ) + 1 (1ᵀ δ) is formed
    from the gradient itself, whose square cannot cancel (and which is the smaller matrix).
    """
    products, masks = network.products, [state.slopes[0], *[None] * (len(network) - 1)]
    by_gradient = [len(inputs) > inputs.shape[1] for inputs in state.inputs]
    first = together(
        products,
        *(
            Linear(inputs.T, delta) if through else Linear(gram, delta, mask=mask, alpha=2.0)
            for inputs, gram, delta, mask, through in zip(
                state.inputs, state.grams, deltas, masks, by_gradient, strict=True
            )
        ),
    )
    derivatives, pairs = [], list[tuple[Tensor, Tensor]]()  # products of pairs make twice the square
    for layer, (found, delta) in enumerate(zip(first, deltas, strict=True)):
        if by_gradient[layer]:
            by_bias = None if network.biases[layer] is None else delta.sum(0)
            pairs += [(one, 2 * one) for one in (found, by_bias) if one is not None]
            last = Linear(state.inputs[layer], found, row=by_bias, mask=masks[layer], alpha=2.0)
            derivatives += together(products, last)
        else:
            pairs.append((delta, found[0] if layer == 0 else found))
            derivatives.append(found)
    (by_first, masked), *others = derivatives
    left, right = zip(*pairs, strict=True)
    return products.dot_sum(left, right, 0.5), [by_first, *others], masked


def pull_back(
    network: Network, plan: Plan, state: State, backward: Backpropagation, seeds: Seeds, by_back: Tensor
) -> Gradient:
    """∂f/∂B_l, ∂f/∂Y_l, ∂f/∂R_l and ∂f/∂r_l from the seeds, by reverse mode through `backpropagate`,
    A = K⁻¹(Y − BRᵀ − r) and K = BBᵀ + 1.

    by_back: ∂f/∂back_1, which is ∂f/∂δ_0 ⊙ σ'(Y_0), as it comes with ∂f/∂δ_0.
    """
    by_inputs: list[Tensor | None] = [None]
    by_targets: list[Tensor | None] = [None]
    by_references: list[tuple[tuple[Tensor, Tensor], ...]] = [()]
    by_offsets: dict[int, Tensor] = {}
    by_target = seeds.targets.get(0)  # of the layer before, like by_delta and by_back
    by_delta = seeds.deltas[0]
    for layer in range(1, len(network)):
        moved = plan.moved[layer - 1]
        if moved:
            by_target = _with_curvature(network, state, backward, layer, by_delta, by_target)
        if state.formed[layer] is not None:
            reverse = _pull_back_thin
        else:
            reverse = _pull_back_fixed if state.coefficients[layer] is None else _pull_back_wide
        terms = reverse(network, state, backward, seeds, layer, by_back, moved)
        by_inputs.append(terms.by_inputs)
        by_targets.append(by_target)
        through_back = (backward.deltas[layer], by_back)
        by_references.append(_reference_pairs(plan, state, seeds, layer, through_back, terms.by_residual))
        if plan.changes_offset(layer) and network.biases[layer] is not None:
            through_residual = None if terms.by_residual is None else terms.by_residual.sum(0).neg()
            by_offset = add(seeds.offsets.get(layer), through_residual)
            if by_offset is not None:
                by_offsets[layer] = by_offset
        if terms.by_delta is not None:
            by_delta, by_back = terms.by_delta
        by_target = terms.by_target
    return Gradient(tuple(by_inputs), tuple(by_targets), tuple(by_references), by_offsets)


def _reference_pairs(
    plan: Plan,
    state: State,
    seeds: Seeds,
    layer: int,
    through_back: tuple[Tensor, Tensor],
    by_residual: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """∂f/∂R_l as pairs: through back, through what the objective says itself, and through E."""
    if not plan.changes_reference(layer):
        return ()
    seeded = (seeds.references[layer],) if layer in seeds.references else ()
    return (through_back, *seeded, *reference_terms(by_residual, state.inputs[layer]))


@dataclass(frozen=True)
class _LayerTerms:
    """∂f/∂δ_l and the ∂f/∂back_{l+1} = ∂f/∂δ_l ⊙ σ'(Y_l) that follows (None for the last layer, where δ is a constant),
    ∂f/∂Y_l, ∂f/∂B_l but for its share through Y_{l−1}, and ∂f/∂E_l where the layer absorbs."""

    by_delta: tuple[Tensor, Tensor] | None
    by_target: Tensor | None
    by_inputs: Tensor | None
    by_residual: Tensor | None


def _pull_back_fixed(
    network: Network,
    state: State,
    backward: Backpropagation,
    seeds: Seeds,
    layer: int,
    by_back: Tensor,
    moved: bool,
) -> _LayerTerms:
    """Reverse mode through one layer that does not absorb: its weights are R."""
    products, reference = network.products, state.references[layer]
    by_delta, by_inputs, by_gram = None, seeds.inputs.get(layer), seeds.grams.get(layer)
    if layer < len(network) - 1:
        assert reference is not None
        (by_delta,) = together(products, Linear(by_back, reference.T, seeds.deltas[layer], mask=state.slopes[layer]))
    if moved and by_gram is not None:
        by_inputs = products.linear(by_gram, state.inputs[layer], source=by_inputs, alpha=2.0)
    return _LayerTerms(by_delta, seeds.targets.get(layer), by_inputs, None)


def _pull_back_wide(
    network: Network,
    state: State,
    backward: Backpropagation,
    seeds: Seeds,
    layer: int,
    by_back: Tensor,
    moved: bool,
) -> _LayerTerms:
    """Reverse mode through one wide layer that absorbs, in n×n matrices."""
    products, batch, reference = network.products, state.inputs[layer], state.references[layer]
    mixing, coefficients = backward.mixings[layer], state.coefficients[layer]
    assert mixing is not None and coefficients is not None
    last = layer == len(network) - 1
    by_mixing, by_inputs, seed = together(
        products,
        Linear(by_back, batch.T),
        Linear(mixing.T, by_back, seeds.inputs.get(layer)) if moved else None,
        None if last or reference is None else Linear(by_back, reference.T, seeds.deltas[layer]),
    )
    by_delta = None
    if not last:
        seed = seeds.deltas[layer] if seed is None else seed
        by_delta = Linear(by_mixing, coefficients, seed, mask=state.slopes[layer])
    if moved and layer not in seeds.coefficients:
        terms = _through_carrier(network, state, backward, seeds, layer, by_mixing, by_inputs, by_delta)
    else:
        terms = _through_coefficients(network, state, backward, seeds, layer, by_mixing, by_inputs, by_delta, moved)
    by_inputs = terms.by_inputs
    if terms.half_by_gram is not None:
        by_gram = terms.half_by_gram + terms.half_by_gram.T
        by_inputs = products.linear(by_gram, batch, source=by_inputs)
    return _LayerTerms(terms.by_delta, add(seeds.targets.get(layer), terms.by_residual), by_inputs, terms.by_residual)


@dataclass(frozen=True)
class _ResidualTerms:
    """∂f/∂E = K⁻¹ ∂f/∂A and, if the layer's input is moved, what comes through it: H with 2 ∂f/∂K = H + Hᵀ, and
    ∂f/∂B with −∂f/∂E R added. by_delta: the results of the product that was to be computed alongside."""

    by_residual: Tensor
    half_by_gram: Tensor | None
    by_inputs: Tensor | None
    by_delta: tuple[Tensor, Tensor] | None


def _through_carrier(
    network: Network,
    state: State,
    backward: Backpropagation,
    seeds: Seeds,
    layer: int,
    by_mixing: Tensor,
    by_inputs: Tensor | None,
    alongside: Linear | None,
) -> _ResidualTerms:
    """Without a seed for A, so that ∂f/∂A = ∂f/∂Sᵀ δ with S = δAᵀ, all follows from the n×n matrix C = K⁻¹ ∂f/∂Sᵀ:

    ∂f/∂E = C δ,  ∂f/∂E Aᵀ = C S,  ∂f/∂E R = C (δR). A product with R is the dearest of all where the batch is small,
    and δR is at hand.
    """
    products, inverse = network.products, state.gram_inverses[layer]
    mixing, through = backward.mixings[layer], backward.through_references[layer]
    assert inverse is not None and mixing is not None
    carrier, by_delta = together(products, Linear(inverse, by_mixing.T), alongside)
    by_residual, half_by_gram, image = together(
        products,
        Linear(carrier, backward.deltas[layer]),
        Linear(carrier, mixing, seeds.grams.get(layer), alpha=-1.0),
        None if through is None else Linear(carrier, through, by_inputs, alpha=-1.0),
    )
    return _ResidualTerms(by_residual, half_by_gram, by_inputs if image is None else image, by_delta)


def _through_coefficients(
    network: Network,
    state: State,
    backward: Backpropagation,
    seeds: Seeds,
    layer: int,
    by_mixing: Tensor,
    by_inputs: Tensor | None,
    alongside: Linear | None,
    moved: bool,
) -> _ResidualTerms:
    """With a seed for A, or where the layer's input is not moved: through ∂f/∂A = ∂f/∂Sᵀ δ + the seed itself."""
    products, inverse, reference = network.products, state.gram_inverses[layer], state.references[layer]
    through, coefficients = backward.through_references[layer], state.coefficients[layer]
    seed, seed_image = seeds.coefficients.get(layer), seeds.coefficient_images.get(layer)
    assert inverse is not None and coefficients is not None
    by_coefficients, image, by_delta = together(
        products,
        Linear(by_mixing.T, backward.deltas[layer], seed),
        None if seed_image is None or through is None else Linear(by_mixing.T, through, seed_image),
        alongside,
    )
    by_residual, image = together(
        products,
        Linear(inverse, by_coefficients),
        None if image is None else Linear(inverse, image, by_inputs, alpha=-1.0),
    )
    if not moved:
        return _ResidualTerms(by_residual, None, None, by_delta)
    by_inputs = by_inputs if image is None else image
    half_by_gram, product = together(
        products,
        Linear(by_residual, coefficients.T, seeds.grams.get(layer), alpha=-1.0),
        None if reference is None or image is not None else Linear(by_residual, reference, by_inputs, alpha=-1.0),
    )
    return _ResidualTerms(by_residual, half_by_gram, by_inputs if product is None else product, by_delta)


def _pull_back_thin(
    network: Network,
    state: State,
    backward: Backpropagation,
    seeds: Seeds,
    layer: int,
    by_back: Tensor,
    moved: bool,
) -> _LayerTerms:
    """Reverse mode through one thin layer that absorbs, with its weights W' formed and ∂f/∂W' = δᵀ ∂f/∂back."""
    products, batch, delta = network.products, state.inputs[layer], backward.deltas[layer]
    coefficients, formed, image = state.coefficients[layer], state.formed[layer], seeds.delta_images.get(layer)
    assert coefficients is not None and formed is not None
    last, by_inputs = layer == len(network) - 1, seeds.inputs.get(layer)
    by_weight, by_delta, through_gram = together(
        products,
        Linear(delta.T, by_back),
        None if last else Linear(by_back, formed.T, seeds.deltas[layer], mask=state.slopes[layer]),
        None if image is None else Linear(delta, image, by_inputs, alpha=2.0),
    )
    by_coefficients = products.linear(batch, by_weight.T, source=seeds.coefficients.get(layer))
    by_residual = residual_gradient(network, state, layer, by_coefficients)
    if moved:
        by_inputs = by_inputs if through_gram is None else through_gram
        by_inputs = input_gradient(network, batch, formed, coefficients, by_weight, by_residual, by_inputs)
    return _LayerTerms(by_delta, add(seeds.targets.get(layer), by_residual), by_inputs, by_residual)


def _with_curvature(
    network: Network, state: State, backward: Backpropagation, layer: int, by_delta: Tensor, by_target: Tensor | None
) -> Tensor | None:
    """∂f/∂Y_{l−1}: `by_target`, and what comes through σ'(Y_{l−1}) in δ_{l−1}, which is nothing where σ is piecewise
    linear."""
    activation, back = network.activations[layer - 1], backward.backs[layer]
    if activation.piecewise_linear or back is None:
        return by_target
    return network.products.times_curvature(by_delta, back, state.targets[layer - 1], by_target, *activation.sigma)
