"""Teleports with flat options, which are sorted into method and guards; those of `teleport_mlp` are without bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor, nn

import symtele_cuda as st
from symtele_cuda import teleporter

GUARDS = {field.name for field in dataclasses.fields(st.Guards)}
ASCENT = {field.name for field in dataclasses.fields(st.Ascent)}
UNBOUNDED = st.Guards(max_weight_change=math.inf, max_sensitivity=math.inf)


def sorted_out(method: st.Ascent, guards: st.Guards, options: dict[str, Any]) -> dict[str, Any]:
    """The options with those of method and guards in the place of the given ones."""
    ours = {name: value for name, value in options.items() if name not in GUARDS | ASCENT}
    method = dataclasses.replace(method, **{name: options[name] for name in ASCENT & options.keys()})
    guards = dataclasses.replace(guards, **{name: options[name] for name in GUARDS & options.keys()})
    return {"method": method, "guards": guards} | ours


def teleport_mlp(
    model: nn.Module, batch: tuple[Tensor, Tensor], loss_fn: Any = None, **options: Any
) -> st.TeleportReport:
    return st.teleport_mlp(model, batch, loss_fn, **sorted_out(st.Ascent(), UNBOUNDED, options))


def make_teleporter(
    model: nn.Module, optimizer: Any, loss_fn: Any = None, kind: type[st.Teleporter] = st.Teleporter, **options: Any
) -> st.Teleporter:
    return kind(model, optimizer, loss_fn, **sorted_out(teleporter.LOOK_AHEAD, teleporter.CAREFUL, options))
