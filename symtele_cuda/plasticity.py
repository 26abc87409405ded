"""What tells that a network loses the ability to learn: silent units, few directions in its features, large weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activations import Activation
from .kernels.torch_kernels import dot
from .model.chain import check_inputs
from .model.problem import begin, read_network
from .model.reader import read_chain
from .transaction import Transaction

SILENT = 0.05
"""A unit is silent if its mean slope over the samples is below this share of the activation's largest."""


@dataclass(frozen=True)
class LayerPlasticity:
    """One hidden layer k = 1..m on n samples, with pre-activations Z and activations H = σ(Z), n×d.

    spread: √(mean of (Z − mean over the samples)²), as `Standardise` sets it. silent: the share of units whose mean
    |σ'(z)| is below 5 % of the largest |σ'|, dead behind ReLU and saturated behind tanh. effective_rank: exp of the
    entropy of the singular values of H − mean, divided by their sum (Roy and Vetterli 2007), from 1 to min(n, d).
    norm: ‖[W, b]‖_F of the weight layer before it.
    """

    index: int
    width: int
    spread: float
    silent: float
    effective_rank: float
    norm: float


@dataclass(frozen=True, repr=False)
class Plasticity:
    """What `plasticity` found, layer by layer; `print` shows a table."""

    layers: tuple[LayerPlasticity, ...]

    def lost(self, silent: float = 0.5, effective_rank: float = 0.1) -> bool:
        """Whether a hidden layer has more than this share of silent units, or an effective rank below this share of
        its width."""
        return any(
            layer.silent > silent or layer.effective_rank < effective_rank * layer.width for layer in self.layers
        )

    def __str__(self) -> str:
        rows = [f"{'hidden layer':<14}{'units':>6}{'spread':>9}{'silent':>9}{'effective rank':>16}{'norm':>9}"]
        rows += [
            f"{layer.index:<14}{layer.width:>6}{layer.spread:>9.3g}{100 * layer.silent:>7.1f} %"
            f"{layer.effective_rank:>16.3g}{layer.norm:>9.3g}"
            for layer in self.layers
        ]
        return "\n".join(rows)

    __repr__ = __str__


def plasticity(model: nn.Module, x: Tensor) -> Plasticity:
    """What tells lost plasticity, measured on the samples x. The model stays as it is.

    Args:
        model: a chain as for `teleport_mlp`.
        x: n samples as the model takes them, of its dtype and device; the effective ranks are at most n.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """

    def work() -> Plasticity:
        chain = read_chain(model)
        begin(transaction, chain)
        network = read_network(chain)
        outputs = network.forward(check_inputs(chain, x, "x").to(network.weights[0].dtype))
        layers = zip(network.activations, outputs, network.weights, network.biases, strict=False)
        figures = [_measure(sigma, output, [weight, bias]) for sigma, output, weight, bias in layers]
        rows = torch.stack(figures).tolist()
        widths = [output.shape[1] for output in outputs]
        return Plasticity(tuple(LayerPlasticity(k, widths[k - 1], *row) for k, row in enumerate(rows, start=1)))

    transaction = Transaction()
    return transaction.run(work)


def _measure(sigma: Activation, output: Tensor, parameters: Sequence[Tensor | None]) -> Tensor:
    """Spread, share of silent units, effective rank and norm: float64."""
    output = output.double()
    spread = (output - output.mean(0)).square().mean().sqrt()
    slopes = sigma.derivative(output).abs()
    everywhere = torch.linspace(-50, 50, 2001, dtype=output.dtype, device=output.device)
    silent = (slopes.mean(0) < SILENT * sigma.derivative(everywhere).abs().max()).double().mean()
    features = sigma.forward(output)
    values = torch.linalg.svdvals(features - features.mean(0))
    shares = values / values.sum()
    rank = torch.special.entr(shares).sum().exp().nan_to_num(nan=0.0)
    squares = torch.stack([dot(tensor, tensor) for tensor in parameters if tensor is not None])
    return torch.stack([spread, silent, rank, squares.sum().sqrt()])
