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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from .action import Gradient, Network, Plan, State, kernel, reference_image
from .activation_space import Backpropagation, Evaluation, Seeds, backpropagate, pull_back, squared_gradient_norm
from .checks import check_number
from .loss import BatchLoss
from .pinv import is_thin

LossOfParameters = Callable[[Sequence[Tensor]], Tensor]


@runtime_checkable
class Objective(Protocol):
    """See the module's text."""

    maximise: bool

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class GradNorm:
    """f = ‖∇L‖², to be maximised (Zhao et al. 2022, arXiv 2205.10637, Algorithm 1)."""

    maximise = True

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    def evaluate(self, network: Network, plan: Plan, state: State, loss: BatchLoss, output_delta: Tensor) -> Evaluation:
        """f = Σ_l ⟨δ_l δ_lᵀ, K_l⟩ and its gradient."""
        backward = backpropagate(network, state, output_delta)
        value, products = squared_gradient_norm(network, state, backward.deltas)

        def gradient() -> Gradient:
            seeds = Seeds(deltas={layer: 2 * product for layer, product in enumerate(products)})
            for layer, delta in enumerate(backward.deltas):
                if layer > 0 and plan.moved[layer - 1]:
                    if state.formed[layer] is None:
                        seeds.grams[layer] = delta @ delta.T
                    else:
                        seeds.inputs[layer] = 2 * (delta @ (delta.T @ state.inputs[layer]))
            return pull_back(network, plan, state, backward, seeds)

        return Evaluation(value, gradient)


@dataclass(frozen=True)
class Lookahead:
    """f = L(θ − η∇L(θ)), the loss after one gradient step of length η = `rate` on the same batch, to be minimised."""

    rate: float

    maximise = False

    def __post_init__(self) -> None:
        check_number("rate", self.rate, above=0.0)

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        return loss_of([p - self.rate * gradient for p, gradient in zip(parameters, gradients, strict=True)])

    def evaluate(self, network: Network, plan: Plan, state: State, loss: BatchLoss, output_delta: Tensor) -> Evaluation:
        """f through z_0 = Y_0 − η K_0 δ_0,  z_l = q_l R_lᵀ + r_l + (q_l B_lᵀ + 1)(A_l − η δ_l),  q_{l+1} = σ_l(z_l).

        The first line holds because layer 0 produces Y_0 whatever its weights; X enters through its Gram matrix alone.
        """
        backward = backpropagate(network, state, output_delta)
        trial = self._step(network, state, backward)
        value, output_gradient = loss.value_and_gradient(trial.outputs[-1])

        def gradient() -> Gradient:
            seeds = self._seeds(network, plan, state, trial, output_gradient)
            return pull_back(network, plan, state, backward, seeds)

        return Evaluation(value, gradient)

    def _step(self, network: Network, state: State, backward: Backpropagation) -> _TrialStep:
        """The forward pass after the step."""
        first = torch.addmm(state.targets[0], state.grams[0], backward.deltas[0], alpha=-self.rate)
        outputs, products = [first], dict[int, KernelProduct]()
        for layer in range(1, len(network)):
            hidden = network.activations[layer - 1].forward(outputs[-1])
            change, coefficients = backward.deltas[layer] * -self.rate, state.coefficients[layer]
            if coefficients is not None:
                change = change + coefficients
            bias = network.biases[layer] is not None
            products[layer] = KernelProduct.make(hidden, state.inputs[layer], change, bias)
            outputs.append(products[layer].added_to(reference_image(network, state, layer, hidden)))
        return _TrialStep(outputs, products)

    def _seeds(self, network: Network, plan: Plan, state: State, trial: _TrialStep, output_gradient: Tensor) -> Seeds:
        """The reverse pass of `_step`."""
        seeds, adjoint = Seeds(), output_gradient
        for layer in range(len(network) - 1, 0, -1):
            product, reference = trial.products[layer], state.references[layer]
            by_hidden, by_change, by_inputs = product.pull_back(adjoint)
            if reference is not None:
                by_hidden.addmm_(adjoint, reference)
            seeds.coefficients[layer] = by_change
            seeds.deltas[layer] = by_change * -self.rate
            if plan.moved[layer - 1]:
                seeds.inputs[layer] = by_inputs
            if plan.carried[layer]:
                seeds.references[layer] = (adjoint, product.hidden)
            adjoint = by_hidden * network.activations[layer - 1].derivative(trial.outputs[layer - 1])
        seeds.targets[0] = adjoint
        seeds.deltas[0] = (state.grams[0] @ adjoint) * -self.rate
        return seeds


def has_fast_path(objective: Objective) -> TypeGuard[GradNorm | Lookahead]:
    """Whether activation space knows the objective: by its type itself, for a subclass has a value of its own."""
    return type(objective) in (GradNorm, Lookahead)


@dataclass(frozen=True)
class _TrialStep:
    """z_l of every layer, and (q_l B_lᵀ + 1)(A_l − η δ_l) of every layer but the first."""

    outputs: list[Tensor]
    products: dict[int, KernelProduct]


@dataclass(frozen=True)
class KernelProduct:
    """(q Bᵀ + 1) C for q, B (n×d) and C (n×c), and its reverse mode, in the cheaper order of the products.

    inner is q Bᵀ + 1 (n×n), or Bᵀ C (d×c) where C is thin.
    """

    hidden: Tensor
    inputs: Tensor
    change: Tensor
    bias: bool
    thin: bool
    inner: Tensor

    @classmethod
    def make(cls, hidden: Tensor, inputs: Tensor, change: Tensor, bias: bool) -> KernelProduct:
        thin = is_thin(change)
        inner = inputs.T @ change if thin else kernel(hidden, inputs, bias)
        return cls(hidden, inputs, change, bias, thin, inner)

    def added_to(self, base: Tensor) -> Tensor:
        """base + (q Bᵀ + 1) C."""
        if not self.thin:
            return torch.addmm(base, self.inner, self.change)
        total = torch.addmm(base, self.hidden, self.inner)
        return total.add_(self.change.sum(0)) if self.bias else total

    def pull_back(self, adjoint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """∂f/∂q = (adjoint Cᵀ) B,  ∂f/∂C = (B qᵀ + 1) adjoint,  ∂f/∂B = (C adjointᵀ) q."""
        if not self.thin:
            by_kernel = adjoint @ self.change.T
            return by_kernel @ self.inputs, self.inner.T @ adjoint, by_kernel.T @ self.hidden
        outer = self.hidden.T @ adjoint
        by_change = self.inputs @ outer
        if self.bias:
            by_change.add_(adjoint.sum(0))
        return adjoint @ self.inner.T, by_change, self.change @ outer.T
