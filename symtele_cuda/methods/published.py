"""Teleportation as it was published: Algorithm 1 of Zhao, Dehmamy, Walters, Yu 2022 (arXiv 2205.10637).

A step moves the activations behind hidden layer k = 1..m by g_k = I + T_k. In rows, with H'_0 = X and W̃_1 = W_1:

    W_k' = teleport_layer(W̃_k, H'_{k−1}, g_k),   H'_k = σ(H'_{k−1} W_k'ᵀ + b_k'),   W̃_{k+1} = W_{k+1} g_k⁻¹,
    W_M' = W̃_M,   T_k = η ∂/∂T_k ‖∇L(W')‖² at T = 0,   then W ← W'

∇L is taken at W' with each weight held fixed for the others. No trial step is judged: a step is taken unless its result
is not finite, its batch cannot be matched, or an activation leaves the domain of σ⁻¹.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_int, check_name, check_number
from ..errors import TeleportError
from ..kernels import torch_kernels
from ..kernels.library import Products
from ..kernels.pinv import append_ones, factorize
from ..model.loss import BatchLoss
from ..model.network import Network, parameter_list
from ..operator.teleport_layer import ACTIONS, teleport_layer
from ..report import StepRecord

INVERSES = ("first_order", "exact")
TAKEN, ALL_STEPS = "accepted", "all steps taken"


@dataclass(frozen=True)
class Published:
    """The published rule: `steps` steps of fixed length along the gradient of ‖∇L‖² on the group.

    step_size: η. inverse: of g_k, "first_order" (I − T_k, the published one) or "exact". action: what a layer that
    moves keeps off the batch, "paper" (nothing, the published one) or "least_change" (W̃_k), see `teleport_layer`.
    """

    step_size: float
    steps: int = 10
    inverse: str = "first_order"
    action: str = "paper"

    group: ClassVar[str] = "gl"
    looks_ahead: ClassVar[bool] = False
    reads_step: ClassVar[bool] = False
    objective: ClassVar[str] = "grad_norm"
    usual_change: ClassVar[float] = math.inf  # the guards count for nothing

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", check_number("step_size", self.step_size, above=0.0))
        object.__setattr__(self, "steps", check_int("steps", self.steps, at_least=1))
        check_name("inverse", self.inverse, INVERSES)
        check_name("action", self.action, ACTIONS)


def climb(
    network: Network, samples: Tensor, loss: BatchLoss, rule: Published, moved: Sequence[bool]
) -> tuple[Network, tuple[StepRecord, ...], str]:
    """The network after the steps of `rule`, a record of each step, and why the climb ended.

    Args:
        samples: X (n×d_0), the inputs of the first layer.
        moved: of each weight layer, whether the activations behind it move; the batch must match the input of such a
            layer.
    """
    records: list[StepRecord] = []
    try:
        point = _Point.at(network, samples, loss, rule, moved)
        for _ in range(rule.steps):
            step = [None if slope is None else rule.step_size * slope for slope in point.gradient()]
            with torch.no_grad():
                candidate = act(point.network, samples, step, rule)
            point = _Point.at(candidate, samples, loss, rule, moved)
            network = candidate
            records.append(StepRecord(point.value.item(), rule.step_size, True, TAKEN))
    except TeleportError as error:
        records.append(StepRecord(math.nan, rule.step_size, False, str(error)))
        return network, tuple(records), f"step {len(records)} could not be taken: {error}"
    return network, tuple(records), ALL_STEPS


def act(network: Network, samples: Tensor, generators: Sequence[Tensor | None], rule: Published) -> Network:
    """The weights W' of the group elements g_k = I + T_k, T_k None where nothing moves behind a layer.

    Differentiable in T at T = 0.

    Raises:
        TeleportError: a layer cannot be moved; the text says why.
    """
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    inputs, before = samples, None
    for layer, (weight, bias, generator) in enumerate(zip(network.weights, network.biases, generators, strict=True)):
        if before is not None:
            weight = _times_inverse(weight, before, rule.inverse)
        if generator is not None:
            weight, bias = _move(network, layer, weight, bias, inputs, generator, rule.action)
        weights.append(weight)
        biases.append(bias)
        if any(later is not None for later in generators[layer + 1 :]):
            inputs = network.activations[layer].forward(F.linear(inputs, weight, bias))
        before = generator
    return replace(network, weights=tuple(weights), biases=tuple(biases))


@dataclass(frozen=True)
class _Point:
    """A network on the climb, and ‖∇L(W')‖² (float64) with its graph down to the generators T = 0."""

    network: Network
    generators: tuple[Tensor | None, ...]
    value: Tensor

    @classmethod
    @torch.enable_grad()
    def at(
        cls, network: Network, samples: Tensor, loss: BatchLoss, rule: Published, moved: Sequence[bool]
    ) -> _Point:
        """Raises TeleportError where a layer cannot be moved or ‖∇L‖² is not finite."""
        generators = tuple(
            weight.new_zeros(len(weight), len(weight), requires_grad=True) if moves else None
            for weight, moves in zip(network.weights, moved, strict=True)
        )
        transformed = act(network, samples, generators, rule)
        point = network.with_parameters([_held(parameter) for parameter in parameter_list(transformed)])
        gradients = torch.autograd.grad(
            loss(point.forward(samples)[-1]), parameter_list(point), create_graph=True, materialize_grads=True
        )
        value = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        if not math.isfinite(value.item()):
            raise TeleportError("‖∇L‖² is not finite")
        return cls(network, generators, value)

    def gradient(self) -> list[Tensor | None]:
        """∂/∂T_k of the value, None where T_k is."""
        present = [generator for generator in self.generators if generator is not None]
        found = iter(torch.autograd.grad(self.value, present, materialize_grads=True))
        return [None if generator is None else next(found) for generator in self.generators]


def _held(parameter: Tensor) -> Tensor:
    """The tensor as a point for ∇L: a later weight depends on an earlier one, and ∇L must not run along that."""
    return parameter.view_as(parameter) if parameter.requires_grad else parameter.detach().requires_grad_()


def _times_inverse(weight: Tensor, generator: Tensor, inverse: str) -> Tensor:
    """W (I + T)⁻¹, or W (I − T) to first order; not finite where I + T is singular."""
    if inverse == "first_order":
        return torch.addmm(weight, weight, generator, alpha=-1)
    return torch.linalg.solve_ex(_element(generator), weight, left=False).result


def _element(generator: Tensor) -> Tensor:
    """g = I + T."""
    return torch.eye(len(generator), dtype=generator.dtype, device=generator.device) + generator


def _move(
    network: Network,
    layer: int,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    generator: Tensor,
    action: str,
) -> tuple[Tensor, Tensor | None]:
    """W', b' of one layer. Where H needs a gradient, T must be 0: there the derivative in H is known."""
    backend = "torch" if network.products is torch_kernels else "cuda"
    try:
        new_weight, new_bias = teleport_layer(
            weight,
            inputs.detach(),
            _element(generator),
            bias,
            network.activations[layer],
            action=action,
            backend=backend,
        )
    except ValueError as error:  # what it says of the arguments is here said of a step
        raise TeleportError(str(error)) from error
    if action != "paper" or not inputs.requires_grad:
        return new_weight, new_bias
    change = _through_inputs(network.products, weight, bias, inputs)
    if new_bias is None:
        return new_weight + change, None
    return new_weight + change[:, :-1], new_bias + change[:, -1]


def _through_inputs(products: Products, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """Zeros [d_out×d̃] with the derivative of [W', b'] in H, which the operator takes for data, at g = I.

    There [W', b'] = W̃ Π(H̃) with action="paper", Π(H̃) = H̃ᵀ P, P = K⁻¹ H̃, K = H̃ H̃ᵀ, H̃ = [H, 1], W̃ = [W, b], and
    W̃ for "least_change", without such a derivative. With A = P W̃ᵀ and along a change D of H̃:

        d(W̃ Π) = (D (W̃ − W̃ Π)ᵀ − H̃ Dᵀ A)ᵀ P + Aᵀ D
    """
    held = inputs.detach()
    with torch.no_grad():
        factor = factorize(held, bias is not None, products).factor()
        extended = held if bias is None else append_ones(held)
        whole = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], dim=1)
        image = factor @ whole.T
        lost = whole - image.T @ extended
    zeros = inputs - held
    change = zeros if bias is None else F.pad(zeros, (0, 1))
    return (change @ lost.T - extended @ (change.T @ image)).T @ factor + image.T @ change
