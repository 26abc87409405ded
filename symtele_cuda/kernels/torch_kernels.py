"""The fused products, in plain torch: what the compiled kernels compute, and what runs where there are none.

Each function is one pass of the compiled extension over its operands, with one signature here and there
(`csrc/ops.cpp`). A product is followed by an elementwise epilogue that reads and writes every element once; a matrix
operand may be transposed by its strides. Activations go by name and numbers (see `Activation.sigma`).

All tensors of a call have one dtype, float32 or float64, and one device, but for what is said to be float64. The
results are new tensors; `commit` alone writes to its arguments. Deterministic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..activations import Activation, activation_of
from . import judgement
from .judgement import Control, Trial
from .operands import operator

# Sums of float32 products in this range have lost nothing to its limits (1e-45 and 3e38).
LEAST_SQUARE, LARGEST_SQUARE = 1e-30, 1e30


@operator(a="n k", b="k m", source="n m", column="n", row="m")
def linear(
    a: Tensor,
    b: Tensor,
    source: Tensor | None = None,
    column: Tensor | None = None,
    row: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """α (a b + u vᵀ) + β C for a (n×k), b (k×m), `source` C (n×m), `column` u (n), by default of ones, `row` v (m).

    Without `row` there is no term u vᵀ, without `source` no β C.
    """
    if source is not None:
        product = torch.addmm(source, a, b, alpha=alpha, beta=beta)
    else:
        product = torch.mm(a, b)
        if alpha != 1:
            product.mul_(alpha)
    if row is None:
        return product
    return product.add_(row if column is None else torch.outer(column, row), alpha=alpha)


@operator(a="n k", b="k m", row="m")
def linear_activation(
    a: Tensor, b: Tensor, row: Tensor | None, activation: str, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Z = a b + 1 vᵀ and σ(Z), with `row` v (m) or None."""
    z = linear(a, b, row=row)
    return z, _distinct(_activation(activation, tuple(numbers)).forward(z), z)


@operator(a="n k", b="k m", origin="n m")
def inverse_activation(
    a: Tensor, b: Tensor, origin: Tensor, rho: float, activation: str, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Y = σ⁻¹(a b) and Y − ρ Z, with `origin` Z (n×m); not finite where a b leaves the domain of σ⁻¹.

    This twin returns one tensor for both where ρ = 0.
    """
    y = _activation(activation, tuple(numbers)).inverse(a @ b)
    return y, torch.sub(y, origin, alpha=rho) if rho else y


@operator(a="n k", b="k m", column="n", row="m", at="n m")
def over_slope(
    a: Tensor,
    b: Tensor,
    column: Tensor | None,
    row: Tensor | None,
    at: Tensor,
    activation: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """G = a b + u vᵀ and G / σ'(Y), with `at` Y (n×m) and u, v as in `linear`."""
    gradient = linear(a, b, column=column, row=row)
    return gradient, _activation(activation, tuple(numbers)).pull_back_inverse(gradient, at)


@operator(a="n k", b="k m", at="n m", source="n m")
def times_slope(
    a: Tensor, b: Tensor, at: Tensor, source: Tensor, beta: float, activation: str, numbers: Sequence[float]
) -> Tensor:
    """(a b) ⊙ σ'(Z) + β C, with `at` Z and `source` C (n×m)."""
    return _activation(activation, tuple(numbers)).pull_back(a @ b, at).add_(source, alpha=beta)


@operator(a="n k", b="k m", sources="n m", rows="m", masks="n m")
def grouped_linear(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> list[Tensor]:
    """D = α (a b + 1 vᵀ) + β C, as in `linear`, of several independent products, in their order, each followed by
    D ⊙ M where it has a `mask` M (of the shape of D). `together` is the way to write a call of it."""
    results: list[Tensor] = []
    for left, right, source, row, mask, alpha, beta in zip(a, b, sources, rows, masks, alphas, betas, strict=True):
        product = linear(left, right, source, None, row, alpha, beta)
        results += [product] if mask is None else [product, product * mask]
    return results


@operator(rows="N d")
def grams(rows: Sequence[Tensor], biases: Sequence[bool], rounds: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """K = H Hᵀ, plus 1 in every element with bias, summed in float64, of every one of several H (n×d, one n for all):
    itself (float64), and in the dtype of H, an empty list unless it `rounds`."""
    exact: list[Tensor] = []
    for matrix, bias in zip(rows, biases, strict=True):
        gram = times_own_transpose(matrix.double())
        exact.append(gram.add_(1.0) if bias else gram)
    if not rounds:
        return exact, []
    return exact, [gram.to(matrix.dtype, copy=True) for gram, matrix in zip(exact, rows, strict=True)]


@operator(grams="N N float64")
def invert_grams(grams: Sequence[Tensor], rounds: bool = False) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """K⁻¹ of every one of several symmetric matrices K (n×n, float64), an int32 vector that is 0 where K is numerically
    positive definite, and K⁻¹ in float32, an empty list unless it `rounds`.

    Elsewhere K⁻¹ holds no meaning.
    """
    inverses: list[Tensor] = []
    infos: list[Tensor] = []
    for gram in grams:
        inverse, info = _invert_gram(gram)
        inverses.append(inverse)
        infos.append(info)
    found = infos[0].unsqueeze(0) if len(infos) == 1 else torch.stack(infos)
    return inverses, found, [inverse.float() for inverse in inverses] if rounds else []


@operator(rows="n d", inverse="n n float64")
def pseudo_inverse(inverse: Tensor, rows: Tensor, bias: bool) -> Tensor:
    """P = K⁻¹ [H, 1], or K⁻¹ H without bias, from a float64 K⁻¹ (n×n), summed in float64: in the dtype of H (n×d).

    It lies in `padded_memory`.
    """
    n, columns = rows.shape
    result, product = padded_memory(rows, n, columns + int(bias)), torch.mm(inverse, rows.double())
    if not bias:
        return result.copy_(product)
    result[:, :columns] = product
    result[:, columns] = inverse.sum(1)
    return result


@operator(grams="* float64", inverses="* float64", infos="int32")
def near_dependence(
    grams: Sequence[Tensor], inverses: Sequence[Tensor], infos: Sequence[Tensor], largest: float
) -> Tensor:
    """Whether any of the matrices K, with K⁻¹ and info from `invert_grams`, is not positive definite, or may have a
    condition number κ₂ beyond `largest`², by the bound κ₂ ≤ ‖K‖_F ‖K⁻¹‖_F: a bool scalar. NaN counts as beyond."""
    bounds = [torch.linalg.vector_norm(k) * torch.linalg.vector_norm(i) for k, i in zip(grams, inverses, strict=True)]
    beyond = (torch.stack(bounds) <= largest**2).logical_not_()
    return beyond.logical_or_(torch.stack([*infos]).bool()).any()


@operator(bases="*", changes="*", size="float64")
def take_steps(
    bases: Sequence[Tensor],
    changes: Sequence[Tensor],
    size: Tensor,
    along_targets: Sequence[bool],
    activations: Sequence[str],
    numbers: Sequence[float],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """B', Y' and σ'(Y') of several layers after a step ε, the float64 scalar `size`:

    B' = B + ε ΔB and Y' = σ⁻¹(B'), not finite where B' lies outside the domain of σ⁻¹, with B and ΔB among `bases` and
    `changes`; or, for a layer `along_targets`, Y' = Y + ε ΔY and B' = σ(Y'), with Y and ΔY there. `numbers` are those
    of the activations, layer after layer.
    """
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    each = len(numbers) // len(bases)
    own = [tuple(numbers[at : at + each]) for at in range(0, len(numbers), each)]
    for base, change, along, *sigma in zip(bases, changes, along_targets, activations, own, strict=True):
        activation, stepped = _activation(*sigma), torch.addcmul(base, change, size)
        other = _distinct(activation.forward(stepped) if along else activation.inverse(stepped), stepped)
        moved, targets = (other, stepped) if along else (stepped, other)
        results.append((moved, targets, activation.derivative(targets)))
    moved_all, targets_all, slopes_all = (list(kind) for kind in zip(*results, strict=True))
    return moved_all, targets_all, slopes_all


@operator(left="*", right="*", at="*", source="*")
def times_curvature(
    left: Tensor, right: Tensor, at: Tensor, source: Tensor | None, activation: str, numbers: Sequence[float]
) -> Tensor:
    """L ⊙ R ⊙ σ''(Y) + C, with `at` Y and `source` C or None; all of one shape."""
    curvature = _activation(activation, tuple(numbers)).second_derivative(at)
    product = torch.zeros_like(left) if curvature is None else left * right * curvature
    product = product.contiguous()
    return product if source is None else product.add_(source)


@operator(left="*", right="*")
def dot_sum(left: Sequence[Tensor], right: Sequence[Tensor], scale: float = 1.0, root: bool = False) -> Tensor:
    """s Σ_i ⟨left_i, right_i⟩, s = `scale`, over the pairs of equal shape, or its square `root`: a float64 scalar.

    The kernels sum in float64, this twin as `dot` does.
    """
    dots = [dot(a, b) for a, b in zip(left, right, strict=True)]
    total = sum(dots[1:], dots[0]) * scale
    return total.sqrt() if root else total


def dot(left: Tensor, right: Tensor) -> Tensor:
    """⟨left, right⟩ of two tensors of one shape and dtype: a float64 scalar.

    On a CPU the sum of float32 tensors is one of float32, several times faster. Where it has left the range in which
    float32 keeps the digits of all squares, it is summed again in float64; so is every sum on other devices.
    """
    a = left.reshape(-1)
    b = a if right is left else right.reshape(-1)
    if a.dtype == torch.float32 and a.is_cpu:
        total = torch.dot(a, b).double()
        if LEAST_SQUARE <= abs(total.item()) <= LARGEST_SQUARE:
            return total
    exact = a.double()
    return torch.dot(exact, exact if b is a else b.double())


@operator(tensors="* float32 float64 int32")
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """‖t‖² of every tensor t, of any shape, float32, float64 or int32: a float64 vector.

    The kernels sum in float64, this twin as `dot` does.
    """
    return torch.stack([dot(t, t) for t in tensors])


@operator(current="* any", trial="* any", accept="bool")
def commit(accept: Tensor, current: Sequence[Tensor], trial: Sequence[Tensor]) -> None:
    """Copy every tensor of `trial` over its partner in `current` if the bool scalar `accept` holds, on the device."""
    for old, new in zip(current, trial, strict=True):
        torch.where(accept, new, old, out=old)


@operator(
    control="5 float64",
    size="float64",
    norm="float64",
    value="float64",
    cap="float64",
    hindered="h bool",
    broken="b bool",
)
def judge(
    control: Tensor,
    size: Tensor,
    norm: Tensor,
    value: Tensor,
    hindered: Tensor,
    broken: Tensor,
    cap: Tensor,
    maximise: bool,
    rules: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """`judgement.judge` on tensors: whether the step is taken, a bool scalar, and the row of figures that says why.

    `control` holds the fields of `Control`, float64, and is updated; `size`, `norm`, `value` and `cap` are those of the
    `Trial`, `hindered` and `broken` its flags; `rules` those of `Rules`, in their order. The row is (value, size) and
    the `Verdict`. This twin reads them back; the kernel does not.
    """
    wanted = len(judgement.Rules._fields)
    torch._check_value(len(rules) == wanted, lambda: f"rules must have {wanted} numbers, got {len(rules)}")
    if control.is_meta:
        return control.new_empty((), dtype=torch.bool), control.new_empty(2 + len(judgement.Verdict._fields))
    known = Control(*control.tolist())
    known.failed, known.ended = bool(known.failed), int(known.ended)
    bounds = broken.tolist()
    trial = Trial(float(size), float(norm), float(value), hindered.tolist(), lambda: bounds, float(cap), maximise)
    verdict = judgement.judge(known, trial, judgement.Rules(*rules))
    control.copy_(control.new_tensor(list(map(float, dataclasses.astuple(known)))))
    row = control.new_tensor([trial.value, trial.size, *map(float, verdict)])
    return torch.tensor(verdict.accepted, device=control.device), row


def times_own_transpose(rows: Tensor) -> Tensor:
    """A Aᵀ, for large A with the block off the diagonal computed once."""
    half = len(rows) // 2
    if half < 64:
        return torch.mm(rows, rows.T)
    upper, lower = rows[:half], rows[half:]
    across = lower @ upper.T
    return torch.cat([torch.cat([upper @ upper.T, across.T], 1), torch.cat([across, lower @ lower.T], 1)])


def padded_memory(like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for a matrix in the dtype and on the device of `like`, whose rows begin at multiples of 16 bytes.

    They are the pieces that tensor cores load.
    """
    piece = 16 // like.dtype.itemsize
    return like.new_empty_strided((rows, columns), (-(-columns // piece) * piece, 1))


def probe_vectors(count: int, matrix: Tensor) -> Tensor:
    """A few rows (count×d) to try d×d matrices (…×d×d) on, spread like random ones, but the same in every run.

    Element k, counted from 1 row by row, is h / 2³¹ − 1 for a hash h of k that goes through all 32 bits.
    """
    size = matrix.shape[-1]
    hashed = torch.arange(1, count * size + 1, device=matrix.device).mul_(0x9E3779B1).bitwise_and_(_LOW_BITS)
    hashed = (hashed ^ (hashed >> 15)).mul_(0x2C1B3C6D).bitwise_and_(_LOW_BITS)
    return hashed.to(matrix.dtype).mul_(2.0**-31).sub_(1.0).reshape(count, size)


_LOW_BITS = 2**32 - 1


def _invert_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    triangle, info = torch.linalg.cholesky_ex(gram)
    if gram.is_cpu:
        return (torch.cholesky_inverse(triangle) if info.item() == 0 else torch.full_like(gram, math.nan)), info
    # `cholesky_inverse` reads its own info back from the device.
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(identity, triangle), info


def _distinct(result: Tensor, other: Tensor) -> Tensor:
    """`result` in memory of its own, where it is `other` itself, as σ(Z) is Z for the identity."""
    return result.clone() if result is other else result


@lru_cache(maxsize=64)
def _activation(name: str, numbers: tuple[float, ...]) -> Activation:
    return activation_of(name, numbers)
