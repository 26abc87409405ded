"""What to pass instead of a model that is no chain: the part of it that is one."""

from __future__ import annotations

import collections
from collections.abc import Callable

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
    """The path of the part with the most parameters that is a chain: a module, or the tail of a Sequential.

    The parts are tried from the top down, MOST_TRIED of them, none that is smaller than one that was found.
    """
    best: str | None = None
    tried = most = 0
    waiting = collections.deque([(path, model)])
    while waiting and tried < MOST_TRIED:
        at, module = waiting.popleft()
        children = _children(module, at)
        waiting += children
        for place, part in [*_tails(module, at), *children]:
            size = sum(parameter.numel() for parameter in part.parameters() if not is_lazy(parameter))
            if size <= most or tried >= MOST_TRIED:
                continue
            tried += 1
            if is_chain(part):
                best, most = place, size
    return best


def _children(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in module._modules.items():
        if child is not None:
            found.append((f"{path}[{name}]" if name.isdigit() else f"{path}.{name}", child))
    return found


def _tails(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """module[1:], module[2:], … of a Sequential."""
    if type(module) is not nn.Sequential:
        return []
    return [(f"{path}[{start}:]", module[start:]) for start in range(1, len(module) - 1)]
