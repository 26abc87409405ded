"""What a teleport optimises over the group.

An objective is any object with an attribute `maximise` and a method `value(loss_of, parameters)`:

    maximise                       True to ascend, False to descend
    value(loss_of, parameters)     the objective as a differentiable scalar tensor; `parameters` is the list of the
                                   network's weights and biases in the order of `model.parameters()` of its Linear
                                   layers, each with requires_grad, and `loss_of(parameters)` the loss on the batch.
                                   Gradients inside must be taken with create_graph=True.

That is the general path: the weights are formed at every step. `GradNorm` and `Lookahead` have a fast path besides, in
activation space (`evaluate`), used for losses that depend on the parameters only through the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from ..checks import check_number
from ..kernels.library import Linear, Products, together
from ..kernels.pinv import is_thin
from ..model.loss import BatchLoss, LossOfParameters
from ..model.network import Network
from ..orbits.action import Gradient, Plan, State, add
from ..orbits.activation_space import (
    Backpropagation,
    Evaluation,
    Seeds,
    backpropagate,
    pull_back,
    squared_gradient_norm,
)

# What ∂f/∂E R costs through ∂f/∂A R, in products with n×n matrices; rounded up, for each is one more call.
IMAGE_PRODUCTS = 4


@runtime_checkable
class Objective(Protocol):
    """See the module's text."""

    @property
    def maximise(self) -> bool: ...

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor: ...


@runtime_checkable
class LooksAhead(Objective, Protocol):
    """An objective that is the loss at other parameters, those that a step from the given ones would reach.

    ahead(loss_of, parameters)     these parameters, as tensors differentiable in the given ones
    """

    def ahead(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class GradNorm:
    """f = ‖∇L‖², to be maximised (Zhao et al. 2022, arXiv 2205.10637, Algorithm 1)."""

    maximise = True

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()

    def evaluate(self, network: Network, plan: Plan, state: State, loss: BatchLoss, output_delta: Tensor) -> Evaluation:
        """f = Σ_l ⟨δ_l δ_lᵀ, K_l⟩ and its gradient."""
        backward = backpropagate(network, state, output_delta)
        value, derivatives, by_back = squared_gradient_norm(network, state, backward.deltas)

        def gradient() -> Gradient:
            products, seeds = network.products, Seeds(deltas=dict(enumerate(derivatives)))
            moved = (layer for layer in range(1, len(network)) if plan.moved[layer - 1])
            deltas = {layer: backward.deltas[layer] for layer in moved}
            is_formed = {layer: state.formed[layer] is not None for layer in deltas}
            found = together(
                products,
                *(
                    Linear(delta.T, state.inputs[layer]) if is_formed[layer] else Linear(delta, delta.T)
                    for layer, delta in deltas.items()
                ),
            )
            for layer, product in zip(deltas, found, strict=True):
                seed = seeds.delta_images if is_formed[layer] else seeds.grams
                seed[layer] = product
            return pull_back(network, plan, state, backward, seeds, by_back)

        return Evaluation(value, gradient)


@dataclass(frozen=True)
class Lookahead:
    """f = L(θ − η∇L(θ)), the loss after one gradient step of length η = `rate` on the same batch, to be minimised.

    rate: a number > 0; the search on a device holds it as a scalar tensor there.
    """

    rate: float | Tensor

    maximise = False

    def __post_init__(self) -> None:
        if not isinstance(self.rate, Tensor):
            check_number("rate", self.rate, above=0.0)

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        return loss_of(self.ahead(loss_of, parameters))

    def ahead(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> list[Tensor]:
        """θ − η∇L(θ)."""
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        return [p - self.rate * gradient for p, gradient in zip(parameters, gradients, strict=True)]

    def evaluate(self, network: Network, plan: Plan, state: State, loss: BatchLoss, output_delta: Tensor) -> Evaluation:
        """f through z_0 = Y_0 − η K_0 δ_0,  z_l = q_l R_lᵀ + r_l + (q_l B_lᵀ + 1)(A_l − η δ_l),  q_{l+1} = σ_l(z_l).

        The first line holds because layer 0 produces Y_0 whatever its weights; X enters through its Gram matrix alone.
        """
        backward = backpropagate(network, state, output_delta * -self.rate)  # −η δ_l, all that f needs
        trial = _step(network, state, backward)
        value, output_gradient = loss.value_and_gradient(trial.outputs[-1])

        def gradient() -> Gradient:
            seeds, by_back = _seeds(network, plan, state, trial, output_gradient)
            return pull_back(network, plan, state, backward, seeds, by_back)

        return Evaluation(value, gradient)


def has_fast_path(objective: Objective) -> TypeGuard[GradNorm | Lookahead]:
    """Whether activation space knows the objective: by its type itself, for a subclass has a value of its own."""
    return type(objective) in (GradNorm, Lookahead)


@dataclass(frozen=True)
class _TrialStep:
    """z_l of every layer, and every layer but the first."""

    outputs: list[Tensor]
    layers: dict[int, SteppedLayer]


def _step(network: Network, state: State, backward: Backpropagation) -> _TrialStep:
    """The forward pass of a lookahead, given −η δ_l."""
    step = backward.deltas
    outputs = [network.products.linear(state.grams[0], step[0], source=state.targets[0])]
    layers = dict[int, SteppedLayer]()
    for layer in range(1, len(network)):
        hidden = network.activations[layer - 1].forward(outputs[-1])
        change = add(step[layer], state.coefficients[layer])
        assert change is not None
        layers[layer] = SteppedLayer.make(network, state, layer, hidden, change)
        outputs.append(layers[layer].output())
    return _TrialStep(outputs, layers)


def _seeds(
    network: Network, plan: Plan, state: State, trial: _TrialStep, output_gradient: Tensor
) -> tuple[Seeds, Tensor]:
    """The reverse pass of `_step`, and ∂f/∂δ_0 ⊙ σ'(Y_0)."""
    seeds, adjoint = Seeds(), output_gradient
    for layer in range(len(network) - 1, 0, -1):
        stepped, reference, moved = trial.layers[layer], state.references[layer], plan.moved[layer - 1]
        with_image = reference is not None and moved and IMAGE_PRODUCTS * len(adjoint) <= len(reference)
        by_hidden, by_change, by_inputs, image = stepped.pull_back(adjoint, moved, with_image)
        if image is not None:
            seeds.coefficient_images[layer] = image
        seeds.coefficients[layer] = by_change
        seeds.deltas[layer] = by_change
        if by_inputs is not None:
            seeds.inputs[layer] = by_inputs
        if plan.changes_reference(layer):
            seeds.references[layer] = (adjoint, stepped.hidden)
        if plan.changes_offset(layer) and network.biases[layer] is not None:
            seeds.offsets[layer] = adjoint.sum(0)
        adjoint = network.activations[layer - 1].pull_back(by_hidden, trial.outputs[layer - 1])
    seeds.targets[0] = adjoint
    ((seeds.deltas[0], by_back),) = together(network.products, Linear(state.grams[0], adjoint, mask=state.slopes[0]))
    return seeds, by_back


@dataclass(frozen=True)
class SteppedLayer:
    """z = q Rᵀ + r + (q Bᵀ + 1) C with q (`hidden`) and B (`inputs`), n×d, and C (`change`), n×c, and its reverse mode,
    in the cheaper order of the products.

    image is q Rᵀ + r, None where R is zero; inner is q Bᵀ + 1 (n×n), or Cᵀ B (c×d) where C is thin.
    """

    products: Products
    hidden: Tensor
    inputs: Tensor
    change: Tensor
    reference: Tensor | None
    image: Tensor | None
    bias: bool
    thin: bool
    inner: Tensor

    @classmethod
    def make(cls, network: Network, state: State, layer: int, hidden: Tensor, change: Tensor) -> SteppedLayer:
        inputs, reference = state.inputs[layer], state.references[layer]
        thin, bias = is_thin(change), network.biases[layer] is not None
        inner, image = together(
            network.products,
            Linear(change.T, inputs) if thin else Linear(hidden, inputs.T),
            None if reference is None else Linear(hidden, reference.T, row=state.offsets[layer]),
        )
        if bias and not thin:
            inner.add_(1)
        return cls(network.products, hidden, inputs, change, reference, image, bias, thin, inner)

    def output(self) -> Tensor:
        """z."""
        if not self.thin:
            return self.products.linear(self.inner, self.change, source=self.image)
        row = self.change.sum(0) if self.bias else None
        return self.products.linear(self.hidden, self.inner.T, source=self.image, row=row)

    def pull_back(
        self, adjoint: Tensor, to_inputs: bool, with_image: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """∂f/∂q = (adjoint Cᵀ) B + adjoint R;  ∂f/∂C = (B qᵀ + 1) adjoint;  if asked for ∂f/∂B = (C adjointᵀ) q and
        ∂f/∂C R, the latter not where C is thin."""
        by_inner, by_change, through = together(
            self.products,
            Linear(adjoint.T, self.hidden) if self.thin else Linear(adjoint, self.change.T),
            None if self.thin else Linear(self.inner.T, adjoint),
            None if self.reference is None else Linear(adjoint, self.reference),
        )
        if self.thin:
            by_hidden, by_change, by_inputs = together(
                self.products,
                Linear(adjoint, self.inner, through),
                Linear(self.inputs, by_inner.T, row=adjoint.sum(0) if self.bias else None),
                Linear(self.change, by_inner) if to_inputs else None,
            )
            return by_hidden, by_change, by_inputs, None
        by_hidden, by_inputs, image = together(
            self.products,
            Linear(by_inner, self.inputs, through),
            Linear(by_inner.T, self.hidden) if to_inputs else None,
            Linear(self.inner.T, through) if with_image else None,
        )
        return by_hidden, by_change, by_inputs, image
