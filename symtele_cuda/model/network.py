"""The weight layers of a chain as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from ..activations import Activation
from ..kernels import torch_kernels as torch_products
from ..kernels.library import Products


@dataclass(frozen=True)
class Network:
    """The weight layers of a chain as plain tensors of one dtype: weights d_l×d_{l−1}, biases d_l or None.

    products: what computes with them, plain torch or the compiled kernels.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activations: tuple[Activation, ...]
    products: Products = torch_products

    def __len__(self) -> int:
        return len(self.weights)

    def with_parameters(self, parameters: Sequence[Tensor]) -> Network:
        """The same network with the tensors of `parameter_list` replaced."""
        tensors = iter(parameters)
        pairs = [(next(tensors), None if bias is None else next(tensors)) for bias in self.biases]
        return replace(self, weights=tuple(weight for weight, _ in pairs), biases=tuple(bias for _, bias in pairs))

    @property
    def befores(self) -> tuple[Activation | None, ...]:
        """The activation before each weight layer, None before the first."""
        return None, *self.activations

    def forward(self, inputs: Tensor, known: Sequence[Tensor] = ()) -> list[Tensor]:
        """The pre-activations Y_0, …, Y_{M−1} of `inputs` (n×d_0); `known` are the first of them."""
        outputs = list(known)
        layers = list(zip(self.befores, self.weights, self.biases, strict=True))
        for before, weight, bias in layers[len(known) :]:
            outputs.append(F.linear(inputs if before is None else before.forward(outputs[-1]), weight, bias))
        return outputs

    def layers_in_common(self, other: Network) -> int:
        """How many of the first layers have the very tensors of `other`."""
        pairs = zip(self.weights, other.weights, strict=True), zip(self.biases, other.biases, strict=True)
        same = (w is v and b is c for (w, v), (b, c) in zip(*pairs, strict=True))
        return next((layer for layer, equal in enumerate(same) if not equal), len(self))


def parameter_list(network: Network, requires_grad: bool = False) -> list[Tensor]:
    """Weights and biases in the order of the layers; as leaves of their own memory if a gradient is required."""
    pairs = zip(network.weights, network.biases, strict=True)
    tensors = [tensor for pair in pairs for tensor in pair if tensor is not None]
    return [tensor.detach().clone().requires_grad_() for tensor in tensors] if requires_grad else tensors


def kernel(left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """left rightᵀ + 1, the +1 only with bias: how two samples' gradients of one layer overlap."""
    product = left @ right.T
    return product.add_(1) if bias else product
