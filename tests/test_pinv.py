"""The pseudo-inverse factor against singular values: its residual, its condition estimate and the ranks it reports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from symtele_cuda.kernels.pinv import (
    MAX_CONDITION,
    append_ones,
    condition_from_gram,
    factorize,
    pinv_factor,
)
from symtele_cuda.kernels.torch_kernels import grams, invert_grams

DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1), (1, 7), (2, 2), (20, 50), (64, 64), (96, 200)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conditioned(n: int, d: int, condition: float, spectrum: str, dtype: torch.dtype) -> Tensor:
    """n×d with singular values from 1 to 1/condition: spread out, or all 1 but the last; or rows of those lengths."""
    left = torch.linalg.qr(normal(n, n)).Q
    right = torch.linalg.qr(normal(d, n, seed=1)).Q
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    if spectrum == "flat":
        values = torch.ones(n, dtype=torch.float64)
        values[-1] = 1 / condition if n > 1 else 1
    if spectrum == "rows":
        left = torch.eye(n, dtype=torch.float64)
    return ((left * values) @ right.T).to(dtype)


def true_condition(inputs: Tensor) -> float:
    values = torch.linalg.svdvals(inputs.double())
    return (values[0] / values[-1]).item()


def residual(factor: Tensor, inputs: Tensor) -> float:
    """‖P H̃ᵀ − I‖₂, evaluated in float64."""
    product = factor.double() @ inputs.double().T
    return torch.linalg.matrix_norm(product - torch.eye(len(inputs), dtype=torch.float64), 2).item()


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", ["log", "flat", "rows"])
@pytest.mark.parametrize("share", [1e-7, 1e-4, 1e-2, 0.9, 0.99])
def test_residual_and_condition_estimate_up_to_the_limit(
    dtype: torch.dtype, shape: tuple[int, int], spectrum: str, share: float
) -> None:
    inputs = conditioned(*shape, max(1.0, share * MAX_CONDITION[dtype]), spectrum, dtype)
    found = pinv_factor(inputs, bias=False)
    condition = true_condition(inputs)

    assert found.matched and found.factor is not None
    assert found.factor.shape == inputs.shape and found.factor.dtype == dtype
    assert found.rank == len(inputs)
    unit_roundoff = torch.finfo(dtype).eps / 2
    assert residual(found.factor, inputs) <= 100 * unit_roundoff * condition
    assert condition / 2 <= found.condition <= condition * 2


@every_dtype
@pytest.mark.parametrize("spectrum", ["log", "flat"])
def test_the_factor_is_the_pseudo_inverse(dtype: torch.dtype, spectrum: str) -> None:
    inputs = conditioned(30, 80, 1e4, spectrum, dtype)
    factor = pinv_factor(inputs, bias=False).factor
    expected = torch.linalg.pinv(inputs.double()).T.to(dtype)
    # The pseudo-inverse of a perturbed matrix moves by u κ: 1e4 units, times 10 for the sums.
    torch.testing.assert_close(
        factor, expected, rtol=0, atol=1e5 * torch.finfo(dtype).eps * expected.abs().max().item()
    )


@every_dtype
@pytest.mark.parametrize("excess", [1.1, 3.0, 10.0, 1e2, 1e4])
@pytest.mark.parametrize("spectrum", ["log", "flat", "rows"])
def test_beyond_the_limit_there_is_no_factor(dtype: torch.dtype, excess: float, spectrum: str) -> None:
    found = pinv_factor(conditioned(40, 60, excess * MAX_CONDITION[dtype], spectrum, dtype), bias=False)
    assert not found.matched and found.factor is None
    assert found.condition > MAX_CONDITION[dtype]


@every_dtype
@pytest.mark.parametrize("excess", [1.1, 2.0, 5.0])
def test_ill_conditioned_is_told_from_rank_deficient(dtype: torch.dtype, excess: float) -> None:
    inputs = conditioned(40, 60, excess * MAX_CONDITION[dtype], "flat", dtype)
    found = pinv_factor(inputs, bias=False)
    assert found.rank == 40
    # Singular values are good to u₆₄ σ₁, that is to u₆₄ κ of the smallest.
    assert found.condition == pytest.approx(true_condition(inputs), rel=1e-6)


def duplicated_sample(inputs: Tensor) -> tuple[Tensor, int]:
    inputs[7] = inputs[3]
    return inputs, len(inputs) - 1


def zero_sample(inputs: Tensor) -> tuple[Tensor, int]:
    inputs[0] = 0
    return inputs, len(inputs) - 1


def constant_features(inputs: Tensor) -> tuple[Tensor, int]:
    inputs[:, 10:] = 0.5
    return inputs, 11


def low_rank(inputs: Tensor) -> tuple[Tensor, int]:
    return inputs[:, :9] @ inputs[:9], 9


def all_zero(inputs: Tensor) -> tuple[Tensor, int]:
    return torch.zeros_like(inputs), 0


@every_dtype
@pytest.mark.parametrize(
    "damage",
    [duplicated_sample, zero_sample, constant_features, low_rank, all_zero],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rank_deficient_batches_are_recognised(dtype: torch.dtype, damage, scale: float) -> None:
    inputs, rank = damage(normal(30, 40, dtype=dtype))
    found = pinv_factor(inputs * scale, bias=False)
    assert not found.matched
    assert (found.rank, found.condition) == (rank, math.inf)


@every_dtype
def test_the_bias_column_counts(dtype: torch.dtype) -> None:
    features = normal(30, 40, dtype=dtype)
    features[:, 10:] = 0.5  # eleven independent columns, one of which the bias repeats
    assert pinv_factor(features, bias=False).rank == pinv_factor(features, bias=True).rank == 11
    repeated = normal(5, 40, dtype=dtype)
    repeated[4] = 2 * repeated[3]  # dependent without the ones, independent with them
    assert not pinv_factor(repeated, bias=False).matched
    assert pinv_factor(repeated, bias=True).matched


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_the_largest_batch(dtype: torch.dtype, bias: bool) -> None:
    width = 24
    limit = width + bias
    found = pinv_factor(normal(limit, width, dtype=dtype), bias)
    assert found.matched and found.factor is not None and found.factor.shape == (limit, limit)
    too_large = pinv_factor(normal(limit + 1, width, dtype=dtype), bias)
    assert (too_large.factor, too_large.rank, too_large.condition) == (None, limit, math.inf)


@every_dtype
def test_many_more_samples_than_columns(dtype: torch.dtype) -> None:
    assert pinv_factor(normal(5000, 6, dtype=dtype), bias=True).rank == 7


@every_dtype
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_the_inputs_is_immaterial(dtype: torch.dtype, scale: float) -> None:
    inputs = normal(20, 30, dtype=dtype)
    found = pinv_factor(inputs * scale, bias=False)
    assert found.matched and found.factor is not None
    assert residual(found.factor, inputs * scale) <= 100 * torch.finfo(dtype).eps * found.condition


@every_dtype
def test_strided_inputs_and_inputs_with_a_gradient(dtype: torch.dtype) -> None:
    base = normal(60, 40, dtype=dtype)
    strided = base[::3, ::2].requires_grad_()
    found = pinv_factor(strided, bias=True)
    expected = pinv_factor(strided.detach().clone(), bias=True)
    assert found.factor is not None and not found.factor.requires_grad
    torch.testing.assert_close(found.factor, expected.factor)


@every_dtype
def test_twice_the_same(dtype: torch.dtype) -> None:
    inputs = normal(50, 70, dtype=dtype)
    first, second = pinv_factor(inputs, bias=True), pinv_factor(inputs, bias=True)
    assert first.condition == second.condition
    assert torch.equal(first.factor, second.factor)


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_gram_and_its_inverse(dtype: torch.dtype, bias: bool) -> None:
    inputs = normal(12, 20, dtype=dtype)
    (matrix,), (rounded,) = grams([inputs], [bias], True)
    exact = append_ones(inputs.double()) if bias else inputs.double()
    assert matrix.dtype == torch.float64 and torch.equal(rounded, matrix.to(dtype))
    torch.testing.assert_close(matrix, exact @ exact.T, rtol=1e-13, atol=1e-13)
    (inverse,), infos, _ = invert_grams([matrix])
    assert infos.item() == 0
    torch.testing.assert_close(inverse @ matrix, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "matrix", [torch.zeros(3, 3), -torch.eye(3), torch.full((3, 3), math.nan)], ids=["0", "-I", "nan"]
)
def test_a_matrix_that_is_not_positive_definite_has_no_inverse(matrix: Tensor) -> None:
    assert invert_grams([matrix.double()])[1].item() != 0


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
def test_factorization(dtype: torch.dtype, bias: bool) -> None:
    inputs = normal(12, 20, dtype=dtype)
    extended = append_ones(inputs.double()) if bias else inputs.double()
    found = factorize(inputs, bias)
    assert (found.info.item(), found.info.dtype, found.info.ndim) == (0, torch.int32, 0)
    torch.testing.assert_close(found.gram, extended @ extended.T, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.inverse() @ found.gram, torch.eye(12).double(), rtol=0, atol=1e-11)
    factor = found.factor()
    assert factor.dtype == dtype and factor.stride(0) * dtype.itemsize % 16 == 0
    assert residual(factor, extended) <= 100 * torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [3, 9], ids=["thin", "wide"])
def test_update_is_the_smallest_change_that_adds_the_residual(dtype: torch.dtype, bias: bool, outputs: int) -> None:
    inputs, wanted = normal(12, 20, dtype=dtype), normal(12, outputs, dtype=dtype, seed=1)
    weight, offset = normal(outputs, 20, dtype=dtype, seed=2), normal(outputs, dtype=dtype, seed=3) if bias else None
    new_weight, new_offset = factorize(inputs, bias).update(weight, offset, wanted)
    assert new_weight.dtype == dtype and (new_offset is None) == (not bias)
    change, extended = new_weight.double() - weight.double(), inputs.double()
    if new_offset is not None and offset is not None:
        assert new_offset.dtype == dtype
        change, extended = torch.cat([change, (new_offset - offset).double()[:, None]], 1), append_ones(extended)
    expected = (torch.linalg.pinv(extended) @ wanted.double()).T
    torch.testing.assert_close(change, expected, rtol=0, atol=50 * torch.finfo(dtype).eps)


@every_dtype
@pytest.mark.parametrize("outputs", [3, 9], ids=["thin", "wide"])
def test_update_by_nothing_gives_the_weights_back(dtype: torch.dtype, outputs: int) -> None:
    weight, offset = normal(outputs, 20, dtype=dtype), normal(outputs, dtype=dtype)
    found = factorize(normal(12, 20, dtype=dtype, seed=1), True).update(
        weight, offset, torch.zeros(12, outputs, dtype=dtype)
    )
    assert all(map(torch.equal, found, (weight, offset)))


@pytest.mark.parametrize("n", [1, 3, 50, 300])
@pytest.mark.parametrize("second", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("condition", [1e2, 1e8])
def test_the_condition_estimate_on_spectra_that_hide_their_ends(n: int, second: float, condition: float) -> None:
    # One eigenvalue at each end, all the others next to it: the hardest for a power iteration.
    values = torch.full((n,), second, dtype=torch.float64)
    values[n // 2 :] = 1 / (condition * second)
    values[0] = 1
    if n > 1:
        values[-1] = 1 / condition
    basis = torch.linalg.qr(normal(n, n)).Q
    estimate = condition_from_gram((basis * values) @ basis.T, (basis / values) @ basis.T)
    expected = (values.max() / values.min()).sqrt().item()
    assert expected / 2 <= estimate <= expected * (1 + 1e-9)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(0, 3), ValueError, r"inputs must have shape \(n, d\) with n, d >= 1, got \(0, 3\)"),
        (torch.zeros(3, 0), ValueError, r"got \(3, 0\)"),
        (torch.zeros(3), ValueError, r"got \(3,\)"),
        (torch.full((2, 3), math.nan), ValueError, "inputs must be finite"),
        (torch.full((2, 3), math.inf), ValueError, "inputs must be finite"),
        (torch.zeros(2, 3, dtype=torch.float16), TypeError, "inputs must be float32 or float64, got torch.float16"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "got torch.int64"),
    ],
    ids=str,
)
def test_bad_inputs(inputs: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pinv_factor(inputs, bias=False)
