"""Symmetry teleportation for PyTorch: along a level set of the loss to where the optimizer gains more."""

from ._version import __version__
from .errors import TeleportError
from .methods.published import Published
from .methods.standardise import Standardise
from .model.objective import Objective
from .model.samples import matched_samples
from .model.sites import LinearPair, Scales, Site, find_sites
from .objectives import GradNorm, Lookahead
from .objectives.generalization import Curvature, Sharpness
from .objectives.next_step import OptimizerLookahead, read_step
from .operator.teleport_layer import teleport_layer
from .plasticity import Plasticity, plasticity
from .report import LayerReport, TeleportReport
from .schedule import Schedule
from .settings import Ascent, Guards
from .teleport import teleport, teleport_mlp
from .teleporter import Teleporter

__all__ = [
    "Ascent",
    "Curvature",
    "GradNorm",
    "Guards",
    "LayerReport",
    "LinearPair",
    "Lookahead",
    "Objective",
    "OptimizerLookahead",
    "Plasticity",
    "Published",
    "Scales",
    "Schedule",
    "Sharpness",
    "Site",
    "Standardise",
    "TeleportError",
    "TeleportReport",
    "Teleporter",
    "__version__",
    "find_sites",
    "matched_samples",
    "plasticity",
    "read_step",
    "teleport",
    "teleport_layer",
    "teleport_mlp",
]
