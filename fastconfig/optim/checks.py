"""What an MConFIG accepts: each error names the argument, the value and the remedy."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastconfig.gradients.parameters import is_dense
from fastconfig.methods import ConFIG, GramianMethod, Method, check_weights_of


def check_count(name: str, value: int) -> None:
    """TypeError unless it is an integer, ValueError unless it is positive."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def checked_method(method: object, num_losses: int) -> Method:
    """The method; TypeError where it is none, ValueError where it is for another number of losses."""
    checked = check_weights_of(method)
    if isinstance(checked, (ConFIG, GramianMethod)):
        checked.rule.check_losses(num_losses)
    return checked


def checked_norm(name: str, value: float | None) -> float | None:
    """A limit on a norm; ValueError unless it is a number above 0 or None."""
    if value is not None and not (isinstance(value, (int, float)) and value > 0):
        raise ValueError(f"{name} must be a number above 0 or None, got {value!r}")
    return value


def check_group(group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError where a parameter group's options cannot be."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(f"lr must be a number or a real tensor of one element, got shape {tuple(lr.shape)}")
    else:
        _check_number("lr", lr)
    for name in ("eps", "weight_decay"):
        _check_number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if isinstance(beta, bool) or not isinstance(beta, (int, float)):
            raise TypeError(f"betas[{i}] must be a number, got {beta!r}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must lie in [0, 1), got {beta}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def check_parameter(parameter: Tensor, index: int) -> None:
    """Raise ValueError where a step could not write to a parameter's memory in order."""
    if not is_dense(parameter):
        raise ValueError(
            f"parameter {index}, shape {tuple(parameter.shape)}, has strides {parameter.stride()} that leave gaps or "
            "overlap; make it contiguous first"
        )
