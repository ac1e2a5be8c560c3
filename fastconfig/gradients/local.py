"""A rank's own part of a parameter and of its gradient: of a DTensor what lies here, of any other tensor all of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs


_TENSOR = "torch.distributed._tensor" if torch.__version__.startswith("2.4.") else "torch.distributed.tensor"
"""Where DTensors are defined: a module that takes long to import, and that nobody imports who has none."""


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether it is a DTensor, as FSDP2's and tensor parallel parameters are."""
    module = sys.modules.get(_TENSOR)  # not imported: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank, in the memory in which it lies: the tensor itself where it is no DTensor."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def local_gradient(grad: Tensor, parameter: Tensor) -> Tensor:
    """What of a parameter's gradient belongs to this rank's part of the parameter.

    A gradient that autograd left as a sum over ranks yet to be made (``Partial``), or laid out in another way, is
    brought to the parameter's own placements: a collective call, which every rank of its mesh makes in the same order.
    """
    if not is_sharded(grad):
        return grad
    if is_sharded(parameter) and grad.placements != parameter.placements:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return grad.to_local()


def like_parameter(local: Tensor, parameter: Tensor, leading: int = 0) -> Tensor:
    """A tensor of the shape of this rank's part as what may stand as ``p.grad``: a DTensor over the same memory.

    Args:
        local: (..., of the shape of this rank's part).
        parameter: the parameter.
        leading: how many dimensions stand before the parameter's; each rank has all of them.
    """
    if not is_sharded(parameter):
        return local
    shape = (*local.shape[:leading], *parameter.shape)
    sharded: Tensor = import_module(_TENSOR).DTensor.from_local(
        local,
        parameter.device_mesh,
        [_shifted(placement, leading) for placement in parameter.placements],
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(math.prod(shape[d + 1 :]) for d in range(len(shape))),
    )
    return sharded


def _shifted(placement: Placement, dimensions: int) -> Placement:
    """The same over a tensor with so many dimensions more in front."""
    dim = getattr(placement, "dim", None)
    if dimensions == 0 or dim is None:  # of a replica there is none
        return placement
    split = getattr(placement, "split_factor", None)  # what FSDP2 over tensor parallelism has beside the dimension
    kind: Any = type(placement)
    moved: Placement = kind(dim + dimensions) if split is None else kind(dim + dimensions, split_factor=split)
    return moved


def shard_of(parameter: Tensor) -> tuple[object, ...]:
    """Which part of a parameter lies here: equal on ranks that hold the same one; empty where that is all of it.

    For each axis of its mesh over which it is sharded: how, by how many, and this rank's coordinate.
    """
    if not is_sharded(parameter):
        return ()
    mesh = parameter.device_mesh
    coordinates = mesh.get_coordinate() or ()
    axes = zip(parameter.placements, mesh.shape, coordinates, strict=True)
    return tuple((str(placement), size, place) for placement, size, place in axes if not placement.is_replicate())


def runs_of(parameter: Tensor) -> Iterator[tuple[int, int]]:
    """Where this rank's elements stand among all of the parameter's, as runs of (first element, how many), in order."""
    if not is_sharded(parameter):
        yield 0, parameter.numel()
        return
    place = import_module(f"{_TENSOR}._utils").compute_local_shape_and_global_offset
    shape, offsets = place(parameter.shape, parameter.device_mesh, parameter.placements)
    if 0 in shape:
        return
    whole = parameter.shape
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    cut = max((d for d in range(len(whole)) if shape[d] != whole[d]), default=0)
    outer = (range(offset, offset + size) for offset, size in zip(offsets[:cut], shape[:cut], strict=True))
    start = offsets[cut] * strides[cut] if whole else 0
    for index in product(*outer):
        yield start + sum(i * stride for i, stride in zip(index, strides, strict=False)), math.prod(shape[cut:])
