"""The same functions, once a backend, and the choice between them.

A backend is a module with ``available``, ``gramian``, ``apply``, ``config_weights`` and ``config_combine``, as
``reference`` defines them.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from fastconfig.backends import cpu, reference
from fastconfig.backends.rules import ConFIGRule
from fastconfig.rows import Rows

__all__ = ["BACKENDS", "Backend", "select"]


class Backend(Protocol):
    """What every backend module provides; the meaning of each function is in ``reference``."""

    def available(self) -> str | None:
        """Why it cannot run here, or None where it can."""

    def gramian(self, rows: Rows) -> Tensor:
        """K = G Gᵀ, (m, m) float64."""

    def apply(self, rows: Rows, weights: Tensor, out: Tensor) -> None:
        """Write Σ c_i g_i to ``out`` (n,)."""

    def config_weights(self, gramian: Tensor, rule: ConFIGRule) -> Tensor:
        """ConFIG's c, (m,) float64, from K."""

    def config_combine(
        self,
        rows: Rows,
        rule: ConFIGRule,
        out: Tensor,
        gramian_out: Tensor | None = None,
        weights_out: Tensor | None = None,
    ) -> None:
        """All of it; K and c are kept where tensors for them are given."""


BACKENDS: dict[str, Backend] = {"reference": reference, "cpu": cpu}
DEVICE_TYPES = {"cpu": "cpu"}
"""Which device type a compiled backend drives; ``reference`` runs on every one."""

FORCED = os.environ.get("FASTCONFIG_BACKEND") or "auto"


def select(device: torch.device, name: str | None = None) -> Backend:
    """The backend for tensors on ``device``.

    Args:
        device: where the gradients are.
        name: "auto", or a backend's name; None reads FASTCONFIG_BACKEND as it stood at import (default "auto").

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run here, or not on this device.
    """
    name = name or FORCED
    if name == "auto":
        return _AUTO.get(device.type, reference)
    if name not in BACKENDS:
        raise ValueError(f"backend must be auto, {' or '.join(BACKENDS)}, got {name!r}")
    backend = BACKENDS[name]
    reason = backend.available()
    if reason is None and DEVICE_TYPES.get(name, device.type) != device.type:
        reason = f"it does not drive {device.type} tensors"
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}; use 'auto' or 'reference'")
    return backend


_AUTO: dict[str, Backend] = {
    device_type: BACKENDS[name] for name, device_type in DEVICE_TYPES.items() if BACKENDS[name].available() is None
}
