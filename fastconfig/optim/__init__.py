"""Optimizers that train on several losses."""

from fastconfig.optim.mconfig import MConFIG
from fastconfig.optim.selection import Selection

__all__ = ["MConFIG", "Selection"]
