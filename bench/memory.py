"""How large the tensors are that a piece of work allocates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class AllocationRecorder(TorchDispatchMode):
    """While active, records every operator whose result lives in storage that no argument of it owns: an allocation.

    Results of views, of operations in place and of `out=` share an argument's storage and do not count. What an
    operator allocates and frees inside its own kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest_elements = 0
        self.largest_operator = ""
        self.allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        owned = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                self._record(str(func), storage.nbytes() // tensor.element_size())
        return result

    def _record(self, operator: str, elements: int) -> None:
        self.allocations += 1
        if elements > self.largest_elements:
            self.largest_elements, self.largest_operator = elements, operator


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
