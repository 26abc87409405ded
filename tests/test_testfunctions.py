"""The test functions: the change of variables, the action of SO(2), and both ways to teleport."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from experiments.testfunctions import SumOfSquares, booth, rosenbrock

SHEAR = torch.tensor([[2.0, 1.0], [0.0, -3.0]], dtype=torch.float64)
own = SumOfSquares("own", h=lambda x: x @ SHEAR.T, h_inverse=lambda u: u @ SHEAR.inverse().T)
FUNCTIONS = [booth, rosenbrock, own]
FORMULAS: list[tuple[SumOfSquares, Callable[[Tensor, Tensor], Tensor], tuple[float, float]]] = [
    (booth, lambda x, y: (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2, (1.0, 3.0)),
    (rosenbrock, lambda x, y: 100 * (x**2 - y) ** 2 + (x - 1) ** 2, (1.0, 1.0)),
]


def points(count: int = 50) -> Tensor:
    return 6 * torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 3


def some_point() -> Tensor:
    return torch.tensor([-0.7, 1.9], dtype=torch.float64)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_h_and_its_inverse(function: SumOfSquares) -> None:
    x = points()
    torch.testing.assert_close(function.h_inverse(function.h(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(function.h(function.h_inverse(x)), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("function", "formula", "minimum"), FORMULAS, ids=["booth", "rosenbrock"])
def test_loss_is_the_published_formula(function: SumOfSquares, formula, minimum) -> None:
    x = points()
    torch.testing.assert_close(function.loss(x), formula(*x.unbind(-1)), rtol=1e-12, atol=1e-12)
    assert function.loss(torch.tensor(minimum, dtype=torch.float64)) == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_gradient_and_hessian_against_differences(function: SumOfSquares) -> None:
    x, step = some_point(), 1e-5
    ends = x + step * torch.stack((torch.eye(2, dtype=x.dtype), -torch.eye(2, dtype=x.dtype)))
    gradient = (function.loss(ends[0]) - function.loss(ends[1])) / (2 * step)
    hessian = (function.gradient(ends[0]) - function.gradient(ends[1])) / (2 * step)
    # central differences with step 1e-5: h² in the truncation, 1e-16/h in the rounding
    torch.testing.assert_close(function.gradient(x), gradient, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(function.hessian(x), hessian, rtol=1e-7, atol=1e-5)
    assert function.gradient_norm(x) == function.gradient(x).norm()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_rotation_keeps_the_loss(function: SumOfSquares) -> None:
    x, angles = points(), torch.linspace(-7, 7, 50, dtype=torch.float64)
    moved = function.rotate(x, angles)
    torch.testing.assert_close(function.loss(moved), function.loss(x), rtol=1e-10, atol=0)
    assert (moved - x).norm(dim=-1).median() > 0.1


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_rotations_form_a_group(function: SumOfSquares) -> None:
    x = points()
    twice = function.rotate(function.rotate(x, 0.4), 1.1)
    torch.testing.assert_close(twice, function.rotate(x, 1.5), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(function.rotate(x, 2 * math.pi), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_rotation_is_differentiable_in_theta(function: SumOfSquares) -> None:
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda angle: function.gradient(function.rotate(some_point(), angle)), (theta,))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_exact_teleport_finds_the_steepest_point_of_the_level_set(function: SumOfSquares) -> None:
    x = some_point()
    best = function.teleport_exact(x)
    dense = function.rotate(x, torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64))
    assert function.gradient_norm(best) >= function.gradient_norm(dense).max() * (1 - 1e-12)
    assert function.gradient_norm(best) > function.gradient_norm(x)
    torch.testing.assert_close(function.loss(best), function.loss(x), rtol=1e-10, atol=0)
    assert torch.equal(best, function.teleport_exact(x))


def test_exact_teleport_against_the_closed_form() -> None:
    """For h(x) = Ax + b, ‖∇L‖ = 2‖Aᵀu‖ ≤ 2 ‖A‖₂ ‖u‖ on the circle of radius ‖u‖, and the bound is reached."""
    x = some_point()
    bound = 2 * torch.linalg.matrix_norm(SHEAR, 2) * own.loss(x).sqrt()
    torch.testing.assert_close(own.gradient_norm(own.teleport_exact(x)), bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
@pytest.mark.parametrize("seed", range(3))
def test_exact_teleport_is_at_least_as_steep_as_the_ascent(function: SumOfSquares, seed: int) -> None:
    x = some_point()
    climbed = function.teleport_ascent(x, steps=20, rate=1e-4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(function.loss(climbed), function.loss(x), rtol=1e-10, atol=0)
    assert function.gradient_norm(climbed) <= function.gradient_norm(function.teleport_exact(x)) * (1 + 1e-12)


def test_ascent_climbs_and_is_reproducible() -> None:
    x = some_point()
    climbed = booth.teleport_ascent(x, steps=30, rate=1e-5)
    assert booth.gradient_norm(climbed) > booth.gradient_norm(x)
    start = booth.rotate(x, math.pi * torch.rand((), dtype=x.dtype, generator=torch.Generator().manual_seed(4)))
    first, second = (booth.teleport_ascent(x, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert booth.gradient_norm(first) >= booth.gradient_norm(start)


def test_bad_points_are_named() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 2\), got \(3,\)"):
        booth.loss(torch.zeros(3))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        booth.loss(torch.zeros(2, dtype=torch.int64))
    for teleport in (booth.teleport_exact, booth.teleport_ascent):
        with pytest.raises(ValueError, match=r"x must be one point of shape \(2,\), got \(5, 2\)"):
            teleport(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        booth.teleport_ascent(some_point(), steps=0)
