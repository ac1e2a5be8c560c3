"""How far an answer is from ConFIG in float64, and from conflict. Shares no code with fastconfig."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def chunks(grads: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """(m, ≤ columns) in float64, 128 MiB at a time."""
    columns = max(1, (1 << 24) // len(grads))
    for start in range(0, grads.shape[1], columns):
        where = slice(start, start + columns)
        yield grads[:, where].double(), where


@dataclass(frozen=True)
class Truth:
    """ConFIG in float64 by Cholesky: the weights, and the gradients' norms."""

    weights: Tensor
    norms: Tensor

    @classmethod
    def of(cls, grads: Tensor) -> Truth:
        gramian = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=grads.device)
        for chunk, _ in chunks(grads):
            gramian += chunk @ chunk.T
        gramian = gramian.cpu()
        norms = gramian.diagonal().sqrt()
        unit = gramian / norms.outer(norms)
        solution = torch.cholesky_solve(torch.ones(len(grads), 1, dtype=torch.float64), torch.linalg.cholesky(unit))
        direction = solution.squeeze(1) / solution.sum().sqrt()
        weights = (norms @ (unit @ direction)) * direction / norms
        return cls(weights.to(grads.device), norms.to(grads.device))


def quality(answer: Tensor, grads: Tensor, truth: Truth) -> dict[str, float]:
    """Relative error against float64, and the least cosine with any gradient."""
    error = torch.zeros((), dtype=torch.float64, device=grads.device)
    right, square = error.clone(), error.clone()
    products = torch.zeros_like(truth.norms)
    for chunk, where in chunks(grads):
        got, wanted = answer[where].double(), truth.weights @ chunk
        error += (got - wanted).square().sum()
        right += wanted.square().sum()
        square += got.square().sum()
        products += chunk @ got
    cosines = products / truth.norms / square.sqrt()
    return {"error": float((error / right).sqrt()), "least_cosine": float(cosines.min())}
