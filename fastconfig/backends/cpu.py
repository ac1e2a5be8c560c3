"""The compiled CPU backend: ``csrc/`` on the tensors' own memory, no copies. Meaning of each function: ``reference``."""

from __future__ import annotations

import torch  # noqa: F401  (first: it loads the OpenMP runtime that the core then shares)
from torch import Tensor

from fastconfig.backends import reference
from fastconfig.backends.rules import ConFIGRule
from fastconfig.validation import Rows


def available() -> str | None:
    """Why the compiled core cannot run here, or None where it can."""
    return "not built yet"

gramian=reference.gramian
apply=reference.apply
config_weights=reference.config_weights
config_combine=reference.config_combine
