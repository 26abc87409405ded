"""The loss gradient of a teleported network, and its own gradient, without forming a weight-sized tensor.

The action keeps the logits, so δ_{M−1} = ∂L/∂logits is a constant of the search, and the whole backward pass lives in
n×d and n×n matrices (notation of `action`):

    S_l = δ_l A_lᵀ      back_l = δ_l R_l + S_l B_l      δ_{l−1} = back_l ⊙ σ'(Y_{l−1})      (l = M−1 … 1)
    ‖∇L‖² = Σ_l ⟨δ_l δ_lᵀ, K_l⟩

`pull_back` is the reverse mode of these lines written out: it takes what an objective f says of δ_l, A_l, K_l, B_l, Y_l
and R_l, and returns ∂f/∂B_l, ∂f/∂Y_l and ∂f/∂R_l.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .action import Gradient, Network, Plan, State, add, input_gradient, residual_gradient, squared_norm


@dataclass(frozen=True)
class Backpropagation:
    """δ_l (n×d_l), back_l (n×d_{l−1}) and S_l (n×n; None where the layer is thin or does not absorb), per weight
    layer l."""

    deltas: tuple[Tensor, ...]
    backs: tuple[Tensor | None, ...]
    mixings: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Evaluation:
    """An objective's value at a state, and its gradient, worked out only when asked for."""

    value: float
    gradient: Callable[[], Gradient]


@dataclass
class Seeds:
    """What an objective depends on directly, per weight layer: ∂f/∂δ_l, ∂f/∂A_l, the symmetric ∂f/∂K_l, ∂f/∂B_l,
    ∂f/∂Y_l, and ∂f/∂R_l = Σ aᵀc as pairs (a, c). A layer that is absent contributes nothing; a thin layer that absorbs
    has its share through K_l in ∂f/∂B_l."""

    deltas: dict[int, Tensor] = field(default_factory=dict)
    coefficients: dict[int, Tensor] = field(default_factory=dict)
    grams: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, Tensor] = field(default_factory=dict)
    references: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def backpropagate(network: Network, state: State, output_delta: Tensor) -> Backpropagation:
    """δ, back and S of every layer at `state`, from ∂L/∂logits = `output_delta` (n×classes)."""
    deltas: list[Tensor] = [output_delta]
    backs: list[Tensor | None] = []
    mixings: list[Tensor | None] = []
    for layer in range(len(network) - 1, 0, -1):
        reference, coefficients, formed = state.references[layer], state.coefficients[layer], state.formed[layer]
        mixing = None
        if formed is not None or coefficients is None:
            weight = reference if formed is None else formed
            assert weight is not None
            back = deltas[-1] @ weight
        else:
            mixing = deltas[-1] @ coefficients.T
            back = mixing @ state.inputs[layer]
            if reference is not None:
                back.addmm_(deltas[-1], reference)
        backs.append(back)
        mixings.append(mixing)
        deltas.append(back * state.slopes[layer - 1])
    return Backpropagation(
        deltas=tuple(reversed(deltas)),
        backs=(None, *reversed(backs)),
        mixings=(None, *reversed(mixings)),
    )


def squared_gradient_norm(network: Network, state: State, deltas: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
    """‖∇L‖² = Σ_l ⟨δ_l, K_l δ_l⟩ over all weights and biases, and the products K_l δ_l.

    With more samples than columns δ may lie in the null space of [B, 1]ᵀ; there K δ = B (Bᵀ δ) + 1 (1ᵀ δ) is formed
    from the gradient itself, whose square cannot cancel (and which is the smaller matrix).
    """
    products, terms = [], []
    for inputs, gram, bias, delta in zip(state.inputs, state.grams, network.biases, deltas, strict=True):
        if len(inputs) <= inputs.shape[1]:
            products.append(gram @ delta)
            terms.append(delta.flatten() @ products[-1].flatten())
            continue
        gradient = inputs.T @ delta
        product, term = inputs @ gradient, squared_norm(gradient)
        if bias is not None:
            by_bias = delta.sum(0)
            product, term = product.add_(by_bias), term + squared_norm(by_bias)
        products.append(product)
        terms.append(term)
    return float(torch.stack(terms).sum()), products


def pull_back(network: Network, plan: Plan, state: State, backward: Backpropagation, seeds: Seeds) -> Gradient:
    """∂f/∂B_l, ∂f/∂Y_l, ∂f/∂R_l from the seeds, by reverse mode through `backpropagate`, A = K⁻¹(Y − BRᵀ − r) and K
    = BBᵀ + 1."""
    by_inputs: list[Tensor | None] = [None]
    by_targets: list[Tensor | None] = [None]
    by_references: list[tuple[tuple[Tensor, Tensor], ...]] = [()]
    by_delta, by_target = seeds.deltas[0], seeds.targets.get(0)  # of the layer before
    for layer in range(1, len(network)):
        by_back = by_delta * state.slopes[layer - 1]
        moved = plan.moved[layer - 1]
        if moved:
            by_target = add(by_target, _curvature_term(network, state, backward, layer, by_delta))
        reverse = _pull_back_thin if state.formed[layer] is not None else _pull_back_wide
        terms = reverse(state, backward, seeds, layer, by_back, moved, last=layer == len(network) - 1)
        by_inputs.append(terms.by_inputs)
        by_targets.append(by_target)
        seeded = (seeds.references[layer],) if layer in seeds.references else ()
        by_references.append(((backward.deltas[layer], by_back), *seeded) if plan.carried[layer] else ())
        if terms.by_delta is not None:
            by_delta = terms.by_delta
        by_target = terms.by_target
    return Gradient(tuple(by_inputs), tuple(by_targets), tuple(by_references))


@dataclass(frozen=True)
class _LayerTerms:
    """∂f/∂δ_l (None for the last layer, where it is a constant), ∂f/∂Y_l, and ∂f/∂B_l but for its share through
    Y_{l−1}."""

    by_delta: Tensor | None
    by_target: Tensor | None
    by_inputs: Tensor | None


def _pull_back_wide(
    state: State, backward: Backpropagation, seeds: Seeds, layer: int, by_back: Tensor, moved: bool, last: bool
) -> _LayerTerms:
    """Reverse mode through one layer in n×n matrices, for a layer that absorbs and is wide, or does not absorb."""
    batch, reference, coefficients = state.inputs[layer], state.references[layer], state.coefficients[layer]
    mixing = backward.mixings[layer]
    by_delta = None if last else seeds.deltas[layer]
    by_target, by_inputs, by_gram = seeds.targets.get(layer), seeds.inputs.get(layer), seeds.grams.get(layer)
    if by_delta is not None and reference is not None:
        by_delta = by_delta.addmm(by_back, reference.T)
    if coefficients is not None and mixing is not None:
        by_mixing = by_back @ batch.T
        by_residual, overlap = _through_residual(state, layer, backward.deltas[layer], mixing, by_mixing, seeds)
        by_target = add(by_target, by_residual)
        if by_delta is not None:
            by_delta = by_delta.addmm(by_mixing, coefficients)
        if moved:
            by_gram = add(by_gram, (overlap + overlap.T).mul_(-0.5))
            by_inputs = _add_product(by_inputs, mixing.T, by_back)
            if reference is not None:
                by_inputs.addmm_(by_residual, reference, alpha=-1)
    if moved and by_gram is not None:
        by_inputs = _add_product(by_inputs, by_gram, batch, alpha=2)
    return _LayerTerms(by_delta, by_target, by_inputs)


def _through_residual(
    state: State, layer: int, delta: Tensor, mixing: Tensor, by_mixing: Tensor, seeds: Seeds
) -> tuple[Tensor, Tensor]:
    """∂f/∂E = K⁻¹ ∂f/∂A and the overlap ∂f/∂E Aᵀ = −∂f/∂K, where ∂f/∂A = ∂f/∂Sᵀ δ + the seed and S = δAᵀ."""
    seed, coefficients = seeds.coefficients.get(layer), state.coefficients[layer]
    assert coefficients is not None
    if seed is None:  # ∂f/∂E = C δ and ∂f/∂E Aᵀ = C S with the n×n matrix C = K⁻¹ ∂f/∂Sᵀ
        carrier = residual_gradient(state, layer, by_mixing.T)
        return carrier @ delta, carrier @ mixing
    by_residual = residual_gradient(state, layer, seed.addmm(by_mixing.T, delta))
    return by_residual, by_residual @ coefficients.T


def _pull_back_thin(
    state: State, backward: Backpropagation, seeds: Seeds, layer: int, by_back: Tensor, moved: bool, last: bool
) -> _LayerTerms:
    """Reverse mode through one thin layer that absorbs, with its weights W' formed and ∂f/∂W' = δᵀ ∂f/∂back."""
    batch, coefficients, formed = state.inputs[layer], state.coefficients[layer], state.formed[layer]
    assert coefficients is not None and formed is not None
    by_weight = backward.deltas[layer].T @ by_back
    by_residual = residual_gradient(state, layer, _add_product(seeds.coefficients.get(layer), batch, by_weight.T))
    by_inputs = seeds.inputs.get(layer)
    if moved:
        by_inputs = add(by_inputs, input_gradient(batch, formed, coefficients, by_weight, by_residual))
    return _LayerTerms(
        by_delta=None if last else seeds.deltas[layer].addmm(by_back, formed.T),
        by_target=add(seeds.targets.get(layer), by_residual),
        by_inputs=by_inputs,
    )


def _curvature_term(
    network: Network, state: State, backward: Backpropagation, layer: int, adjoint: Tensor
) -> Tensor | None:
    """∂f/∂Y_{l−1} through σ'(Y_{l−1}) in δ_{l−1}; None for piecewise linear activations."""
    curvature = network.activations[layer - 1].second_derivative(state.targets[layer - 1])
    back = backward.backs[layer]
    return None if curvature is None or back is None else adjoint * back * curvature


def _add_product(base: Tensor | None, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """base + alpha·left right as a new tensor."""
    if base is not None:
        return base.addmm(left, right, alpha=alpha)
    product = left @ right
    return product if alpha == 1 else product.mul_(alpha)
