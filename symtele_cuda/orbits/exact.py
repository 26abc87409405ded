"""The orbit of a model's parameters under symmetries that keep its outputs on every input.

With p' = A_g p, linear in the parameters p of a site, the loss is the same at both, so that the gradient at p' follows
from that at p without a backward pass:

    ∇L(p') = A_g^{-T} ∇L(p) = A_{g*} ∇L(p),   g* = g^{-T} (1/g for the diagonal group)

‖∇L‖² along the orbit takes one backward pass for a whole search, and the loss after a gradient step one forward pass a
trial. Other objectives, and losses with weight terms, are differentiated through the action. A step is g ← (I + εT)g
with the gradient T on the group, for the diagonal group g ← exp(εT) g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TeleportError
from ..kernels.torch_kernels import dot
from ..measure import Measurement
from ..model.chain import Chain
from ..model.loss import Losses
from ..model.objective import LooksAhead, Objective, knows_gradients
from ..report import NOT_ASKED_FOR, TELEPORTED, LayerReport, frozen_text
from ..sites.action import POSITIVE_DIAGONAL, Axis, Parameters, Site
from . import Candidate, Evaluation, Hindrance

# The largest change of the logarithm of a scale, and the largest ‖εT‖_F of a matrix, in one step: beyond it a step to
# first order says nothing.
LARGEST_RATE = {1: 1.0, 3: 0.5}

Point = tuple[Tensor, ...]
"""The element g of every site."""


@dataclass(frozen=True)
class ExactDirection:
    """T of every site, and their Frobenius norm, a float64 scalar."""

    generators: tuple[Tensor, ...]
    norm: Tensor


@dataclass(frozen=True)
class ExactOrbit:
    """The orbit of `parameters`, those that sites change and all others that train.

    gradients: those of the loss at the start. losses: on the batch and elsewhere, as functions of the list of
    parameters in the order of `names`. written: the dtype in which the model holds its parameters.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    losses: Losses
    sites: tuple[Site, ...]
    objective: Objective
    written: torch.dtype

    @classmethod
    def make(
        cls,
        parameters: Parameters,
        losses: Losses,
        sites: Sequence[Site],
        objective: Objective,
        written: torch.dtype,
    ) -> ExactOrbit:
        """From the parameters by name, in the dtype of the search."""
        values = tuple(parameters.values())
        with torch.enable_grad():
            leaves = [value.detach().clone().requires_grad_() for value in values]
            found = torch.autograd.grad(losses.batch(leaves), leaves, allow_unused=True)
        gradients = [torch.zeros_like(value) if g is None else g for value, g in zip(values, found, strict=True)]
        return cls(tuple(parameters), values, tuple(gradients), losses, tuple(sites), objective, written)

    @property
    def parts(self) -> int:
        """How many parts of the weights a report counts: the modules that have parameters."""
        return len(self._modules())

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    # --- points -------------------------------------------------------------------------------------------------------

    def start(self) -> Point:
        parameters = dict(zip(self.names, self.parameters, strict=True))
        return tuple(site.identity(parameters) for site in self.sites)

    def scale(self, point: Point) -> Tensor:
        """√k over all sites: the norm of I."""
        units = sum(g.numel() if g.dim() == 1 else g.numel() // g.shape[-1] for g in point)
        return torch.tensor(float(units), dtype=torch.float64, device=point[0].device).sqrt()

    def waypoint(self, point: Point) -> Point:
        return point

    def figures(self, point: Point) -> list[Tensor]:
        """None: no other sample, and no noise, sees the action."""
        return []

    def at(self, point: Point, values: Sequence[Tensor]) -> list[Tensor]:
        """`values`, one for each parameter, moved by the point as the parameters are."""
        moved = dict(zip(self.names, values, strict=True))
        for site, g in zip(self.sites, point, strict=True):
            moved |= site.act(moved, g)
        return list(moved.values())

    def gradients_at(self, point: Point) -> list[Tensor]:
        """∇L at the point."""
        dual = tuple(site.contragredient(g) for site, g in zip(self.sites, point, strict=True))
        return self.at(dual, self.gradients)

    # --- the objective ------------------------------------------------------------------------------------------------

    def evaluate(self, point: Point) -> Evaluation:
        with torch.enable_grad():
            generators = [torch.zeros_like(g, requires_grad=True) for g in point]
            value = self._value(tuple(_stepped(g, t) for g, t in zip(point, generators, strict=True)))

        def gradient() -> tuple[Tensor, ...]:
            found = torch.autograd.grad(value, generators, allow_unused=True)
            return tuple(torch.zeros_like(t) if d is None else d for t, d in zip(generators, found, strict=True))

        return Evaluation(value.detach(), gradient)

    def _value(self, point: Point) -> Tensor:
        parameters = self.at(point, self.parameters)
        if knows_gradients(self.objective) and not self.losses.weight_terms:  # these are not the same at p and p'
            return self.objective.value_given(self.losses.batch, parameters, self.gradients_at(point))
        # ∇L counts parameters that no site moves as well.
        leaves = [p if p.requires_grad else p.detach().clone().requires_grad_() for p in parameters]
        return self.objective.value(self.losses.batch, leaves)

    # --- steps --------------------------------------------------------------------------------------------------------

    def direction(self, point: Point, evaluation: Evaluation) -> ExactDirection:
        generators = evaluation.gradient()
        squares = [dot(generator, generator) for generator in generators]
        return ExactDirection(generators, torch.stack(squares).sum().sqrt())

    def limit(self, point: Point, direction: ExactDirection, size: Tensor) -> Tensor:
        """`size`, shortened where one step would change an element too much."""
        largest = size.abs()
        for generator in direction.generators:
            scales = generator.dim() == 1
            length = generator.abs().max() if scales else torch.linalg.matrix_norm(generator).max()
            largest = torch.minimum(largest, LARGEST_RATE[generator.dim()] / length.double())
        return torch.sign(size) * largest

    def advance(
        self, point: Point, direction: ExactDirection, size: Tensor
    ) -> tuple[Point, tuple[Hindrance, ...]]:
        pairs = zip(point, direction.generators, strict=True)
        return tuple(_stepped(g, size.to(g.dtype) * generator) for g, generator in pairs), ()

    # --- weights ------------------------------------------------------------------------------------------------------

    def weights(self, waypoint: Point) -> Candidate:
        """The parameters of a point, rounded to the model's dtype and measured there."""
        parameters = [moved.to(self.written).to(moved.dtype) for moved in self.at(waypoint, self.parameters)]
        pairs = list(zip(self.parameters, parameters, strict=True))
        parts = [[pairs[place] for place in places] for places in self._modules()]
        return Candidate(parameters, self.measure(parameters), torch.stack([*map(_change, parts), _change(pairs)]), ())

    def _modules(self) -> list[list[int]]:
        """The places of the parameters, module by module."""
        found: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            found.setdefault(name.rpartition(".")[0], []).append(place)
        return [*found.values()]

    def measure(self, parameters: Sequence[Tensor]) -> Tensor:
        """The loss, the objective and ‖∇L‖ there; with a holdout its loss, and that where the objective looks ahead."""
        with torch.enable_grad():
            leaves = [value.detach().clone().requires_grad_() for value in parameters]
            loss = self.losses.batch(leaves)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            ahead = self.objective.ahead(self.losses.batch, leaves) if isinstance(self.objective, LooksAhead) else None
            value = self.objective.value(self.losses.batch, leaves) if ahead is None else self.losses.batch(ahead)
        squares = [dot(gradient, gradient) for gradient in gradients if gradient is not None]
        values = [loss, self.losses.data(parameters), value, torch.stack(squares).sum().sqrt()]
        if self.losses.holdout is not None:
            values += [self.losses.holdout(where) for where in (parameters, ahead) if where is not None]
        return torch.stack([value.detach().double() for value in values])

    def measure_start(self) -> Tensor:
        return self.measure(self.parameters)

    def read(self, values: Tensor) -> Measurement:
        """The numbers of `measure`, in one transfer."""
        loss, data_loss, objective, gradient_norm, *holdout = values.tolist()
        return Measurement(loss, data_loss, objective, gradient_norm, None, *holdout)


def _stepped(g: Tensor, generator: Tensor) -> Tensor:
    """(I + T) g, or for scales exp(T) g."""
    return g * generator.exp() if g.dim() == 1 else g + generator @ g


def _change(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """‖new − old‖ / ‖old‖ of all pairs (old, new) together; 0 where nothing has changed."""
    change = torch.stack([dot(new - old, new - old) for old, new in pairs]).sum().sqrt()
    return torch.where(change == 0, change, change / torch.stack([dot(old, old) for old, _ in pairs]).sum().sqrt())


def plan_scales(
    chain: Chain, n: int, layers: Sequence[int] | None
) -> tuple[list[Site], tuple[LayerReport, ...]]:
    """The `Scales` of the hidden layers k of `layers` (1..m; None: all) of a chain, and a report on each layer for a
    batch of n samples.

    Raises:
        TeleportError: there are none, or not those of one that `layers` names.
    """
    sites, refused, reports = list[Site](), dict[int, str](), list[LayerReport]()
    for index, sigma in enumerate(chain.activations, start=1):
        reason = TELEPORTED
        if layers is not None and index not in layers:
            reason = NOT_ASKED_FOR
        elif frozen := chain.frozen_beside(index):
            reason = refused[index] = frozen_text(frozen[0])
        elif not sigma.positively_homogeneous:
            reason = refused[index] = f"{sigma} is not positively homogeneous"
        moves = reason == TELEPORTED
        if moves:
            sites.append(_scales_of(chain, index))
        width = len(chain.linears[index - 1].weight)
        group = "positive_diagonal" if moves else None
        reports.append(LayerReport(index, n, width, None, None, moves, reason, group))
    if not sites or (layers is not None and refused):
        details = "; ".join(f"hidden layer {index}: {reason}" for index, reason in refused.items())
        raise TeleportError(
            f"{'group' if layers is None else 'layers'}: expected positively homogeneous activations (ReLU, LeakyReLU "
            f'or none) between weights that are not frozen, got {details}. Use group="gl", or other layers.'
        )
    return sites, tuple(reports)


def _scales_of(chain: Chain, index: int) -> Site:
    """The scales of hidden layer `index` (1..m) of a chain."""
    up, down = chain.names[index - 1 : index + 1]
    linear = chain.linears[index - 1]
    before = [f"{up}.weight", *([] if linear.bias is None else [f"{up}.bias"])]
    axes = (*(Axis(name, 0) for name in before), Axis(f"{down}.weight", 1, power=-1))
    return Site("Scales", POSITIVE_DIAGONAL, axes, len(linear.weight))
