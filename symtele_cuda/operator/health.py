"""Whether a layer's result is sound: what its kernel measures, and the error behind a number that is not small."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import Activation
from ..errors import TeleportError
from ..kernels.library import Products
from ..kernels.pinv import MAX_CONDITION, Factorization, pinv_factor
from .layer import Layer, full_precision, named_tensors, widen

# Between these magnitudes of the inputs no Gram matrix, and no norm of one or of its inverse, leaves float64.
_SCALES = (1e-70, 1e70)


class Health(NamedTuple):
    """Squared norms that a layer's kernel leaves on its device; some of them are small where the result is sound.

    Attributes:
        gram, inverse: of K and K⁻¹, float64.
        info: not 0 where K is not positive definite.
        z, weight, bias: of Z, W' and b', if there is one, not finite where an argument is not, where Y left the domain
            of σ⁻¹ or where numbers overflowed, be it only their squares.
    """

    gram: float
    inverse: float
    info: float
    z: float
    weight: float
    bias: float = 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.z + self.weight + self.bias)

    def matched(self, largest: float) -> bool:
        """Whether κ₂(H̃) is at most `largest` for sure: κ₂(H̃)² = κ₂(K) ≤ ‖K‖ ‖K⁻¹‖, which is often far too much."""
        return self.info == 0 and self.gram * self.inverse <= largest**4


def measure_health(products: Products, found: Factorization, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The numbers of `Health`, on the device: there every question about a value waits for all that was launched."""
    results = [widen(new) for new in (weight, bias) if new is not None]
    return products.squared_norms([found.gram, found.inverse(), found.infos, z, *results])


def check_health(measured: Tensor, layer: Layer, z: Tensor, new_weight: Tensor, new_bias: Tensor | None) -> None:
    """Look closer where a number is not small, and raise the error that is behind it if there is one."""
    health = Health(*measured.tolist())
    matched = health.matched(MAX_CONDITION[z.dtype])
    if matched and health.finite:
        return
    with torch.no_grad(), full_precision(z):
        for name, tensor in named_tensors(*layer.tensors()).items():
            _check_finite(name, tensor)
        if not matched:
            _check_matched(widen(layer.inputs), layer.has_bias, health)
        if not health.finite:
            _check_domain(layer.sigma, layer.sigma.forward(z) @ widen(layer.g).T)
            _check_range("weight", new_weight)
            if new_bias is not None:
                _check_range("bias", new_bias)


def _check_matched(inputs: Tensor, bias: bool, health: Health) -> None:
    found = pinv_factor(inputs, bias)
    if found.matched and health.info == 0:
        return
    name, samples, (low, high) = "[inputs, 1]" if bias else "inputs", len(inputs), _SCALES
    largest = inputs.abs().max().item()
    advice = f" for n={samples} samples; use fewer or more different samples"
    if found.rank < samples:
        expected, came = "full row rank, so that every sample can be matched", f"rank {found.rank}"
    elif not low <= largest <= high:
        expected, came = f"a largest magnitude from {low:g} to {high:g}", f"{largest:.1e}"
        advice = ": their Gram matrix is out of the range of float64; rescale them"
    else:
        expected = f"a condition number of at most {MAX_CONDITION[inputs.dtype]:g} in {inputs.dtype}"
        came = f"{found.condition:.2g} at full rank {found.rank}"
    raise TeleportError(f"{name} must have {expected}, got {came}{advice}")


def _check_domain(activation: Activation, moved: Tensor) -> None:
    if activation.contains(moved):
        return
    low, high = activation.domain
    outside = torch.where(torch.isfinite(moved), torch.maximum(low - moved, moved - high), torch.inf)
    worst = moved.flatten()[outside.argmax()].item()
    raise ValueError(
        f"g must keep σ(Z) gᵀ in ({low:g}, {high:g}), the domain of the inverse of {activation}, "
        f"got the value {worst:.9g}"
    )


def _check_range(name: str, new: Tensor) -> None:
    if not _is_finite(new):
        raise ValueError(
            f"the new {name} must be at most {torch.finfo(new.dtype).max:g}, the largest number of {new.dtype}, "
            "got an overflow; use a dtype of wider range or a g nearer to I"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if not _is_finite(tensor):
        raise ValueError(f"{name} must be finite, got NaN or infinite elements")


def _is_finite(tensor: Tensor) -> bool:
    """From the extremes, which are NaN if any element is: several times faster than `isfinite` of every element."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))
