"""Which layers a batch can move, by which group, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

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
from ..report import LayerReport
from ..settings import AUTO, GL, POSITIVE_DIAGONAL
from .action import Match, Plan

NOT_ASKED_FOR = "not asked for"
TELEPORTED = "teleported"
NOT_LOOKED_AT = "no search"


@dataclass(frozen=True)
class _Batches:
    """The inputs B_l of all weight layers, whether these have biases, which are to be matched, and the products that
    compute with them."""

    inputs: tuple[Tensor, ...]
    biased: tuple[bool, ...]
    wanted: tuple[bool, ...]
    products: Products

    def tensors(self) -> list[Tensor]:
        return list(self.inputs)

    def with_tensors(self, tensors: Sequence[Tensor]) -> _Batches:
        return replace(self, inputs=tuple(tensors))

    def signature(self) -> Hashable:
        return self.biased, self.wanted, id(self.products)

    def obstacle(self) -> str | None:
        return graphs.solver_obstacle(self.products, len(self.inputs[0]))

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
    wanted = tuple(layers is None or k in layers or k + 1 in layers for k in range(len(network)))
    inputs = tuple(layer_inputs(network, problem.samples, problem.outputs))
    batches = _Batches(inputs, biased, wanted, network.products)
    factors, _ = graphs.run(batches, _factorize)
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


def observe_inputs(problem: Problem) -> list[Match]:
    """The Gram matrix of every layer's input, for a group that needs no match: nothing is factorized."""
    network, inputs = problem.network, layer_inputs(problem.network, problem.samples, problem.outputs)
    grams, _ = network.products.grams(inputs, [bias is not None for bias in network.biases])
    return [Match(batch, gram) for batch, gram in zip(inputs, grams, strict=True)]


def report_unmatched(problem: Problem) -> tuple[LayerReport, ...]:
    """A report on each hidden layer of a problem whose inputs nothing has looked at."""
    widths = [output.shape[1] for output in problem.outputs[:-1]]
    n = len(problem.samples)
    return tuple(
        LayerReport(index, n, width, rank=None, condition=None, teleported=False, reason=NOT_LOOKED_AT, group=None)
        for index, width in enumerate(widths, start=1)
    )


@dataclass(frozen=True)
class _Choice:
    """What moves the activations behind one hidden layer, "gl" or "positive_diagonal", or None and why.

    frozen: whether it is that a parameter is frozen which would have to change.
    """

    group: str | None
    reason: str = TELEPORTED
    frozen: bool = False

    @property
    def refused(self) -> bool:
        """Whether the layer was asked for and cannot be moved."""
        return self.group is None and self.reason != NOT_ASKED_FOR


def make_plan(
    problem: Problem,
    matches: Sequence[Match],
    layers: Sequence[int] | None,
    *,
    action: str,
    inverse: str,
    group_steps: bool,
    group: str = GL,
) -> tuple[Plan, tuple[LayerReport, ...]]:
    """The plan that moves every hidden layer k of `layers` (None: all) that can be moved, and a report on each layer.

    group: which group moves them; "auto" is GL where it can, and the positive diagonal group elsewhere.

    Raises:
        TeleportError: none can be moved, or one that `layers` names cannot.
    """
    network = problem.network
    matched = [match.gram_inverse is not None for match in matches]
    choices = [
        _Choice(None, NOT_ASKED_FOR)
        if layers is not None and index not in layers
        else _choose_group(problem, matches, index - 1, group)
        for index in range(1, len(network))
    ]

    def plan_for(choices: Sequence[_Choice]) -> Plan:
        by_gl, scaled = ([*(choice.group == name for choice in choices), False] for name in (GL, POSITIVE_DIAGONAL))
        return Plan.make(
            network, by_gl, matched, scaled=scaled, action=action, inverse=inverse, group_steps=group_steps
        )

    plan = plan_for(choices)
    for layer, choice in enumerate(choices):
        if choice.group == GL and (reason := _why_no_step(network, plan, matches, layer)) is not None:
            choices[layer] = _Choice(None, reason)
    _check_enough(network, choices, layers, len(problem.samples), group)
    reports = tuple(
        LayerReport(
            index=layer + 1,
            n=len(match.inputs),
            width=network.weights[layer].shape[0],
            rank=match.rank,
            condition=match.condition,
            teleported=choice.group is not None,
            reason=choice.reason,
            group=choice.group,
        )
        for layer, (choice, match) in enumerate(zip(choices, matches, strict=False))
    )
    return plan_for(choices), reports


def _choose_group(problem: Problem, matches: Sequence[Match], layer: int, group: str) -> _Choice:
    """The first group that can move the activations behind weight layer `layer` (0-based), of those that `group` is."""
    network, reasons = problem.network, []
    for name in problem.frozen[layer : layer + 2]:
        if name is not None:
            return _Choice(None, _frozen(name), frozen=True)
    for name in _groups(group):
        by_gl = name == GL
        reason = _why_not_gl(network, matches, layer) if by_gl else _why_not_scaled(network.activations[layer])
        if reason is None:
            return _Choice(name)
        reasons.append(reason)
    return _Choice(None, ", and ".join(reasons))


def check_possible(chain: Chain, layers: Sequence[int] | None, group: str, n: int) -> None:
    """Raise ValueError if no batch of `n` samples lets `group` move the hidden `layers` (1..m; None: any) of `chain`.

    It sees what needs no batch: frozen parameters, activations without inverse, layers too narrow.
    """
    hidden = range(1, len(chain.linears)) if layers is None else layers
    reasons = {index: _why_never(chain, index - 1, group, n) for index in hidden}
    impossible = {index: reason for index, reason in reasons.items() if reason is not None}
    if not impossible or (layers is None and len(impossible) < len(reasons)):
        return
    details = "; ".join(f"hidden layer {index}: {reason}" for index, reason in impossible.items())
    raise ValueError(f"model can never be teleported by group={group!r} with {n} samples: {details}")


def _why_never(chain: Chain, layer: int, group: str, n: int) -> str | None:
    """Why `group` moves the activations behind weight layer `layer` with no batch of n samples, or None."""
    for name in (chain.frozen(layer), chain.frozen(layer + 1)):
        if name is not None:
            return _frozen(name)
    activation, linear = chain.activations[layer], chain.linears[layer]
    by_gl = _why_never_gl(activation, linear.weight.shape[1] + (linear.bias is not None), n)
    found = {GL: by_gl, POSITIVE_DIAGONAL: _why_not_scaled(activation)}
    reasons = [found[name] for name in _groups(group)]
    return None if None in reasons else ", and ".join(reason for reason in reasons if reason is not None)


def _groups(group: str) -> tuple[str, ...]:
    """The groups that `group` stands for, in the order in which they are tried."""
    return (GL, POSITIVE_DIAGONAL) if group == AUTO else (group,)


def _frozen(name: str) -> str:
    return f"it would change {name!r}, which is frozen"


def _why_never_gl(activation: Activation, columns: int, n: int) -> str | None:
    """Why GL cannot move activations behind a layer whose input has `columns` columns, whatever the n samples."""
    if not activation.invertible:
        return f"{activation} has no inverse"
    if n > columns:
        return f"{n} samples cannot be independent in an input of {columns} columns (bias included)"
    return None


def _why_not_gl(network: Network, matches: Sequence[Match], layer: int) -> str | None:
    """Why GL cannot move the activations behind weight layer `layer`, or None."""
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


def _why_not_scaled(activation: Activation) -> str | None:
    """Why the positive diagonal group does not act on the activations behind a layer with `activation`, or None."""
    return None if activation.positively_homogeneous else f"{activation} is not positively homogeneous"


def _why_no_step(network: Network, plan: Plan, matches: Sequence[Match], layer: int) -> str | None:
    """Why GL cannot move the activations behind `layer` though its input is matched, or None."""
    activation = network.activations[layer]
    if plan.along_targets[layer] or not activation.bounded or activation.contains(matches[layer + 1].inputs):
        return None
    return f"activations lie on the edge of the domain {activation.domain} of the inverse of {activation}"


# What `teleport_mlp`'s `group` expects of a batch and a model.
_EXPECTED = {
    GL: "samples that the layers' inputs can tell apart, and activations that have an inverse",
    POSITIVE_DIAGONAL: "positively homogeneous activations (ReLU, LeakyReLU or none)",
    AUTO: "samples that the layers' inputs can tell apart, or positively homogeneous activations",
}


def _check_enough(
    network: Network, choices: Sequence[_Choice], layers: Sequence[int] | None, n: int, group: str
) -> None:
    refused = [(index, choice) for index, choice in enumerate(choices, start=1) if choice.refused]
    if any(choice.group is not None for choice in choices) and not (layers is not None and refused):
        return
    argument = "layers" if layers is not None else "group" if group == POSITIVE_DIAGONAL else "batch"
    details = "; ".join(f"hidden layer {index}: {choice.reason}" for index, choice in refused)
    advice = _advise([network.activations[index - 1] for index, choice in refused if not choice.frozen], group)
    raise TeleportError(f"{argument}: expected {_EXPECTED[group]}, got a batch of n = {n} with {details}. {advice}.")


def _advise(refused: Sequence[Activation], group: str) -> str:
    """What may help where layers with these activations, and none that is frozen, cannot be moved by `group`."""
    if not refused:
        return "Unfreeze it, or name other hidden layers in layers"
    if group == POSITIVE_DIAGONAL:
        return 'Use group="gl"'
    advice = ["Use fewer or more varied samples"] if any(activation.invertible for activation in refused) else []
    if group == GL and any(activation.positively_homogeneous for activation in refused):
        advice.append('group="positive_diagonal" moves ReLU, LeakyReLU and layers without activation on any batch')
    return "; ".join(advice)
