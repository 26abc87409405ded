"""The optimizers of a training loop: one, several or wrapped ones, and whether gradients wait for their step."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(optimizer: object) -> tuple[torch.optim.Optimizer, ...]:
    """The torch optimizers that `optimizer` is: itself, what a wrapper holds in `.optimizer`, or those of a sequence.

    Raises:
        TypeError: it is, or a sequence holds, something else. ValueError: an empty sequence, or one given twice.
    """
    parts = optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)
    found = tuple(map(_unwrap_one, parts))
    if not found:
        raise ValueError("optimizer must be a torch.optim.Optimizer or a sequence of them, got an empty sequence")
    if len(set(map(id, found))) < len(found):
        raise ValueError("optimizer must hold no optimizer twice, got a sequence that does")
    return found


def _unwrap_one(optimizer: object) -> torch.optim.Optimizer:
    inner, seen = optimizer, set[int]()
    while (held := getattr(inner, "optimizer", None)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        inner = held
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, a wrapper that holds one in .optimizer, or a sequence of them, "
            f"got {type(optimizer).__name__}"
        )
    return inner


def kind_of(
    optimizer: torch.optim.Optimizer, known: Collection[type[torch.optim.Optimizer]]
) -> type[torch.optim.Optimizer] | None:
    """The class of `known` whose steps the optimizer takes: its own, or that of a base whose `step` it inherits."""
    for cls in type(optimizer).__mro__:
        if cls in known:
            own, theirs = map(_step_of, (type(optimizer), cls))
            return cls if own is theirs else None
    return None


def _step_of(cls: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The function that a class of optimizers steps by, without what torch wraps around it to profile it."""
    return inspect.unwrap(cls.step)


def holder_of(optimizers: Sequence[torch.optim.Optimizer]) -> dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]]:
    """By the id of each parameter that they hold, the optimizer that holds it and its group."""
    return {
        id(parameter): (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def groups_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The parameter groups that hold parameters of the model."""
    own = set(map(id, model.parameters()))
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return [group for group in groups if any(id(parameter) in own for parameter in group["params"])]


def check_holds(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError unless each trainable parameter of the model is held by exactly one of the optimizers."""
    holders: dict[int, set[int]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                holders.setdefault(id(parameter), set()).add(id(optimizer))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, p in trainable if id(p) not in holders]
    if trainable and len(missing) == len(trainable):
        raise ValueError("optimizer must hold all trainable parameters of the model, got one that holds none of them")
    if missing:
        raise ValueError(
            f"optimizer must hold all trainable parameters of the model, got one without {missing}: parameters that "
            "were added or replaced later, as by load_state_dict(assign=True), or taken out of its groups, are not held"
        )
    shared = [name for name, p in trainable if len(holders[id(p)]) > 1]
    if shared:
        raise ValueError(f"optimizer must hold each parameter once, got several optimizers that hold {shared}")


class PendingGradients:
    """Tells whether a model has gradients that no step of its optimizers has used yet.

    A gradient counts as used if it is the one, unchanged, that was there when an optimizer of the model stepped last,
    or when this object was made. Gradients that are all zero, as zero_grad(set_to_none=False) leaves them, are none.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model, self._used = model, dict[int, tuple[weakref.ref[Tensor], int]]()
        own = weakref.ref(self)

        def note_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
            if (pending := own()) is not None:
                pending._note(optimizer)

        self._handles = [optimizer.register_step_post_hook(note_step) for optimizer in optimizers]
        for handle in self._handles:
            weakref.finalize(self, handle.remove).atexit = False
        for optimizer in optimizers:
            self._note(optimizer)

    def __bool__(self) -> bool:
        unused = [p.grad for p in self._model.parameters() if p.grad is not None and not self._is_used(p)]
        return any(bool(gradient.count_nonzero()) for gradient in unused)

    def _is_used(self, parameter: nn.Parameter) -> bool:
        reference, version = self._used.get(id(parameter), (None, 0))
        gradient = parameter.grad
        return reference is not None and reference() is gradient and gradient._version == version  # type: ignore[union-attr]

    def _note(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._used[id(parameter)] = weakref.ref(parameter.grad), parameter.grad._version
