"""Conflict-free gradients for training on several losses. Start with ``combine`` or ``GradientBuffer``."""

from fastconfig import optim, weightings
from fastconfig.api import combine, gramian
from fastconfig.conflict.history import ConflictHistory
from fastconfig.conflict.learning_rate import ConflictAwareLR
from fastconfig.conflict.monitor import ConflictMonitor
from fastconfig.diagnostics import show_config
from fastconfig.gradients.buffer import GradientBuffer
from fastconfig.gradients.combination import Combination
from fastconfig.gradients.features import backward
from fastconfig.integrations import torchjd
from fastconfig.methods import (
    CRMOGM,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    GradDrop,
    GradVac,
    InverseNorm,
    Mean,
    Method,
    NashMTL,
    PCGrad,
    Priority,
    RandomWeights,
    SDMGrad,
    StreamingMethod,
    Sum,
    UPGrad,
)
from fastconfig.version import __version__

__all__ = [
    "CRMOGM",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "Combination",
    "ConFIG",
    "ConflictAwareLR",
    "ConflictHistory",
    "ConflictMonitor",
    "Constant",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "GradientBuffer",
    "InverseNorm",
    "Mean",
    "Method",
    "NashMTL",
    "PCGrad",
    "Priority",
    "RandomWeights",
    "SDMGrad",
    "StreamingMethod",
    "Sum",
    "UPGrad",
    "__version__",
    "backward",
    "combine",
    "gramian",
    "optim",
    "show_config",
    "torchjd",
    "weightings",
]
