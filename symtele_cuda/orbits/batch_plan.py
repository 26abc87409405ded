"""Which layers a batch can move by GL, and why not the others: the way from a problem to its `BatchOrbit`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import Activation
from ..errors import TeleportError
from ..kernels import graphs
from ..kernels.library import Products
from ..kernels.pinv import MAX_CONDITION, condition_from_gram, pinv_factor
from ..model.chain import Chain
from ..model.network import Network
from ..model.problem import Problem, layer_inputs
from ..report import NOT_ASKED_FOR, NOT_LOOKED_AT, TELEPORTED, LayerReport, frozen_text
from .layers import Fit, LayerPlan, Match, Move


@dataclass(frozen=True)
class _Batches:
    """The inputs B_l of all weight layers, whether these have biases, which are to be matched, and the products that
    compute with them."""

    inputs: tuple[Tensor, ...]
    biased: tuple[bool, ...]
    wanted: tuple[bool, ...]
    products: Products

    def fitting(self) -> list[int]:
        """The layers whose input is wanted and has no more rows than columns, the bias's among them."""
        return [k for k, b in enumerate(self.inputs) if self.wanted[k] and len(b) <= b.shape[1] + self.biased[k]]


@dataclass(frozen=True)
class _Factors:
    """K of every layer; K⁻¹ of those that fit, and a float64 tensor (2×fitting) of κ₂ and of `invert_grams`' infos."""

    grams: list[Tensor]
    inverses: list[Tensor]
    figures: Tensor


def match_inputs(problem: Problem, layers: Sequence[int] | None = None) -> list[Match]:
    """Gram matrix of every layer's input; inverse, rank and condition of those on both sides of the hidden `layers`
    (1..m; None: all)."""
    network = problem.network
    biased = tuple(bias is not None for bias in network.biases)
    wanted = tuple(layers is None or bool({k, k + 1} & {*layers}) for k in range(len(network)))
    inputs = tuple(layer_inputs(network, problem.samples, problem.outputs))
    batches = _Batches(inputs, biased, wanted, network.products)
    obstacle = graphs.solver_obstacle(network.products, len(problem.samples))
    factors, _ = graphs.run(batches, _factorize, obstacle)
    estimates, infos = factors.figures.tolist()
    found = {
        layer: (inverse, estimate if info == 0 else math.inf)
        for layer, inverse, estimate, info in zip(batches.fitting(), factors.inverses, estimates, infos, strict=True)
    }
    matches = []
    for layer, (batch, gram) in enumerate(zip(batches.inputs, factors.grams, strict=True)):
        inverse, condition = found.get(layer, (None, math.inf))
        if not wanted[layer]:
            matches.append(Match(batch, gram))
        elif condition <= MAX_CONDITION[batch.dtype]:
            matches.append(Match(batch, gram, inverse, len(batch), condition))
        else:
            factor = pinv_factor(batch, biased[layer])
            matches.append(Match(batch, gram, None, factor.rank, factor.condition))
    return matches


def _factorize(batches: _Batches) -> _Factors:
    """Without a value read back from the device."""
    products = batches.products
    grams, _ = products.grams(batches.inputs, batches.biased)
    fitting = [grams[layer] for layer in batches.fitting()]
    if not fitting:
        return _Factors(grams, [], grams[0].new_empty(2, 0))
    inverses, infos, _ = products.invert_grams(fitting)
    conditions = condition_from_gram(torch.stack(fitting), torch.stack(inverses))
    return _Factors(grams, inverses, torch.stack([conditions, infos.double()]))


def report_unmatched(problem: Problem) -> tuple[LayerReport, ...]:
    """A report on each hidden layer of a problem whose inputs nothing has looked at."""
    widths = [output.shape[1] for output in problem.outputs[:-1]]
    n = len(problem.samples)
    return tuple(
        LayerReport(index, n, width, rank=None, condition=None, teleported=False, reason=NOT_LOOKED_AT, group=None)
        for index, width in enumerate(widths, start=1)
    )


@dataclass(frozen=True)
class _Refusal:
    """Why the activations of a hidden layer do not move. frozen: whether a parameter would have to change that is."""

    reason: str
    frozen: bool = False


def make_plan(
    problem: Problem, matches: Sequence[Match], layers: Sequence[int] | None
) -> tuple[tuple[LayerPlan, ...], tuple[LayerReport, ...]]:
    """The plan that moves every hidden layer k of `layers` (None: all) that can be moved, and a report on each layer.

    Raises:
        TeleportError: none can be moved, or one that `layers` names cannot.
    """
    network = problem.network
    refusals = [
        _Refusal(NOT_ASKED_FOR) if layers is not None and index not in layers else _refuse(problem, matches, index)
        for index in range(1, len(network))
    ]
    plans = _plans(network, matches, refusals)
    for place, (plan, match) in enumerate(zip(plans[1:], matches[1:], strict=True)):
        if plan.edged and not plan.sigma.contains(match.inputs):
            edge = f"the domain {plan.sigma.domain} of the inverse of {plan.sigma}"
            refusals[place] = _Refusal(f"activations lie on the edge of {edge}")
    _check_enough(network, refusals, layers, len(problem.samples))
    reports = tuple(
        LayerReport(
            index=index,
            n=len(match.inputs),
            width=len(weight),
            rank=match.rank,
            condition=match.condition,
            teleported=refusal is None,
            reason=TELEPORTED if refusal is None else refusal.reason,
            group="gl" if refusal is None else None,
        )
        for index, (refusal, match, weight) in enumerate(zip(refusals, matches, network.weights, strict=False), start=1)
    )
    return _plans(network, matches, refusals), reports


def _plans(
    network: Network, matches: Sequence[Match], refusals: Sequence[_Refusal | None]
) -> tuple[LayerPlan, ...]:
    """The plan that moves the activations of the hidden layers that nothing refuses.

    A layer absorbs if the activations in front of it or behind it move, and its input is matched; where only those in
    front of it move, and it is not, it is carried.
    """
    in_front = [False, *(refusal is None for refusal in refusals)]
    behind = [*in_front[1:], False]
    matched = [match.gram_inverse is not None for match in matches]
    plans = []
    for before, moved, moves, has_match in zip(network.befores, in_front, behind, matched, strict=True):
        fit = Fit.ABSORBED if moves or (moved and has_match) else Fit.CARRIED if moved else Fit.KEPT
        move = Move.STILL
        if moved and before is not None:
            move = Move.TARGETS if before.bounded and fit is not Fit.CARRIED else Move.ACTIVATIONS
        plans.append(LayerPlan(fit, move, before))
    return tuple(plans)


def _refuse(problem: Problem, matches: Sequence[Match], index: int) -> _Refusal | None:
    """Why GL cannot move the activations of hidden layer `index` (1..m), or None."""
    for name in problem.frozen_beside(index):
        return _Refusal(frozen_text(name), frozen=True)
    reason = _why_not(problem.network, matches, index - 1)
    return None if reason is None else _Refusal(reason)


def check_matchable(chain: Chain, layers: Sequence[int] | None, n: int) -> None:
    """Raise ValueError if no batch of `n` samples lets GL move the hidden `layers` (1..m; None: any) of `chain`.

    It sees what needs no batch: frozen parameters, activations without inverse, layers too narrow.
    """
    hidden = range(1, len(chain.linears)) if layers is None else layers
    reasons = {index: _why_never(chain, index, n) for index in hidden}
    impossible = {index: reason for index, reason in reasons.items() if reason is not None}
    if not impossible or (layers is None and len(impossible) < len(reasons)):
        return
    details = "; ".join(f"hidden layer {index}: {reason}" for index, reason in impossible.items())
    raise ValueError(f"model can never be teleported by group='gl' with {n} samples: {details}")


def _why_never(chain: Chain, index: int, n: int) -> str | None:
    """Why GL moves the activations of hidden layer `index` (1..m) with no batch of n samples, or None."""
    for name in chain.frozen_beside(index):
        return frozen_text(name)
    return _why_never_gl(chain.activations[index - 1], chain.columns(index), n)


def _why_never_gl(activation: Activation, columns: int, n: int) -> str | None:
    """Why GL cannot move activations behind a layer whose input has `columns` columns, whatever the n samples."""
    if not activation.invertible:
        return f"{activation} has no inverse"
    if n > columns:
        return f"{n} samples cannot be independent in an input of {columns} columns (bias included)"
    return None


def _why_not(network: Network, matches: Sequence[Match], layer: int) -> str | None:
    """Why GL cannot move the activations behind weight layer `layer` (0-based), or None."""
    match = matches[layer]
    n, width = match.inputs.shape
    never = _why_never_gl(network.activations[layer], width + (network.biases[layer] is not None), n)
    if never is not None:
        return never
    if match.rank is not None and match.rank < n:
        return f"the {n} samples have rank {match.rank} in the layer's input"
    if match.gram_inverse is None:
        return f"the layer's input is ill-conditioned (κ ≈ {match.condition:.1e})"
    return None


def _check_enough(
    network: Network, refusals: Sequence[_Refusal | None], layers: Sequence[int] | None, n: int
) -> None:
    refused = {
        index: refusal
        for index, refusal in enumerate(refusals, start=1)
        if refusal is not None and refusal.reason != NOT_ASKED_FOR
    }
    if None in refusals and not (layers is not None and refused):
        return
    argument = "batch" if layers is None else "layers"
    details = "; ".join(f"hidden layer {index}: {refusal.reason}" for index, refusal in refused.items())
    advice = _advise([network.activations[index - 1] for index, refusal in refused.items() if not refusal.frozen])
    raise TeleportError(
        f"{argument}: expected samples that the layers' inputs can tell apart, and activations that have an inverse, "
        f"got a batch of n = {n} with {details}. {advice}."
    )


def _advise(refused: Sequence[Activation]) -> str:
    """What may help where layers with these activations, and none that is frozen, cannot be moved."""
    if not refused:
        return "Unfreeze it, or name other hidden layers in layers"
    advice = ["Use fewer or more varied samples"] if any(activation.invertible for activation in refused) else []
    if any(activation.positively_homogeneous for activation in refused):
        advice.append('group="positive_diagonal" moves ReLU, LeakyReLU and layers without activation on any batch')
    return "; ".join(advice)
