"""What a teleport optimises over the group; `model.objective` says what an objective is.

`GradNorm` and `Lookahead` have a fast path, in activation space. `next_step` is the loss after an optimizer's own step,
`generalization` sharpness and curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_number
from ..kernels.library import Linear, Products, together
from ..kernels.pinv import is_thin
from ..measure import WeightsOnBatch
from ..model.loss import LossOfParameters
from ..model.objective import LooksAhead, Objective, has_fast_path
from ..orbits import Evaluation
from ..orbits.layers import BatchPoint, Fit, LayerState
from ..orbits.passes import LayerGradient, Seed, add, backpropagate, deltas_of, pull_back, squared_gradient_norm

__all__ = ["GradNorm", "Lookahead", "LooksAhead", "Objective", "has_fast_path"]

# What ∂f/∂E R costs through ∂f/∂A R, in products with n×n matrices; rounded up, for each is one more call.
IMAGE_PRODUCTS = 4


@dataclass(frozen=True)
class GradNorm:
    """f = ‖∇L‖², to be maximised (Zhao et al. 2022, arXiv 2205.10637, Algorithm 1)."""

    maximise = True

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        return self.value_given(loss_of, parameters, gradients)

    def value_given(
        self, loss_of: LossOfParameters, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Tensor:
        return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()

    def evaluate(self, point: BatchPoint, output_delta: Tensor) -> Evaluation:
        """f = Σ_l ⟨δ_l δ_lᵀ, K_l⟩ and its gradient."""
        products = point.products
        passes = backpropagate(products, point.layers, output_delta)
        value, derivatives, by_back = squared_gradient_norm(products, point.layers, deltas_of(passes))

        def gradient() -> list[LayerGradient]:
            seeds = [Seed(delta=derivative) for derivative in derivatives]
            moved = [(one, seed) for one, seed in zip(passes, seeds[1:], strict=True) if one.at.plan.moves]
            linears = (
                Linear(one.delta.T, one.at.inputs) if one.at.formed is not None else Linear(one.delta, one.delta.T)
                for one, _ in moved
            )
            for (one, seed), product in zip(moved, together(products, *linears), strict=True):
                if one.at.formed is not None:
                    seed.delta_image = product
                else:
                    seed.gram = product
            return pull_back(passes, seeds, by_back)

        return Evaluation(value, gradient)

    def measure(self, weights: WeightsOnBatch) -> tuple[Tensor, None]:
        return weights.squared_gradient_norm, None


@dataclass(frozen=True)
class Lookahead:
    """f = L(θ − η∇L(θ)), the loss after one gradient step of length η = `rate` on the same batch, to be minimised.

    rate: a number > 0; the search on a device holds it as a scalar tensor there.
    """

    rate: float | Tensor

    maximise = False

    def __post_init__(self) -> None:
        if not isinstance(self.rate, Tensor):
            check_number("rate", self.rate, above=0.0)

    def value(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> Tensor:
        return loss_of(self.ahead(loss_of, parameters))

    def ahead(self, loss_of: LossOfParameters, parameters: Sequence[Tensor]) -> list[Tensor]:
        """θ − η∇L(θ)."""
        gradients = torch.autograd.grad(loss_of(parameters), list(parameters), create_graph=True)
        return self._stepped(parameters, gradients)

    def value_given(
        self, loss_of: LossOfParameters, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Tensor:
        return loss_of(self._stepped(parameters, gradients))

    def _stepped(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        return [p - self.rate * gradient for p, gradient in zip(parameters, gradients, strict=True)]

    def evaluate(self, point: BatchPoint, output_delta: Tensor) -> Evaluation:
        """f through z_0 = Y_0 − η K_0 δ_0,  z_l = q_l R_lᵀ + b_l + (q_l B_lᵀ + 1)(A_l − η δ_l),  q_{l+1} = σ_l(z_l).

        The first line holds because layer 0 produces Y_0 whatever its weights; X enters through its Gram matrix alone.
        """
        passes = backpropagate(point.products, point.layers, output_delta * -self.rate)  # −η δ_l, all that f needs
        trial = _step(point, deltas_of(passes))
        value, output_gradient = point.loss.value_and_gradient(trial[-1].output)

        def gradient() -> list[LayerGradient]:
            seeds, by_back = _seeds(point, trial, output_gradient)
            return pull_back(passes, seeds, by_back)

        return Evaluation(value, gradient)

    def measure(self, weights: WeightsOnBatch) -> tuple[Tensor, list[Tensor]]:
        steps = [delta * -self.rate for delta in weights.deltas]
        return weights.loss_after(steps), steps


@dataclass(frozen=True)
class _Stepped:
    """One layer after a gradient step: z, and what else it takes for the way back, None for the first layer."""

    output: Tensor
    layer: SteppedLayer | None


def _step(point: BatchPoint, steps: Sequence[Tensor]) -> list[_Stepped]:
    """The forward pass of a lookahead, given −η δ_l."""
    first, *others = point.layers
    output = point.products.linear(first.gram, steps[0], source=point.targets[0])
    trial = [_Stepped(output, None)]
    for at, step in zip(others, steps[1:], strict=True):
        change = add(step, at.coefficients)
        assert change is not None
        stepped = SteppedLayer.make(point.products, at, at.plan.sigma.forward(trial[-1].output), change)
        trial.append(_Stepped(stepped.output(), stepped))
    return trial


def _seeds(point: BatchPoint, trial: Sequence[_Stepped], output_gradient: Tensor) -> tuple[list[Seed], Tensor]:
    """The reverse pass of `_step`, and ∂f/∂δ_0 ⊙ σ'(Y_0)."""
    first, second, *_ = point.layers
    seeds, adjoint = list[Seed](), output_gradient
    befores = [stepped.output for stepped in trial[:-1]]
    for at, stepped, before in zip(point.layers[:0:-1], trial[:0:-1], befores[::-1], strict=True):
        layer = stepped.layer
        assert layer is not None
        with_image = at.plan.moves and IMAGE_PRODUCTS * len(adjoint) <= len(at.reference)
        by_hidden, by_change, by_inputs, image = layer.pull_back(adjoint, at.plan.moves, with_image)
        seed = Seed(delta=by_change, coefficients=by_change, coefficient_image=image, inputs=by_inputs)
        if at.plan.fit is Fit.CARRIED:
            seed.reference = adjoint, layer.hidden
        seeds.append(seed)
        adjoint = at.plan.sigma.pull_back(by_hidden, before)
    ((by_delta, by_back),) = together(point.products, Linear(first.gram, adjoint, mask=second.slope))
    return [Seed(delta=by_delta, target=adjoint), *reversed(seeds)], by_back


@dataclass(frozen=True)
class SteppedLayer:
    """z = q Rᵀ + b + (q Bᵀ + 1) C with q (`hidden`) and B (`inputs`), n×d, and C (`change`), n×c, and its reverse mode,
    in the cheaper order of the products.

    image is q Rᵀ + b; inner is q Bᵀ + 1 (n×n), or Cᵀ B (c×d) where C is thin.
    """

    products: Products
    hidden: Tensor
    at: LayerState
    change: Tensor
    image: Tensor
    thin: bool
    inner: Tensor

    @classmethod
    def make(cls, products: Products, at: LayerState, hidden: Tensor, change: Tensor) -> SteppedLayer:
        thin = is_thin(change)
        inner, image = together(
            products,
            Linear(change.T, at.inputs) if thin else Linear(hidden, at.inputs.T),
            Linear(hidden, at.reference.T, row=at.bias),
        )
        if at.bias is not None and not thin:
            inner.add_(1)
        return cls(products, hidden, at, change, image, thin, inner)

    def output(self) -> Tensor:
        """z."""
        if not self.thin:
            return self.products.linear(self.inner, self.change, source=self.image)
        row = None if self.at.bias is None else self.change.sum(0)
        return self.products.linear(self.hidden, self.inner.T, source=self.image, row=row)

    def pull_back(
        self, adjoint: Tensor, to_inputs: bool, with_image: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """∂f/∂q = (adjoint Cᵀ) B + adjoint R;  ∂f/∂C = (B qᵀ + 1) adjoint;  if asked for ∂f/∂B = (C adjointᵀ) q and
        ∂f/∂C R, the latter not where C is thin."""
        at = self.at
        by_inner, by_change, through = together(
            self.products,
            Linear(adjoint.T, self.hidden) if self.thin else Linear(adjoint, self.change.T),
            None if self.thin else Linear(self.inner.T, adjoint),
            Linear(adjoint, at.reference),
        )
        if self.thin:
            by_hidden, by_change, by_inputs = together(
                self.products,
                Linear(adjoint, self.inner, through),
                Linear(at.inputs, by_inner.T, row=None if at.bias is None else adjoint.sum(0)),
                Linear(self.change, by_inner) if to_inputs else None,
            )
            return by_hidden, by_change, by_inputs, None
        by_hidden, by_inputs, image = together(
            self.products,
            Linear(by_inner, at.inputs, through),
            Linear(by_inner.T, self.hidden) if to_inputs else None,
            Linear(self.inner.T, through) if with_image else None,
        )
        return by_hidden, by_change, by_inputs, image
