"""Elementwise activations: σ, σ', σ'', σ⁻¹ and the open interval on which σ⁻¹ lives, and ReLU, which has no σ⁻¹.

Teleportation needs more of an activation than training does: the action writes Y = σ⁻¹(σ(Z) gᵀ), and the gradient
of the search uses σ' and σ''. The derivatives of the inverse follow from them at y = σ⁻¹(b):
(σ⁻¹)'(b) = 1 / σ'(y) and (σ⁻¹)''(b) = −σ''(y) / σ'(y)³.

Every formula is written with differentiable torch operations, so that the reference can be differentiated by autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Activation:
    """An activation σ, applied elementwise; `parameter` is its one real parameter where it has one.

    invertible: whether σ⁻¹ exists. positively_homogeneous: whether σ(cz) = c σ(z) for every c > 0.
    """

    parameter: float = 0.0

    name = "abstract"
    domain = (-math.inf, math.inf)
    invertible = True
    positively_homogeneous = False

    def forward(self, z: Tensor) -> Tensor:
        """σ(z)."""
        raise NotImplementedError

    def derivative(self, z: Tensor) -> Tensor:
        """σ'(z); at a kink the value that torch's own backward uses."""
        raise NotImplementedError

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        """gradient ⊙ σ'(z): a gradient with respect to σ(z) as one with respect to z."""
        return gradient * self.derivative(z)

    def second_derivative(self, z: Tensor) -> Tensor | None:
        """σ''(z), or None where it is zero everywhere (piecewise linear activations)."""
        raise NotImplementedError

    def inverse(self, b: Tensor) -> Tensor:
        """σ⁻¹(b); not finite where b lies outside `domain`."""
        raise NotImplementedError

    @property
    def bounded(self) -> bool:
        """Whether `domain` is not all of ℝ."""
        return self.domain != (-math.inf, math.inf)

    def contains(self, b: Tensor) -> bool:
        """Whether every element of b is finite and lies in the open interval `domain`."""
        if b.numel() == 0:
            return True
        low, high = self.domain
        least, largest = torch.aminmax(b)  # both NaN if any element is
        return bool(low < least) and bool(largest < high)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Identity(Activation):
    """σ(z) = z."""

    name = "identity"
    positively_homogeneous = True

    def forward(self, z: Tensor) -> Tensor:
        return z

    def derivative(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient

    def second_derivative(self, z: Tensor) -> None:
        return None

    def inverse(self, b: Tensor) -> Tensor:
        return b


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """σ(z) = max(z, 0) + s·min(z, 0) with the slope s = `parameter` > 0."""

    parameter: float = 0.1

    name = "leaky_relu"
    positively_homogeneous = True

    def __post_init__(self) -> None:
        _require_invertible("negative_slope", self.parameter)

    def forward(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z, self.parameter)

    def derivative(self, z: Tensor) -> Tensor:
        return self.pull_back(torch.ones_like(z), z)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        # σ's own backward pass, whose derivative in z is zero: several times faster on a CPU than `where`.
        return torch.ops.aten.leaky_relu_backward(gradient, z.detach(), self.parameter, False)

    def second_derivative(self, z: Tensor) -> None:
        return None

    def inverse(self, b: Tensor) -> Tensor:
        return F.leaky_relu(b, 1.0 / self.parameter)


@dataclass(frozen=True)
class ReLU(Activation):
    """σ(z) = max(z, 0), which has no inverse."""

    name = "relu"
    invertible = False
    positively_homogeneous = True

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z)

    def derivative(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)

    def second_derivative(self, z: Tensor) -> None:
        return None


@dataclass(frozen=True)
class Tanh(Activation):
    """σ(z) = tanh z, onto (−1, 1)."""

    name = "tanh"
    domain = (-1.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def derivative(self, z: Tensor) -> Tensor:
        return 1 - torch.tanh(z) ** 2

    def second_derivative(self, z: Tensor) -> Tensor:
        value = torch.tanh(z)
        return -2 * value * (1 - value**2)

    def inverse(self, b: Tensor) -> Tensor:
        return torch.atanh(b)


@dataclass(frozen=True)
class Sigmoid(Activation):
    """σ(z) = 1 / (1 + e⁻ᶻ), onto (0, 1)."""

    name = "sigmoid"
    domain = (0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def second_derivative(self, z: Tensor) -> Tensor:
        value, mirrored = torch.sigmoid(z), torch.sigmoid(-z)
        return value * mirrored * (mirrored - value)

    def inverse(self, b: Tensor) -> Tensor:
        return torch.log(b) - torch.log1p(-b)


@dataclass(frozen=True)
class Softplus(Activation):
    """σ(z) = log(1 + e^{βz}) / β with β = `parameter`, onto (0, ∞); like torch, the identity where βz > 20."""

    parameter: float = 1.0

    name = "softplus"
    domain = (0.0, math.inf)
    threshold = 20.0

    def __post_init__(self) -> None:
        _require_invertible("beta", self.parameter)

    def forward(self, z: Tensor) -> Tensor:
        return F.softplus(z, self.parameter, self.threshold)

    def derivative(self, z: Tensor) -> Tensor:
        scaled = self.parameter * z
        return torch.where(scaled > self.threshold, 1.0, torch.sigmoid(scaled))

    def second_derivative(self, z: Tensor) -> Tensor:
        scaled = self.parameter * z
        curved = self.parameter * torch.sigmoid(scaled) * torch.sigmoid(-scaled)
        return torch.where(scaled > self.threshold, 0.0, curved)

    def inverse(self, b: Tensor) -> Tensor:
        scaled = self.parameter * b
        curved = b + torch.log(-torch.expm1(-scaled)) / self.parameter
        return torch.where(scaled > self.threshold, b, curved)


@dataclass(frozen=True)
class ELU(Activation):
    """σ(z) = z for z > 0, α(eᶻ − 1) otherwise, with α = `parameter` > 0, onto (−α, ∞)."""

    parameter: float = 1.0

    name = "elu"

    def __post_init__(self) -> None:
        _require_invertible("alpha", self.parameter)

    @property
    def domain(self) -> tuple[float, float]:  # type: ignore[override]
        return (-self.parameter, math.inf)

    def forward(self, z: Tensor) -> Tensor:
        return F.elu(z, self.parameter)

    def derivative(self, z: Tensor) -> Tensor:
        # The clamp keeps exp finite on the branch that `where` discards; it never touches the branch taken.
        return torch.where(z > 0, 1.0, self.parameter * torch.exp(z.clamp(max=0)))

    def second_derivative(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, 0.0, self.parameter * torch.exp(z.clamp(max=0)))

    def inverse(self, b: Tensor) -> Tensor:
        return torch.where(b > 0, b, torch.log1p(b.clamp(max=0) / self.parameter))


ACTIVATIONS: dict[str, type[Activation]] = {
    cls.name: cls for cls in (LeakyReLU, Tanh, Sigmoid, Softplus, ELU, Identity)
}
"""The invertible activations by their names."""


def make_activation(name: str, parameter: float | None = None) -> Activation:
    """The invertible activation called `name`; `parameter` is the slope of leaky_relu, β of softplus or α of elu."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    cls = ACTIVATIONS[name]
    takes_parameter = cls in (LeakyReLU, Softplus, ELU)
    return cls() if parameter is None or not takes_parameter else cls(float(parameter))


def activation_of_module(module: nn.Module) -> Activation | None:
    """The activation that a torch module applies, or None if it is no activation of this library."""
    if isinstance(module, nn.ReLU):
        return ReLU()
    if isinstance(module, nn.LeakyReLU):
        return LeakyReLU(module.negative_slope)
    if isinstance(module, nn.ELU):
        return ELU(module.alpha)
    if isinstance(module, nn.Softplus) and module.threshold == Softplus.threshold:
        return Softplus(module.beta)
    if isinstance(module, nn.Tanh):
        return Tanh()
    if isinstance(module, nn.Sigmoid):
        return Sigmoid()
    if isinstance(module, nn.Identity):
        return Identity()
    return None


def _require_invertible(argument: str, value: float) -> None:
    """Neither a slope or scale nor its inverse, which σ⁻¹ needs, may overflow or lose digits in float32."""
    least, largest = _TINY, 1 / _TINY
    if not least <= value <= largest:
        raise ValueError(
            f"{argument} must be a finite number > 0 that leaves the activation invertible in float32, "
            f"from {least:.1e} to {largest:.1e}, got {value!r}"
        )
