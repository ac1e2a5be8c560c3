"""Conflict-free gradients for training on several losses. Start with ``combine`` or ``GradientBuffer``."""

from fastconfig import optim
from fastconfig.api import combine, gramian
from fastconfig.buffer import GradientBuffer
from fastconfig.combination import Combination
from fastconfig.diagnostics import show_config
from fastconfig.history import ConflictHistory
from fastconfig.methods import ConFIG, Method
from fastconfig.monitor import ConflictMonitor
from fastconfig.version import __version__

__all__ = [
    "Combination",
    "ConFIG",
    "ConflictHistory",
    "ConflictMonitor",
    "GradientBuffer",
    "Method",
    "__version__",
    "combine",
    "gramian",
    "optim",
    "show_config",
]
