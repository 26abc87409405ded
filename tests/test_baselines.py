"""The published algorithm against its formulas in numpy, finite differences, and the library's own paper rule."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import act, ascent_gradient, forward, published_teleport
from symtele_cuda.activations import Activation, Identity, LeakyReLU, Softplus, Tanh

WIDE = (9, 8, 7, 4)  # with the 5 samples below, every input is matched
CHAINS = [WIDE, (9, 8, 3), (9, 8, 7, 6, 4)]
SAMPLES = 5


def make_weights(dims: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) / math.sqrt(d_in)
        for d_in, d_out in pairwise(dims)
    ]


def make_problem(dims: tuple[int, ...], n: int = SAMPLES) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = make_weights(dims, generator)
    x = torch.randn(n, dims[0], generator=generator, dtype=torch.float64)
    return weights, x, torch.randint(dims[-1], (n,), generator=generator)


def make_generators(dims: tuple[int, ...], size: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [size * torch.randn(d, d, generator=generator, dtype=torch.float64) for d in dims[1:-1]]


def gradients(weights: list[Tensor], x: Tensor, y: Tensor, activation: Activation) -> tuple[Tensor, ...]:
    """∇L at the weights as independent variables."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    return torch.autograd.grad(F.cross_entropy(forward(leaves, x, activation), y), leaves)


def squared_norm(tensors: tuple[Tensor, ...]) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors)


@pytest.mark.parametrize("dims", CHAINS)
@pytest.mark.parametrize("n", [SAMPLES, 12], ids=["matched", "more samples than columns"])
def test_act_is_equation_8_in_columns(dims: tuple[int, ...], n: int) -> None:
    weights, x, _ = make_problem(dims, n)
    generators = make_generators(dims, size=0.1)

    def sigma(z: np.ndarray, slope: float) -> np.ndarray:
        return np.where(z > 0, z, slope * z)

    h, previous, expected = x.numpy().T, np.eye(dims[0]), []
    for weight, generator in zip(weights[:-1], generators, strict=True):
        identity = np.eye(len(generator))
        g = identity + generator.numpy()
        targets = sigma(g @ sigma(weight.numpy() @ previous @ h, 0.1), 10.0)
        expected.append(targets @ np.linalg.pinv(h))
        h, previous = sigma(expected[-1] @ h, 0.1), identity - generator.numpy()
    expected.append(weights[-1].numpy() @ previous)

    actual = act(weights, generators, x, torch.linalg.pinv(x), LeakyReLU(0.1))
    assert len(actual) == len(expected)
    for value, truth in zip(actual, expected, strict=True):
        # float64 rounding times the condition of the inputs, of a few hundred
        np.testing.assert_allclose(value.numpy(), truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("activation", [LeakyReLU(0.1), Identity()])
def test_act_keeps_the_logits_to_first_order(activation: Activation) -> None:
    weights, x, _ = make_problem(WIDE)
    before, inverse = forward(weights, x, activation), torch.linalg.pinv(x)

    def change(size: float) -> float:
        moved = act(weights, make_generators(WIDE, size), x, inverse, activation)
        return (forward(moved, x, activation) - before).norm().item()

    assert change(0.0) <= 1e-12 * before.norm().item()
    # g⁻¹ ≈ I − T leaves −T²: a tenth of the step, a hundredth of the change
    assert change(1e-4) == pytest.approx(1e-2 * change(1e-3), rel=0.1)


@pytest.mark.parametrize("dims", CHAINS)
@pytest.mark.parametrize("activation", [LeakyReLU(0.1), Softplus(1.0), Tanh()], ids=str)
def test_ascent_gradient_against_finite_differences(dims: tuple[int, ...], activation: Activation) -> None:
    weights, x, y = make_problem(dims)
    inverse = torch.linalg.pinv(x)
    found, value = ascent_gradient(weights, x, y, inverse, F.cross_entropy, activation)
    directions = make_generators(dims, size=1.0)

    def objective(size: float) -> float:
        moved = act(weights, [size * direction for direction in directions], x, inverse, activation)
        return squared_norm(gradients(list(moved), x, y, activation))

    assert value == pytest.approx(objective(0.0), rel=1e-12)
    step = 1e-6  # too short for any pre-activation of these weights to reach the kink of LeakyReLU
    numeric = (objective(step) - objective(-step)) / (2 * step)
    exact = sum((a * b).sum().item() for a, b in zip(found, directions, strict=True))
    # cancellation of order 1e-16 / step, relative to a sum of terms that partly cancel
    assert exact == pytest.approx(numeric, rel=1e-6)


def test_one_step_is_the_gradient_times_the_rate() -> None:
    weights, x, y = make_problem(WIDE)
    inverse, rate = torch.linalg.pinv(x), 0.05
    found, value = ascent_gradient(weights, x, y, inverse, F.cross_entropy, LeakyReLU(0.1))
    expected = act(weights, [rate * gradient for gradient in found], x, inverse, LeakyReLU(0.1))
    result = published_teleport(weights, x, y, F.cross_entropy, LeakyReLU(0.1), steps=1, rate=rate)
    assert result.grad_norms == (pytest.approx(math.sqrt(value), rel=1e-12),)
    for actual, truth in zip(result.weights, expected, strict=True):
        assert torch.equal(actual, truth)


def test_the_gradient_norm_rises_and_the_start_is_left_alone() -> None:
    weights, x, y = make_problem(WIDE)
    originals = [weight.clone() for weight in weights]
    # smooth: at a kink of LeakyReLU the norm jumps, up or down
    result = published_teleport(weights, x, y, F.cross_entropy, Softplus(1.0), steps=5, rate=0.002)
    assert len(result.grad_norms) == 5
    assert all(later > earlier for earlier, later in pairwise(result.grad_norms))
    assert not any(weight.requires_grad for weight in result.weights)
    for weight, original in zip(weights, originals, strict=True):
        assert torch.equal(weight, original)
