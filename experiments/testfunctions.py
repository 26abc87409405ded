"""Test functions with a circle symmetry: L(x) = ‖h(x)‖² for a bijection h of the plane.

The rotation R(θ) ∈ SO(2) acts on x by  g_θ · x = h⁻¹(R(θ) h(x)),  and L(g_θ · x) = L(x) because R(θ) keeps the norm
(Zhao et al. 2022, arXiv 2205.10637, section 4.1). The orbit of a point is its whole level set, a circle in the
coordinates (u, v) = h(x), and a teleport chooses the point of that circle where ‖∇L‖² is large:

    booth        L = (x₁ + 2x₂ − 7)² + (2x₁ + x₂ − 5)²      h(x) = (x₁ + 2x₂ − 7, 2x₁ + x₂ − 5)
    rosenbrock   L = 100 (x₁² − x₂)² + (x₁ − 1)²            h(x) = (10 (x₁² − x₂), x₁ − 1)

A function of one's own is one line: `SumOfSquares("sphere", h=lambda x: x, h_inverse=lambda u: u)`.
Everything is plain torch; points are tensors of shape (..., 2) and the results have their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The exact maximisation: one grid over the circle, then grids over ever smaller brackets around the best angle.
# 2π/4096 after the first, a factor 64 with each refinement: 6e-9 at the end, where a maximum is flat in float64.
GRID_POINTS = 4096
BRACKET_POINTS = 129
REFINEMENTS = 3


@dataclass(frozen=True)
class SumOfSquares:
    """L(x) = ‖h(x)‖² on the plane, with the action g_θ · x = h⁻¹(R(θ) h(x)) of SO(2).

    Args:
        name: what figures and tables call it.
        h: the change of variables, (..., 2) → (..., 2), a bijection made of differentiable torch operations.
        h_inverse: its inverse, of the same kind.
    """

    name: str
    h: Callable[[Tensor], Tensor]
    h_inverse: Callable[[Tensor], Tensor]

    def loss(self, x: Tensor) -> Tensor:
        """L(x) = ‖h(x)‖², of shape (...) for x of shape (..., 2)."""
        _check_point(x)
        return self.h(x).square().sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """∇L(x), of x's shape; differentiable in x where x requires a gradient."""
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(point).sum(), point, create_graph=x.requires_grad)
        return gradient

    def gradient_norm(self, x: Tensor) -> Tensor:
        """‖∇L(x)‖, of shape (...)."""
        return self.gradient(x).norm(dim=-1)

    def hessian(self, x: Tensor) -> Tensor:
        """∇²L(x) for one point x of shape (2,), symmetric of shape (2, 2)."""
        return torch.autograd.functional.hessian(self.loss, x.detach())

    def rotate(self, x: Tensor, theta: Tensor | float) -> Tensor:
        """g_θ · x = h⁻¹(R(θ) h(x)); x (..., 2) and theta (...) broadcast, differentiable in both."""
        _check_point(x)
        theta = torch.as_tensor(theta, dtype=x.dtype, device=x.device)
        u, v = self.h(x).unbind(-1)
        cos, sin = theta.cos(), theta.sin()
        return self.h_inverse(torch.stack((cos * u - sin * v, sin * u + cos * v), dim=-1))

    def teleport_ascent(
        self, x: Tensor, steps: int = 10, rate: float = 0.1, generator: torch.Generator | None = None
    ) -> Tensor:
        """θ ← θ + rate · ∂‖∇L(g_θ · x)‖²/∂θ, `steps` times from a random θ in [0, π); returns g_θ · x.

        The published search returns the last θ. Its rates are long enough to jump from slope to slope of the circle
        (on rosenbrock one run in seven then ends above 1e-6), so this one returns the steepest of the θ it visited.

        Args:
            x: one point, shape (2,).
            generator: draws the first θ; without one θ starts at 0, deterministically.
        """
        _check_one_point(x)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        angles = [torch.zeros((), dtype=x.dtype)]
        if generator is not None:
            angles = [math.pi * torch.rand((), dtype=x.dtype, generator=generator)]
        for _ in range(steps):
            angles.append(angles[-1] + rate * self._steepness_slope(x, angles[-1]))
        return self._steepest(x, torch.stack(angles))

    def teleport_exact(self, x: Tensor) -> Tensor:
        """argmax over θ ∈ [0, 2π) of ‖∇L(g_θ · x)‖²; returns g_θ · x for one point x of shape (2,). Deterministic.

        A dense grid over the circle finds the highest peak, ever finer grids around it sharpen it; θ = 0 is among the
        candidates, so the point returned is never less steep than x.
        """
        _check_one_point(x)
        center, half_width = torch.zeros((), dtype=x.dtype), math.pi
        offsets = torch.linspace(-1, 1, GRID_POINTS + 1, dtype=x.dtype)
        for _ in range(1 + REFINEMENTS):
            angles = center + half_width * offsets
            center = angles[self.gradient_norm(self.rotate(x, angles)).argmax()]
            half_width *= float(offsets[1] - offsets[0])
            offsets = torch.linspace(-1, 1, BRACKET_POINTS, dtype=x.dtype)
        return self.rotate(x, center).detach()

    def _steepness_slope(self, x: Tensor, theta: Tensor) -> Tensor:
        """∂‖∇L(g_θ · x)‖²/∂θ."""
        theta = theta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.gradient(self.rotate(x, theta)).square().sum(), theta)
        return slope

    def _steepest(self, x: Tensor, angles: Tensor) -> Tensor:
        """The point g_θ · x of largest ‖∇L‖ among the angles."""
        points = self.rotate(x, angles)
        return points[self.gradient_norm(points).argmax()].detach()


def _booth_h(x: Tensor) -> Tensor:
    x1, x2 = x.unbind(-1)
    return torch.stack((x1 + 2 * x2 - 7, 2 * x1 + x2 - 5), dim=-1)


def _booth_h_inverse(uv: Tensor) -> Tensor:
    u, v = uv.unbind(-1)
    return torch.stack(((2 * v - u) / 3 + 1, (2 * u - v) / 3 + 3), dim=-1)


def _rosenbrock_h(x: Tensor) -> Tensor:
    x1, x2 = x.unbind(-1)
    return torch.stack((10 * (x1**2 - x2), x1 - 1), dim=-1)


def _rosenbrock_h_inverse(uv: Tensor) -> Tensor:
    u, v = uv.unbind(-1)
    x1 = v + 1
    return torch.stack((x1, x1**2 - u / 10), dim=-1)


booth = SumOfSquares("booth", _booth_h, _booth_h_inverse)
rosenbrock = SumOfSquares("rosenbrock", _rosenbrock_h, _rosenbrock_h_inverse)


def _check_point(x: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] != 2:
        raise ValueError(f"x must have shape (..., 2), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")


def _check_one_point(x: Tensor) -> None:
    if x.shape != (2,):
        raise ValueError(f"x must be one point of shape (2,), got {tuple(x.shape)}")
