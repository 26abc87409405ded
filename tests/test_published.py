"""The published method against its formulas in `bench.baselines`, finite differences, and what it promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import published_teleport
from symtele_cuda.activations import Activation, LeakyReLU, Softplus, Tanh
from symtele_cuda.methods import published
from symtele_cuda.methods.published import Published, act, climb
from symtele_cuda.model.loss import BatchLoss
from symtele_cuda.model.network import Network, parameter_list
from symtele_cuda.model.pieces import Flatten

SAMPLES = 5
TWO, THREE = (9, 8, 7, 4), (9, 8, 7, 6, 4)
ACTIVATIONS = [LeakyReLU(0.1), Tanh(), Softplus(1.0)]
WITHOUT_BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def make_network(
    dims: tuple[int, ...], activation: Activation, *, bias: bool = False, dtype: torch.dtype = torch.float64
) -> Network:
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) / math.sqrt(d_in)
        for d_in, d_out in pairwise(dims)
    ]
    biases = [0.1 * torch.randn(d, generator=generator, dtype=torch.float64) if bias else None for d in dims[1:]]
    return Network(
        tuple(weight.to(dtype) for weight in weights),
        tuple(None if one is None else one.to(dtype) for one in biases),
        (activation,) * (len(dims) - 2),
    )


def make_data(dims: tuple[int, ...], n: int = SAMPLES) -> tuple[Tensor, BatchLoss]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(n, dims[0], generator=generator, dtype=torch.float64)
    return x, BatchLoss(F.cross_entropy, torch.randint(dims[-1], (n,), generator=generator), Flatten(), default=True)


def all_moved(network: Network) -> list[bool]:
    return [True] * (len(network) - 1) + [False]


def squared_gradient_norm(network: Network, x: Tensor, loss: BatchLoss) -> float:
    leaves = parameter_list(network, requires_grad=True)
    value = loss(network.with_parameters(leaves).forward(x)[-1])
    return sum(gradient.square().sum().item() for gradient in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("dims", [TWO, THREE], ids=["2 hidden", "3 hidden"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_ten_steps_equal_the_formulas(dims: tuple[int, ...], activation: Activation) -> None:
    network, (x, loss), rate = make_network(dims, activation), make_data(dims), 1e-3
    expected = published_teleport(network.weights, x, loss.targets, F.cross_entropy, activation, steps=10, rate=rate)
    found, records, reason = climb(network, x, loss, Published(rate, steps=10), all_moved(network))
    assert reason == "all steps taken"
    assert all(record.accepted and record.size == rate for record in records) and len(records) == 10
    assert any(not torch.equal(a, b) for a, b in zip(network.weights, found.weights, strict=True))
    for weight, truth in zip(found.weights, expected.weights, strict=True):
        # float64 rounding times the condition of the inputs, of a few hundred, in each of ten steps
        torch.testing.assert_close(weight, truth, rtol=1e-8, atol=1e-9)
    reached = [math.sqrt(record.objective) for record in records]
    assert reached[:-1] == pytest.approx(list(expected.grad_norms[1:]), rel=1e-8)
    assert reached[-1] == pytest.approx(math.sqrt(squared_gradient_norm(found, x, loss)), rel=1e-9)


@WITHOUT_BIAS
@pytest.mark.parametrize("action", ["paper", "least_change"])
@pytest.mark.parametrize("inverse", ["first_order", "exact"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_step_goes_along_the_gradient(activation: Activation, inverse: str, action: str, bias: bool) -> None:
    """T_k against finite differences of ‖∇L(W'(T))‖², a layer among them whose activations stay."""
    dims, moved = (9, 8, 8, 7, 4), [True, False, True, False]
    network, (x, loss) = make_network(dims, activation, bias=bias), make_data(dims)
    rule = Published(1e-3, steps=1, inverse=inverse, action=action)
    generator = torch.Generator().manual_seed(2)
    ways = [
        torch.randn(d, d, generator=generator, dtype=torch.float64) if one else None
        for d, one in zip(dims[1:], moved, strict=True)
    ]

    def value(size: float) -> float:
        transformed = act(network, x, [None if way is None else size * way for way in ways], rule)
        return squared_gradient_norm(transformed, x, loss)

    point = published._Point.at(network, x, loss, rule, moved)
    assert point.value.item() == pytest.approx(value(0.0), rel=1e-12)
    slopes = point.gradient()
    assert [slope is not None for slope in slopes] == moved
    pairs = zip(slopes, ways, strict=True)
    exact = sum((slope * way).sum().item() for slope, way in pairs if slope is not None and way is not None)
    size = 1e-6  # too short for any pre-activation of these weights to reach the kink of LeakyReLU
    assert exact == pytest.approx((value(size) - value(-size)) / (2 * size), rel=1e-5)

    found, _, _ = climb(network, x, loss, rule, moved)
    expected = act(network, x, [None if slope is None else 1e-3 * slope for slope in slopes], rule)
    for actual, truth in zip(parameter_list(found), parameter_list(expected), strict=True):
        assert torch.equal(actual, truth) and not actual.requires_grad


@WITHOUT_BIAS
@pytest.mark.parametrize("action", ["paper", "least_change"])
def test_the_outputs_stay_to_first_order_and_with_the_exact_inverse_to_rounding(action: str, bias: bool) -> None:
    network, (x, loss) = make_network(THREE, Softplus(1.0), bias=bias), make_data(THREE)
    before = network.forward(x)[-1]

    def drift(rate: float, inverse: str) -> float:
        rule = Published(rate, steps=1, inverse=inverse, action=action)
        found, _, reason = climb(network, x, loss, rule, all_moved(network))
        assert reason == "all steps taken"
        return (found.forward(x)[-1] - before).norm().item() / before.norm().item()

    assert drift(1e-3, "exact") <= 1e-12
    assert drift(1e-3, "first_order") >= 1e-9
    assert drift(1e-4, "first_order") == pytest.approx(1e-2 * drift(1e-3, "first_order"), rel=0.1)


@WITHOUT_BIAS
def test_the_gradient_norm_rises(bias: bool) -> None:
    # smooth: at a kink of LeakyReLU the norm jumps, up or down
    network, (x, loss) = make_network(TWO, Softplus(1.0), bias=bias), make_data(TWO)
    _, records, _ = climb(network, x, loss, Published(2e-3, steps=5), all_moved(network))
    values = [record.objective for record in records]
    assert len(values) == 5 and all(later > earlier for earlier, later in pairwise(values))
    start = [torch.zeros(d, d, dtype=torch.float64) for d in TWO[1:-1]]
    assert values[0] > squared_gradient_norm(act(network, x, [*start, None], Published(1.0)), x, loss)


def test_float32_follows_float64() -> None:
    x, loss = make_data(THREE)
    exact = make_network(THREE, Tanh(), bias=True)
    rounded = make_network(THREE, Tanh(), bias=True, dtype=torch.float32)
    rule = Published(1e-3, steps=3)
    truth, _, _ = climb(exact, x, loss, rule, all_moved(exact))
    found, records, _ = climb(rounded, x.float(), loss, rule, all_moved(rounded))
    assert len(records) == 3
    for actual, expected in zip(parameter_list(found), parameter_list(truth), strict=True):
        assert actual.dtype == torch.float32
        # float32 rounding times the condition of the inputs, of a few hundred
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-4)


def test_a_step_out_of_the_domain_is_not_taken() -> None:
    network, (x, loss) = make_network(TWO, Tanh()), make_data(TWO)
    found, records, reason = climb(network, x, loss, Published(1e3), all_moved(network))
    assert found is network
    assert [record.accepted for record in records] == [False] and math.isnan(records[0].objective)
    assert reason.startswith("step 1 could not be taken: g must keep σ(Z) gᵀ in (-1, 1)")


def test_the_steps_before_one_that_is_not_finite_stay() -> None:
    network, (x, loss) = make_network(TWO, LeakyReLU(0.1)), make_data(TWO)
    found, records, reason = climb(network, x, loss, Published(1e30), all_moved(network))
    *taken, last = records
    assert not last.accepted and all(record.accepted and math.isfinite(record.objective) for record in taken)
    assert reason == f"step {len(records)} could not be taken: {last.note}"
    assert all(bool(torch.isfinite(weight).all()) for weight in found.weights)


def test_a_batch_that_cannot_be_matched_ends_the_climb() -> None:
    network, (x, loss) = make_network(TWO, LeakyReLU(0.1)), make_data(TWO)
    repeated = torch.cat([x[:-1], x[:1]])
    found, records, reason = climb(network, repeated, loss, Published(1e-3), all_moved(network))
    assert found is network and len(records) == 1
    assert "inputs must have full row rank" in reason


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"step_size": 0.0}, ValueError, r"step_size must be a finite number > 0, got 0.0"),
        ({"step_size": "auto"}, TypeError, r"step_size must be a number, got str"),
        ({"step_size": 1.0, "steps": 0}, ValueError, r"steps must be >= 1, got 0"),
        ({"step_size": 1.0, "inverse": "second_order"}, ValueError, r"inverse must be one of .*, got 'second_order'"),
        ({"step_size": 1.0, "action": "none"}, ValueError, r"action must be one of .*, got 'none'"),
    ],
)
def test_settings_that_cannot_be_used(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Published(**options)
