"""The group action in the coordinates of the batch: plans, states, steps, the weights of a state."""

from __future__ import annotations

import pytest
import torch
from networks import make_batch, make_mlp

from symtele_cuda.model.chain import read_chain
from symtele_cuda.model.network import parameter_list
from symtele_cuda.model.problem import Problem
from symtele_cuda.orbits.action import (
    Direction,
    LayerStep,
    OtherSamples,
    Plan,
    State,
    advance,
    domain_limit,
    form_weights,
    initial_state,
    predict,
    weights_of,
)
from symtele_cuda.orbits.batch_plan import make_plan, match_inputs
from symtele_cuda.search.trust_region import holding


def set_up(
    dims: list[int],
    activation: str = "leaky_relu",
    n: int = 12,
    *,
    action: str = "least_change",
    inverse: str = "exact",
) -> tuple[Problem, Plan, State]:
    """A problem, its plan with group steps, and the state at g = I."""
    model = make_mlp(dims, activation)
    with torch.no_grad():
        problem = Problem.make(model, read_chain(model), make_batch(n, dims[0], dims[-1]), None)
        matches = match_inputs(problem)
        plan, _ = make_plan(problem, matches, None, action=action, inverse=inverse, group_steps=True)
        return problem, plan, initial_state(problem.network, plan, problem.outputs, matches)


def random_generator(width: int) -> torch.Tensor:
    return torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) / width**0.5


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def walk(problem: Problem, plan: Plan, state: State, step: LayerStep, size: float) -> State:
    """The state after a step of the first hidden layer that nothing hinders."""
    moved, hindrances = advance(problem.network, plan, state, Direction({1: step}, scalar(1.0)), scalar(size))
    assert holding(hindrances) is None
    return moved


def test_wide_layers_absorb_and_the_paper_s_output_layer_is_carried():
    network = set_up([20, 24, 22, 5])[0].network

    def plan(action: str, matched: list[bool], group_steps: bool = False) -> Plan:
        return Plan.make(network, [True, True, False], matched, action=action, inverse="exact", group_steps=group_steps)

    least = plan("least_change", [True, True, True])
    assert (least.absorbs, least.carried) == ((True, True, True), (False, False, False))
    assert not any(least.zero_reference)
    paper = plan("paper", [True, True, True])
    assert (paper.absorbs, paper.carried) == ((True, True, False), (False, False, True))
    assert paper.zero_reference == (True, True, False)
    narrow = Plan.make(
        network, [True, False, False], [True, False, True], action="least_change", inverse="exact", group_steps=False
    )
    assert (narrow.absorbs, narrow.carried) == ((True, False, False), (False, True, False))


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_only_bounded_activations_that_nobody_carries_move_along_their_targets(activation):
    problem, _, _ = set_up([20, 24, 22, 5], activation)
    matches = match_inputs(problem)
    bounded = activation == "tanh"
    for action, expected in (("least_change", (bounded, bounded)), ("paper", (bounded, False))):
        plan, _ = make_plan(problem, matches, None, action=action, inverse="exact", group_steps=False)
        assert plan.along_targets == expected
        plan, _ = make_plan(problem, matches, None, action=action, inverse="exact", group_steps=True)
        assert not any(plan.along_targets)


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "softplus"])
def test_least_change_is_the_identity_at_g_equal_to_the_identity(activation):
    problem, plan, state = set_up([20, 24, 22, 5], activation)
    formed, outputs, _ = form_weights(problem.network, plan, state, state.waypoint)
    assert all(map(torch.equal, parameter_list(formed), parameter_list(problem.network)))
    assert torch.equal(outputs[-1], problem.outputs[-1])


def test_the_paper_s_action_at_the_identity_is_the_projection_on_the_span_of_the_batch():
    problem, plan, state = set_up([20, 24, 22, 5], action="paper")
    formed, *_ = form_weights(problem.network, plan, state, state.waypoint)
    extended = torch.cat([problem.samples, torch.ones(12, 1, dtype=torch.float64)], 1)
    weight = torch.cat([problem.network.weights[0], problem.network.biases[0][:, None]], 1)
    projection = torch.linalg.pinv(extended) @ extended
    assert torch.allclose(formed.weights[0], (weight @ projection)[:, :-1], rtol=0, atol=1e-12)
    assert not torch.allclose(formed.weights[0], problem.network.weights[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("rank", [3, 12], ids=["Woodbury", "dense"])
@pytest.mark.parametrize("dims", [[20, 9, 5], [20, 9, 11, 5]], ids=str)
def test_a_carried_layer_takes_the_inverse_of_g(dims, rank):
    problem, plan, state = set_up(dims, n=15)
    assert plan.carried[1]
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(rank, 9, dtype=torch.float64, generator=generator) / 9 for _ in range(2))
    step = LayerStep(state.inputs[1] @ right.T @ left, generator=(left, right))
    moved = walk(problem, plan, state, step, 0.3)
    g = torch.eye(9, dtype=torch.float64) + 0.3 * left.T @ right
    assert torch.allclose(moved.references[1], problem.network.weights[1] @ torch.linalg.inv(g), rtol=1e-10, atol=1e-12)
    formed, outputs, _ = form_weights(problem.network, plan, state, moved.waypoint)
    assert torch.allclose(outputs[-1], problem.outputs[-1], rtol=0, atol=1e-11)
    assert torch.allclose(formed.forward(problem.samples)[-1], outputs[-1], rtol=0, atol=1e-12)


def test_the_first_order_inverse_drifts_with_the_square_of_the_step():
    problem, plan, state = set_up([20, 9, 11, 5], n=15, inverse="first_order")
    generator = random_generator(9)
    identity = torch.eye(9, dtype=torch.float64)
    step = LayerStep(state.inputs[1] @ generator.T, generator=(identity, generator))
    drifts = []
    for size in (1e-3, 5e-4):
        moved = walk(problem, plan, state, step, size)
        drifts.append(float((moved.logits - problem.outputs[-1]).norm()))
        _, outputs, _ = form_weights(problem.network, plan, state, moved.waypoint)
        assert torch.allclose(outputs[-1], moved.logits, rtol=0, atol=1e-12)  # the state knows its own drift
    assert drifts[0] / drifts[1] == pytest.approx(4.0, rel=0.05)


def test_the_state_s_weights_its_predictions_and_the_formed_weights_agree():
    problem, plan, state = set_up([20, 24, 22, 5], "softplus")
    change = 0.01 * torch.randn(12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).abs()
    step = LayerStep(change)
    moved = walk(problem, plan, state, step, 1.0)
    formed, outputs, _ = form_weights(problem.network, plan, state, moved.waypoint)
    assert torch.allclose(outputs[-1], problem.outputs[-1], rtol=0, atol=1e-12)
    quick = weights_of(problem.network, plan, moved)
    for first, second in zip(parameter_list(quick), parameter_list(formed), strict=True):
        assert torch.allclose(first, second, rtol=0, atol=1e-9)
    others = make_batch(30, 20, 5, seed=9)[0]
    predicted = predict(problem.network, plan, moved, OtherSamples.make(problem.network, others, problem.samples))
    assert torch.allclose(predicted, formed.forward(others)[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [10.0, -10.0])
def test_a_step_towards_the_edge_of_the_domain_is_shortened_to_half_the_way(size):
    problem, _, state = set_up([20, 24, 22, 5], "tanh")
    direction = Direction({1: LayerStep(torch.ones_like(state.inputs[1]))}, scalar(1.0))
    limit = float(domain_limit(problem.network, state, direction, scalar(size)))
    room = 1 - (state.inputs[1].max() if size > 0 else -state.inputs[1].min())
    assert limit == pytest.approx(0.5 * float(room) * (1 if size > 0 else -1), rel=1e-12)
    assert domain_limit(problem.network, state, direction, scalar(1e-9 * size)) == 1e-9 * size


def test_a_step_across_the_edge_or_into_dependence_is_hindered():
    problem, plan, state = set_up([20, 24, 22, 5], "tanh")

    def hindrance(change: torch.Tensor, size: float) -> str | None:
        direction = Direction({1: LayerStep(change)}, scalar(1.0))
        return holding(advance(problem.network, plan, state, direction, scalar(size))[1])

    assert "domain" in hindrance(torch.ones_like(state.inputs[1]), 2.0)
    collapse = torch.zeros_like(state.inputs[1])
    collapse[0] = state.inputs[1][1] - state.inputs[1][0]
    assert "dependence" in hindrance(collapse, 1.0)
    assert hindrance(collapse, 0.1) is None


@pytest.mark.parametrize("value", [2.0, torch.inf, torch.nan])
def test_a_target_that_is_not_finite_hinders_by_the_flag_of_its_layer(value):
    problem, plan, state = set_up([20, 24, 22, 5], "tanh")
    steps = {layer: LayerStep(torch.zeros_like(state.inputs[layer])) for layer in (1, 2)}
    steps[2].change[3, 7] = value
    flags = advance(problem.network, plan, state, Direction(steps, scalar(1.0)), scalar(1.0))[1]
    assert [bool(flag) for flag, text in flags if "left the domain" in text] == [False, True]
