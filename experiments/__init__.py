"""The experiments behind docs/experiments.md: `python -m experiments EXPERIMENT` from the root of a checkout.

planar          gradient descent on booth and rosenbrock, with and without teleports
regression      a small multi-layer regression, GD and AdaGrad
classification  MNIST and scikit-learn's digits
minima          a narrow network on MNIST, teleported to flatter and sharper places of its level set
spike           the loss spike of a teleport, taken apart
study           seven tuned optimizers without and with teleports
training        the training loop that these five share; data, records, tables, figures: in and out
plasticity      one task after another, and what restores the ability to learn: a loop of its own
"""

from __future__ import annotations

import importlib
import platform
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def require_extra(module: str) -> ModuleType:
    """The optional module, or an ImportError that says how to get it: the library itself needs torch and numpy only."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise ImportError(f'{package} is needed here; install it with: pip install ".[experiments]"') from error


def override(settings: Settings, **options: Any) -> Settings:
    """A copy of the settings (a dataclass) with the options that were given, which are those that are not None."""
    return replace(settings, **{name: value for name, value in options.items() if value is not None})  # type: ignore[type-var]


def processor() -> str:
    """The processor's model, as the kernel tells it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
