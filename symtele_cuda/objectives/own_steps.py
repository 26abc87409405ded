"""The steps that a model's optimizers really take, as what a lookahead looks ahead to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..model.chain import Chain
from ..optimizers import groups_of, kind_of
from .next_step import Step, muon_length, read_step, sgd_rate


@dataclass(frozen=True)
class OwnSteps:
    """The optimizers of a model, read anew at every question."""

    optimizers: Sequence[torch.optim.Optimizer]
    model: nn.Module

    def check(self, chain: Chain, one_step: bool) -> None:
        """Raise ValueError unless their next step is known and lowers the loss. one_step: whether it alone counts; if
        not, the steps of optimizers that are all SGD must come to gradient steps."""
        self.check_minimises()
        self.next_step(chain)
        if not one_step and self._are_all(torch.optim.SGD):
            for group in groups_of(self.model, self.optimizers):
                sgd_rate(group)

    def check_minimises(self) -> None:
        if any(group.get("maximize", False) for group in groups_of(self.model, self.optimizers)):
            raise ValueError('optimizer must minimise the loss for objective "lookahead", got one with maximize=True')

    @property
    def largest_lr(self) -> float:
        """That of the groups that hold parameters of the model; infinite where none does, which is an error."""
        return max((float(group["lr"]) for group in groups_of(self.model, self.optimizers)), default=math.inf)

    def next_step(self, chain: Chain) -> Step:
        return read_step(self.optimizers, _trainable(chain))

    def gradient_rate(self) -> float | None:
        """The rate of the gradient steps that their steps come to, the largest of all groups; None unless all are
        SGD."""
        if not self._are_all(torch.optim.SGD):
            return None
        return max(map(sgd_rate, groups_of(self.model, self.optimizers)))

    def plain_rate(self) -> float | None:
        """The largest lr of all groups; None unless all optimizers are SGD. Its momentum is zero at the start."""
        return self.largest_lr if self._are_all(torch.optim.SGD) else None

    def fixed_length(self, chain: Chain) -> float | None:
        """The norm of a step, whatever the gradient; None unless all are Muon."""
        if not self._are_all(torch.optim.Muon):
            return None
        own = set(map(id, _trainable(chain)))
        groups = groups_of(self.model, self.optimizers)
        shapes = [[p.shape for p in group["params"] if id(p) in own] for group in groups]
        return math.hypot(*map(muon_length, groups, shapes))

    def _are_all(self, kind: type[torch.optim.Optimizer]) -> bool:
        return all(kind_of(optimizer, (kind,)) is not None for optimizer in self.optimizers)


def _trainable(chain: Chain) -> list[nn.Parameter]:
    """The parameters that the optimizers move, in the order of the layers."""
    return [parameter for _, parameter in chain.named_parameters() if parameter.requires_grad]
