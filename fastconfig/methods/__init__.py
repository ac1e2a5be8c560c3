"""One file a method: Gramian -> weights."""

from fastconfig.methods.base import Method
from fastconfig.methods.config import ConFIG

__all__ = ["ConFIG", "Method"]
