"""Adam on the m weights themselves, as tensors in and out: torch's optimizer holds state that no buffer can be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What Adam remembers."""

    first: Tensor
    """(m,) moving average of the gradient."""
    second: Tensor
    """(m,) moving average of its square."""
    updates: Tensor
    """0-d int64, how many there were."""

    @staticmethod
    def zeros(m: int) -> Moments:
        """Of no update, in float64."""
        zeros = torch.zeros(m, dtype=torch.float64)
        return Moments(zeros, zeros.clone(), torch.zeros((), dtype=torch.int64))


def adam(gradient: Tensor, moments: Moments, lr: float) -> tuple[Tensor, Moments]:
    """One step: what to add to the parameters, (m,), and the new moments.

    Source: Kingma & Ba 2015, algorithm 1, with its β₁ = 0.9, β₂ = 0.999, ε = 1e-8.
    """
    updates = moments.updates + 1
    first = torch.lerp(gradient, moments.first, 0.9)
    second = torch.lerp(gradient.square(), moments.second, 0.999)
    mean = first / (1.0 - 0.9 ** updates.double())  # an int64 power would be float32
    root = (second / (1.0 - 0.999 ** updates.double())).sqrt()
    return -lr * mean / (root + 1e-8), Moments(first, second, updates)
