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
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .action import Gradient, Network, Plan, State, kernel, reference_image
from .activation_space import Backpropagation, Evaluation, Seeds, backpropagate, pull_back, squared_gradient_norm
from .loss import BatchLoss

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
        value, products = squared_gradient_norm(state, backward.deltas)

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
        outputs, hiddens, kernels, changes = [first], [first], [first], [first]
        for layer in range(1, len(network)):
            hidden = network.activations[layer - 1].forward(outputs[-1])
            overlap = kernel(hidden, state.inputs[layer], network.biases[layer] is not None)
            change, coefficients = backward.deltas[layer] * -self.rate, state.coefficients[layer]
            if coefficients is not None:
                change = change + coefficients
            outputs.append(torch.addmm(reference_image(network, state, layer, hidden), overlap, change))
            hiddens.append(hidden)
            kernels.append(overlap)
            changes.append(change)
        return _TrialStep(outputs, hiddens, kernels, changes)

    def _seeds(self, network: Network, plan: Plan, state: State, trial: _TrialStep, output_gradient: Tensor) -> Seeds:
        """The reverse pass of `_step`."""
        seeds, adjoint = Seeds(), output_gradient
        for layer in range(len(network) - 1, 0, -1):
            hidden, overlap, change = trial.hiddens[layer], trial.kernels[layer], trial.changes[layer]
            reference = state.references[layer]
            overlap_gradient = adjoint @ change.T
            hidden_gradient = overlap_gradient @ state.inputs[layer]
            if reference is not None:
                hidden_gradient.addmm_(adjoint, reference)
            change_gradient = overlap.T @ adjoint
            seeds.coefficients[layer] = change_gradient
            seeds.deltas[layer] = change_gradient * -self.rate
            if plan.moved[layer - 1]:
                seeds.inputs[layer] = overlap_gradient.T @ hidden
            if plan.carried[layer]:
                seeds.references[layer] = (adjoint, hidden)
            adjoint = hidden_gradient * network.activations[layer - 1].derivative(trial.outputs[layer - 1])
        seeds.targets[0] = adjoint
        seeds.deltas[0] = (state.grams[0] @ adjoint) * -self.rate
        return seeds


@dataclass(frozen=True)
class _TrialStep:
    """z_l, q_l, q_l B_lᵀ + 1 and A_l − η δ_l of the step, per weight layer; the entries of layer 0 but z_0 are
    unused."""

    outputs: list[Tensor]
    hiddens: list[Tensor]
    kernels: list[Tensor]
    changes: list[Tensor]
