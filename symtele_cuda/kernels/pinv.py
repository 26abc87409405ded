"""The pseudo-inverse factor P = (H̃ H̃ᵀ)⁻¹ H̃ of a batch of activations, without an SVD.

H is n×d, H̃ = [H, 1] with a bias column (H̃ = H without bias), K = H̃ H̃ᵀ. P = (H̃⁺)ᵀ solves P H̃ᵀ = I exactly when the n
rows of H̃ are linearly independent, so the batch must be no larger than the layer is wide: n ≤ d + 1 (n ≤ d without
bias).

K squares the condition number κ of H̃. What that costs decides how P is formed:

* float32 inputs: K, K⁻¹ and the product K⁻¹ H̃ in float64, rounded once. The error is u₃₂·κ + u₆₄·κ², so float64 hides
  the square. The *product* must be float64 too: K⁻¹ rounded to float32 alone costs u₃₂·κ².
* float64 inputs: Cholesky-QR, twice (CholeskyQR2: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015; Fukaya, Kannan,
  Nakatsukasa, Yamamoto, Yanagisawa 2020). The first pass leaves nearly orthonormal rows, the second removes the u·κ²
  that it left. It needs K to be numerically positive definite, κ ≲ u^(−1/2).

Within MAX_CONDITION the residual obeys ‖P H̃ᵀ − I‖ ≤ 100·u·κ; beyond it no factor is handed out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import torch_kernels as torch_products
from .library import Products
from .torch_kernels import padded_memory, probe_vectors

MAX_CONDITION: dict[torch.dtype, float] = {torch.float32: 1e5, torch.float64: 1e7}
"""The largest κ₂(H̃), by dtype of the inputs, for which a batch counts as matched."""

_POWER_ITERATIONS = 8
_PROBES = 2


@dataclass(frozen=True)
class PinvFactor:
    """The factor of one batch, and how far it can be trusted.

    Attributes:
        factor: P (n×d̃, dtype of the inputs); None unless the batch is matched.
        rank: the numerical rank of H̃.
        condition: κ₂(H̃), an estimate within a factor of two; infinite where H̃ has not full row rank.
    """

    factor: Tensor | None
    rank: int
    condition: float

    @property
    def matched(self) -> bool:
        """Whether any n×d_out target can be reached exactly: full row rank and κ₂(H̃) ≤ MAX_CONDITION."""
        return self.factor is not None


def pinv_factor(inputs: Tensor, bias: bool) -> PinvFactor:
    """P = (H̃ H̃ᵀ)⁻¹ H̃ with the rank and the condition number of H̃.

    A batch that cannot be matched (more samples than columns, duplicated samples, constant features, κ₂ beyond
    MAX_CONDITION) is no error here: `factor` is None, and rank and condition say why.

    Args:
        inputs: H (n×d), float32 or float64, n and d at least 1; any strides.
        bias: whether a column of ones is appended.

    Raises:
        TypeError: inputs of another dtype.
        ValueError: inputs that are empty, not two-dimensional or not finite.
    """
    _check_inputs(inputs)
    inputs = inputs.detach()
    if len(inputs) <= inputs.shape[1] + int(bias):
        found = factorize(inputs, bias)
        if found.info.item() == 0:
            condition = float(condition_from_gram(found.gram, found.inverse()))
            if condition <= MAX_CONDITION[inputs.dtype]:
                return PinvFactor(found.factor(), len(inputs), condition)
    return _unmatched(append_ones(inputs) if bias else inputs)


@dataclass(frozen=True)
class Factorization:
    """K of a batch and what follows from it, without a question to the device.

    Attributes:
        inputs: H (n×d), n ≤ d̃.
        bias: whether H̃ has a column of ones.
        products: what computes.
        gram: K (float64).
        infos: an int32 of one element, not 0 where K is not numerically positive definite: then the rest holds no
            meaning.
    """

    inputs: Tensor
    bias: bool
    products: Products
    gram: Tensor
    infos: Tensor

    @property
    def info(self) -> Tensor:
        """The element of `infos`, a scalar."""
        return self.infos.view(())

    def inverse(self) -> Tensor:
        """K⁻¹ (float64)."""
        raise NotImplementedError

    def factor(self) -> Tensor:
        """P (n×d̃, dtype of the inputs), whose rows begin at multiples of 16 bytes."""
        raise NotImplementedError

    def update(self, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """The smallest change of W̃ = [W, b] that adds E (n×d_out) to H̃ W̃ᵀ: W̃ + Eᵀ P. None at all where E is 0."""
        return absorb(self.products, self.factor(), residual, weight, bias)


def factorize(inputs: Tensor, bias: bool, products: Products = torch_products) -> Factorization:
    """K of a batch (n×d, float32 or float64, n ≤ d̃) by the method for its dtype."""
    (gram,), _ = products.grams([inputs], [bias])
    if inputs.dtype == torch.float32:
        inverses, infos, _ = products.invert_grams([gram])
        return _ByInverse(inputs, bias, products, gram, infos, inverses[0])
    factor, info = _cholesky_qr_2(append_ones(inputs) if bias else inputs, gram, products)
    return _ByFactor(inputs, bias, products, gram, info, factor)


def factorize_by_inverse(
    inputs: Tensor, bias: bool, products: Products, gram: Tensor, inverse: Tensor
) -> Factorization:
    """What `factorize` makes of a float32 batch, from K and K⁻¹ (float64) that are known already."""
    return _ByInverse(inputs, bias, products, gram, torch.zeros((), dtype=torch.int32, device=gram.device), inverse)


def absorb(
    products: Products, factor: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, share: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """ρ [W, b] + Eᵀ P for P (n×d̃), a residual E (n×d_out), W (d_out×d_in), b (d_out) or None and the share ρ."""
    kept = weight if share else None
    if bias is None:
        return products.linear(residual.T, factor, kept, beta=share), None
    new_weight = products.linear(residual.T, factor[:, :-1], kept, beta=share)
    return new_weight, torch.addmv(bias, residual.T, factor[:, -1], beta=share)


def is_thin(values: Tensor) -> bool:
    """Whether an n×c tensor is so narrow that products with c×d matrices are cheaper than those with n×n ones."""
    return 2 * values.shape[1] <= len(values)


def append_ones(inputs: Tensor) -> Tensor:
    """[H, 1]: the bias as one more input that is always 1."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


def condition_from_gram(gram: Tensor, inverse: Tensor) -> Tensor:
    """κ₂(H̃) = √(‖K‖₂ ‖K⁻¹‖₂), both norms by power iteration; one float64 a matrix.

    The estimate comes from below and is within a factor of two in practice. It is deterministic.

    Args:
        gram: K (…×n×n, float64).
        inverse: K⁻¹ (…×n×n, float64).
    """
    return (_spectral_norm(gram) * _spectral_norm(inverse)).sqrt()


@dataclass(frozen=True)
class _ByInverse(Factorization):
    """For float32 batches: P is formed only where it is wanted."""

    known_inverse: Tensor

    def inverse(self) -> Tensor:
        return self.known_inverse

    def factor(self) -> Tensor:
        return self.products.pseudo_inverse(self.known_inverse, self.inputs, self.bias)

    def update(self, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """With few columns as W̃ + (K⁻¹ E)ᵀ H̃, without forming P."""
        if not is_thin(residual):
            return super().update(weight, bias, residual)
        coefficients = self.products.linear(self.known_inverse, residual.double())
        exact = self.products.linear(coefficients.T, self.inputs.double(), weight.double())
        new_bias = None if bias is None else (bias + coefficients.sum(0)).to(bias.dtype)
        return exact.to(weight.dtype), new_bias


@dataclass(frozen=True)
class _ByFactor(Factorization):
    """For float64 batches. P Pᵀ is K⁻¹ to the accuracy of P, which the condition estimate needs near the limit."""

    known_factor: Tensor

    def inverse(self) -> Tensor:
        (exact,), _ = self.products.grams([self.known_factor], [False])
        return exact

    def factor(self) -> Tensor:
        return self.known_factor


def _cholesky_qr_2(extended: Tensor, gram: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    """P = L⁻ᵀ (Q Qᵀ)⁻¹ Q with K = L Lᵀ and H̃ = L Q: Q Qᵀ is near I, and its inverse is the second Cholesky pass.

    Q is solved for and not multiplied by L⁻¹: only the solve is backward stable column by column.
    """
    triangle, first = torch.linalg.cholesky_ex(gram)
    rows = torch.linalg.solve_triangular(triangle, extended, upper=False)
    corrections, second, _ = products.invert_grams(products.grams([rows], [False])[0])
    factor = padded_memory(extended, *extended.shape)
    factor.copy_(torch.linalg.solve_triangular(triangle.T, products.linear(corrections[0], rows), upper=True))
    return factor, first + second[0]


def _spectral_norm(matrix: Tensor) -> Tensor:
    """‖A‖₂ of symmetric positive semidefinite A, from below: the growth of a few vectors in the last power iteration.

    The Frobenius norm is divided out before, so that no power of A can overflow.
    """
    scale = torch.linalg.matrix_norm(matrix, keepdim=True)
    scaled = matrix / scale
    vectors = probe_vectors(_PROBES, matrix)
    for _ in range(_POWER_ITERATIONS):
        vectors = vectors @ scaled
    growth = torch.linalg.vector_norm(vectors @ scaled, dim=-1) / torch.linalg.vector_norm(vectors, dim=-1)
    return growth.amax(-1) * scale.squeeze((-2, -1))


def _unmatched(extended: Tensor) -> PinvFactor:
    """Rank and condition number of a batch without a factor, from its singular values: dear, but off the fast path.

    Directions below 10 eps of the largest count as rounding of the inputs, not as rank.
    """
    if not bool(torch.isfinite(extended).all()):
        raise ValueError("inputs must be finite, got NaN or infinite elements")
    values = _singular_values(extended.double())
    largest = values[-1].item()
    resolution = max(10 * torch.finfo(extended.dtype).eps, max(extended.shape) * torch.finfo(torch.float64).eps)
    rank = int((values > resolution * largest).sum())
    full_row_rank = rank == len(extended)
    return PinvFactor(None, rank, largest / values[0].item() if full_row_rank else math.inf)


def _singular_values(matrix: Tensor) -> Tensor:
    """σ(A), ascending: the upper half of the eigenvalues of [[0, R], [Rᵀ, 0]], R the triangular factor of A's thin QR.

    Unlike the eigenvalues of A Aᵀ this does not square the condition number.
    """
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    triangle = torch.linalg.qr(tall, mode="r").R
    size = len(triangle)
    block = triangle.new_zeros(2 * size, 2 * size)
    block[size:, :size] = triangle.T  # eigvalsh reads the lower half only
    return torch.linalg.eigvalsh(block)[size:].clamp(min=0)


def _check_inputs(inputs: Tensor) -> None:
    if inputs.dtype not in MAX_CONDITION:
        raise TypeError(f"inputs must be float32 or float64, got {inputs.dtype}")
    if inputs.ndim != 2 or inputs.numel() == 0:
        raise ValueError(f"inputs must have shape (n, d) with n, d >= 1, got {tuple(inputs.shape)}")
