"""Several multilayer perceptrons of one shape, trained side by side: one step of all costs little more than of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Layer = Callable[[], nn.Module]


def make_mlp(dims: Sequence[int], activation: Layer, layer_norm: bool = False) -> nn.Sequential:
    """Linear layers of torch's own start with activations between them, behind a LayerNorm each if one is wanted."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(dims[:-1]):
        layers += [nn.Linear(d_in, d_out), *([nn.LayerNorm(d_out)] if layer_norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))


class SideBySide(nn.Module):
    """The networks `models`, stacked: parameters (S×...) of S networks; x (S×n×d) gives logits (S×n×c)."""

    def __init__(self, models: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.kinds = [*models[0]]
        stacks = zip(*(model.parameters() for model in models), strict=True)
        self.stacked = nn.ParameterList(nn.Parameter(torch.stack([p.detach() for p in stack])) for stack in stacks)

    def forward(self, x: Tensor) -> Tensor:
        parameters = iter(self.stacked)
        for kind in self.kinds:
            if isinstance(kind, nn.Linear):
                weight, bias = next(parameters), next(parameters)
                x = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
            elif isinstance(kind, nn.LayerNorm):
                weight, bias = next(parameters), next(parameters)
                x = nn.functional.layer_norm(x, x.shape[-1:]) * weight.unsqueeze(1) + bias.unsqueeze(1)
            else:
                x = kind(x)
        return x

    @torch.no_grad()
    def write(self, models: Sequence[nn.Sequential]) -> None:
        """Take over the parameters of the models."""
        for stack, *parts in zip(self.stacked, *(model.parameters() for model in models), strict=True):
            stack.copy_(torch.stack(parts))

    @torch.no_grad()
    def read(self, models: Sequence[nn.Sequential]) -> None:
        """Hand over the parameters to the models."""
        for stack, *parts in zip(self.stacked, *(model.parameters() for model in models), strict=True):
            for one, part in zip(stack, parts, strict=True):
                part.copy_(one)


class Apart(nn.Module):
    """The networks `models` themselves, with the interface of `SideBySide`: for optimizers that take matrices only."""

    def __init__(self, models: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(one) for model, one in zip(self.models, x, strict=True)])

    def hidden_matrices(self) -> list[Tensor]:
        """The weights of all layers but the networks' last ones."""
        layers = [[module for module in model.modules() if isinstance(module, nn.Linear)] for model in self.models]
        return [linear.weight for linears in layers for linear in linears[:-1]]

    @property
    def stacked(self) -> list[Tensor]:
        """The parameters (S×...) of S networks."""
        stacks = zip(*(model.parameters() for model in self.models), strict=True)
        return [torch.stack([p.detach() for p in stack]) for stack in stacks]

    def read(self, models: Sequence[nn.Sequential]) -> None:
        """The models are the networks."""

    def write(self, models: Sequence[nn.Sequential]) -> None:
        """The models are the networks."""
