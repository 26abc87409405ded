"""Modules of a model by their names, and along which dimensions of which parameters their inputs and outputs lie."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from .action import Axis

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IN_PROJ = "in_proj"
PART = re.compile(r"\[(\d+)/(\d+)\]$")


@dataclass(frozen=True)
class Side:
    """The inputs or the outputs of modules: `size` of them, along these axes."""

    size: int
    axes: tuple[Axis, ...]

    def part(self, index: int, of: int) -> Side:
        """Part `index` of `of` equal ones."""
        size = self.size // of
        return Side(size, tuple(replace(axis, start=axis.start + index * size) for axis in self.axes))

    def acted(self, power: int = 1, repeat: int = 1) -> tuple[Axis, ...]:
        """The axes where g acts to this power, `repeat` entries or heads alike."""
        return tuple(replace(axis, power=power, repeat=repeat) for axis in self.axes)


class ModelNames:
    """A model's modules and parameters by name; a parameter that is tied has the name that comes first."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._first = {id(parameter): name for name, parameter in model.named_parameters()}

    @cached_property
    def tied(self) -> frozenset[str]:
        """First names of the parameters that have others."""
        return frozenset(self._first[id(p)] for name, p in self.parameters.items() if self._first[id(p)] != name)

    def match(self, pattern: str) -> list[tuple[str, tuple[str, ...]]]:
        """The names of modules or parameters that fit, and what their stars stand for: one part of a name each.

        Raises:
            ValueError: there is none.
        """
        part = PART.search(pattern)
        base, suffix = (pattern, "") if part is None else (pattern[: part.start()], part.group())
        expression = re.compile(re.escape(base).replace(r"\*", r"([^.]+)"))
        attentions = (name for name, module in self.modules.items() if isinstance(module, nn.MultiheadAttention))
        names = dict.fromkeys((*self.modules, *self.parameters, *(f"{name}.{IN_PROJ}" for name in attentions)))
        matches = ((name, expression.fullmatch(name)) for name in names)
        found = [(name + suffix, match.groups()) for name, match in matches if match is not None]
        if not found:
            raise ValueError(f"sites must name modules of the model, got {pattern!r}, which fits none")
        return found

    def names_of(self, patterns: Sequence[str]) -> list[str]:
        return [name for pattern in patterns for name, _ in self.match(pattern)]

    def outputs(self, name: str) -> Side:
        """Where the outputs of a module lie: of a layer, an embedding, or a parameter that is added itself.

        name: of the module, with "[i/n]" behind it for part i (from 0) of n equal ones.
        """
        return self._side(name, outputs=True)

    def inputs(self, name: str) -> Side:
        """Where the inputs of a module lie, as `outputs` says of these."""
        return self._side(name, outputs=False)

    def bias_of(self, name: str) -> tuple[nn.Module, str]:
        """The module and the attribute that hold the bias of a layer, or None where it has none."""
        owner, _, last = name.rpartition(".")
        module = self.modules[owner if last == IN_PROJ else name]
        return module, "in_proj_bias" if isinstance(module, nn.MultiheadAttention) else "bias"

    def _side(self, name: str, outputs: bool) -> Side:
        part = PART.search(name)
        base = name if part is None else name[: part.start()]
        dims = list(self._dims_of(base, outputs))
        axes = tuple(Axis(self._first[id(self.parameters[parameter])], dim) for parameter, dim in dims)
        side = Side(self.parameters[dims[0][0]].shape[dims[0][1]], axes)
        if part is None:
            return side
        index, of = map(int, part.groups())
        if of == 0 or index >= of or side.size % of:
            raise ValueError(f"sites must name part i of n equal ones, got {name!r} of a side with {side.size} entries")
        return side.part(index, of)

    def _dims_of(self, name: str, outputs: bool) -> Iterator[tuple[str, int]]:
        """(parameter, dimension) of one side of a module."""
        module = self.modules.get(name)
        if module is None and name in self.parameters:
            yield name, self.parameters[name].dim() - 1
            return
        owner, _, last = name.rpartition(".")
        if last == IN_PROJ and isinstance(attention := self.modules.get(owner), nn.MultiheadAttention):
            yield from self._of_packed(name, attention, outputs)
            return
        if isinstance(module, nn.MultiheadAttention):
            inner = f"{name}.".lstrip(".")
            yield from self._dims_of(f"{inner}out_proj" if outputs else f"{inner}{IN_PROJ}", outputs)
            return
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield from self._dims_of(f"{name}.base_layer", outputs)
            for low in self.modules[f"{name}.lora_B" if outputs else f"{name}.lora_A"]._modules:
                yield from self._dims_of(f"{name}.lora_{'B' if outputs else 'A'}.{low}", outputs)
            return
        columns = is_transposed(module)
        if isinstance(module, nn.Embedding) and outputs:
            yield self._plain(f"{name}.weight"), 1
        elif isinstance(module, BATCH_NORMS) and outputs and module.affine:
            yield self._plain(f"{name}.weight"), 0
            yield self._plain(f"{name}.bias"), 0
        elif isinstance(module, nn.Linear) or columns or (
            isinstance(module, CONVOLUTIONS) and (outputs or module.groups == 1)
        ):
            yield self._plain(f"{name}.weight"), int(outputs == columns)
            if outputs and getattr(module, "bias", None) is not None:
                yield self._plain(f"{name}.bias"), 0
        else:
            side = "outputs" if outputs else "inputs"
            raise ValueError(
                f"sites must name layers (Linear, convolution, Embedding, attention) or parameters, got {name!r}, "
                f"{'which names nothing' if module is None else 'a ' + type(module).__name__}, for {side}"
            )

    def _of_packed(self, name: str, module: nn.MultiheadAttention, outputs: bool) -> Iterator[tuple[str, int]]:
        """Of the "in_proj" of torch's attention: queries, keys and values, one after the other."""
        if module.in_proj_weight is not None:
            yield self._plain(f"{name}_weight"), int(not outputs)
            if outputs and module.in_proj_bias is not None:
                yield self._plain(f"{name}_bias"), 0
        elif outputs:
            raise ValueError(f"sites must have queries, keys and values in one weight, got several in {name!r}")
        else:
            for kind in "qkv":
                yield self._plain(f"{name.removesuffix(IN_PROJ)}{kind}_proj_weight"), 1

    def _plain(self, name: str) -> str:
        if name not in self.parameters:
            raise ValueError(f"sites must have plain parameters, got {name!r}, which is none: parametrized, perhaps")
        return name


def is_transposed(module: nn.Module | None) -> bool:
    """Whether it is a linear layer that holds Wᵀ (in×out), as those of GPT-2 in transformers are."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, torch.Tensor)
