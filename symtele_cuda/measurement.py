"""What is true of given weights: measured on them with plain backpropagation, not taken from the search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .action import Network, parameter_list
from .objectives import GradNorm, Lookahead, Objective
from .problem import Holdout, Problem


@dataclass(frozen=True)
class Measurement:
    """The losses of given weights, the objective and ‖∇L‖ on the batch.

    loss: on the batch; data_loss: the same with its weight terms, if it has any, held at the model's own weights, which
    is what the action keeps; holdout: on the holdout batch, None without one.
    """

    loss: float
    data_loss: float
    holdout: float | None
    objective: float
    gradient_norm: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.data_loss, self.objective, self.gradient_norm)))


def measure(
    problem: Problem, objective: Objective, held: Holdout | None, network: Network, outputs: Sequence[Tensor]
) -> Measurement:
    """Measure `network`, whose pre-activations on the batch are `outputs`, in the place of the problem's own
    weights."""
    data_loss, output_delta = problem.loss.value_and_gradient(outputs[-1])
    if problem.weight_terms:
        loss, gradients = _value_and_gradients(problem, network)
    else:
        loss, gradients = data_loss, loss_gradients(network, problem.samples, outputs, output_delta)
    squared_norm = sum(float(gradient.square().sum()) for gradient in gradients)
    return Measurement(
        loss=loss,
        data_loss=data_loss,
        holdout=None if held is None else held.loss.value(network.forward(held.samples)[-1]),
        objective=_objective_value(problem, objective, network, gradients, squared_norm),
        gradient_norm=math.sqrt(squared_norm),
    )


def loss_gradients(network: Network, samples: Tensor, outputs: Sequence[Tensor], output_delta: Tensor) -> list[Tensor]:
    """∂L/∂W_l = δ_lᵀ B_l and ∂L/∂b_l = Σ δ_l, in the order of `parameter_list`, from ∂L/∂logits = `output_delta`."""
    gradients: list[Tensor] = []
    delta = output_delta
    for layer in range(len(network) - 1, -1, -1):
        activation = network.activations[layer - 1] if layer > 0 else None
        inputs = samples if activation is None else activation.forward(outputs[layer - 1])
        if network.biases[layer] is not None:
            gradients.append(delta.sum(0))
        gradients.append(delta.T @ inputs)
        if activation is not None:
            delta = (delta @ network.weights[layer]).mul_(activation.derivative(outputs[layer - 1]))
    return gradients[::-1]


def _objective_value(
    problem: Problem, objective: Objective, network: Network, gradients: Sequence[Tensor], squared_norm: float
) -> float:
    parameters = parameter_list(network)
    if type(objective) is GradNorm:
        return squared_norm
    if type(objective) is Lookahead:
        stepped = torch._foreach_add(parameters, list(gradients), alpha=-objective.rate)
        if problem.weight_terms:
            return float(problem.loss_of(stepped))
        return problem.loss.value(network.with_parameters(stepped).forward(problem.samples)[-1])
    with torch.enable_grad():
        return float(objective.value(problem.loss_of, parameter_list(network, requires_grad=True)).detach())


def _value_and_gradients(problem: Problem, network: Network) -> tuple[float, list[Tensor]]:
    """The loss with its weight terms, and its gradients."""
    with torch.enable_grad():
        parameters = parameter_list(network, requires_grad=True)
        value = problem.loss_of(parameters)
        return float(value.detach()), list(torch.autograd.grad(value, parameters))


def relative_change(before: float, after: float) -> float:
    """|after − before| / |before|; from 0 to anything else it is infinite."""
    if after == before:
        return 0.0
    return abs(after - before) / abs(before) if before != 0 else math.inf
