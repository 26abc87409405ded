"""Which layers a batch can move, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import graphs
from .action import Match, Network, Plan
from .errors import TeleportError
from .kernels import Products
from .pinv import MAX_CONDITION, condition_from_gram, pinv_factor
from .problem import Problem, layer_inputs
from .report import LayerReport

NOT_ASKED_FOR = "not asked for"
TELEPORTED = "teleported"


@dataclass(frozen=True)
class _Batches:
    """The inputs B_l of all weight layers, whether these have biases, and the products that compute with them."""

    inputs: tuple[Tensor, ...]
    biased: tuple[bool, ...]
    products: Products

    def tensors(self) -> list[Tensor]:
        return list(self.inputs)

    def with_tensors(self, tensors: Sequence[Tensor]) -> _Batches:
        return replace(self, inputs=tuple(tensors))

    def signature(self) -> Hashable:
        return self.biased, id(self.products)

    def obstacle(self) -> str | None:
        return graphs.solver_obstacle(self.products, len(self.inputs[0]))

    def fitting(self) -> list[int]:
        """The layers whose input has no more rows than columns, the bias's among them."""
        return [k for k, b in enumerate(self.inputs) if len(b) <= b.shape[1] + self.biased[k]]


@dataclass(frozen=True)
class _Factors:
    """K of every layer; K⁻¹ of those that fit, and a float64 tensor (2×fitting) of κ₂ and of `invert_gram`'s info."""

    grams: list[Tensor]
    inverses: list[Tensor]
    figures: Tensor


def match_inputs(problem: Problem) -> list[Match]:
    """Gram matrix, inverse, rank and condition of every layer's input."""
    network = problem.network
    biased = tuple(bias is not None for bias in network.biases)
    batches = _Batches(tuple(layer_inputs(network, problem.samples, problem.outputs)), biased, network.products)
    factors, _ = graphs.run(batches, _factorize)
    estimates, infos = factors.figures.tolist()
    found = {
        layer: (inverse, estimate if info == 0 else math.inf)
        for layer, inverse, estimate, info in zip(batches.fitting(), factors.inverses, estimates, infos, strict=True)
    }
    matches = []
    for layer, (batch, gram) in enumerate(zip(batches.inputs, factors.grams, strict=True)):
        inverse, condition = found.get(layer, (None, math.inf))
        if condition <= MAX_CONDITION[batch.dtype]:
            matches.append(Match(batch, gram, inverse, len(batch), condition))
        else:
            factor = pinv_factor(batch, biased[layer])
            matches.append(Match(batch, gram, None, factor.rank, factor.condition))
    return matches


def _factorize(batches: _Batches) -> _Factors:
    """Without a value read back from the device."""
    products = batches.products
    grams = [products.gram(batch, bias)[0] for batch, bias in zip(batches.inputs, batches.biased, strict=True)]
    fitting = [grams[layer] for layer in batches.fitting()]
    if not fitting:
        return _Factors(grams, [], grams[0].new_empty(2, 0))
    inverses, infos = zip(*map(products.invert_gram, fitting), strict=True)
    conditions = condition_from_gram(torch.stack(fitting), torch.stack(inverses))
    return _Factors(grams, list(inverses), torch.stack([conditions, torch.stack(infos).double()]))


def make_plan(
    problem: Problem,
    matches: Sequence[Match],
    layers: Sequence[int] | None,
    *,
    action: str,
    inverse: str,
    group_steps: bool,
) -> tuple[Plan, tuple[LayerReport, ...]]:
    """The plan that moves every hidden layer k of `layers` (None: all) that can be moved, and a report on each layer.

    Raises:
        TeleportError: none can be moved, or one that `layers` names cannot.
    """
    network = problem.network
    matched = [match.gram_inverse is not None for match in matches]
    reasons = [
        NOT_ASKED_FOR if layers is not None and index not in layers else _why_not_matched(network, matches, index - 1)
        for index in range(1, len(network))
    ]

    def plan_for(reasons: Sequence[str | None]) -> Plan:
        moved = [*(reason is None for reason in reasons), False]
        return Plan.make(network, moved, matched, action=action, inverse=inverse, group_steps=group_steps)

    plan = plan_for(reasons)
    reasons = [reason or _why_no_step(network, plan, matches, layer) for layer, reason in enumerate(reasons)]
    _check_enough(reasons, layers, len(problem.samples))
    reports = tuple(
        LayerReport(
            index=layer + 1,
            n=len(match.inputs),
            width=network.weights[layer].shape[0],
            rank=match.rank,
            condition=match.condition,
            teleported=reason is None,
            reason=reason or TELEPORTED,
        )
        for layer, (reason, match) in enumerate(zip(reasons, matches, strict=False))
    )
    return plan_for(reasons), reports


def _why_not_matched(network: Network, matches: Sequence[Match], layer: int) -> str | None:
    """Why the batch cannot be matched as the input of weight layer `layer` (0-based), or None."""
    match = matches[layer]
    n, width = match.inputs.shape
    columns = width + (network.biases[layer] is not None)
    if n > columns:
        return f"{n} samples cannot be independent in an input of {columns} columns (bias included)"
    if match.rank < n:
        return f"the {n} samples have rank {match.rank} in the layer's input"
    if match.gram_inverse is None:
        return f"the layer's input is ill-conditioned (κ ≈ {match.condition:.1e})"
    return None


def _why_no_step(network: Network, plan: Plan, matches: Sequence[Match], layer: int) -> str | None:
    """Why the activations behind `layer` cannot move though its input is matched, or None."""
    activation = network.activations[layer]
    if plan.along_targets[layer] or not activation.bounded or activation.contains(matches[layer + 1].inputs):
        return None
    return f"activations lie on the edge of the domain {activation.domain} of the inverse of {activation}"


def _check_enough(reasons: Sequence[str | None], layers: Sequence[int] | None, n: int) -> None:
    refused = [(index, reason) for index, reason in enumerate(reasons, start=1) if reason not in (None, NOT_ASKED_FOR)]
    if None in reasons and not (layers is not None and refused):
        return
    details = "; ".join(f"hidden layer {index}: {reason}" for index, reason in refused)
    raise TeleportError(
        f"{'batch' if layers is None else 'layers'}: expected samples that the layers' inputs can tell apart, "
        f"got a batch of n = {n} with {details}. Use fewer or more varied samples."
    )
