"""Symmetry teleportation for PyTorch: along a level set of the loss to where the optimizer gains more."""

from ._version import __version__
from .errors import TeleportError
from .methods.eigenbasis import EigenbasisTeleporter
from .methods.published import Published
from .methods.standardise import Standardise
from .model.objective import Objective
from .model.samples import matched_samples
from .objectives import GradNorm, Lookahead
from .objectives.generalization import Curvature, Sharpness
from .objectives.next_step import OptimizerLookahead, read_step
from .operator.teleport_layer import teleport_layer
from .plasticity import Plasticity, plasticity
from .report import LayerReport, TeleportReport
from .schedule import Schedule
from .settings import Ascent, Guards
from .sites import Axis, LinearPair, QueryKey, Scales, Site, Stream, find_sites
from .sites.norms import convert_layernorm, fold_norms
from .teleport import teleport, teleport_mlp
from .teleporter import Teleporter

__all__ = [
    "Ascent",
    "Axis",
    "Curvature",
    "EigenbasisTeleporter",
    "GradNorm",
    "Guards",
    "LayerReport",
    "LinearPair",
    "Lookahead",
    "Objective",
    "OptimizerLookahead",
    "Plasticity",
    "Published",
    "QueryKey",
    "Scales",
    "Schedule",
    "Sharpness",
    "Site",
    "Standardise",
    "Stream",
    "TeleportError",
    "TeleportReport",
    "Teleporter",
    "__version__",
    "convert_layernorm",
    "find_sites",
    "fold_norms",
    "matched_samples",
    "plasticity",
    "read_step",
    "teleport",
    "teleport_layer",
    "teleport_mlp",
]
