"""What is true of given weights: measured on them, not taken from the search that led there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .action import Network, Plan, parameter_list, plain_state
from .activation_space import backpropagate, squared_gradient_norm
from .objectives import GradNorm, Objective
from .paths import choose_path
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


def measure(
    problem: Problem,
    objective: Objective,
    held: Holdout | None,
    network: Network,
    outputs: Sequence[Tensor],
    grams: Sequence[Tensor] | None = None,
    known_objective: float | None = None,
) -> Measurement:
    """Measure `network` in the place of the problem's own weights.

    Args:
        outputs: the network's pre-activations on the batch.
        grams: the Gram matrices of the layers' inputs, if they are known.
        known_objective: the objective's value, if it is known.
    """
    data_loss, output_delta = problem.loss.value_and_gradient(outputs[-1])
    here = replace(problem, network=network, output_delta=output_delta)
    plan, state = Plan.untouched(network), plain_state(network, problem.samples, outputs, grams)
    value = known_objective
    if value is None:
        value = choose_path(here, plan, objective).evaluate(state).value
    if isinstance(objective, GradNorm):
        gradient_norm = math.sqrt(value)
    elif problem.weight_terms:
        gradient_norm = _gradient_norm_with_weight_terms(here)
    else:
        deltas = backpropagate(network, state, output_delta).deltas
        gradient_norm = math.sqrt(squared_gradient_norm(state, deltas)[0])
    return Measurement(
        loss=float(problem.loss_of(parameter_list(network))) if problem.weight_terms else data_loss,
        data_loss=data_loss,
        holdout=None if held is None else held.loss.value(network.forward(held.samples)[-1]),
        objective=value,
        gradient_norm=gradient_norm,
    )


def relative_change(before: float, after: float) -> float:
    """|after − before| / |before|; from 0 to anything else it is infinite."""
    if after == before:
        return 0.0
    return abs(after - before) / abs(before) if before != 0 else math.inf


def _gradient_norm_with_weight_terms(problem: Problem) -> float:
    with torch.enable_grad():
        parameters = parameter_list(problem.network, requires_grad=True)
        return math.sqrt(float(GradNorm().value(problem.loss_of, parameters).detach()))
