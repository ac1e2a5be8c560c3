"""Sizes of the losses' gradients with respect to parameters they share, for weightings that balance these."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_sizes(
    losses: Sequence[Tensor], names: Sequence[str], shared: Sequence[Tensor], orders: Sequence[float]
) -> Tensor:
    """Norms of each loss's gradient over all parameters together; the graph is retained, and no ``.grad`` written.

    Args:
        losses: m of them, 0-d, of one graph or several.
        names: m, for errors.
        shared: parameters, as from ``parameters.trained``; where a loss does not depend on one, its gradient is zero.
        orders: of each norm, as in ``torch.linalg.vector_norm``: 1, 2 or inf.

    Returns:
        (len(orders), m) float64, on the device of the losses.

    Raises:
        ValueError: a loss that does not require grad.
    """
    for loss, name in zip(losses, names, strict=True):
        if not loss.requires_grad:
            raise ValueError(
                f"loss {name} does not require grad, so it has no gradient to balance; compute it from the parameters, "
                "outside torch.no_grad()"
            )
    return torch.stack([_norms(loss, shared, orders) for loss in losses], dim=1)


def _norms(loss: Tensor, shared: Sequence[Tensor], orders: Sequence[float]) -> Tensor:
    """(len(orders),) norms of one loss's gradient, in float64, where a float32 square would overflow."""
    gradients = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        return torch.zeros(len(orders), dtype=torch.float64, device=loss.device)
    return torch.stack([_norm_of_all(reached, order, loss.device) for order in orders])


def _norm_of_all(gradients: Sequence[Tensor], order: float, device: torch.device) -> Tensor:
    """0-d: the norm of their norms, which is that of the whole."""
    return _norm(torch.stack([_norm(gradient, order).to(device) for gradient in gradients]), order)


def _norm(gradient: Tensor, order: float) -> Tensor:
    wide = torch.complex128 if gradient.is_complex() else torch.float64
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    norm: Tensor = torch.linalg.vector_norm(dense, order, dtype=wide)
    return norm
