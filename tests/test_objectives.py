"""The fast path (activation space, gradients written out) against the general path and against a dense oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import ACTIVATIONS, make_batch, make_mlp
from torch import Tensor

from symtele_cuda.model.chain import read_chain
from symtele_cuda.model.network import Network
from symtele_cuda.model.problem import Problem
from symtele_cuda.objectives import GradNorm, Lookahead
from symtele_cuda.orbits.action import Plan, State, advance, domain_limit, initial_state, steepest_direction
from symtele_cuda.orbits.batch_plan import make_plan, match_inputs
from symtele_cuda.orbits.paths import FastPath, GeneralPath
from symtele_cuda.search.trust_region import holding

# κ of these batches is below 1e3; the general path squares it through K⁻¹, hence 1e-9 and not 1e-13.
AGREEMENT = 1e-9
WIDE = {1: [20, 24, 5], 2: [20, 24, 26, 5], 3: [20, 24, 22, 26, 5], 4: [20, 24, 22, 26, 28, 5]}
NARROW = [[20, 9, 5], [20, 24, 7, 22, 5], [20, 24, 10, 5], [20, 8, 9, 5]]
OBJECTIVES = {"grad_norm": GradNorm(), "lookahead": Lookahead(0.2)}


def set_up(dims: list[int], activation: str, bias: bool, action: str, n: int = 12) -> tuple[Problem, Plan, State]:
    """Problem, plan and a state some way along the orbit, away from g = I."""
    model = make_mlp(dims, activation, bias=bias)
    with torch.no_grad():
        chain = read_chain(model)
        problem = Problem.make(model, chain, make_batch(n, dims[0], dims[-1]), None)
        matches = match_inputs(problem)
        plan, _ = make_plan(problem, matches, None, action=action, inverse="exact", group_steps=False)
        state = initial_state(problem.network, plan, problem.outputs, matches)
        path = FastPath(problem.network, plan, GradNorm(), problem.loss, problem.output_delta)
        direction = steepest_direction(problem.network, plan, state, path.evaluate(state).gradient())
        norm = sum(float(b.square().sum()) for b in state.inputs[1:]) ** 0.5
        size = domain_limit(problem.network, state, direction, 0.01 * norm / direction.norm)
        state, hindrances = advance(problem.network, plan, state, direction, size)
        assert holding(hindrances) is None
    return problem, plan, state


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("action", ["least_change", "paper"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depth", WIDE)
def test_fast_path_equals_general_path(depth, activation, bias, action, objective):
    problem, plan, state = set_up(WIDE[depth], activation, bias, action)
    assert sum(plan.moved) == depth
    compare_paths(problem, plan, state, OBJECTIVES[objective])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("action", ["least_change", "paper"])
@pytest.mark.parametrize("dims", NARROW, ids=str)
def test_fast_path_equals_general_path_with_narrow_layers(dims, action, objective):
    problem, plan, state = set_up(dims, "softplus", True, action)
    assert any(plan.carried)
    compare_paths(problem, plan, state, OBJECTIVES[objective])


def compare_paths(problem: Problem, plan: Plan, state: State, objective: GradNorm | Lookahead) -> None:
    with torch.no_grad():
        fast = FastPath(problem.network, plan, objective, problem.loss, problem.output_delta).evaluate(state)
        general = GeneralPath(problem, plan, objective).evaluate(state)
        assert abs(fast.value - general.value) <= AGREEMENT * abs(general.value)
        steps = [
            steepest_direction(problem.network, plan, state, evaluation.gradient()) for evaluation in (fast, general)
        ]
        assert list(steps[0].steps) == list(steps[1].steps) != []
        for layer, got in steps[0].steps.items():
            expected = steps[1].steps[layer]
            got, expected = got.change, expected.change
            assert relative(got, expected) <= AGREEMENT, f"layer {layer}"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("action", ["least_change", "paper"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_equals_double_backward_through_weights_by_pinv(activation, action, objective):
    """Nothing of the library's formulas: weights by torch.linalg.pinv as a function of B, then autograd twice."""
    problem, plan, state = set_up([20, 24, 22, 5], activation, True, action)
    network = problem.network
    leaves = [state.inputs[layer].clone().requires_grad_() for layer in (1, 2)]
    if action == "paper":  # B alone does not determine the output layer W g⁻¹: only the first layer is compared
        leaves[1] = state.inputs[2].clone()
    parameters = dense_weights(network, state, leaves, action)
    loss_of = loss_function(problem)
    gradients = torch.autograd.grad(loss_of(parameters), parameters, create_graph=True)
    if objective == "grad_norm":
        value = sum(gradient.square().sum() for gradient in gradients)
    else:
        value = loss_of([p - 0.2 * gradient for p, gradient in zip(parameters, gradients, strict=True)])
    path = FastPath(network, plan, OBJECTIVES[objective], problem.loss, problem.output_delta)
    with torch.no_grad():
        fast = path.evaluate(state)
        got = fast.gradient()
    assert fast.value == pytest.approx(value.item(), rel=AGREEMENT)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    for layer, expected in enumerate(torch.autograd.grad(value, wanted), start=1):
        through_targets = got.targets[layer] if got.targets[layer] is not None else 0.0
        total = got.inputs[layer] + through_targets / state.slopes[layer - 1]
        assert relative(total, expected) <= AGREEMENT


def dense_weights(network: Network, state: State, leaves: list[Tensor], action: str) -> list[Tensor]:
    """[R, r] + Eᵀ P(B) for every layer, P by SVD."""
    inputs = [state.inputs[0], *leaves]
    targets = [a.inverse(leaf) for a, leaf in zip(network.activations, leaves, strict=True)] + [state.logits]
    parameters = []
    for layer, (batch, target) in enumerate(zip(inputs, targets, strict=True)):
        weight, bias = network.weights[layer], network.biases[layer]
        if action == "paper":
            if layer == len(inputs) - 1:
                parameters += [state.references[layer].clone().requires_grad_(), bias.clone().requires_grad_()]
                continue
            weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
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
