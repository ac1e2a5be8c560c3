"""Gradients of several losses in one vectorised backward pass, which land by one copy a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastconfig.gradients.graph import leaves_of
from fastconfig.gradients.landing import GradientRows, Place
from fastconfig.gradients.local import is_sharded
from fastconfig.gradients.losses import Loss


def checked_chunk(batched: bool | int | None, losses: Sequence[Loss], parameters: Sequence[Tensor], alone: bool) -> int:
    """How many losses to backpropagate in one pass; 0 for each in a pass of its own.

    Args:
        batched: as in ``GradientBuffer.backward``.
        losses: in order.
        parameters: of the buffer.
        alone: whether one process trains.

    Raises:
        TypeError, ValueError: as there.
    """
    if batched is None or batched is False:
        return 0
    if not isinstance(batched, int):
        raise TypeError(f"batched must be True, a number of losses or None, got {batched!r}")
    if batched < 1:
        raise ValueError(f"batched must be at least 1, or None for a pass a loss, got {batched}")
    if not alone or any(map(is_sharded, parameters)):
        raise ValueError(
            f"batched={batched} is of models in one process: ranks bring gradients together in every backward pass; "
            "leave it out"
        )
    for i, loss in enumerate(losses):
        if loss is not None and not isinstance(loss, Tensor):
            raise ValueError(
                f"losses[{i}] must be a tensor with batched={batched}, as losses are backpropagated together, got "
                f"{loss!r}; call it, or leave batched out"
            )
    return len(losses) if batched is True else batched


def gradients_in_batches(
    rows: GradientRows[Place], losses: Mapping[int, Tensor], adds: Sequence[bool], chunk: int, retain_graph: bool
) -> None:
    """Bring the losses' gradients into their rows; leaves outside of these accumulate the losses' sum, in one pass.

    Args:
        rows: the rows.
        losses: by row.
        adds: of every row, whether to add to what it holds.
        chunk: how many losses a pass takes.
        retain_graph: whether to keep the graph.

    Raises:
        RuntimeError: what ``torch.vmap`` cannot do; the rows are in no order then.
    """
    outside = [GradientEdge(node, 0) for node, leaf in leaves_of(list(losses.values())).items() if not rows.has(leaf)]
    trained = [i for i, parameter in enumerate(rows.parameters) if parameter.requires_grad]
    waiting = iter(losses)
    left = len(losses)
    while some := list(islice(waiting, chunk)):
        left -= len(some)
        found = _vectorised(
            [losses[i] for i in some], [rows.parameters[i] for i in trained], retain_graph or left > 0 or bool(outside)
        )
        grads: list[Tensor | None] = [None] * len(rows.parameters)
        for i, grad in zip(trained, found, strict=True):
            grads[i] = grad
        rows.put(some, grads, [adds[i] for i in some])
    if outside:
        given = list(losses.values())
        torch.autograd.backward(given, list(map(torch.ones_like, given)), retain_graph=retain_graph, inputs=outside)


def _vectorised(losses: Sequence[Tensor], parameters: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
    """For each parameter, the gradients (k, *shape) of k losses; None where none reaches it."""
    k = len(losses)
    seeds = []
    for i, loss in enumerate(losses):
        seed = torch.zeros(k, *loss.shape, dtype=loss.dtype, device=loss.device)
        seed[i] = 1
        seeds.append(seed)
    try:
        return torch.autograd.grad(
            losses, parameters, seeds, retain_graph=retain_graph, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"{k} losses could not be backpropagated in one batched pass: {error}. Leave batched out, or where memory "
            "is short give a smaller number of losses a pass"
        ) from error
