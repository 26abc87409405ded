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

import torch
from torch import Tensor

from .action import (
    Gradient,
    Network,
    Plan,
    State,
    add,
    input_gradient,
    reference_terms,
    residual_gradient,
)


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
    ∂f/∂Y_l, ∂f/∂R_l = aᵀc as a pair (a, c), and ∂f/∂r_l. A layer that is absent contributes nothing; a thin layer that
    absorbs has its share through K_l in ∂f/∂B_l. coefficient_images: ∂f/∂A_l R_l, where it is cheaper to have than to
    work out."""

    deltas: dict[int, Tensor] = field(default_factory=dict)
    coefficients: dict[int, Tensor] = field(default_factory=dict)
    coefficient_images: dict[int, Tensor] = field(default_factory=dict)
    grams: dict[int, Tensor] = field(default_factory=dict)
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
            back, before = products.masked(delta, weight, None, slope)
        else:
            mixing = products.linear(delta, coefficients.T)
            through_reference = None if reference is None else products.linear(delta, reference)
            back, before = products.masked(mixing, state.inputs[layer], through_reference, slope)
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


def squared_gradient_norm(network: Network, state: State, deltas: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """‖∇L‖² = Σ_l ⟨δ_l, K_l δ_l⟩ over all weights and biases, and its derivatives 2 K_l δ_l in δ_l.

    With more samples than columns δ may lie in the null space of [B, 1]ᵀ; there K δ = B (Bᵀ δ) + 1 (1ᵀ δ) is formed
    from the gradient itself, whose square cannot cancel (and which is the smaller matrix).
    """
    linear = network.products.linear
    derivatives: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []  # whose products sum up to twice the square
    for inputs, gram, bias, delta in zip(state.inputs, state.grams, network.biases, deltas, strict=True):
        if len(inputs) <= inputs.shape[1]:
            derivatives.append(linear(gram, delta, alpha=2.0))
            pairs.append((delta, derivatives[-1]))
            continue
        gradient, by_bias = linear(inputs.T, delta), None
        pairs.append((gradient, 2 * gradient))
        if bias is not None:
            by_bias = delta.sum(0)
            pairs.append((by_bias, 2 * by_bias))
        derivatives.append(linear(inputs, gradient, row=by_bias, alpha=2.0))
    left, right = zip(*pairs, strict=True)
    return 0.5 * network.products.dot_sum(left, right), derivatives


def pull_back(network: Network, plan: Plan, state: State, backward: Backpropagation, seeds: Seeds) -> Gradient:
    """∂f/∂B_l, ∂f/∂Y_l, ∂f/∂R_l and ∂f/∂r_l from the seeds, by reverse mode through `backpropagate`,
    A = K⁻¹(Y − BRᵀ − r) and K = BBᵀ + 1."""
    by_inputs: list[Tensor | None] = [None]
    by_targets: list[Tensor | None] = [None]
    by_references: list[tuple[tuple[Tensor, Tensor], ...]] = [()]
    by_offsets: dict[int, Tensor] = {}
    by_target = seeds.targets.get(0)  # of the layer before, like by_delta and by_back
    by_delta, by_back = seeds.deltas[0], seeds.deltas[0] * state.slopes[0]
    for layer in range(1, len(network)):
        moved = plan.moved[layer - 1]
        if moved:
            by_target = _with_curvature(network, state, backward, layer, by_delta, by_target)
        reverse = _pull_back_thin if state.formed[layer] is not None else _pull_back_wide
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


def _pull_back_wide(
    network: Network,
    state: State,
    backward: Backpropagation,
    seeds: Seeds,
    layer: int,
    by_back: Tensor,
    moved: bool,
) -> _LayerTerms:
    """Reverse mode through one layer in n×n matrices, for a layer that absorbs and is wide, or does not absorb."""
    products = network.products
    batch, reference, coefficients = state.inputs[layer], state.references[layer], state.coefficients[layer]
    mixing, last = backward.mixings[layer], layer == len(network) - 1
    by_delta, by_residual = None, None
    by_target, by_inputs, by_gram = seeds.targets.get(layer), seeds.inputs.get(layer), seeds.grams.get(layer)
    if coefficients is not None and mixing is not None:
        by_mixing = products.linear(by_back, batch.T)
        by_residual, overlap, image = _through_residual(network, state, backward, seeds, layer, by_mixing, moved)
        by_target = add(by_target, by_residual)
        if not last:
            seed = seeds.deltas[layer]
            if reference is not None:
                seed = products.linear(by_back, reference.T, source=seed)
            by_delta = products.masked(by_mixing, coefficients, seed, state.slopes[layer])
        if overlap is not None:
            symmetric = overlap + overlap.T
            by_gram = symmetric.mul_(-0.5) if by_gram is None else torch.sub(by_gram, symmetric, alpha=0.5)
            by_inputs = products.linear(mixing.T, by_back, source=by_inputs)
            by_inputs = by_inputs if image is None else by_inputs.sub_(image)
    elif not last:
        assert reference is not None
        by_delta = products.masked(by_back, reference.T, seeds.deltas[layer], state.slopes[layer])
    if moved and by_gram is not None:
        by_inputs = products.linear(by_gram, batch, source=by_inputs, alpha=2.0)
    return _LayerTerms(by_delta, by_target, by_inputs, by_residual)


def _through_residual(
    network: Network,
    state: State,
    backward: Backpropagation,
    seeds: Seeds,
    layer: int,
    by_mixing: Tensor,
    moved: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """∂f/∂E = K⁻¹ ∂f/∂A; and if the layer's input is moved the overlap ∂f/∂E Aᵀ = −∂f/∂K, and ∂f/∂E R unless R is zero.

    ∂f/∂A = ∂f/∂Sᵀ δ + the seed, and S = δAᵀ. Without a seed all three follow from the n×n matrix C = K⁻¹ ∂f/∂Sᵀ, as
    C δ, C S and C (δR). A product with R is the dearest of all where the batch is small, and δR is at hand.
    """
    linear = network.products.linear
    seed, coefficients, reference = seeds.coefficients.get(layer), state.coefficients[layer], state.references[layer]
    delta, mixing, through = backward.deltas[layer], backward.mixings[layer], backward.through_references[layer]
    assert coefficients is not None and mixing is not None
    if seed is None and moved:
        carrier = residual_gradient(network, state, layer, by_mixing.T)
        return linear(carrier, delta), linear(carrier, mixing), None if through is None else linear(carrier, through)
    by_residual = residual_gradient(network, state, layer, linear(by_mixing.T, delta, source=seed))
    if not moved:
        return by_residual, None, None
    seed_image = seeds.coefficient_images.get(layer)
    overlap = linear(by_residual, coefficients.T)
    if seed_image is not None and through is not None:
        image = residual_gradient(network, state, layer, linear(by_mixing.T, through, source=seed_image))
        return by_residual, overlap, image
    return by_residual, overlap, None if reference is None else linear(by_residual, reference)


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
    products = network.products
    batch, coefficients, formed = state.inputs[layer], state.coefficients[layer], state.formed[layer]
    assert coefficients is not None and formed is not None
    by_weight = products.linear(backward.deltas[layer].T, by_back)
    by_coefficients = products.linear(batch, by_weight.T, source=seeds.coefficients.get(layer))
    by_residual = residual_gradient(network, state, layer, by_coefficients)
    by_inputs, by_delta = seeds.inputs.get(layer), None
    if moved:
        by_inputs = add(by_inputs, input_gradient(network, batch, formed, coefficients, by_weight, by_residual))
    if layer < len(network) - 1:
        by_delta = products.masked(by_back, formed.T, seeds.deltas[layer], state.slopes[layer])
    return _LayerTerms(by_delta, add(seeds.targets.get(layer), by_residual), by_inputs, by_residual)


def _with_curvature(
    network: Network, state: State, backward: Backpropagation, layer: int, by_delta: Tensor, by_target: Tensor | None
) -> Tensor | None:
    """∂f/∂Y_{l−1}: `by_target`, and what comes through σ'(Y_{l−1}) in δ_{l−1}, which is nothing where σ is piecewise
    linear."""
    activation, back = network.activations[layer - 1], backward.backs[layer]
    if activation.positively_homogeneous or back is None:
        return by_target
    sigma = (activation.name, activation.parameter)
    return network.products.times_curvature(by_delta, back, state.targets[layer - 1], by_target, *sigma)
