"""The same functions, once a backend, and the choice between them.

A backend is a module with ``available``, ``gramian``, ``apply``, ``graddrop``, and ``config_weights``,
``config_combine``, ``rule_weights`` and ``rule_combine``, as ``reference`` defines them.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from fastconfig.backends import cpu, reference, triton
from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import ConFIGRule, GramianRule

__all__ = ["BACKENDS", "Backend", "select"]


class Backend(Protocol):
    """What every backend module provides; the meaning of each function is in ``reference``."""

    def available(self) -> str | None:
        """Why it cannot run here, or None where it can."""

    def gramian(self, rows: Rows) -> Tensor:
        """K = G Gᵀ, (m, m) float64."""

    def apply(self, rows: Rows, weights: Tensor, out: Tensor) -> None:
        """Write Σ c_i g_i to ``out`` (n,)."""

    def graddrop(self, rows: Rows, leak: Tensor | None, seed: Tensor, column: int, out: Tensor) -> None:
        """Write GradDrop's combination to ``out`` (n,)."""

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

    def rule_weights(self, gramian: Tensor, rule: GramianRule, operand: Tensor | None) -> Tensor:
        """Another method's c, (m,) float64, from K."""

    def rule_combine(
        self,
        rows: Rows,
        rule: GramianRule,
        operand: Tensor | None,
        out: Tensor,
        gramian_out: Tensor | None = None,
        weights_out: Tensor | None = None,
    ) -> None:
        """All of it by another method."""


BACKENDS: dict[str, Backend] = {"reference": reference, "cpu": cpu, "triton": triton}
DEVICE_TYPES = {"cpu": "cpu", "triton": "cuda"}
"""Which device type a compiled backend drives, ROCm's being "cuda", too; ``reference`` runs on every one."""

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
        return _automatic(device)
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    reason = _reason_against(name, device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}; use 'auto' or 'reference'")
    return BACKENDS[name]


@lru_cache(maxsize=64)
def _automatic(device: torch.device) -> Backend:
    """The compiled backend that drives the device, else the reference, with a warning where that is a pity."""
    for name, device_type in DEVICE_TYPES.items():
        if device_type == device.type:
            reason = _reason_against(name, device)
            if reason is None:
                return BACKENDS[name]
            if name == "triton":  # the CPU's backend warns for itself, and only where it was built and does not load
                warnings.warn(f"fastconfig runs its slow reference on {device}: {reason}", stacklevel=5)
    return reference


def _reason_against(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on tensors of this device, or None where it can."""
    reason = BACKENDS[name].available()
    if reason is None and name == "triton":
        return triton.drives(device)
    if reason is None and DEVICE_TYPES.get(name, device.type) != device.type:
        return f"it does not drive {device.type} tensors"
    return reason
