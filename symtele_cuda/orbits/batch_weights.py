"""The weights of a point of a batch's orbit, the gradient through them, and the logits of other samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.pinv import factorize
from ..model.network import Network, kernel
from ..model.problem import Problem
from ..model.surroundings import OtherSamples
from . import Hindrance
from .layers import BatchPoint, Fit, LayerGoal, LayerPlan, Match, form
from .passes import LayerGradient, input_gradient


def form_weights(
    problem: Problem, plans: Sequence[LayerPlan], matches: Sequence[Match], waypoint: Sequence[LayerGoal]
) -> tuple[Network, list[Tensor], tuple[Hindrance, ...]]:
    """The weights [R, b] + Eᵀ P(B) that turn the batch into the Y of a waypoint layer by layer, and what they produce.

    B is the activation that the new weights really produce, so that a layer mends the rounding of those before it,
    and an output layer that absorbs is corrected once more: then the logits keep the precision of the arithmetic, not
    of P. The pre-activations returned are those of the weights returned, not the targets. Where a hindrance holds,
    neither is of use.
    """
    network, products = problem.network, problem.network.products
    weights, biases, outputs = list[Tensor](), list[Tensor | None](), list[Tensor]()
    hindrances: list[Hindrance] = []
    targets = [*(goal.source for goal in waypoint[1:]), problem.outputs[-1]]
    as_at_start = True  # whether all layers so far have kept their weights, and so this one its input
    for plan, match, goal, target, own, weight, bias in zip(
        plans, matches, waypoint, targets, problem.outputs, network.weights, network.biases, strict=True
    ):
        # Asked of the plan and not of the tensors: those of a point that a CUDA graph has found are copies.
        if as_at_start and plan.fit is Fit.KEPT:
            weights.append(weight)
            biases.append(bias)
            outputs.append(own)
            continue
        inputs = match.inputs if as_at_start else plan.sigma.forward(outputs[-1])
        image = own if as_at_start and not plan.moves else None  # B Rᵀ + b where it is known
        weight = goal.reference
        if plan.fit is Fit.ABSORBED:
            known = match.factorization(bias is not None, products) if as_at_start else None
            found = factorize(inputs, bias is not None, products) if known is None else known
            hindrances.append((found.info != 0, "the activations of the batch lost their full row rank"))
            for _ in range(2 if target is targets[-1] else 1):
                image = F.linear(inputs, weight, bias) if image is None else image
                assert target is not None
                (weight, bias), image = found.update(weight, bias, target - image), None
        as_at_start = False
        weights.append(weight)
        biases.append(bias)
        outputs.append(F.linear(inputs, weight, bias))
    return replace(network, weights=tuple(weights), biases=tuple(biases)), outputs, tuple(hindrances)


def weights_of(network: Network, point: BatchPoint) -> Network:
    """The weights [R + AᵀB, b + Aᵀ1] of a point, to the precision of the search; `form_weights` has the full one."""
    weights, biases = [], []
    for at, target in zip(point.layers, point.targets, strict=True):
        coefficients, bias = at.whole_coefficients(target), at.bias
        if coefficients is not None:
            weights.append(form(point.products, at.inputs, at.reference, coefficients))
            biases.append(None if bias is None else bias + coefficients.sum(0))
        else:
            weights.append(at.reference)
            biases.append(bias)
    return replace(network, weights=tuple(weights), biases=tuple(biases))


def pull_back_weights(point: BatchPoint, formed: Network, by_weights: Network) -> list[LayerGradient]:
    """The gradient in the layers behind the first, from V = ∂f/∂W' (d_l×d_{l−1}) and v = ∂f/∂b', held as a network.

    It follows through W' = R + AᵀB, b' = b + Aᵀ1, A = K⁻¹E. `formed` are the point's weights.
    """
    products, gradients, by_source = point.products, list[LayerGradient](), None
    rows = zip(point.layers, point.targets, formed.weights, by_weights.weights, by_weights.biases, strict=True)
    for at, target, weight, by_weight, by_bias in rows:
        coefficients, by_residual = at.whole_coefficients(target), None
        if coefficients is not None:
            transposed = by_weight.T
            by_coefficients = at.inputs @ transposed if by_bias is None else torch.addmm(by_bias, at.inputs, transposed)
            by_residual = products.linear(at.inverse, by_coefficients)
        if at.source is not None:
            by_inputs = torch.zeros_like(at.inputs)
            if by_residual is not None:
                by_inputs = input_gradient(products, at, weight, by_weight, by_residual, None)
            references: tuple[tuple[Tensor, Tensor], ...] = ()
            if at.plan.fit is Fit.CARRIED:
                identity = torch.eye(by_weight.shape[0], dtype=by_weight.dtype, device=by_weight.device)
                references = ((identity, by_weight),)
            gradients.append(LayerGradient(by_inputs, by_source, references))
        by_source = by_residual
    return gradients


def predict(network: Network, point: BatchPoint, others: OtherSamples) -> Tensor:
    """The logits of `others` under a point's weights, without forming them.

    z_l = q_l R_lᵀ + b_l + (q_l B_lᵀ + 1) A_l, q_{l+1} = σ_l(z_l), q_0 = Q.
    """
    output, as_at_start = others.inputs, True
    for at, target, known in zip(point.layers, point.targets, others.outputs, strict=True):
        hidden = output if at.source is None else at.plan.sigma.forward(output)
        as_at_start = as_at_start and at.plan.fit is not Fit.CARRIED
        output = known if as_at_start else F.linear(hidden, at.reference, at.bias)
        if (coefficients := at.whole_coefficients(target)) is not None:
            overlap = others.overlap if at.source is None else kernel(hidden, at.inputs, at.bias is not None)
            output, as_at_start = point.products.linear(overlap, coefficients, source=output), False
    return output
