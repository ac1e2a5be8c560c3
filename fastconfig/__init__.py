"""Conflict-free gradients for training on several losses. Start with ``combine`` or ``GradientBuffer``."""

from fastconfig import optim, weightings
from fastconfig.api import combine, gramian
from fastconfig.buffer import GradientBuffer
from fastconfig.combination import Combination
from fastconfig.conflict_lr import ConflictAwareLR
from fastconfig.diagnostics import show_config
from fastconfig.methods import ConFIG, Method
from fastconfig.version import __version__

__all__ = [
    "Combination",
    "ConFIG",
    "ConflictAwareLR",
    "GradientBuffer",
    "Method",
    "__version__",
    "combine",
    "gramian",
    "optim",
    "show_config",
    "weightings",
]
