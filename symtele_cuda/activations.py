"""Elementwise activations: σ, σ', σ'', σ⁻¹ and the open interval on which σ⁻¹ lives, and ReLU, which has no σ⁻¹.

Teleportation needs more of an activation than training does: the action writes Y = σ⁻¹(σ(Z) gᵀ), and the gradient
of the search uses σ' and σ''. The derivatives of the inverse follow from them at y = σ⁻¹(b):
(σ⁻¹)'(b) = 1 / σ'(y) and (σ⁻¹)''(b) = −σ''(y) / σ'(y)³.

Every formula is written with differentiable torch operations, so that the reference can be differentiated by autograd.

A new activation is one class here, or anywhere, which `register` makes known, and one place in csrc/activation.cuh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_invertible
from .spelling import Spelling

Sigma = tuple[str, tuple[float, ...]]
"""An activation as the operators take it: its name and its five numbers, see `Activation.sigma`."""


@dataclass(frozen=True)
class Activation:
    """An activation σ, applied elementwise; `parameter` is its one real parameter where it has one.

    name: what the operators call it. domain: the open interval on which σ⁻¹ lives. invertible: whether σ⁻¹ exists.
    positively_homogeneous: whether σ(cz) = c σ(z) for every c > 0. piecewise_linear: whether σ'' is zero everywhere.
    spellings: how models write it. spread: the standard deviation of z with which networks learn fast.
    """

    name = "abstract"
    spellings: ClassVar[tuple[Spelling, ...]] = ()
    parameter = 0.0
    domain = (-math.inf, math.inf)
    invertible = True
    positively_homogeneous = False
    piecewise_linear = False
    spread = 2.0

    def forward(self, z: Tensor) -> Tensor:
        """σ(z)."""
        raise NotImplementedError

    def derivative(self, z: Tensor) -> Tensor:
        """σ'(z); at a kink the value that torch's own backward uses."""
        raise NotImplementedError

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        """gradient ⊙ σ'(z): a gradient with respect to σ(z) as one with respect to z."""
        return gradient * self.derivative(z)

    def pull_back_inverse(self, gradient: Tensor, z: Tensor) -> Tensor:
        """gradient / σ'(z): a gradient with respect to z = σ⁻¹(b) as one with respect to b."""
        return gradient / self.derivative(z)

    def second_derivative(self, z: Tensor) -> Tensor | None:
        """σ''(z), or None where it is zero everywhere (piecewise linear activations)."""
        if self.piecewise_linear:
            return None
        raise NotImplementedError

    def inverse(self, b: Tensor) -> Tensor:
        """σ⁻¹(b); not finite where b lies outside `domain`."""
        raise NotImplementedError

    @property
    def sigma(self) -> Sigma:
        """Name and (parameter, α, β, a, c) of a σ(αz + β) + c; for σ itself α = a = 1 and β = c = 0."""
        return self.name, (self.parameter, *UNSCALED)

    @property
    def bounded(self) -> bool:
        """Whether `domain` is not all of ℝ."""
        return self.domain != (-math.inf, math.inf)

    def contains(self, b: Tensor) -> bool:
        """Whether every element of b is finite and lies in the open interval `domain`."""
        if b.numel() == 0:
            return True
        least, largest = torch.aminmax(b)  # both NaN if any element is
        return bool(self.domain[0] < least) and bool(largest < self.domain[1])

    def __str__(self) -> str:
        return self.name


ACTIVATIONS: dict[str, type[Activation]] = {}
"""The activations by their names. The kernels know those of them that have an inverse."""

_A = TypeVar("_A", bound="Activation")


def register(cls: type[_A]) -> type[_A]:
    """Make an activation known: models may contain it, and the operators take it by its name.

    Raises:
        ValueError: its name is taken.
    """
    if cls.name in ACTIVATIONS:
        raise ValueError(f"name must be that of no other activation, got {cls.name!r}, of {ACTIVATIONS[cls.name]!r}")
    ACTIVATIONS[cls.name] = cls
    return cls


def plain(name: str) -> Callable[..., Activation]:
    """Reads calls of one argument, or of `inplace` as well, as the activation of this name with its own parameter."""

    def read(input: None, inplace: bool = False) -> Activation:
        return ACTIVATIONS[name]()

    return read


@register
@dataclass(frozen=True)
class Identity(Activation):
    """σ(z) = z."""

    name = "identity"
    spellings = (Spelling((nn.Identity,), (), plain("identity")),)
    positively_homogeneous = True
    piecewise_linear = True

    def forward(self, z: Tensor) -> Tensor:
        return z

    def derivative(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient

    def inverse(self, b: Tensor) -> Tensor:
        return b


def _leaky_relu(input: None, negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return LeakyReLU(float(negative_slope))


def _prelu(input: None, weight: Tensor) -> Activation:
    """LeakyReLU of the slope that `weight` holds now: training may change it."""
    if weight.is_meta:
        raise ValueError("PReLU whose weight is on the meta device and holds no data")
    slope = float(weight.detach().flatten()[0])
    if not bool((weight.detach() == slope).all()):
        raise ValueError(f"PReLU whose {weight.numel()} slopes differ, where one slope for all units is understood")
    check_invertible("PReLU's weight", slope)
    return LeakyReLU(slope)


@register
@dataclass(frozen=True)
class LeakyReLU(Activation):
    """σ(z) = max(z, 0) + s·min(z, 0) with the slope s = `parameter` > 0."""

    parameter: float = 0.1

    name = "leaky_relu"
    spellings = (
        Spelling((nn.LeakyReLU,), (F.leaky_relu,), _leaky_relu),
        Spelling((nn.PReLU,), (F.prelu, torch.prelu, "prelu"), _prelu, " (one slope)"),
    )
    positively_homogeneous = True
    piecewise_linear = True

    def __post_init__(self) -> None:
        check_invertible("negative_slope", self.parameter)

    def forward(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z, self.parameter)

    def derivative(self, z: Tensor) -> Tensor:
        return self.pull_back(torch.ones_like(z), z)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        # σ's own backward pass, whose derivative in z is zero: several times faster on a CPU than `where`.
        return torch.ops.aten.leaky_relu_backward.default(gradient, z.detach(), self.parameter, False)

    def pull_back_inverse(self, gradient: Tensor, z: Tensor) -> Tensor:
        return torch.ops.aten.leaky_relu_backward.default(gradient, z.detach(), 1.0 / self.parameter, False)

    def inverse(self, b: Tensor) -> Tensor:
        return F.leaky_relu(b, 1.0 / self.parameter)


@register
@dataclass(frozen=True)
class ReLU(Activation):
    """σ(z) = max(z, 0), which has no inverse."""

    name = "relu"
    spellings = (Spelling((nn.ReLU,), (F.relu, torch.relu, "relu"), plain("relu")),)
    invertible = False
    positively_homogeneous = True
    piecewise_linear = True

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z)

    def derivative(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype)


@register
@dataclass(frozen=True)
class Tanh(Activation):
    """σ(z) = tanh z, onto (−1, 1)."""

    name = "tanh"
    spellings = (Spelling((nn.Tanh,), (F.tanh, torch.tanh, "tanh"), plain("tanh")),)
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


@register
@dataclass(frozen=True)
class Sigmoid(Activation):
    """σ(z) = 1 / (1 + e⁻ᶻ), onto (0, 1)."""

    name = "sigmoid"
    spellings = (Spelling((nn.Sigmoid,), (F.sigmoid, torch.sigmoid, "sigmoid"), plain("sigmoid")),)
    domain = (0.0, 1.0)
    spread = 4.0

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def second_derivative(self, z: Tensor) -> Tensor:
        value, mirrored = torch.sigmoid(z), torch.sigmoid(-z)
        return value * mirrored * (mirrored - value)

    def inverse(self, b: Tensor) -> Tensor:
        return torch.log(b) - torch.log1p(-b)


def _softplus(input: None, beta: float = 1.0, threshold: float = 20.0) -> Activation:
    if threshold != Softplus.threshold:
        raise ValueError(f"Softplus with threshold {threshold}")
    return Softplus(float(beta))


@register
@dataclass(frozen=True)
class Softplus(Activation):
    """σ(z) = log(1 + e^{βz}) / β with β = `parameter`, onto (0, ∞); like torch, the identity where βz > 20."""

    parameter: float = 1.0

    name = "softplus"
    spellings = (Spelling((nn.Softplus,), (F.softplus,), _softplus, " (threshold 20)"),)
    domain = (0.0, math.inf)
    threshold = 20.0

    def __post_init__(self) -> None:
        check_invertible("beta", self.parameter)

    @property
    def spread(self) -> float:  # type: ignore[override]
        return 4.0 / self.parameter

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


def _elu(input: None, alpha: float = 1.0, inplace: bool = False) -> Activation:
    return ELU(float(alpha))


def _selu(input: None, inplace: bool = False) -> Activation:
    """λ·ELU with the λ and α of Klambauer et al. 2017, as torch has them."""
    return scaled(ELU(1.6732632423543772848170429916717), gain=1.0507009873554804934193349852946)


def _celu(input: None, alpha: float = 1.0, inplace: bool = False) -> Activation:
    """max(z, 0) + min(0, α(e^{z/α} − 1)) = α ELU₁(z/α)."""
    check_invertible("alpha", alpha)
    return scaled(ELU(), rate=1 / alpha, gain=alpha)


@register
@dataclass(frozen=True)
class ELU(Activation):
    """σ(z) = z for z > 0, α(eᶻ − 1) otherwise, with α = `parameter` > 0, onto (−α, ∞)."""

    parameter: float = 1.0

    name = "elu"
    spellings = (
        Spelling((nn.ELU,), (F.elu,), _elu),
        Spelling((nn.SELU,), (F.selu, torch.selu), _selu),
        Spelling((nn.CELU,), (F.celu, torch.celu), _celu),
    )

    def __post_init__(self) -> None:
        check_invertible("alpha", self.parameter)

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


@register
@dataclass(frozen=True)
class Softsign(Activation):
    """σ(z) = z / (1 + |z|), onto (−1, 1)."""

    name = "softsign"
    spellings = (Spelling((nn.Softsign,), (F.softsign,), plain("softsign")),)
    domain = (-1.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return F.softsign(z)

    def derivative(self, z: Tensor) -> Tensor:
        return (1 + z.abs()) ** -2

    def second_derivative(self, z: Tensor) -> Tensor:
        return -2 * torch.sign(z) * (1 + z.abs()) ** -3

    def inverse(self, b: Tensor) -> Tensor:
        left = 1 - b.abs()
        return torch.where(left > 0, b / left, math.nan)


@register
@dataclass(frozen=True)
class LogSigmoid(Activation):
    """σ(z) = −log(1 + e⁻ᶻ), onto (−∞, 0)."""

    name = "log_sigmoid"
    spellings = (Spelling((nn.LogSigmoid,), (F.logsigmoid,), plain("log_sigmoid")),)
    domain = (-math.inf, 0.0)

    def forward(self, z: Tensor) -> Tensor:
        return F.logsigmoid(z)

    def derivative(self, z: Tensor) -> Tensor:
        return torch.sigmoid(-z)

    def second_derivative(self, z: Tensor) -> Tensor:
        return -torch.sigmoid(z) * torch.sigmoid(-z)

    def inverse(self, b: Tensor) -> Tensor:
        return b - torch.log(-torch.expm1(b))


@dataclass(frozen=True)
class Scaled(Activation):
    """σ̃(z) = a σ(αz + β) + c of another activation σ = `base`; `scaled` makes it.

    a = `gain` and α = `rate`, both ≠ 0, β = `shift` and c = `offset`.

    σ̃' = aα σ'(αz + β), σ̃'' = aα² σ''(αz + β), σ̃⁻¹(b) = (σ⁻¹((b − c)/a) − β)/α.
    """

    base: Activation
    rate: float
    shift: float
    gain: float
    offset: float

    def __post_init__(self) -> None:
        check_invertible("the size of a factor", abs(self.rate))
        check_invertible("the size of a factor", abs(self.gain))
        for constant in (self.shift, self.offset):
            if not math.isfinite(constant):
                raise ValueError(f"a constant that is added must be finite, got {constant!r}")
        for name in ("name", "parameter", "invertible", "piecewise_linear"):
            object.__setattr__(self, name, getattr(self.base, name))
        homogeneous = self.base.positively_homogeneous and self.shift == self.offset == 0
        object.__setattr__(self, "positively_homogeneous", homogeneous)
        edges = (self.gain * edge + self.offset for edge in self.base.domain)
        object.__setattr__(self, "domain", tuple(sorted(edges)))

    @property
    def sigma(self) -> Sigma:
        return self.name, (self.parameter, self.rate, self.shift, self.gain, self.offset)

    def forward(self, z: Tensor) -> Tensor:
        return self.base.forward(self._inner(z)) * self.gain + self.offset

    def derivative(self, z: Tensor) -> Tensor:
        return self.base.derivative(self._inner(z)) * (self.gain * self.rate)

    def pull_back(self, gradient: Tensor, z: Tensor) -> Tensor:
        return self.base.pull_back(gradient * (self.gain * self.rate), self._inner(z))

    def second_derivative(self, z: Tensor) -> Tensor | None:
        curvature = self.base.second_derivative(self._inner(z))
        return None if curvature is None else curvature * (self.gain * self.rate**2)

    def inverse(self, b: Tensor) -> Tensor:
        return (self.base.inverse((b - self.offset) / self.gain) - self.shift) / self.rate

    def _inner(self, z: Tensor) -> Tensor:
        return z * self.rate + self.shift

    def __str__(self) -> str:
        return f"scaled {self.base}"


UNSCALED = (1.0, 0.0, 1.0, 0.0)
"""(α, β, a, c) of an activation that is not scaled."""


def scaled(
    base: Activation, rate: float = 1.0, shift: float = 0.0, gain: float = 1.0, offset: float = 0.0
) -> Activation:
    """a σ(αz + β) + c of σ = `base`, (α, β, a, c) = (rate, shift, gain, offset): σ itself where they change nothing.

    Raises:
        ValueError: a factor is 0, or so small or large that float32 cannot invert it, or a constant is not finite.
    """
    numbers = (float(rate), float(shift), float(gain), float(offset))
    return base if numbers == UNSCALED else Scaled(base, *numbers)


def make_activation(name: str, parameter: float | None = None) -> Activation:
    """The invertible activation called `name`; `parameter` is the slope of leaky_relu, β of softplus or α of elu."""
    invertible = {own: cls for own, cls in ACTIVATIONS.items() if cls.invertible}
    if name not in invertible:
        raise ValueError(f"activation must be one of {sorted(invertible)}, got {name!r}")
    cls = invertible[name]
    takes_parameter = any(field.name == "parameter" for field in fields(cls))
    return cls() if parameter is None or not takes_parameter else cls(**{"parameter": float(parameter)})


def activation_of(name: str, numbers: Sequence[float]) -> Activation:
    """The activation whose `sigma` is (name, numbers)."""
    parameter, *scales = numbers
    return scaled(make_activation(name, parameter), *scales)


def spellings() -> Iterator[Spelling]:
    """How models may write activations."""
    return (spelling for cls in ACTIVATIONS.values() for spelling in cls.spellings)
