"""The published teleportation algorithm, written from its formulas: the opponent in every comparison of this folder.

Source: Zhao, Dehmamy, Walters, Yu, "Symmetry Teleportation for Accelerated Optimization", NeurIPS 2022
(arXiv 2205.10637), equation 8 and Algorithm 1. What makes it the published algorithm, and not ours: the pseudo-inverse
of every layer's input is an SVD, computed anew for each layer and step; g⁻¹ is I − T; the weights are formed; and the
gradient of the search comes from double backward through them.

The gradient comes in two readings. The formula takes ∇L at the transformed weights, each held fixed for the others. The
authors' own program differentiates through everything: W_2' is a function of W_1' by its input h'_1, and ∇L is taken
along that dependence too, twice through the pseudo-inverse. `through_weights=True` is the program's reading.

Beyond these choices it is written to be fast, so that the comparison is fair: no pseudo-inverse is computed that is not
used, the data's serves both the gradient and the update of its step, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symtele_cuda.activations import Activation

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PublishedTeleport:
    """The teleported weights, and ‖∇L‖ where each step of the ascent began."""

    weights: tuple[Tensor, ...]
    grad_norms: tuple[float, ...]


def published_teleport(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    loss: Loss,
    activation: Activation,
    steps: int,
    rate: float,
    through_weights: bool = False,
) -> PublishedTeleport:
    """Algorithm 1: `steps` times T = rate · ∇_T ‖∇L(T·W)‖² at T = 0, then W ← T·W (see `act`).

    Args:
        weights: W_1 … W_M in forward order, W_k of shape (d_k, d_{k-1}), no bias.
        x: (n, d_0), the data.
        y: whatever `loss` takes as targets.
        loss: (logits (n, d_M), y) → scalar.
        activation: σ, the same after every hidden layer.
        steps: number of ascent steps.
        rate: step length of the ascent.
        through_weights: which reading of ∇L, see the module's text.
    """
    current = tuple(weight.detach() for weight in weights)
    grad_norms = []
    for _ in range(steps):
        data_inverse = torch.linalg.pinv(x)
        gradients, squared_norm = ascent_gradient(current, x, y, data_inverse, loss, activation, through_weights)
        grad_norms.append(squared_norm**0.5)
        with torch.no_grad():
            current = act(current, [rate * gradient for gradient in gradients], x, data_inverse, activation)
    return PublishedTeleport(current, tuple(grad_norms))


def ascent_gradient(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    data_inverse: Tensor,
    loss: Loss,
    activation: Activation,
    through_weights: bool = False,
) -> tuple[tuple[Tensor, ...], float]:
    """∂/∂T_k of ‖∇L(T·W)‖² at T = 0 for every hidden layer k, by double backward; and ‖∇L‖² itself."""
    generators = [weight.new_zeros(weight.shape[0], weight.shape[0], requires_grad=True) for weight in weights[:-1]]
    transformed = act(weights, generators, x, data_inverse, activation)
    # W_2' is a function of W_1' through h'_1. Views are a point for ∇L with only the forward pass between itself and
    # the loss, so that ∇L is not the derivative along that dependence.
    point = list(transformed) if through_weights else [weight.view_as(weight) for weight in transformed]
    value = loss(forward(point, x, activation), y)
    gradients = torch.autograd.grad(value, point, create_graph=True)
    squared_norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    return torch.autograd.grad(squared_norm, generators), squared_norm.item()


def act(
    weights: Sequence[Tensor], generators: Sequence[Tensor], x: Tensor, data_inverse: Tensor, activation: Activation
) -> tuple[Tensor, ...]:
    """Equation 8 with g_k = I + T_k and g_k⁻¹ ≈ I − T_k, from the first layer to the last.

        W_k' = σ⁻¹(g_k σ(W_k g_{k-1}⁻¹ h'_{k-1})) h'_{k-1}⁺ for the hidden layers (g_0 = I),    W_M' = W_M g_m⁻¹

    with h'_0 = x and h'_k = σ(W_k' h'_{k-1}): a layer's input as the layers before it, already changed, produce it.
    """
    transformed: list[Tensor] = []
    weight, inputs = weights[0], x
    for layer, (generator, next_weight) in enumerate(zip(generators, weights[1:], strict=True)):
        if layer > 0:
            inputs = activation.forward(inputs @ transformed[-1].T)
        inverse = torch.linalg.pinv(inputs) if layer > 0 else data_inverse
        transformed.append(act_on_layer(weight, inputs, inverse, generator, activation))
        weight = torch.addmm(next_weight, next_weight, generator, alpha=-1)
    return (*transformed, weight)


def act_on_layer(weight: Tensor, inputs: Tensor, inverse: Tensor, generator: Tensor, activation: Activation) -> Tensor:
    """σ⁻¹((I + T) σ(W h)) h⁺ with h⁺ = `inverse`. Rows: inputs hᵀ (n, d_in), inverse (d_in, n), T (d_out, d_out)."""
    outputs = activation.forward(inputs @ weight.T)
    moved = torch.addmm(outputs, outputs, generator.T)
    return (inverse @ activation.inverse(moved)).T


def forward(weights: Sequence[Tensor], x: Tensor, activation: Activation) -> Tensor:
    """The logits of the chain of weights without biases, σ after each but the last."""
    for weight in weights[:-1]:
        x = activation.forward(x @ weight.T)
    return x @ weights[-1].T
