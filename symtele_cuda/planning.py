"""Which layers a batch can move, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .action import Match, Network, Plan
from .errors import TeleportError
from .pinv import MAX_CONDITION, condition_from_gram, gram, invert_gram, pinv_factor
from .problem import Problem, layer_inputs
from .report import LayerReport

NOT_ASKED_FOR = "not asked for"
TELEPORTED = "teleported"


def match_inputs(problem: Problem) -> list[Match]:
    """Gram matrix, inverse, rank and condition of every layer's input."""
    network, matches = problem.network, []
    for values, bias in zip(layer_inputs(network, problem.samples, problem.outputs), network.biases, strict=True):
        has_bias = bias is not None
        exact = gram(values, has_bias)
        inverse = invert_gram(exact) if len(values) <= values.shape[1] + has_bias else None
        condition = math.inf if inverse is None else condition_from_gram(exact, inverse)
        if condition <= MAX_CONDITION[values.dtype]:
            matches.append(Match(values, exact, inverse, len(values), condition))
        else:
            factor = pinv_factor(values, has_bias)
            matches.append(Match(values, exact, None, factor.rank, factor.condition))
    return matches


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
