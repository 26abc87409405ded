"""All or nothing: after any exception, an interrupt included, everything that a call has touched is what it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

Result = TypeVar("Result")

# What torch.fx replaces while it traces a forward, and leaves replaced where an interrupt comes in between.
_PATCHED_BY_FX = (
    (nn.Module, "__call__"),
    (nn.Module, "__getattr__"),
    (_symbolic_trace, "CURRENT_PATCHER"),
)
# Where it notes that it traces: in the module up to torch 2.13, in an object for each thread from 2.14 on, where the
# flag is absent before the first trace.
_TRACING: tuple[Any, str] = (_symbolic_trace, "_is_fx_tracing_flag")
if hasattr(_symbolic_trace, "_is_fx_tracing_tls"):
    _TRACING = (_symbolic_trace._is_fx_tracing_tls, "flag")

_AUTOCAST = ("cpu", "cuda")  # the devices that this library computes on


class Transaction:
    """One call that changes a model, and what it takes to undo it.

    `run` calls the work. If that raises, the undo steps are taken in reverse order. They are taken a second time where
    an interrupt came between them, so each must be one that can be repeated. In every case grad mode, autocast and the
    current device are afterwards what they were when the transaction was made; after a failure so are the random state
    of torch and what torch.fx patches.
    """

    def __init__(self) -> None:
        self._undo_steps: list[Callable[[], None]] = []
        self._modes: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (torch.set_grad_enabled, (torch.is_grad_enabled(),)),
            *((torch.set_autocast_enabled, (kind, torch.is_autocast_enabled(kind))) for kind in _AUTOCAST),
        ]
        if torch.cuda.is_initialized():
            self._modes.append((torch.cuda.set_device, (torch.cuda.current_device(),)))
        self.on_failure(functools.partial(torch.set_rng_state, torch.get_rng_state()))
        for owner, name in _PATCHED_BY_FX:
            self.keep_attribute(owner, name)
        owner, name = _TRACING
        self.on_failure(functools.partial(setattr, owner, name, getattr(owner, name, False)))

    def run(self, work: Callable[[], Result]) -> Result:
        """work(), all or nothing."""
        try:
            try:
                result = work()
                self._restore_modes()
                return result
            except BaseException:
                self._undo()
                raise
        except BaseException:
            self._undo()
            raise

    def on_failure(self, undo: Callable[[], None]) -> None:
        """Take this step too where the work raises."""
        self._undo_steps.append(undo)

    def keep_attribute(self, owner: Any, name: str) -> None:
        """Put the present attribute back where the work raises; nothing where there is none."""
        if name in vars(owner):
            self.on_failure(functools.partial(setattr, owner, name, vars(owner)[name]))

    def compute_on(self, device: torch.device) -> None:
        """From here to the end of `run` compute on that device, without gradients and autocast."""
        if device.type == "cuda":
            self.on_failure(functools.partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
            torch.cuda.set_device(device)
        torch.set_grad_enabled(False)
        for kind in _AUTOCAST:
            torch.set_autocast_enabled(kind, False)

    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copy the values into the tensors, each of the shape of its value."""
        for tensor, value in zip(tensors, values, strict=True):
            if tensor.shape != value.shape:
                raise ValueError(f"values must have the shapes of the tensors, got {value.shape} for {tensor.shape}")
        if not tensors:  # of which torch makes an error
            return
        saved = [tensor.detach().clone() for tensor in tensors]
        self.on_failure(functools.partial(_copy, tensors, saved))
        _copy(tensors, values)

    def keep_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the present entries of the optimizer's state back where the work raises; their tensors are not copied."""
        entries = [(key, dict(value)) for key, value in optimizer.state.items()]

        def put_back() -> None:
            optimizer.state.clear()
            optimizer.state.update((key, dict(value)) for key, value in entries)

        self.on_failure(put_back)

    def _undo(self) -> None:
        self._restore_modes()
        for undo in reversed(self._undo_steps):
            undo()

    def _restore_modes(self) -> None:
        for restore, arguments in self._modes:
            restore(*arguments)


def _copy(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """In one call, which no interrupt of Python can split."""
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    torch._foreach_copy_(list(tensors), list(values))
    torch.set_grad_enabled(enabled)
