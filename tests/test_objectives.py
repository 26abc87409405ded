"""The fast path (activation space, gradients written out) against the general path and against a dense oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from climbs import make_orbit
from networks import ACTIVATIONS
from torch import Tensor

from symtele_cuda.model.problem import Problem
from symtele_cuda.objectives import GradNorm, Lookahead
from symtele_cuda.orbits.batch import BatchOrbit
from symtele_cuda.orbits.layers import BatchPoint, Fit
from symtele_cuda.search.trust_region import holding

# κ of these batches is below 1e3; the general path squares it through K⁻¹, hence 1e-9 and not 1e-13.
AGREEMENT = 1e-9
WIDE = {1: [20, 24, 5], 2: [20, 24, 26, 5], 3: [20, 24, 22, 26, 5], 4: [20, 24, 22, 26, 28, 5]}
NARROW = [[20, 9, 5], [20, 24, 7, 22, 5], [20, 24, 10, 5], [20, 8, 9, 5]]
OBJECTIVES = {"grad_norm": GradNorm(), "lookahead": Lookahead(0.2)}


@torch.no_grad()
def set_up(dims: list[int], activation: str, bias: bool, objective: str) -> tuple[BatchOrbit, BatchPoint]:
    """An orbit and a point some way along it, away from g = I."""
    orbit = make_orbit(dims, activation, bias=bias)
    start = orbit.start()
    direction = orbit.direction(start, orbit.evaluate(start))
    norm = sum(float(at.inputs.square().sum()) for at in start.layers[1:]) ** 0.5
    point, hindrances = orbit.advance(start, direction, orbit.limit(start, direction, 0.01 * norm / direction.norm))
    assert holding(hindrances) is None
    return replace(orbit, objective=OBJECTIVES[objective]), point


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", WIDE)
def test_fast_path_equals_general_path(depth, activation, bias, objective):
    orbit, point = set_up(WIDE[depth], activation, bias, objective)
    assert sum(plan.moves for plan in orbit.plans) == depth
    compare_paths(orbit, point)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dims", NARROW, ids=str)
def test_fast_path_equals_general_path_with_narrow_layers(dims, objective):
    orbit, point = set_up(dims, "softplus", True, objective)
    assert any(plan.fit is Fit.CARRIED for plan in orbit.plans)
    compare_paths(orbit, point)


@torch.no_grad()
def compare_paths(orbit: BatchOrbit, point: BatchPoint) -> None:
    assert orbit.fast
    general = replace(orbit, problem=replace(orbit.problem, weight_terms=True))
    assert not general.fast
    found = [one.evaluate(point) for one in (orbit, general)]
    assert abs(found[0].value - found[1].value) <= AGREEMENT * abs(found[1].value)
    directions = [orbit.direction(point, evaluation) for evaluation in found]
    for at, got, expected in zip(point.layers, *(direction.steps for direction in directions), strict=True):
        assert (got is None) == (expected is None) == (not at.plan.moves)
        if got is not None and expected is not None:
            assert relative(got.change, expected.change) <= AGREEMENT


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_equals_double_backward_through_weights_by_pinv(activation, objective):
    """Nothing of the library's formulas: weights by torch.linalg.pinv as a function of B, then autograd twice."""
    orbit, point = set_up([20, 24, 22, 5], activation, True, objective)
    leaves = [at.inputs.clone().requires_grad_() for at in point.layers[1:]]
    parameters = dense_weights(orbit, leaves)
    loss_of = loss_function(orbit.problem)
    gradients = torch.autograd.grad(loss_of(parameters), parameters, create_graph=True)
    if objective == "grad_norm":
        value = sum(gradient.square().sum() for gradient in gradients)
    else:
        value = loss_of([p - 0.2 * gradient for p, gradient in zip(parameters, gradients, strict=True)])
    with torch.no_grad():
        fast = orbit.evaluate(point)
        found = fast.gradient()
    assert fast.value == pytest.approx(value.item(), rel=AGREEMENT)
    for at, got, expected in zip(point.layers[1:], found, torch.autograd.grad(value, leaves), strict=True):
        through_targets = 0.0 if got.source is None else got.source / at.slope
        assert relative(got.inputs + through_targets, expected) <= AGREEMENT


def dense_weights(orbit: BatchOrbit, leaves: list[Tensor]) -> list[Tensor]:
    """[W, b] + Eᵀ P(B) for every layer, P by SVD."""
    network = orbit.network
    inputs = [orbit.problem.samples, *leaves]
    targets = [a.inverse(leaf) for a, leaf in zip(network.activations, leaves, strict=True)]
    parameters = []
    layers = zip(inputs, [*targets, orbit.problem.outputs[-1]], network.weights, network.biases, strict=True)
    for batch, target, weight, bias in layers:
        extended = torch.cat([batch, torch.ones(len(batch), 1, dtype=batch.dtype)], 1)
        change = (target - F.linear(batch, weight, bias)).T @ torch.linalg.pinv(extended).T
        parameters += [weight + change[:, :-1], bias + change[:, -1]]
    return [p if p.requires_grad else p.clone().requires_grad_() for p in parameters]


def loss_function(problem: Problem):
    """The batch loss as a plain function of [W_1, b_1, W_2, …]."""

    def loss_of(parameters):
        hidden = problem.samples
        for layer in range(len(parameters) // 2):
            if layer:
                hidden = problem.network.activations[layer - 1].forward(hidden)
            hidden = F.linear(hidden, parameters[2 * layer], parameters[2 * layer + 1])
        return F.cross_entropy(hidden, problem.loss.targets)

    return loss_of
