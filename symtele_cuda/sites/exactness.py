"""Whether a model computes the same after what its sites say: measured on a batch, not taken on trust."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import TeleportError
from ..kernels.torch_kernels import dot
from .action import ORTHOGONAL, POSITIVE_DIAGONAL, Site

KEPT = 1e-4
"""The largest ‖z' − z‖ / ‖z‖ of outputs that count as kept: rounding stays below, a wrong site is far above."""
NEAR = 0.3
"""How far from the neutral element the elements are that sites are tried with."""

Outputs = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""The outputs of a model on a batch, given some of its parameters by name."""


def floating_outputs(outputs: Any) -> list[Tensor]:
    """The floating tensors of what a model returns; of a mapping with logits these alone, for what else it holds (keys
    and values of a cache, hidden states) may move."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        outputs = outputs["logits"]
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_exact(outputs: Outputs, parameters: Mapping[str, Tensor], sites: Sequence[Site]) -> Sequence[Tensor]:
    """The outputs; raise TeleportError if one of the sites changes them, tried with one element of its group near I."""
    before, everything = outputs({}), dict(parameters)
    for site in sites:
        everything |= site.act(everything, element_near(site, parameters))
    if change_of(before, outputs(everything)) <= KEPT:
        return before
    for site in sites:
        change = change_of(before, outputs(site.act(parameters, element_near(site, parameters))))
        if not change <= KEPT:
            raise TeleportError(
                f"sites: expected symmetries of the model, got {site.kind} of {', '.join(site.names)}, "
                f"which changes the outputs by {change:.1e} of their norm"
            )
    raise TeleportError("sites: expected symmetries of the model, got some that change its outputs together")


def element_near(site: Site, parameters: Mapping[str, Tensor]) -> Tensor:
    """An element of the site's group, the same on every call."""
    identity = site.identity(parameters)
    noise = torch.randn(identity.shape, generator=torch.Generator().manual_seed(0)).to(identity)
    if site.group == POSITIVE_DIAGONAL:
        return (NEAR * noise).exp()
    if site.group == ORTHOGONAL:
        return torch.linalg.qr(noise).Q
    return identity + NEAR * noise / identity.shape[-1] ** 0.5


def change_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """‖z' − z‖ / ‖z‖ over all tensors; NaN where one is not finite."""
    changes = [dot(new - old, new - old) for old, new in zip(before, after, strict=True)]
    return float((sum(changes) / sum(dot(old, old) for old in before)) ** 0.5)
