"""The two ways to an objective's value and gradient at a state: in activation space, or with the weights formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model.loss import BatchLoss
from ..model.network import Network, parameter_list
from ..model.problem import Problem
from ..objectives import GradNorm, Lookahead, Objective, has_fast_path
from .action import Gradient, Plan, State, pull_back_weights, weights_of
from .activation_space import Evaluation


class Path(Protocol):
    """How an objective is evaluated at a state."""

    def evaluate(self, state: State) -> Evaluation: ...


@dataclass(frozen=True)
class FastPath:
    """In activation space; for objectives that offer `evaluate` and losses that see the parameters through the
    logits."""

    network: Network
    plan: Plan
    objective: GradNorm | Lookahead
    loss: BatchLoss
    output_delta: Tensor

    def evaluate(self, state: State) -> Evaluation:
        delta = self.output_delta
        if self.plan.first_order_inverse:  # the logits are not quite kept
            delta = self.loss.value_and_gradient(state.logits)[1]
        return self.objective.evaluate(self.network, self.plan, state, self.loss, delta)


@dataclass(frozen=True)
class GeneralPath:
    """With the weights formed at every step; for any objective and any loss of the parameters."""

    problem: Problem
    plan: Plan
    objective: Objective

    def evaluate(self, state: State) -> Evaluation:
        problem, network = self.problem, self.problem.network
        formed = weights_of(network, self.plan, state)
        with torch.enable_grad():
            parameters = problem.leaves(formed)
            value = self.objective.value(problem.loss_of_trainable(formed), parameters)
        if not (isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad):
            raise ValueError("objective.value must return a scalar tensor that depends on the parameters")

        def gradient() -> Gradient:
            # One Hessian-vector product gives ∂f/∂[W', b'], the closed form of the action the rest.
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            nothing = formed.with_parameters([torch.zeros_like(tensor) for tensor in parameter_list(formed)])
            by_weights = formed.with_parameters(problem.merge(nothing, filled))
            pairs = list(zip(by_weights.weights, by_weights.biases, strict=True))
            return pull_back_weights(network, self.plan, state, formed, pairs)

        return Evaluation(value.detach(), gradient)


def choose_path(problem: Problem, plan: Plan, objective: Objective) -> Path:
    """In activation space where loss and objective allow it, else with the weights formed."""
    if has_fast_path(objective) and problem.sees_logits_alone:
        return FastPath(problem.network, plan, objective, problem.loss, problem.output_delta)
    return GeneralPath(problem, plan, objective)
