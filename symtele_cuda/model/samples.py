"""Which samples of a batch to teleport on: those that the layers' inputs can tell apart well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TeleportError
from ..kernels import torch_kernels as products
from ..kernels.pinv import condition_from_gram
from ..transaction import Transaction
from .chain import Chain, check_inputs, check_layers
from .network import Network
from .problem import begin, layer_inputs, read_network
from .reader import read_chain

# Float32 would bear more, the data outside the batch would not: the nearer the samples are to dependence, the larger
# the weights that tell them apart. With less the batch shrinks at the second of several teleports, for they bring its
# activations nearer to dependence.
GOOD_CONDITION = 1000.0


def matched_samples(model: nn.Module, x: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """Indices of samples of `x` that are independent, and well conditioned, as the inputs of the hidden layers.

    The samples are taken in order, greedily. Sample i is skipped if with it κ₂([B, 1]) > 1000 (no column of ones
    without bias) in the input B = B_{k−1} of any hidden layer k that counts; no more are taken than the narrowest
    input has columns. Because κ₂ does not fall when rows are added, a sample that is skipped once would not fit later
    either, and a duplicate costs one sample and not all those behind it.

    How it is found: K = [B, 1][B, 1]ᵀ = C Cᵀ row by row (Cholesky, float64). With the rows taken so far, c the solution
    of C c = k_i and d² = k_ii − ‖c‖² the squared distance of row i from their span, the new factor is [[C, 0], [cᵀ, d]]
    and its extreme singular values are followed by incremental condition estimation (Bischof 1990, SIAM J. Matrix Anal.
    Appl. 11): from unit vectors v with ‖C v‖ = s ≈ σ the next ones are [p v, q], (p, q) being an eigenvector of

        [s² + α², α d; α d, d²],   α = cᵀ v,   and the next s² its eigenvalue.

    As this κ₂ is estimated from below, the samples taken last are dropped, by bisection, until `condition_from_gram`
    is at most 1000 too.

    Args:
        model: a chain as for `teleport_mlp`; its parameters and the random state are not changed.
        x: N samples as the model takes them, of its dtype and device; a few hundred, as the memory grows with N².
        layers: the hidden layers k = 1..m that count; default: all.

    Returns:
        Increasing int64 indices into x, on its device; at least one. Deterministic on the CPU.

    Raises:
        TypeError, ValueError: an argument is not what is said above, or a parameter of the model is not what
            `teleport_mlp` asks for (NaN or Inf in it, frozen, ...).
        TeleportError: no sample can be taken, because all are zero in the input of a layer without bias, or not finite.
    """

    def work() -> Tensor:
        chain = read_chain(model)
        named = range(1, len(chain.linears)) if layers is None else check_layers(layers, len(chain.linears) - 1)
        begin(transaction, chain)
        network = read_network(chain)
        samples = check_inputs(chain, x, "x").to(network.weights[0].dtype)
        return choose_samples(network, samples, network.forward(samples), named)

    transaction = Transaction()
    return transaction.run(work)


def choose_samples(
    network: Network, samples: Tensor, outputs: Sequence[Tensor], named: Sequence[int]
) -> Tensor:
    """`matched_samples` of a network for the hidden layers `named` (1..m); `outputs` are its pre-activations."""
    inputs = layer_inputs(network, samples, outputs)
    biased = [bias is not None for bias in network.biases]
    exact, _ = products.grams([inputs[k - 1] for k in named], [biased[k - 1] for k in named])
    grams = torch.stack(exact).cpu()  # row by row is slow on a GPU
    squares = grams.diagonal(dim1=1, dim2=2)
    usable = (squares.isfinite() & (squares > 0)).all(0).nonzero()[:, 0]
    if len(usable) == 0:
        raise TeleportError(
            f"x: expected a sample that is finite and not zero in the inputs of the hidden layers {list(named)}, "
            f"got none among {len(samples)}"
        )
    columns = min(inputs[k - 1].shape[1] + biased[k - 1] for k in named)
    if len(usable) <= columns and _well_conditioned(_restrict(grams, usable)):  # then none would be skipped
        return usable.to(samples.device)
    taken = usable[_independent_rows(_restrict(grams, usable).numpy(), columns)]
    return taken[: _well_conditioned_rows(_restrict(grams, taken))].to(samples.device)


def layers_to_match(chain: Chain, layers: Sequence[int] | None) -> list[int]:
    """The hidden layers, of `layers` (1..m; None: all), in whose inputs a batch for a teleport by GL is to match: those
    with an invertible activation and nothing frozen in the weight layers beside them."""
    hidden = range(1, len(chain.linears)) if layers is None else layers
    return [k for k in hidden if chain.activations[k - 1].invertible and not chain.frozen_beside(k)]


def _restrict(grams: Tensor, rows: Tensor) -> Tensor:
    return grams[:, rows[:, None], rows]


def _independent_rows(grams: np.ndarray, most: int) -> list[int]:
    """The rows, `most` at most, that `matched_samples` takes by its estimate of κ₂.

    grams: K of each layer's input (layers×n×n), no row of which is zero.
    """
    factors = [_GrowingFactor(gram_matrix, most) for gram_matrix in grams]
    taken: list[int] = []
    for row in range(grams.shape[1]):
        if len(taken) == most:
            break
        extensions = [factor.extended_by(row) for factor in factors]
        if any(extension is None or extension.condition > GOOD_CONDITION for extension in extensions):
            continue
        for factor, extension in zip(factors, extensions, strict=True):
            assert extension is not None
            factor.take(row, extension)
        taken.append(row)
    return taken


@dataclass(frozen=True)
class _Extreme:
    """An extreme singular value of the next factor: s², and the (p, q) that make its v from the v so far."""

    square: float
    turn: tuple[float, float]


@dataclass(frozen=True)
class _Extension:
    """What one more row would bring: d², and the extremes of the factor with it."""

    distance: float
    smallest: _Extreme
    largest: _Extreme

    @property
    def condition(self) -> float:
        return math.sqrt(self.largest.square / self.smallest.square) if self.smallest.square > 0 else math.inf


class _GrowingFactor:
    """The factor C of K for the rows taken so far, with the estimates of its extreme singular values."""

    def __init__(self, gram_matrix: np.ndarray, most: int) -> None:
        n = len(gram_matrix)
        self._gram = gram_matrix / gram_matrix.diagonal().max()
        self._count = 0
        self._components = np.zeros((n, min(n, most)))  # of every row the c, which for the rows taken is their row of C
        self._squares = (2.0, 0.0)  # s² below and above; the first row, at most 1, will be both
        self._vectors = np.zeros((2, min(n, most)))  # their v

    def extended_by(self, row: int) -> _Extension | None:
        """What `row` would bring, or None where it depends on the rows taken."""
        components = self._components[row, : self._count]
        distance = float(self._gram[row, row] - components @ components)
        if distance <= 0:
            return None
        overlaps = self._vectors[:, : self._count] @ components
        below, above = (_extend(s, float(a), distance) for s, a in zip(self._squares, overlaps, strict=True))
        return _Extension(distance, below[0], above[1])

    def take(self, row: int, extension: _Extension) -> None:
        count = self._count
        rest = self._gram[row:, row] - self._components[row:, :count] @ self._components[row, :count]
        self._components[row:, count] = rest / math.sqrt(extension.distance)
        extremes = extension.smallest, extension.largest
        self._squares = extremes[0].square, extremes[1].square
        for vector, extreme in zip(self._vectors, extremes, strict=True):
            vector[:count] *= extreme.turn[0]
            vector[count] = extreme.turn[1]
        self._count += 1


def _extend(square: float, overlap: float, distance: float) -> tuple[_Extreme, _Extreme]:
    """The smaller and the larger next s² with their (p, q), from one so far, α = `overlap` and d² = `distance`.

    The larger eigenvalue is a sum of what is not negative, and the product of both is the determinant s² d²: neither
    loses digits.
    """
    half = (square + overlap * overlap - distance) / 2
    beside = overlap * math.sqrt(distance)
    root = math.hypot(half, beside)
    larger = (square + overlap * overlap + distance) / 2 + root
    p, q = (half + root, beside) if half >= 0 else (beside, root - half)
    length = math.hypot(p, q)
    p, q = (p / length, q / length) if length > 0 else (1.0, 0.0)
    return _Extreme(square * distance / larger, (-q, p)), _Extreme(larger, (p, q))


def _well_conditioned_rows(grams: Tensor) -> int:
    """The largest number of leading rows whose Gram matrices (layers×n×n) are well conditioned; at least 1."""
    low, beyond = 1, grams.shape[1] + 1
    middle = beyond - 1  # first of all, as mostly all are good
    while beyond - low > 1:
        low, beyond = (middle, beyond) if _well_conditioned(grams[:, :middle, :middle]) else (low, middle)
        middle = (low + beyond) // 2
    return low


def _well_conditioned(grams: Tensor) -> bool:
    """Whether κ₂ of all inputs is good, given their Gram matrices (layers×n×n)."""
    return all(_condition(matrix) <= GOOD_CONDITION for matrix in grams)


def _condition(gram_matrix: Tensor) -> float:
    inverses, infos, _ = products.invert_grams([gram_matrix])
    return float(condition_from_gram(gram_matrix, inverses[0])) if infos.item() == 0 else math.inf
