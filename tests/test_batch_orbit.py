"""GL in the coordinates of the batch: plans, points, steps, the weights of a point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from climbs import make_orbit
from networks import make_batch

from symtele_cuda.model.network import parameter_list
from symtele_cuda.model.surroundings import OtherSamples
from symtele_cuda.orbits.batch import BatchDirection, BatchOrbit, LayerStep
from symtele_cuda.orbits.batch_weights import form_weights, predict, weights_of
from symtele_cuda.orbits.layers import BatchPoint, Fit, LayerGoal, Move
from symtele_cuda.search.trust_region import holding

WIDE = [20, 24, 22, 5]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def along(point: BatchPoint, steps: dict[int, LayerStep]) -> BatchDirection:
    """The direction that moves the inputs of these layers."""
    return BatchDirection(tuple(map(steps.get, range(len(point.layers)))), scalar(1.0))


def walk(orbit: BatchOrbit, step: LayerStep, size: float) -> BatchPoint:
    """The point after a step of the first hidden layer that nothing hinders."""
    start = orbit.start()
    moved, hindrances = orbit.advance(start, along(start, {1: step}), scalar(size))
    assert holding(hindrances) is None
    return moved


def written(orbit: BatchOrbit, waypoint: tuple[LayerGoal, ...]):
    return form_weights(orbit.problem, orbit.plans, orbit.matches, waypoint)


def moved_along_activations(orbit: BatchOrbit) -> BatchOrbit:
    """The same orbit with every input moved by its B."""
    plans = [replace(plan, move=Move.ACTIVATIONS) if plan.moves else plan for plan in orbit.plans]
    return replace(orbit, plans=tuple(plans))


def test_matched_layers_absorb_and_others_are_carried():
    assert [plan.fit for plan in make_orbit(WIDE).plans] == [Fit.ABSORBED] * 3
    assert [plan.fit for plan in make_orbit([20, 9, 5], n=15).plans] == [Fit.ABSORBED, Fit.CARRIED]
    assert [plan.fit for plan in make_orbit(WIDE, layers=[2]).plans] == [Fit.KEPT, Fit.ABSORBED, Fit.ABSORBED]
    assert [plan.moves for plan in make_orbit(WIDE, layers=[2]).plans] == [False, False, True]


@pytest.mark.parametrize(("activation", "move"), [("leaky_relu", Move.ACTIVATIONS), ("tanh", Move.TARGETS)])
def test_only_bounded_activations_that_nobody_carries_move_along_their_targets(activation, move):
    assert [plan.move for plan in make_orbit(WIDE, activation).plans] == [Move.STILL, move, move]
    assert make_orbit([20, 9, 5], activation, n=15).plans[1].move is Move.ACTIVATIONS


@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "softplus"])
def test_the_start_is_the_network_itself(activation):
    orbit = make_orbit(WIDE, activation)
    formed, outputs, _ = written(orbit, orbit.waypoint(orbit.start()))
    assert all(map(torch.equal, parameter_list(formed), parameter_list(orbit.network)))
    assert torch.equal(outputs[-1], orbit.problem.outputs[-1])


@pytest.mark.parametrize("rank", [3, 12], ids=["Woodbury", "dense"])
@pytest.mark.parametrize("dims", [[20, 9, 5], [20, 9, 11, 5]], ids=str)
def test_a_carried_layer_takes_the_inverse_of_g(dims, rank):
    orbit = make_orbit(dims, n=15)
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(rank, 9, dtype=torch.float64, generator=generator) / 9 for _ in range(2))
    step = LayerStep(orbit.start().layers[1].inputs @ right.T @ left, generator=(left, right))
    moved = walk(orbit, step, 0.3)
    g = torch.eye(9, dtype=torch.float64) + 0.3 * left.T @ right
    expected = orbit.network.weights[1] @ torch.linalg.inv(g)
    assert torch.allclose(moved.layers[1].reference, expected, rtol=1e-10, atol=1e-12)
    formed, outputs, _ = written(orbit, orbit.waypoint(moved))
    assert torch.allclose(outputs[-1], orbit.problem.outputs[-1], rtol=0, atol=1e-11)
    assert torch.allclose(formed.forward(orbit.problem.samples)[-1], outputs[-1], rtol=0, atol=1e-12)


def test_the_point_s_weights_its_predictions_and_the_formed_weights_agree():
    orbit = moved_along_activations(make_orbit(WIDE, "softplus"))
    change = 0.01 * torch.randn(12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).abs()
    moved = walk(orbit, LayerStep(change), 1.0)
    formed, outputs, _ = written(orbit, orbit.waypoint(moved))
    assert torch.allclose(outputs[-1], orbit.problem.outputs[-1], rtol=0, atol=1e-12)
    for first, second in zip(parameter_list(weights_of(orbit.network, moved)), parameter_list(formed), strict=True):
        assert torch.allclose(first, second, rtol=0, atol=1e-9)
    others = make_batch(30, 20, 5, seed=9)[0]
    predicted = predict(orbit.network, moved, OtherSamples.make(orbit.network, others, orbit.problem.samples))
    assert torch.allclose(predicted, formed.forward(others)[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [10.0, -10.0])
def test_a_step_towards_the_edge_of_the_domain_is_shortened_to_half_the_way(size):
    orbit = moved_along_activations(make_orbit(WIDE, "tanh"))
    start = orbit.start()
    inputs = start.layers[1].inputs
    direction = along(start, {1: LayerStep(torch.ones_like(inputs))})
    room = 1 - (inputs.max() if size > 0 else -inputs.min())
    limit = float(orbit.limit(start, direction, scalar(size)))
    assert limit == pytest.approx(0.5 * float(room) * (1 if size > 0 else -1), rel=1e-12)
    assert orbit.limit(start, direction, scalar(1e-9 * size)) == 1e-9 * size


def test_a_step_across_the_edge_or_into_dependence_is_hindered():
    orbit = moved_along_activations(make_orbit(WIDE, "tanh"))
    start = orbit.start()
    inputs = start.layers[1].inputs

    def hindrance(change: torch.Tensor, size: float) -> str | None:
        return holding(orbit.advance(start, along(start, {1: LayerStep(change)}), scalar(size))[1])

    assert "domain" in hindrance(torch.ones_like(inputs), 2.0)
    collapse = torch.zeros_like(inputs)
    collapse[0] = inputs[1] - inputs[0]
    assert "dependence" in hindrance(collapse, 1.0)
    assert hindrance(collapse, 0.1) is None


@pytest.mark.parametrize("value", [2.0, torch.inf, torch.nan])
def test_a_target_that_is_not_finite_hinders_by_the_flag_of_its_layer(value):
    orbit = moved_along_activations(make_orbit(WIDE, "tanh"))
    start = orbit.start()
    steps = {layer: LayerStep(torch.zeros_like(start.layers[layer].inputs)) for layer in (1, 2)}
    steps[2].change[3, 7] = value
    flags = orbit.advance(start, along(start, steps), scalar(1.0))[1]
    assert [bool(flag) for flag, text in flags if "left the domain" in text] == [False, True]
