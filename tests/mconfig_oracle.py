"""M-ConFIG by numpy in float64, as the issue writes it down: shares no code with the package, and stores f_{t-1}."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import oracle
import torch
from torch import Tensor

import fastconfig as fc


def config(averages: np.ndarray) -> np.ndarray:
    """ConFIG of the averages (m, n) by the singular value decomposition of the unit rows."""
    return oracle.config(averages).value


def mean(averages: np.ndarray) -> np.ndarray:
    return averages.mean(axis=0)


class Oracle:
    """The moments over all columns of all parameters, flattened and joined in their order."""

    def __init__(
        self,
        m: int,
        n: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        combine: Callable[[np.ndarray], np.ndarray] = config,
        max_norm: float = np.inf,
        max_update_norm: float = np.inf,
    ) -> None:
        self.betas, self.eps, self.combine = betas, eps, combine
        self.max_norm, self.max_update_norm = max_norm, max_update_norm
        self.first, self.second, self.f = np.zeros((m, n)), np.zeros(n), np.zeros(n)
        self.counts, self.t = np.zeros(m), 0

    def step(
        self,
        theta: np.ndarray,
        gradients: dict[int, np.ndarray],
        lr: np.ndarray | float,
        weight_decay: np.ndarray | float = 0.0,
        sign: np.ndarray | float = 1.0,
        updated: np.ndarray | None = None,
    ) -> np.ndarray:
        """θ after the step; ``lr``, ``weight_decay``, ``sign`` and ``updated`` for each column, or for all."""
        if not all(np.isfinite(gradient).all() for gradient in gradients.values()):
            return theta
        beta1, beta2 = self.betas
        for i, gradient in gradients.items():
            norm = np.linalg.norm(gradient)
            clipped = gradient * min(1.0, self.max_norm / norm) if norm > 0 else gradient
            self.counts[i] += 1
            self.first[i] = beta1 * self.first[i] + (1 - beta1) * clipped
        if not self.counts.all():
            return theta
        self.t += 1
        updated = np.ones(len(theta), dtype=bool) if updated is None else updated
        unbiased = self.first / (1 - beta1**self.counts)[:, None]
        combined = self.combine(unbiased)
        f = combined * (1 - beta1**self.t)
        pseudo = (f - beta1 * self.f) / (1 - beta1)
        self.f = f
        self.second = np.where(updated, beta2 * self.second + (1 - beta2) * pseudo**2, self.second)
        update = np.where(updated, combined / (np.sqrt(self.second / (1 - beta2**self.t)) + self.eps), 0.0)
        norm = np.linalg.norm(update)
        if norm > self.max_update_norm:
            update = update * (self.max_update_norm / norm)
        return np.where(updated, theta - lr * weight_decay * theta - sign * lr * update, theta)


def joined(tensors: Sequence[Tensor]) -> np.ndarray:
    """The values in float64, one after the other, each in the order of its indices."""
    return np.concatenate([np.zeros(0), *(tensor.detach().double().numpy().ravel() for tensor in tensors)])


def push(
    optimizer: fc.optim.MConFIG, loss: int, gradients: dict[Tensor, Tensor], scaler: torch.amp.GradScaler | None = None
) -> None:
    """Record exactly these gradients, each in its parameter's dtype; other parameters are not reached."""
    with optimizer.record(loss):
        total = sum((parameter * gradient).sum() for parameter, gradient in gradients.items())
        assert isinstance(total, Tensor)
        (total if scaler is None else scaler.scale(total)).backward()


def random_like(parameters: Sequence[Tensor], generator: torch.Generator, scale: float = 1.0) -> dict[Tensor, Tensor]:
    """A gradient for each."""
    return {
        parameter: (scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(parameter.dtype)
        for parameter in parameters
    }


def parameters_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def assert_near(parameters: Sequence[Tensor], theta: np.ndarray, tolerance: float) -> None:
    """Within ``tolerance`` of each value's own size, or of 1 where that is smaller."""
    found = joined(parameters)
    error = np.abs(found - theta)
    assert (error <= tolerance * np.maximum(1.0, np.abs(theta))).all(), error.max()
