"""Small networks and batches for the tests, with activations that are far from linear dependence."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class FlippedTanh(nn.Module):
    """A tanh that is scaled and shifted, inside and outside."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.25 - 1.5 * torch.tanh(0.7 * x + 0.1)


ACTIVATIONS: dict[str, type[nn.Module] | object] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "softsign": nn.Softsign,
    "flipped_tanh": FlippedTanh,
    "identity": nn.Identity,
}

# Sigmoid and softplus squeeze their inputs most; larger weights keep the samples apart, layer after layer.
GAINS = {"sigmoid": 5.0, "softplus": 2.5, "elu": 1.2}


def make_mlp(
    dims: list[int],
    activation: str = "leaky_relu",
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> nn.Sequential:
    """An MLP of the given widths with weights of variance gain² / fan-in."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(itertools.pairwise(dims)):
        linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias)
        with torch.no_grad():
            linear.weight.copy_(GAINS.get(activation, 1.0) * torch.randn(d_out, d_in, generator=generator) / d_in**0.5)
            if bias:
                linear.bias.copy_(0.1 * torch.randn(d_out, generator=generator))
        layers.append(linear)
        if index < len(dims) - 2:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers).to(dtype)


def make_batch(
    n: int, d_in: int, classes: int, *, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """n normal samples and their random classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, classes, (n,), generator=generator)


def snapshot(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    """Whether the parameters equal their copies bit for bit."""
    return all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
