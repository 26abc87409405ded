"""The fused products in plain torch against the formulas of their docstrings, with sums over explicit indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operators import judge_arguments, results_of
from sigmas import ONE_OF_EACH
from torch import Tensor
from torch.utils._pytree import tree_leaves

from symtele_cuda.activations import Activation, Identity
from symtele_cuda.kernels import torch_kernels as products
from symtele_cuda.kernels.library import Linear, together

SHAPES = [(1, 1, 1), (2, 3, 4), (7, 1, 5), (31, 33, 2), (5, 0, 3), (0, 3, 4)]

# Of sums of up to 33 terms of order one: a few roundings.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}

every_activation = pytest.mark.parametrize("activation", ONE_OF_EACH, ids=str)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_domain(activation: Activation, shape: tuple[int, ...]) -> Tensor:
    """Values that σ takes."""
    return activation.forward(normal(*shape, seed=9))


def assert_agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ik,kj->ij", a, b)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", ["", "source", "row", "row column", "source row column"])
def test_linear(shape: tuple[int, int, int], terms: str, dtype: torch.dtype) -> None:
    n, k, m = shape
    a, b = normal(n, k, seed=1), normal(k, m, seed=2)
    operands = {"source": normal(n, m, seed=3), "column": normal(n, seed=4), "row": normal(m, seed=5)}
    chosen = {name: operand for name, operand in operands.items() if name in terms.split()}
    expected = multiply(a, b)
    if "row" in chosen:
        expected = (
            expected + (torch.ones(n, 1) if "column" not in chosen else chosen["column"][:, None]) * chosen["row"]
        )
    expected = -0.7 * expected + (0.3 * chosen["source"] if "source" in chosen else 0)
    narrow = {name: operand.to(dtype) for name, operand in chosen.items()}
    actual = products.linear(a.to(dtype), b.to(dtype), **narrow, alpha=-0.7, beta=0.3)
    assert actual.dtype == dtype
    assert_agree(actual, expected, TOLERANCE[dtype])


def test_linear_by_default() -> None:
    a, b, source, row = normal(3, 4), normal(4, 5), normal(3, 5), normal(5)
    assert_agree(products.linear(a, b), multiply(a, b))
    assert_agree(products.linear(a, b, source), multiply(a, b) + source)
    assert_agree(products.linear(a, b, row=row), multiply(a, b) + row)


def test_operands_may_be_transposed() -> None:
    a, b = normal(4, 3), normal(5, 4)
    assert_agree(products.linear(a.T, b.T), multiply(a.T, b.T))
    padded = normal(4, 10)
    assert_agree(products.linear(a.T, padded[:, :5]), multiply(a.T, padded[:, :5]))


@every_activation
@pytest.mark.parametrize("with_row", [False, True])
def test_linear_activation(activation: Activation, with_row: bool) -> None:
    a, b, row = normal(3, 4), normal(4, 5), normal(5) if with_row else None
    z, s = products.linear_activation(a, b, row, *activation.sigma)
    expected = multiply(a, b) + (0 if row is None else row)
    assert_agree(z, expected)
    assert_agree(s, activation.forward(expected))


@every_activation
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_inverse_activation(activation: Activation, rho: float) -> None:
    a, b, origin = in_domain(activation, (3, 4)), torch.eye(4, dtype=torch.float64), normal(3, 4)
    y, change = products.inverse_activation(a, b, origin, rho, *activation.sigma)
    assert_agree(y, activation.inverse(a))
    assert_agree(change, activation.inverse(a) - rho * origin)


@pytest.mark.parametrize("activation", [a for a in ONE_OF_EACH if a.bounded], ids=str)
def test_the_inverse_is_not_finite_off_the_domain(activation: Activation) -> None:
    low, high = activation.domain
    b = torch.tensor([[low - 0.5, low, high if high < float("inf") else low - 1]], dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)
    y, change = products.inverse_activation(b, identity, 0 * b, 1.0, *activation.sigma)
    assert not torch.isfinite(y).any()
    assert not torch.isfinite(change).any()


@every_activation
@pytest.mark.parametrize("rank_one", [False, True])
def test_over_slope(activation: Activation, rank_one: bool) -> None:
    a, b, at = normal(3, 4), normal(4, 5), normal(3, 5)
    column, row = (normal(3), normal(5)) if rank_one else (None, None)
    gradient, scaled = products.over_slope(a, b, column, row, at, *activation.sigma)
    expected = multiply(a, b) + (column[:, None] * row if column is not None and row is not None else 0)
    assert_agree(gradient, expected)
    assert_agree(scaled, expected / activation.derivative(at), 1e-12)


@every_activation
def test_times_slope(activation: Activation) -> None:
    a, b, at, source = normal(3, 4), normal(4, 5), normal(3, 5), normal(3, 5, seed=1)
    actual = products.times_slope(a, b, at, source, -0.5, *activation.sigma)
    assert_agree(actual, multiply(a, b) * activation.derivative(at) - 0.5 * source)


def test_grouped_linear() -> None:
    a, b, mask, source, row = normal(3, 4), normal(4, 5), normal(3, 5), normal(3, 5, seed=1), normal(4, seed=2)
    (product, cut), nothing, plain = together(
        products, Linear(a, b, source, mask=mask, alpha=0.5, beta=-2.0), None, Linear(b.T, a.T[:, :2], row=row[:2])
    )
    expected = 0.5 * multiply(a, b) - 2 * source
    assert_agree(product, expected)
    assert_agree(cut, expected * mask)
    assert nothing is None
    assert_agree(plain, multiply(b.T, a.T[:, :2]) + row[:2])
    assert together(products) == []
    assert together(products, None) == [None]


@every_dtype
@pytest.mark.parametrize("size", [1, 5, 131])
@pytest.mark.parametrize("bias", [False, True])
def test_gram_is_summed_in_float64(size: int, bias: bool, dtype: torch.dtype) -> None:
    rows = normal(size, 40).to(dtype)
    (exact, other), (rounded, _) = products.grams([rows, rows[:, :3]], [bias, not bias], True)
    assert_agree(other, multiply(rows[:, :3].double(), rows[:, :3].double().T) + (not bias), 1e-13)
    assert (exact.dtype, rounded.dtype) == (torch.float64, dtype)
    assert_agree(exact, multiply(rows.double(), rows.double().T) + bias, 1e-13)
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("size", [1, 5, 131])
def test_invert_grams(size: int) -> None:
    (exact,), _ = products.grams([normal(size, size + 40)], [True])
    inverses, infos, rounded = products.invert_grams([exact, -exact, 4 * exact], True)
    assert len(inverses) == 3 and infos.dtype == torch.int32
    torch.testing.assert_close(rounded, [inverse.float() for inverse in inverses], rtol=0, atol=0, equal_nan=True)
    assert products.invert_grams([exact])[2] == []
    assert infos.tolist() == [0, 1, 0]
    assert_agree(multiply(inverses[0], exact), torch.eye(size, dtype=torch.float64), 1e-10)
    assert torch.equal(inverses[2], inverses[0] / 4)


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [1, 6, 8])
def test_pseudo_inverse(columns: int, bias: bool, dtype: torch.dtype) -> None:
    inverse, rows = normal(5, 5), normal(5, columns, seed=1).to(dtype)
    factor = products.pseudo_inverse(inverse, rows, bias)
    extended = torch.cat([rows, rows.new_ones(5, 1)], 1) if bias else rows
    assert (factor.dtype, factor.shape) == (dtype, extended.shape)
    assert factor.stride(1) == 1 and factor.stride(0) * dtype.itemsize % 16 == 0
    assert_agree(factor, multiply(inverse, extended.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan"), float("inf")])
def test_what_is_not_positive_definite_is_told_by_info(value: float) -> None:
    _, infos, _ = products.invert_grams([torch.full((3, 3), value, dtype=torch.float64)])
    assert infos.item() != 0


@every_activation
@every_dtype
def test_steps(activation: Activation, dtype: torch.dtype) -> None:
    size = torch.tensor(0.125, dtype=torch.float64)
    batch, change = in_domain(activation, (3, 4)).to(dtype), 1e-2 * normal(3, 4).to(dtype)
    named = [activation.name], activation.sigma[1]
    (moved,), (targets,), (slopes,) = products.take_steps([batch], [change], size, [False], *named)
    wide = batch.double() + size * change.double()
    assert {moved.dtype, targets.dtype, slopes.dtype} == {dtype}
    for actual, expected in zip((moved, targets), (wide, activation.inverse(wide)), strict=True):
        assert_agree(actual, expected, 10 * TOLERANCE[dtype])
    assert_agree(slopes, activation.derivative(targets.double()), 10 * TOLERANCE[dtype])

    (moved,), (ahead,), (slopes,) = products.take_steps([targets], [change], size, [True], *named)
    wide = targets.double() + size * change.double()
    assert {moved.dtype, ahead.dtype, slopes.dtype} == {dtype}
    assert_agree(ahead, wide, TOLERANCE[dtype])
    assert_agree(moved, activation.forward(wide), TOLERANCE[dtype])
    assert_agree(slopes, activation.derivative(wide), TOLERANCE[dtype])


@every_activation
@every_dtype
def test_times_curvature(activation: Activation, dtype: torch.dtype) -> None:
    left, right, at, source = (normal(3, 4, seed=seed).to(dtype) for seed in range(4))
    wide = at.double().requires_grad_()
    slope = activation.derivative(wide)
    curvature = torch.zeros_like(wide)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), wide)
    for added in (None, source):
        result = products.times_curvature(left, right, at, added, *activation.sigma)
        expected = left.double() * right.double() * curvature + (0 if added is None else added.double())
        assert result.dtype == dtype and result is not added
        assert_agree(result, expected, 10 * TOLERANCE[dtype])
    assert_agree(source, normal(3, 4, seed=3), TOLERANCE[dtype])  # not written to


@every_dtype
def test_dot_sum(dtype: torch.dtype) -> None:
    left = [normal(3, 4).to(dtype), normal(5).to(dtype), normal(2, 2)[:, :0].to(dtype)]
    right = [normal(4, 3, seed=1).to(dtype).T, normal(5, seed=1).to(dtype), left[2]]
    total = products.dot_sum(left, right)
    assert products.dot_sum(left, right, -2.0) == -2 * total
    assert products.dot_sum(left, left, 0.5, True) == (0.5 * products.dot_sum(left, left)).sqrt()
    assert (total.dtype, total.shape) == (torch.float64, ())
    expected = sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True))
    assert_agree(total, torch.as_tensor(expected), TOLERANCE[dtype])


def test_squared_norms() -> None:
    tensors = [normal(3, 4), normal(4, 3).float().T, torch.tensor(-3, dtype=torch.int32), torch.empty(0)]
    found = products.squared_norms(tensors)
    assert found.dtype == torch.float64
    assert_agree(found, torch.stack([tensor.double().square().sum() for tensor in tensors]), 1e-6)
    assert products.squared_norms([tensors[0] * float("nan"), tensors[0]]).isnan().tolist() == [True, False]


@pytest.mark.parametrize("size", [1, 10, 512, 3000])
@pytest.mark.parametrize("count", [2, 8, 32])
def test_probe_vectors_are_spread_like_random_ones(count: int, size: int) -> None:
    vectors = products.probe_vectors(count, torch.empty(size, size, dtype=torch.float64))
    assert vectors.shape == (count, size) and vectors.abs().max() <= 1
    narrow = products.probe_vectors(count, torch.empty(size, size))
    assert narrow.dtype == torch.float32 and torch.equal(narrow, (vectors + 1).float() - 1)
    if size >= 512:
        values = torch.linalg.svdvals(vectors) / (size / 3) ** 0.5
        assert 1 - 1.5 * (count / size) ** 0.5 <= values.min() <= values.max() <= 1 + 1.5 * (count / size) ** 0.5
        assert vectors.mean().abs() <= 4 / (3 * vectors.numel()) ** 0.5


@every_dtype
def test_no_two_results_are_one_tensor(dtype: torch.dtype) -> None:
    a, size = normal(3, 3).to(dtype), torch.tensor(0.5, dtype=torch.float64)
    for results in (
        products.linear_activation(a, a, None, *Identity().sigma),
        products.inverse_activation(a, a, a, 1.0, *Identity().sigma),
        *(products.take_steps([a], [a], size, [along], ["identity"], Identity().sigma[1]) for along in (False, True)),
        products.grams([a], [True]),
        together(products, Linear(a, a, mask=a))[0],
    ):
        found = tree_leaves(results)
        assert len({result.data_ptr() for result in found}) == len(found)


@pytest.mark.parametrize("accept", [False, True])
def test_commit(accept: bool) -> None:
    current = [normal(3, 4), normal(2, seed=1)]
    trial = [normal(3, 4, seed=2), torch.full((2,), float("nan"), dtype=torch.float64)]
    expected = [tensor.clone() for tensor in (trial if accept else current)]
    products.commit(torch.tensor(accept), current, trial)
    for actual, value in zip(current, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_near_dependence(last: int) -> None:
    """‖K‖_F ‖K⁻¹‖_F of diag(1, t) is t + 1/t, here with the bound between t = 8 and t = 10."""
    info = torch.tensor(0, dtype=torch.int32)
    diagonals = [torch.tensor([1.0, value], dtype=torch.float64) for value in (1.0, 8.0, 10.0)]
    grams, inverses = [torch.diag(one) for one in diagonals], [torch.diag(1 / one) for one in diagonals]
    chosen = slice(0, last + 1)
    count = len(grams[chosen])
    beyond = products.near_dependence(grams[chosen], inverses[chosen], [info] * count, 3.0)
    assert (beyond.dtype, beyond.shape) == (torch.bool, ())
    assert beyond.item() is (last == 2)
    assert products.near_dependence(grams[:1], inverses[:1], [info + 1], 3.0).item()
    assert products.near_dependence(grams[:1], [inverses[0] * float("nan")], [info], 3.0).item()


INF, NAN = float("inf"), float("nan")

DECISIONS: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    # what is decided on, (value, size, accepted, shortened, note, end), (value, radius, failed, ended, first radius)
    "taken": ({}, [3, 0.25, 1, 0, 0, 0], [3, 1.5, 0, 0, 0.5]),
    "taken after a failure": ({"control": (2, 0.5, 1, 0, 0.5)}, [3, 0.25, 1, 0, 0, 0], [3, 0.75, 1, 0, 0.5]),
    "taken downwards": (
        {"value": 1.0, "size": -0.25, "maximise": False},
        [1, -0.25, 1, 0, 0, 0],
        [1, 1.5, 0, 0, 0.5],
    ),
    "shortened": ({"size": 0.125}, [3, 0.125, 1, 1, 0, 0], [3, 0.75, 0, 0, 0.5]),
    "hindered": ({"hindered": (False, True)}, [3, 0.25, 0, 0, 2, 0], [2, 0.125, 1, 0, 0.5]),
    "not finite": ({"value": INF}, [INF, 0.25, 0, 0, 3, 0], [2, 0.125, 1, 0, 0.5]),
    "no improvement": ({"value": 2.0}, [2, 0.25, 0, 0, 4, 0], [2, 0.125, 1, 0, 0.5]),
    "above the cap": ({"cap": 2.5}, [3, 0.25, 0, 0, 5, 0], [2, 0.5 * 0.95 * 0.5503397132, 1, 0, 0.5]),
    "far above the cap": ({"cap": 2.0001}, [3, 0.25, 0, 0, 5, 0], [2, 0.05, 1, 0, 0.5]),
    "a bound broken": ({"broken": (True,)}, [3, 0.25, 0, 0, 6, 0], [2, 0.125, 1, 0, 0.5]),
    "cap reached": ({"cap": 3.1}, [3, 0.25, 1, 0, 0, 4], [3, 1.5, 0, 4, 0.5]),
    "radius too small": (
        {"value": 1.0, "size": 1e-4, "control": (2, 2e-4, 1, 0, 0.5)},
        [1, 1e-4, 0, 0, 4, 5],
        [2, 5e-5, 1, 5, 0.5],
    ),
    "no direction": ({"norm": 0.0}, [3, 0.25, 0, 1, 0, 2], [2, 0, 1, 2, 0.5]),
    "after the end": ({"control": (2, 0.5, 0, 4, 0.5)}, [3, 0.25, 0, 0, 0, 1], [2, 0.125, 1, 1, 0.5]),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_judge(case: str) -> None:
    facts, row, control = DECISIONS[case]
    actual = results_of(products.judge, "judge", judge_arguments(**facts))
    for found, expected in zip(actual, (row[2], row, control), strict=True):
        assert found.tolist() == pytest.approx(expected)


def test_judge_of_a_direction_that_is_not_finite() -> None:
    accept, row, control = results_of(products.judge, "judge", judge_arguments(norm=NAN))
    assert (accept.item(), row[5].item(), control[3].item()) == (False, 3, 3)
