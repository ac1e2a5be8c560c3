"""What is timed of the methods: each one's combination, ConFIG's beside it, torchjd's version where there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchjd.aggregation as jd
from contenders import Call, Shape
from torch import Tensor

import fastconfig as fc
from fastconfig.methods.catalogue import CATALOGUE

METHOD_SHAPES = [Shape(3, 10_000), Shape(3, 10_000_000), Shape(40, 10_000), Shape(40, 250_000)]

TORCHJD: dict[str, Callable[[int], jd.Aggregator]] = {
    "config": lambda m: jd.ConFIG(),
    "sum": lambda m: jd.Sum(),
    "mean": lambda m: jd.Mean(),
    "constant": lambda m: jd.Constant(torch.ones(m)),
    "randomweights": lambda m: jd.Random(),
    "pcgrad": lambda m: jd.PCGrad(),
    "gradvac": lambda m: jd.GradVac(),
    "graddrop": lambda m: jd.GradDrop(),
    "mgda": lambda m: jd.MGDA(),
    "cagrad": lambda m: jd.CAGrad(0.5),
    "sdmgrad": lambda m: jd.GramianWeightedAggregator(jd.SDMGradWeighting()),
    "dualproj": lambda m: jd.DualProj(),
    "upgrad": lambda m: jd.UPGrad(),
    "imtlg": lambda m: jd.IMTLG(),
    "nashmtl": lambda m: jd.NashMTL(n_tasks=m),
    "fairgrad": lambda m: jd.FairGrad(alpha=1.0),
    "alignedmtl": lambda m: jd.AlignedMTL(),
    "crmogm": lambda m: jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.MGDAWeighting())),
}
"""torchjd's version of a method of the catalogue; it has none of the others."""


def combination(name: str, grads: Tensor) -> Call:
    """fc.combine by a method of the catalogue, with ``out=``."""
    method = CATALOGUE[name].make(len(grads))
    out = torch.empty(grads.shape[1], dtype=grads.dtype)
    return lambda: fc.combine(grads, method, out=out)


def rival(name: str, grads: Tensor) -> Call | None:
    """torchjd's version, if there is one."""
    if name not in TORCHJD:
        return None
    aggregator = TORCHJD[name](len(grads))
    return lambda: aggregator(grads)
