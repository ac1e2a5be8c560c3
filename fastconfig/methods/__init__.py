"""One file a method: Gramian -> weights, or rows -> combination."""

from fastconfig.methods.aligned_mtl import AlignedMTL
from fastconfig.methods.base import GramianMethod, Method, Stateful, StreamingMethod, check_weights_of, is_streaming
from fastconfig.methods.cagrad import CAGrad
from fastconfig.methods.catalogue import method_for_one_call, method_of, remembers
from fastconfig.methods.config import ConFIG
from fastconfig.methods.constant import Constant, Mean, Sum
from fastconfig.methods.crmogm import CRMOGM
from fastconfig.methods.dualproj import DualProj
from fastconfig.methods.fairgrad import FairGrad
from fastconfig.methods.graddrop import GradDrop
from fastconfig.methods.gradvac import GradVac
from fastconfig.methods.imtlg import IMTLG
from fastconfig.methods.inverse_norm import InverseNorm
from fastconfig.methods.mgda import MGDA
from fastconfig.methods.nash_mtl import NashMTL
from fastconfig.methods.pcgrad import PCGrad
from fastconfig.methods.priority import Priority
from fastconfig.methods.random_weights import RandomWeights
from fastconfig.methods.sdmgrad import SDMGrad
from fastconfig.methods.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "DEFAULT_METHOD",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "GramianMethod",
    "InverseNorm",
    "Mean",
    "Method",
    "NashMTL",
    "PCGrad",
    "Priority",
    "RandomWeights",
    "SDMGrad",
    "Stateful",
    "StreamingMethod",
    "Sum",
    "UPGrad",
    "check_weights_of",
    "is_streaming",
    "method_for_one_call",
    "method_of",
    "remembers",
]

DEFAULT_METHOD = ConFIG()
"""What combines where no method is named."""
