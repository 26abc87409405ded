"""What to pass instead of a model that is no chain: the part of it that is one."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.parameter import is_lazy

MOST_TRIED = 100  # parts of one model, each of which is traced
_WRAPPED = ("_orig_mod", "module")  # where torch's compiler and its parallel wrappers keep the model

IsChain = Callable[[nn.Module], bool]


def hint(model: nn.Module, is_chain: IsChain) -> str:
    """A sentence that names the part of `model` to pass in its place, the largest found; empty if there is none."""
    inner, path = model, "model"
    while (name := _wrapped_in(inner)) is not None:
        inner, path = inner._modules[name], f"{path}.{name}"  # type: ignore[assignment]
    if path != "model" and is_chain(inner):
        return f"{path} is such a chain: pass it, with the same batch"
    found = _largest_chain(inner, path, is_chain)
    return f"{found} is such a chain: pass it, and as the batch's inputs what the model gives it" if found else ""


def _wrapped_in(module: nn.Module) -> str | None:
    """The name of the one child of a module with which torch wraps another one."""
    children = [name for name, child in module._modules.items() if child is not None]
    is_wrapper = type(module).__module__.startswith("torch.") and len(children) == 1 and children[0] in _WRAPPED
    return children[0] if is_wrapper else None


def _largest_chain(model: nn.Module, path: str, is_chain: IsChain) -> str | None:
    """The path of the part with the most parameters that is a chain.

    MOST_TRIED of the parts are tried, none that is smaller than one that was found.
    """
    best: str | None = None
    tried = most = 0
    for place, part in _parts(model, path):
        size = sum(parameter.numel() for parameter in part.parameters() if not is_lazy(parameter))
        if size > most:
            tried += 1
            if is_chain(part):
                best, most = place, size
            if tried == MOST_TRIED:
                break
    return best


def _parts(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with their paths, from the top down, and the tails module[1:], … of a Sequential."""
    waiting = collections.deque([(path, model)])
    while waiting:
        at, module = waiting.popleft()
        if type(module) is nn.Sequential:
            yield from ((f"{at}[{start}:]", module[start:]) for start in range(1, len(module) - 1))
        for name, child in module._modules.items():
            if child is not None:
                waiting.append((f"{at}[{name}]" if name.isdigit() else f"{at}.{name}", child))
                yield waiting[-1]
