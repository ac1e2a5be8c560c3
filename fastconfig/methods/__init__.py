"""One file a method: Gramian -> weights."""

from fastconfig.methods.base import Method
from fastconfig.methods.config import ConFIG

__all__ = ["DEFAULT_METHOD", "ConFIG", "Method"]

DEFAULT_METHOD = ConFIG()
"""What combines where no method is named."""
