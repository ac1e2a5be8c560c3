"""Weightings of the losses themselves: ``total = weighting(losses)``, one backward pass, no gradient matrix."""

from fastconfig.weightings.base import Weighting
from fastconfig.weightings.dynamic_weight_average import DynamicWeightAverage
from fastconfig.weightings.famo import FAMO
from fastconfig.weightings.geometric_mean import GeometricMean
from fastconfig.weightings.gradnorm import GradNorm
from fastconfig.weightings.learning_rate_annealing import LearningRateAnnealing
from fastconfig.weightings.relobralo import ReLoBRaLo
from fastconfig.weightings.softadapt import SoftAdapt
from fastconfig.weightings.uncertainty import UncertaintyWeighting

__all__ = [
    "FAMO",
    "DynamicWeightAverage",
    "GeometricMean",
    "GradNorm",
    "LearningRateAnnealing",
    "ReLoBRaLo",
    "SoftAdapt",
    "UncertaintyWeighting",
    "Weighting",
]
