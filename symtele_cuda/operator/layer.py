"""The arguments of `teleport_layer`: what can be said of them without reading an element, and what the kernels read."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..activations import ACTIVATIONS, Activation, Scaled, activation_of, make_activation
from ..kernels.library import Products, products_for
from ..kernels.pinv import append_ones

ACTIONS: dict[str, float] = {"least_change": 1.0, "paper": 0.0}
"""The actions, with the share ρ of the old weights that stays as the reference."""

COMPUTE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""The dtypes that a layer may have, and the ones that they are computed in."""

# A tensor of more elements is refused on a GPU: the kernels were made and tested for no larger ones.
_MOST_ELEMENTS = 2**31


class Layer(NamedTuple):
    """The operator's arguments in the order of its schema, and what the kernels read off them."""

    weight: Tensor
    inputs: Tensor
    g: Tensor
    bias: Tensor | None
    activation: str
    numbers: Sequence[float]
    action: str
    backend: str

    @classmethod
    def at_the_end_of(cls, arguments: tuple[Any, ...]) -> Layer:
        """These are the last arguments of all three operators."""
        return cls(*arguments[-len(cls._fields) :])

    @property
    def sigma(self) -> Activation:
        return activation_of(self.activation, self.numbers)

    @property
    def rho(self) -> float:
        return ACTIONS[self.action]

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def products(self) -> Products:
        return products_for(self.weight.device, self.backend)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.weight, self.inputs, self.g, self.bias

    def widened(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors in the dtype of the computation."""
        return (
            widen(self.weight),
            widen(self.inputs),
            widen(self.g),
            None if self.bias is None else widen(self.bias),
        )

    def extended_inputs(self) -> Tensor:
        """H̃ in the dtype of the computation."""
        inputs = widen(self.inputs)
        return append_ones(inputs) if self.has_bias else inputs

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """W and b, tensors of their own, rounded to the layer's dtype; b is empty where the layer has no bias."""
        if not self.has_bias:
            return packed.to(self.weight.dtype), self.weight.new_empty(0)
        weight, bias = self.new_empty()
        return weight.copy_(packed[:, :-1]), bias.copy_(packed[:, -1])

    def new_empty(self) -> tuple[Tensor, Tensor]:
        """Memory for a W and a b."""
        outputs = len(self.weight)
        return self.weight.new_empty(self.weight.shape), self.weight.new_empty(outputs if self.has_bias else 0)

    def narrow(self, tensor: Tensor) -> Tensor:
        """A result of the computation in the layer's own dtype."""
        dtype = self.weight.dtype
        return tensor if tensor.dtype == dtype else tensor.to(dtype)

    def nothing(self) -> tuple[Tensor, Tensor]:
        """What stands for a W and a b that were not asked for."""
        return self.weight.new_empty(0), self.weight.new_empty(0)


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of the computation."""
    dtype = COMPUTE_DTYPE[tensor.dtype]
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def pack(matrix: Tensor, column: Tensor | None) -> Tensor:
    """[W, b] in the dtype of the computation, or W where there is no b: None or empty."""
    if column is None or column.numel() == 0:
        return widen(matrix)
    return widen(torch.cat([matrix, column.unsqueeze(1)], dim=1))


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: it would compute the products of a float32 layer in half precision."""
    device = "cpu" if tensor.is_cpu else tensor.device.type  # torch spells a type anew each time, which takes long
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# checks
# ---------------------------------------------------------------------------------------------------------------------


def choose_activation(activation: str | Activation, negative_slope: float) -> Activation:
    if isinstance(activation, Activation):
        base = activation.base if isinstance(activation, Scaled) else activation
        if not base.invertible or ACTIVATIONS.get(base.name) is not type(base):  # a subclass inherits the name
            known = ", ".join(cls.__name__ for cls in ACTIVATIONS.values() if cls.invertible)
            raise TypeError(f"activation must be a name or one of {known} itself, got {type(activation).__name__}")
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name or an Activation, got {type(activation).__name__}")
    if activation != "leaky_relu":
        return make_activation(activation)
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, numbers.Real):
        raise TypeError(f"negative_slope must be a number, got {type(negative_slope).__name__}")
    return make_activation(activation, negative_slope)


def check_tensors(weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None = None) -> None:
    """Types, shapes, dtypes and devices: all that can be known without reading an element."""
    named = named_tensors(weight, inputs, g, bias)
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must have shape (d_out, d_in) with d_out, d_in >= 1, got {tuple(weight.shape)}")
    outputs, columns = weight.shape
    if inputs.ndim != 2 or inputs.shape[1] != columns or inputs.shape[0] == 0:
        raise ValueError(f"inputs must have shape (n, d_in={columns}) with n >= 1, got {tuple(inputs.shape)}")
    if g.shape != (outputs, outputs):
        raise ValueError(f"g must have shape (d_out={outputs}, d_out={outputs}), got {tuple(g.shape)}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must have shape (d_out={outputs},), got {tuple(bias.shape)}")
    if weight.dtype not in COMPUTE_DTYPE:
        raise TypeError(f"weight must be one of {', '.join(map(str, COMPUTE_DTYPE))}, got {weight.dtype}")
    for name, tensor in named.items():
        if tensor.dtype != weight.dtype:
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")
        if tensor.is_cuda and tensor.numel() > _MOST_ELEMENTS:
            raise ValueError(f"{name} must have at most 2³¹ elements on {tensor.device}, got {tensor.numel()}")
    limit = columns if bias is None else columns + 1
    if inputs.shape[0] > limit:
        expression = f"d_in={columns}" if bias is None else f"d_in + 1 = {limit}"
        raise ValueError(
            f"inputs must have at most {expression} samples, which is the largest possible rank, "
            f"got n={inputs.shape[0]} samples of shape {tuple(inputs.shape)}"
        )


def check_no_tangent(name: str, tensor: Tensor | None) -> None:
    """torch drops the tangents that reach an operator without a forward derivative, and does not say so."""
    if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} must have no tangent, got one: teleport_layer has no forward-mode derivative; "
            "torch.autograd.functional.jvp computes the same from its backward derivatives"
        )


def named_tensors(weight: Tensor, inputs: Tensor, g: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    named = {"weight": weight, "inputs": inputs, "g": g}
    return named if bias is None else {**named, "bias": bias}
