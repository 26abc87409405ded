"""What a twin says of itself as an operator: its operands. Its fake kernel follows from them and from the twin.

A fake kernel knows the results' shapes without computing. It checks the operands and runs the twin on the meta device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "int32": torch.int32, "bool": torch.bool}
_OF_FIRST = ("float32", "float64")
_ANY, _WHOLE = "any", "*"
_SORTS = {0: "a scalar", 1: "a vector", 2: "a matrix"}

_Twin = TypeVar("_Twin", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """A twin, and for each of its operands a word for each dimension, followed by the dtypes that it may have.

    A small letter stands for one size in a call, or in all lists of it at one place; a capital letter for one size in
    all places; * for a whole shape. Without a dtype an operand has that of the first one, float32 or float64.
    """

    twin: Callable[..., Any]
    operands: dict[str, str]

    def kernel(self, *arguments: Any, **keywords: Any) -> Any:
        """What the twin returns; several results are contiguous and share no memory, as the compiled operators' are."""
        results = self.twin(*arguments, **keywords)
        return tree_map_only(Tensor, _contiguous_copy, results) if isinstance(results, tuple | list) else results

    def fake(self, *arguments: Any, **keywords: Any) -> Any:
        """Memory for what the twin returns, on the device of the first operand."""
        given = inspect.signature(self.twin).bind(*arguments, **keywords).arguments
        tensors = [(name, place, tensor) for name in self.operands for place, tensor in _listed(given.get(name))]
        self._check(tensors)
        device = tensors[0][2].device
        results = self.kernel(**tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given))
        return tree_map_only(
            Tensor, lambda one: torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device), results
        )

    def _check(self, tensors: list[tuple[str, int, Tensor]]) -> None:
        first, known = tensors[0][2], dict[tuple[str, int], Any]()
        for name, place, tensor in tensors:
            words = self.operands[name].split()
            sizes = [word for word in words if len(word) == 1]
            _check_shape(name, tensor, sizes, place, known)
            dtypes = [word for word in words if len(word) > 1] or [_OF_FIRST, [_name(first)]][tensor is not first]
            torch._check_type(
                _name(tensor) in dtypes or _ANY in dtypes,
                lambda name=name, dtypes=dtypes, tensor=tensor: (
                    f"{name} must be of dtype {' or '.join(dtypes)}, got {_name(tensor)}"
                ),
            )
            torch._check_value(
                tensor.device == first.device,
                lambda name=name, tensor=tensor: (
                    f"{name} must be on the device of the first tensor, {first.device}, got {tensor.device}"
                ),
            )


OPERATORS: dict[str, Operator] = {}
"""The operators of `csrc/ops.cpp` by their names."""


def operator(**operands: str) -> Callable[[_Twin], _Twin]:
    """Make a function of torch the twin of the operator of its name; `operands` are described in `Operator`."""

    def register(twin: _Twin) -> _Twin:
        OPERATORS[twin.__name__] = Operator(twin, operands)
        return twin

    return register


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _listed(value: Any) -> Iterator[tuple[int, Tensor]]:
    """The tensors of an argument with their places in its list."""
    for place, one in enumerate(value if isinstance(value, list | tuple) else [value]):
        if one is not None:
            yield place, one


def _check_shape(name: str, tensor: Tensor, words: list[str], place: int, known: dict[tuple[str, int], Any]) -> None:
    """The shape is what `words` say, with the sizes that are `known` of words at places; those new are noted."""
    if words == [_WHOLE]:
        expected = known.setdefault((_WHOLE, place), tuple(tensor.shape))
    else:
        torch._check_value(
            tensor.ndim == len(words), lambda: f"{name} must be {_SORTS[len(words)]}, got shape {tuple(tensor.shape)}"
        )
        expected = tuple(
            int(word) if word.isdigit() else known.setdefault((word, -1 if word.isupper() else place), size)
            for word, size in zip(words, tensor.shape, strict=True)
        )
    torch._check_value(
        tuple(tensor.shape) == expected, lambda: f"{name} must have shape {expected}, got {tuple(tensor.shape)}"
    )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
