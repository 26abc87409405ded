"""Pairs of layers that scales or matrices pass between, found in the graph of a module that torch.fx can trace.

From each layer the way goes on as long as one operation alone takes what comes out, and all operations on it are
positively homogeneous, unit by unit: activations, dropout, pooling, flattening, a product with something else. A batch
normalisation on the way takes the scales itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .declared import Declaration, LinearPair, Scales
from .names import BATCH_NORMS, CONVOLUTIONS, is_transposed

PASSING: set[Any] = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout}
HOMOGENEOUS: set[Any] = {nn.ReLU, nn.LeakyReLU, F.relu, torch.relu, "relu", "relu_", F.leaky_relu}
FLATTENING: set[Any] = {nn.Flatten, torch.flatten, "flatten"}
POOLING: set[Any] = {
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}
SQUARES: set[Any] = {torch.square, "square"}
POWERS: set[Any] = {operator.pow, torch.pow, "pow"}
PRODUCTS: set[Any] = {operator.mul, torch.mul, "mul"}


def pairs_in(model: nn.Module, prefix: str = "") -> Iterator[Declaration]:
    """The pairs of the largest parts of a model that can be traced."""
    graph = _trace(model)
    if graph is not None:
        yield from _pairs_of(dict(model.named_modules()), graph, prefix)
        return
    for name, child in model.named_children():
        yield from pairs_in(child, f"{prefix}{name}.")


class _Tracer(fx.Tracer):
    """Takes torch's own layers as one operation each, and those of GPT-2."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_transposed(m) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph | None:
    """The graph of the model's forward, or None where Python decides on values."""
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)) or not list(model.children()):
        return None
    try:
        with torch.random.fork_rng([]):
            return _Tracer().trace(model)
    except Exception:  # whatever a user's module does with what is no tensor
        return None


def _pairs_of(modules: Mapping[str, nn.Module], graph: fx.Graph, prefix: str) -> Iterator[Declaration]:
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op == "call_module" and _is_layer(modules[node.target]):
            way = _Way(node.target, node.target)
            if way.follow(node, modules) and all(called.count(name) == 1 for name in (way.first, way.up, way.down)):
                declared = way.declared(modules, prefix)
                yield from () if declared is None else (declared,)


@dataclass
class _Way:
    """From the layer `first` to the layer `down`.

    up: what takes the scales, `first` or a batch normalisation behind it. power: of the scales at the end. linear:
    whether a matrix passes as well. pooled, flattened: whether units are pooled, or channels have become many units.
    """

    first: str
    up: str
    down: str = ""
    power: int = 1
    linear: bool = True
    pooled: bool = False
    flattened: bool = False

    def follow(self, node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
        """Go on from the output of `node` to the next layer; whether there is such a way."""
        while len(node.users) == 1:
            before, (node,) = node, node.users
            module = modules[str(node.target)] if node.op == "call_module" else None
            if module is not None and _is_layer(module):
                self.down = str(node.target)
                return True
            if isinstance(module, BATCH_NORMS):
                if not module.affine or self.power != 1 or self.flattened:
                    return False
                self.up, self.linear = str(node.target), False
            elif not self._pass(before, node, module):
                return False
        return False

    def _pass(self, before: fx.Node, node: fx.Node, module: nn.Module | None) -> bool:
        """Go through the operation of `node`, which takes the output of `before`; whether scales do."""
        operation: Any = node.target if module is None else type(module)
        if operation in SQUARES or (operation in POWERS and node.args[1:] == (2,)):
            self.power, self.linear = 2 * self.power, False
        elif operation in HOMOGENEOUS or (operation in PRODUCTS and [*node.args].count(before) == 1):
            self.linear = False
        elif operation in POOLING:
            self.pooled = True
        elif operation in FLATTENING:
            self.flattened = True
        else:
            return operation in PASSING
        return True

    def declared(self, modules: Mapping[str, nn.Module], prefix: str) -> Declaration | None:
        """What acts between the two layers, or None."""
        convolutions = [isinstance(modules[name], CONVOLUTIONS) for name in (self.first, self.down)]
        up, down = f"{prefix}{self.up}", f"{prefix}{self.down}"
        if convolutions == [False, False]:
            if self.pooled or self.flattened:  # over units, or of several tokens: no unit is left to itself
                return None
            return LinearPair(up, down) if self.linear else Scales(up, down, self.power)
        channels = convolutions == [True, True] and getattr(modules[self.down], "groups", 1) == 1
        if (channels and not self.flattened) or (convolutions == [True, False] and self.flattened):
            return Scales(up, down, self.power)
        return None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_transposed(module)
