"""Symmetry teleportation for PyTorch: along a level set of the loss to where the optimizer gains more."""

from ._version import __version__
from .errors import TeleportError
from .model.samples import matched_samples
from .objectives import GradNorm, Lookahead, Objective
from .objectives.generalization import Curvature, Sharpness
from .objectives.next_step import OptimizerLookahead, read_step
from .operator.teleport_layer import teleport_layer
from .report import LayerReport, TeleportReport
from .teleport import teleport_mlp
from .teleporter import Schedule, Teleporter

__all__ = [
    "Curvature",
    "GradNorm",
    "LayerReport",
    "Lookahead",
    "Objective",
    "OptimizerLookahead",
    "Schedule",
    "Sharpness",
    "TeleportError",
    "TeleportReport",
    "Teleporter",
    "__version__",
    "matched_samples",
    "read_step",
    "teleport_layer",
    "teleport_mlp",
]
