"""The weight layers on a batch's orbit: what a search does to each, and how it stands at a point.

Notation (row-major, as in torch.nn.Linear), for the weight layers l = 0..M−1 and n samples:

    B_0 = X,   Y_l = B_l W_lᵀ + b_l,   B_{l+1} = σ_l(Y_l),   Y_{M−1} = logits,   K_l = B_l B_lᵀ + 1   (+1 only with
    bias)

g acts on the activations, B_{l+1} ← B_{l+1} gᵀ. The layer before must then produce the new activations and the layer
behind must not notice them. Both follow from one formula with R_l = W_l and Y_l = σ_l⁻¹(B_{l+1}):

    [W_l', b_l'] = [R_l, b_l] + E_lᵀ P(B_l) = [R_l + A_lᵀ B_l, b_l + A_lᵀ 1],
    E_l = Y_l − B_l R_lᵀ − b_l,   A_l = K_l⁻¹ E_l,   P(B) = K⁻¹ [B, 1]

(Zhao et al. 2022, arXiv 2205.10637, eq. 8, where R_l = 0; R_l = W_l makes it the least change of the weights). It holds
exactly where the rows of [B_l, 1] are linearly independent: such an input is *matched*. Where the input of a layer was
moved and is not matched, the layer is *carried*: R_l = W_l g⁻¹ with the explicit g, and E_l = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from ..activations import Activation
from ..kernels.library import Products
from ..kernels.pinv import Factorization, factorize_by_inverse, is_thin
from ..model.loss import BatchLoss


class Fit(Enum):
    """How the weights of a layer follow the activations on both sides of it."""

    KEPT = "kept"  # [W, b] stays
    ABSORBED = "absorbed"  # [W, b] + Eᵀ P(B)
    CARRIED = "carried"  # W g⁻¹, for the g that moves its input


class Move(Enum):
    """How a search moves the activations B = σ(Y) that a layer takes as its input."""

    STILL = "still"
    ACTIVATIONS = "activations"  # B moves, and Y = σ⁻¹(B) follows
    TARGETS = "targets"  # Y moves, which has no edge to run into, and B = σ(Y) follows


@dataclass(frozen=True)
class LayerPlan:
    """What a search does to one weight layer. `before` is the σ behind which its input lies, None for the first."""

    fit: Fit
    move: Move
    before: Activation | None

    @property
    def moves(self) -> bool:
        """Whether a step moves the layer's input."""
        return self.move is not Move.STILL

    @property
    def edged(self) -> bool:
        """Whether the input could leave the domain of σ⁻¹."""
        return self.move is Move.ACTIVATIONS and self.sigma.bounded

    @property
    def sigma(self) -> Activation:
        assert self.before is not None
        return self.before


@dataclass(frozen=True)
class LayerGoal:
    """As much of a layer's state as its weights depend on: Y behind its input, None for the first layer, and R."""

    source: Tensor | None
    reference: Tensor


@dataclass(frozen=True)
class LayerState:
    """One weight layer at a point of the orbit.

    inputs: B (n×d). source: the Y with B = σ(Y), and slope: σ'(Y); None for the first layer. gram: K. gram_inverse:
    K⁻¹, None where the input is not matched. reference: R. coefficients: A, None where the layer does not absorb, and
    for the first, for which no search asks. formed: W' of a thin layer that absorbs, with which products are cheaper
    than with n×n matrices. image: B Rᵀ + b where no step changes it.
    """

    plan: LayerPlan
    bias: Tensor | None
    inputs: Tensor
    source: Tensor | None
    slope: Tensor | None
    gram: Tensor
    gram_inverse: Tensor | None
    reference: Tensor
    coefficients: Tensor | None
    formed: Tensor | None
    image: Tensor | None

    @property
    def behind(self) -> Tensor:
        """The Y of a layer that has one behind its input."""
        assert self.source is not None
        return self.source

    @property
    def goal(self) -> LayerGoal:
        return LayerGoal(self.source, self.reference)

    @property
    def inverse(self) -> Tensor:
        """K⁻¹ of a layer that is known to have one."""
        assert self.gram_inverse is not None
        return self.gram_inverse

    def moving(self) -> list[Tensor]:
        """What a step changes, as far as the next step and the weights depend on it."""
        tensors = []
        if self.plan.moves:
            tensors += [self.inputs, self.behind]
        return [*tensors, self.reference] if self.plan.fit is Fit.CARRIED else tensors

    def whole_coefficients(self, target: Tensor) -> Tensor | None:
        """A with the layer's own Y as `target`, None where the layer does not absorb; that of the first worked out."""
        if self.coefficients is None and self.plan.fit is Fit.ABSORBED:
            assert self.image is not None
            return self.inverse @ (target - self.image)
        return self.coefficients


def form(products: Products, inputs: Tensor, reference: Tensor, coefficients: Tensor) -> Tensor:
    """R + AᵀB."""
    return products.linear(coefficients.T, inputs, source=reference)


def form_thin(products: Products, inputs: Tensor, reference: Tensor, coefficients: Tensor | None) -> Tensor | None:
    """The weights of a thin layer that absorbs, None for every other."""
    if coefficients is None or not is_thin(coefficients):
        return None
    return form(products, inputs, reference, coefficients)


@dataclass(frozen=True)
class Match:
    """How the rows of one layer's input [B, 1] lie: B (n×d), K and K⁻¹ in float64 (None if not matched), rank, κ₂.

    rank and condition are None where nobody asked whether it is matched.
    """

    inputs: Tensor
    gram: Tensor
    gram_inverse: Tensor | None = None
    rank: int | None = field(default=None, compare=False)
    condition: float | None = field(default=None, compare=False)

    def factorization(self, bias: bool, products: Products) -> Factorization | None:
        """What `factorize` would work out again; None where the input is not matched, and for float64."""
        if self.gram_inverse is None or self.inputs.dtype != torch.float32:
            return None
        return factorize_by_inverse(self.inputs, bias, products, self.gram, self.gram_inverse)


@dataclass(frozen=True)
class BatchPoint:
    """A point of the orbit, layer by layer, with the logits, which all points share, and the loss of the batch."""

    layers: tuple[LayerState, ...]
    logits: Tensor
    loss: BatchLoss
    products: Products

    @property
    def targets(self) -> list[Tensor]:
        """Y of every layer: what lies behind the input of the next one, and the logits."""
        return [*(at.source for at in self.layers if at.source is not None), self.logits]
