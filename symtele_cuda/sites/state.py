"""An optimizer's state, moved along with the parameters that it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import TeleportError
from ..transaction import Transaction
from .action import Site

FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg")
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum", "max_exp_avg_sq")


def moments_of(
    optimizers: Iterable[torch.optim.Optimizer], parameters: dict[str, nn.Parameter], kinds: Sequence[str]
) -> list[dict[str, Tensor]]:
    """The entries of the optimizers' state of these kinds, each kind by the names of the parameters.

    Raises:
        TeleportError: a state has a tensor of its parameter's shape that is of no kind that is known.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = dict[str, dict[str, Tensor]]()
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if id(parameter) not in names:
                continue
            for kind, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
                    if kind not in (*FIRST_MOMENTS, *SECOND_MOMENTS):
                        raise TeleportError(
                            f"optimizer: expected a state that can be moved, {', '.join(FIRST_MOMENTS)} or "
                            f"{', '.join(SECOND_MOMENTS)}, got {kind!r} of a {type(optimizer).__name__}"
                        )
                    found.setdefault(kind, {})[names[id(parameter)]] = value
    return [found[kind] for kind in kinds if kind in found]


def move(
    transaction: Transaction,
    entries: Mapping[str, Tensor],
    moved: Iterable[tuple[Site, Tensor]],
    squared: bool = False,
) -> None:
    """Act with an element of each site on tensors of its parameters' shapes, in place; squared: as `Site.act` says."""
    values = dict(entries)
    for site, g in moved:
        like = next((values[name] for name in site.names if name in values), None)
        if like is not None:
            values |= site.act(values, g.to(like), squared)
    changed = [name for name in entries if values[name] is not entries[name]]
    transaction.write([entries[name] for name in changed], [values[name] for name in changed])


def transport(
    transaction: Transaction,
    optimizers: Iterable[torch.optim.Optimizer],
    parameters: dict[str, nn.Parameter],
    moved: Iterable[tuple[Site, Tensor]],
) -> None:
    """Move the state as gradients move: first moments by g^{-T}, second ones by the squares of its entries.

    The latter is exact for scales, and else where the entries of a gradient are not correlated.
    """
    listed = [(site, site.contragredient(g)) for site, g in moved]
    optimizers = list(optimizers)
    for kinds, squared in ((FIRST_MOMENTS, False), (SECOND_MOMENTS, True)):
        for entries in moments_of(optimizers, parameters, kinds):
            move(transaction, entries, listed, squared)
