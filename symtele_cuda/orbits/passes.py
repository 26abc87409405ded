"""The way back through the layers of a point, and its reverse mode; the notation is that of `layers`.

The action keeps the logits, so δ_{M−1} = ∂L/∂logits is a constant of the search, and the whole backward pass lives in
n×d and n×n matrices:

    S_l = δ_l A_lᵀ      back_l = δ_l R_l + S_l B_l      δ_{l−1} = back_l ⊙ σ'(Y_{l−1})      (l = M−1 … 1)

A `LayerPass` is these lines for one layer, and their reverse mode written out. No pass forms a weight-sized tensor,
unless the layer is thin, and nothing here reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..kernels.library import Linear, Products, together
from .layers import Fit, LayerState


@dataclass
class Seed:
    """What an objective f depends on directly in one layer: ∂f/∂δ, ∂f/∂A, the symmetric ∂f/∂K, ∂f/∂B, ∂f/∂Y and
    ∂f/∂R = aᵀc as (a, c). None is zero.

    coefficient_image: ∂f/∂A R, where it is cheaper to have than to work out. delta_image: δᵀB of a thin layer that
    absorbs, in place of ∂f/∂K = δδᵀ.
    """

    delta: Tensor | None = None
    coefficients: Tensor | None = None
    coefficient_image: Tensor | None = None
    gram: Tensor | None = None
    delta_image: Tensor | None = None
    inputs: Tensor | None = None
    target: Tensor | None = None
    reference: tuple[Tensor, Tensor] | None = None


class LayerTerms(NamedTuple):
    """What comes out of one layer's reverse mode: ∂f/∂δ with ∂f/∂δ ⊙ σ'(Y) (None for the last layer, where δ is a
    constant), ∂f/∂Y, ∂f/∂B without its share through the Y before, and ∂f/∂E where the layer absorbs."""

    by_delta: tuple[Tensor, Tensor] | None
    by_target: Tensor | None
    by_inputs: Tensor | None
    by_residual: Tensor | None


class LayerGradient(NamedTuple):
    """The gradient of an objective f in one layer; None is zero.

    inputs: ∂f/∂B with Y held, and source: ∂f/∂Y with B held, though the two move together. references: ∂f/∂R = Σ aᵀc as
    pairs (a, c) where the layer is carried.
    """

    inputs: Tensor | None
    source: Tensor | None
    references: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class LayerPass:
    """δ on its way back through one layer: back = δ W', and before = back ⊙ σ' is the δ of the layer before.

    slope: σ'(Y) of the layer's own Y, None for the last layer.
    """

    products: Products
    at: LayerState
    slope: Tensor | None
    delta: Tensor
    back: Tensor
    before: Tensor

    def pull_back(self, seed: Seed, by_back: Tensor) -> LayerTerms:
        """Reverse mode, given ∂f/∂back and what the objective says itself."""
        raise NotImplementedError


class KeptPass(LayerPass):
    """Through a layer whose weights are R."""

    @classmethod
    def make(cls, products: Products, at: LayerState, slope: Tensor | None, delta: Tensor) -> KeptPass:
        ((back, before),) = together(products, Linear(delta, at.reference, mask=at.slope))
        return cls(products, at, slope, delta, back, before)

    def pull_back(self, seed: Seed, by_back: Tensor) -> LayerTerms:
        products, at, by_delta, by_inputs = self.products, self.at, None, seed.inputs
        if self.slope is not None:
            (by_delta,) = together(products, Linear(by_back, at.reference.T, seed.delta, mask=self.slope))
        if at.plan.moves and seed.gram is not None:
            by_inputs = products.linear(seed.gram, at.inputs, source=by_inputs, alpha=2.0)
        return LayerTerms(by_delta, seed.target, by_inputs, None)


class ThinPass(LayerPass):
    """Through a layer whose weights W' are formed, with ∂f/∂W' = δᵀ ∂f/∂back."""

    @classmethod
    def make(cls, products: Products, at: LayerState, slope: Tensor | None, delta: Tensor) -> ThinPass:
        assert at.formed is not None
        ((back, before),) = together(products, Linear(delta, at.formed, mask=at.slope))
        return cls(products, at, slope, delta, back, before)

    def pull_back(self, seed: Seed, by_back: Tensor) -> LayerTerms:
        products, at, by_inputs = self.products, self.at, seed.inputs
        assert at.formed is not None
        by_weight, by_delta, through_gram = together(
            products,
            Linear(self.delta.T, by_back),
            None if self.slope is None else Linear(by_back, at.formed.T, seed.delta, mask=self.slope),
            None if seed.delta_image is None else Linear(self.delta, seed.delta_image, by_inputs, alpha=2.0),
        )
        by_coefficients = products.linear(at.inputs, by_weight.T, source=seed.coefficients)
        by_residual = products.linear(at.inverse, by_coefficients)
        if at.plan.moves:
            by_inputs = by_inputs if through_gram is None else through_gram
            by_inputs = input_gradient(products, at, at.formed, by_weight, by_residual, by_inputs)
        return LayerTerms(by_delta, add(seed.target, by_residual), by_inputs, by_residual)


@dataclass(frozen=True)
class WidePass(LayerPass):
    """Through a layer that absorbs, in n×n matrices: S = δAᵀ (`mixing`) and δR (`through`), back = δR + SB."""

    mixing: Tensor
    through: Tensor

    @classmethod
    def make(cls, products: Products, at: LayerState, slope: Tensor | None, delta: Tensor) -> WidePass:
        assert at.coefficients is not None
        mixing, through = together(products, Linear(delta, at.coefficients.T), Linear(delta, at.reference))
        ((back, before),) = together(products, Linear(mixing, at.inputs, through, mask=at.slope))
        return cls(products, at, slope, delta, back, before, mixing, through)

    def pull_back(self, seed: Seed, by_back: Tensor) -> LayerTerms:
        products, at = self.products, self.at
        assert at.coefficients is not None
        by_mixing, by_inputs, by_delta = together(
            products,
            Linear(by_back, at.inputs.T),
            Linear(self.mixing.T, by_back, seed.inputs) if at.plan.moves else None,
            None if self.slope is None else Linear(by_back, at.reference.T, seed.delta),
        )
        alongside = None if self.slope is None else Linear(by_mixing, at.coefficients, by_delta, mask=self.slope)
        through = self._through_coefficients
        if at.plan.moves and seed.coefficients is None:
            through = self._through_carrier
        by_residual, half_by_gram, by_inputs, by_delta = through(seed, by_mixing, by_inputs, alongside)
        if half_by_gram is not None:
            by_inputs = products.linear(half_by_gram + half_by_gram.T, at.inputs, source=by_inputs)
        return LayerTerms(by_delta, add(seed.target, by_residual), by_inputs, by_residual)

    def _through_carrier(
        self, seed: Seed, by_mixing: Tensor, by_inputs: Tensor | None, alongside: Linear | None
    ) -> _ResidualTerms:
        """Without a seed for A, so that ∂f/∂A = ∂f/∂Sᵀ δ, all follows from the n×n matrix C = K⁻¹ ∂f/∂Sᵀ:

        ∂f/∂E = C δ,  ∂f/∂E Aᵀ = C S,  ∂f/∂E R = C (δR). A product with R is the dearest of all where the batch is
        small, and δR is at hand.
        """
        carrier, by_delta = together(self.products, Linear(self.at.inverse, by_mixing.T), alongside)
        by_residual, half_by_gram, by_inputs = together(
            self.products,
            Linear(carrier, self.delta),
            Linear(carrier, self.mixing, seed.gram, alpha=-1.0),
            Linear(carrier, self.through, by_inputs, alpha=-1.0),
        )
        return _ResidualTerms(by_residual, half_by_gram, by_inputs, by_delta)

    def _through_coefficients(
        self, seed: Seed, by_mixing: Tensor, by_inputs: Tensor | None, alongside: Linear | None
    ) -> _ResidualTerms:
        """With a seed for A, or where the input stays: through ∂f/∂A = ∂f/∂Sᵀ δ + the seed itself."""
        products, at, image = self.products, self.at, seed.coefficient_image
        assert at.coefficients is not None
        by_coefficients, image, by_delta = together(
            products,
            Linear(by_mixing.T, self.delta, seed.coefficients),
            None if image is None else Linear(by_mixing.T, self.through, image),
            alongside,
        )
        by_residual, image = together(
            products,
            Linear(at.inverse, by_coefficients),
            None if image is None else Linear(at.inverse, image, by_inputs, alpha=-1.0),
        )
        if not at.plan.moves:
            return _ResidualTerms(by_residual, None, None, by_delta)
        half_by_gram, product = together(
            products,
            Linear(by_residual, at.coefficients.T, seed.gram, alpha=-1.0),
            Linear(by_residual, at.reference, by_inputs, alpha=-1.0) if image is None else None,
        )
        return _ResidualTerms(by_residual, half_by_gram, product if image is None else image, by_delta)


class _ResidualTerms(NamedTuple):
    """∂f/∂E = K⁻¹ ∂f/∂A and, if the layer's input is moved, what comes through it: H with 2 ∂f/∂K = H + Hᵀ, and
    ∂f/∂B with −∂f/∂E R added. by_delta: the results of the product that was to be computed alongside."""

    by_residual: Tensor
    half_by_gram: Tensor | None
    by_inputs: Tensor | None
    by_delta: tuple[Tensor, Tensor] | None


def backpropagate(products: Products, layers: Sequence[LayerState], output_delta: Tensor) -> list[LayerPass]:
    """The passes through the layers behind the first, from ∂L/∂logits = `output_delta` (n×classes)."""
    passes: list[LayerPass] = []
    delta, slope = output_delta, None
    for at in reversed(layers[1:]):
        kind = KeptPass if at.coefficients is None else WidePass if at.formed is None else ThinPass
        passes.append(kind.make(products, at, slope, delta))
        delta, slope = passes[-1].before, at.slope
    return passes[::-1]


def deltas_of(passes: Sequence[LayerPass]) -> list[Tensor]:
    """δ of every layer, the first included."""
    return [passes[0].before, *(one.delta for one in passes)]


def pull_back(passes: Sequence[LayerPass], seeds: Sequence[Seed], by_back: Tensor) -> list[LayerGradient]:
    """The gradient in the layers behind the first, from the seeds of all, by reverse mode through `backpropagate`,
    A = K⁻¹(Y − BRᵀ − b) and K = BBᵀ + 1.

    by_back: ∂f/∂back of the second layer, which is ∂f/∂δ_0 ⊙ σ'(Y_0), as it comes with ∂f/∂δ_0.
    """
    first, *others = seeds
    by_delta, by_target = first.delta, first.target  # of the layer before, like by_back
    gradient = []
    for one, seed in zip(passes, others, strict=True):
        assert by_delta is not None
        by_source = with_curvature(one, by_delta, by_target) if one.at.plan.moves else by_target
        terms = one.pull_back(seed, by_back)
        references = ()
        if one.at.plan.fit is Fit.CARRIED:
            references = ((one.delta, by_back), *(() if seed.reference is None else (seed.reference,)))
        gradient.append(LayerGradient(terms.by_inputs, by_source, references))
        if terms.by_delta is not None:
            by_delta, by_back = terms.by_delta
        by_target = terms.by_target
    return gradient


def with_curvature(one: LayerPass, by_delta: Tensor, by_target: Tensor | None) -> Tensor | None:
    """∂f/∂Y of the Y before a layer: `by_target`, and what comes through σ'(Y) in the δ before, which is nothing where
    σ is piecewise linear."""
    sigma = one.at.plan.sigma
    if sigma.piecewise_linear:
        return by_target
    return one.products.times_curvature(by_delta, one.back, one.at.behind, by_target, *sigma.sigma)


def input_gradient(
    products: Products, at: LayerState, formed: Tensor, by_weight: Tensor, by_residual: Tensor, source: Tensor | None
) -> Tensor:
    """∂f/∂B through W' = R + AᵀB, A = K⁻¹(Y − BRᵀ − b) with K = BBᵀ + 1: A (V − ∂f/∂Eᵀ B) − ∂f/∂E W' + the source."""
    assert at.coefficients is not None
    through_weight, through_residual = together(
        products,
        Linear(by_residual.T, at.inputs, by_weight, alpha=-1.0),
        Linear(by_residual, formed, source, alpha=-1.0),
    )
    return products.linear(at.coefficients, through_weight, source=through_residual)


def add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """left + right, where None is zero."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


def squared_gradient_norm(
    products: Products, layers: Sequence[LayerState], deltas: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """‖∇L‖² = Σ_l ⟨δ_l, K_l δ_l⟩ over all weights and biases, its derivatives 2 K_l δ_l in δ_l, and that of the first
    layer times σ'(Y_0), elementwise.

    With more samples than columns δ may lie in the null space of [B, 1]ᵀ; there K δ = B (Bᵀ δ) + 1 (1ᵀ δ) is formed
    from the gradient itself, whose square cannot cancel (and which is the smaller matrix).
    """
    masks = [layers[1].slope, *[None] * len(layers[1:])]
    through_gradient = [len(at.inputs) > at.inputs.shape[1] for at in layers]
    first = together(
        products,
        *(
            Linear(at.inputs.T, delta) if through else Linear(at.gram, delta, mask=mask, alpha=2.0)
            for at, delta, mask, through in zip(layers, deltas, masks, through_gradient, strict=True)
        ),
    )
    derivatives, pairs = [], list[tuple[Tensor, Tensor]]()  # products of pairs make twice the square
    for at, found, delta, mask, through in zip(layers, first, deltas, masks, through_gradient, strict=True):
        if through:
            by_bias = None if at.bias is None else delta.sum(0)
            pairs += [(one, 2 * one) for one in (found, by_bias) if one is not None]
            derivatives += together(products, Linear(at.inputs, found, row=by_bias, mask=mask, alpha=2.0))
        else:
            pairs.append((delta, found if mask is None else found[0]))
            derivatives.append(found)
    (by_first, masked), *others = derivatives
    left, right = zip(*pairs, strict=True)
    return products.dot_sum(left, right, 0.5), [by_first, *others], masked
