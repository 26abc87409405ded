"""How torch writes an operation of a model: as a module, as a function, as a method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Spelling:
    """How torch writes one operation of a model, and what reads it.

    modules: its modules, none where it has none. calls: its functions, and the names of its methods.
    read: returns what the operation is. It has the signature of the calls; None stands for the value that is worked on.
    It raises ValueError where a chain may not have the operation. A module gives it the arguments that are its
    attributes.
    remark: what lists say behind its name.
    """

    modules: tuple[type[nn.Module], ...]
    calls: tuple[object, ...]
    read: Callable[..., Any]
    remark: str = ""

    @property
    def title(self) -> str:
        """What a list of the modules calls this one."""
        return self.modules[0].__name__ + self.remark if self.modules else ""

    def spells(self, module: nn.Module) -> bool:
        """Whether `module` is one of its modules, or of a subclass that has not changed the forward."""
        return any(isinstance(module, one) and type(module).forward is one.forward for one in self.modules)

    def read_module(self, module: nn.Module) -> Any:
        """What `module`, one of its modules, is."""
        _, *names = inspect.signature(self.read).parameters
        return self.read(None, **{name: getattr(module, name) for name in names if hasattr(module, name)})
