"""Which processes train a model together, told from what the user gave, and what brings their gradients together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from fastconfig.gradients.local import is_sharded
from fastconfig.gradients.ranks import Ranks, is_group, world

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Sync: TypeAlias = "Literal['auto'] | ProcessGroup | None"
"""``"auto"``: told from the parameters; a group: of replicas, to be averaged; None: every process for itself."""


def ranks_of(
    module: Module | None, parameters: Sequence[Tensor], sync: Sync, group: ProcessGroup | None, owner: str
) -> Ranks | None:
    """The ranks among which the columns of a model are divided, or copied; None where a process trains alone.

    Args:
        module: the module that was given, if one was.
        parameters: those that are trained.
        sync: as the buffer's.
        group: those ranks, as the user says; None to tell them from the parameters.
        owner: the class that errors name.

    Raises:
        RuntimeError: there are several processes, and nothing says how the gradients of plain parameters meet.
        ValueError: DTensors on a mesh that has no group of its own; ``sync`` or ``group`` are something else.
    """
    if is_group(sync):
        _check_replicas(module, parameters, group)
        return None if torch.distributed.get_world_size(sync) == 1 else Ranks(sync)
    if sync not in ("auto", None):
        raise ValueError(f"sync must be 'auto', a process group or None, got {sync!r}")
    everyone = world()
    if everyone is None or sync is None:
        return None
    found = group if group is not None else _group_of_meshes(parameters) or _group_of_ddp(module, parameters)
    if found is None:
        raise RuntimeError(
            f"{torch.distributed.get_world_size()} processes train, and this {owner} was given plain parameters, so "
            "each would combine its own gradients and go its own way. Give it the module that is wrapped in "
            "DistributedDataParallel or made of DTensors by fully_shard, or group= where the gradients of parameters "
            "named alike are already equal on all ranks, or sync=group, which averages them; or say sync=None where "
            "every process trains for itself"
        )
    ranks = Ranks(found)
    return None if ranks.count == 1 else ranks


class Solitude:
    """Whether a process that trains alone still does: others may have been initialised since.

    Args:
        owner: the class that errors name.
        sync: as the buffer's; where it is not ``"auto"``, the user has said.
    """

    def __init__(self, owner: str, sync: Sync) -> None:
        self._owner = owner
        self._began_alone = sync == "auto" and world() is None

    def check(self, call: str) -> None:
        """RuntimeError where torch.distributed was initialised after the owner was made."""
        if self._began_alone and world() is not None:
            raise RuntimeError(
                f"{call}: torch.distributed runs several processes now and did not when this {self._owner} was made, "
                f"so this rank would go its own way; make the {self._owner} after init_process_group"
            )


def _check_replicas(module: Module | None, parameters: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """ValueError where somebody else averages the gradients."""
    if group is not None:
        raise ValueError("sync and group were both given; sync= is for plain replicas, and names their group")
    if any(map(is_sharded, parameters)):
        raise ValueError("sync= is for plain replicas, and some parameters are DTensors, which need no word; leave it")
    if ddp_modules(module):
        raise ValueError(
            "sync= was given with a module within DistributedDataParallel, which averages gradients itself; leave out "
            "one of both"
        )


def _group_of_meshes(parameters: Sequence[Tensor]) -> ProcessGroup | None:
    """That of all ranks over which DTensors lie."""
    meshes = {parameter.device_mesh for parameter in parameters if is_sharded(parameter)}
    if not meshes:
        return None
    members = [frozenset(mesh.mesh.flatten().tolist()) for mesh in meshes]
    everyone = frozenset(torch.distributed.get_process_group_ranks(torch.distributed.group.WORLD))
    if everyone in members:
        return torch.distributed.group.WORLD
    largest = max(meshes, key=lambda mesh: mesh.mesh.numel())
    if largest.mesh.dim() == 1 and all(some <= frozenset(largest.mesh.tolist()) for some in members):
        found: ProcessGroup = largest.get_group()
        return found
    raise ValueError(
        f"the DTensors lie on meshes of {sorted(map(sorted, members))}, which are not all processes and have no group "
        "of their own; give group=, a process group of all ranks that hold a part of this model"
    )


def _group_of_ddp(module: Module | None, parameters: Sequence[Tensor]) -> ProcessGroup | None:
    wrapped = ddp_modules(module)
    if not wrapped:
        return None
    inside = {id(parameter) for ddp in wrapped for parameter in ddp.parameters()}
    outside = [parameter for parameter in parameters if id(parameter) not in inside]
    if outside:
        raise RuntimeError(
            f"{len(outside)} parameters, the first of shape {tuple(outside[0].shape)}, are in no "
            "DistributedDataParallel, so nothing averages their gradients over the ranks; wrap them, or leave them out"
        )
    found: ProcessGroup = wrapped[0].process_group
    return found


def ddp_modules(module: Module | None) -> list[DistributedDataParallel]:
    """Those within a module."""
    return [part for part in module.modules() if isinstance(part, DistributedDataParallel)] if module else []


def identities_of(local: Sequence[Module | Tensor]) -> set[int]:
    """Of the parameters in modules, or given as such."""
    given = [list(part.parameters()) if isinstance(part, Module) else [part] for part in local]
    return {id(parameter) for parameters in given for parameter in parameters}


class Wrappers:
    """The DistributedDataParallel and FSDP2 modules that average a model's gradients, and how they want to be used.

    DistributedDataParallel averages once a forward pass: a second backward pass through one forward pass it leaves
    local, silently. FSDP2 may be told to keep gradients local, where those of different losses would be added up.

    Args:
        module: what may hold such modules; None where parameters alone were given, of which nothing is known.
    """

    def __init__(self, module: Module | None) -> None:
        self._ddp = ddp_modules(module)
        self._fsdp = [part for part in module.modules() if hasattr(part, "_get_fsdp_state")] if module else []
        self._are_any = bool(self._ddp or self._fsdp)  # most models have none, and pay no more than this question
        self._is_fresh = True
        self._held: list[Any] = []
        handles = [part.register_forward_pre_hook(_noting(weakref.ref(self))) for part in self._ddp]
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def check_tensors(self, losses: Sequence[object]) -> None:
        """ValueError where several losses are given as tensors, which were made before the first is backpropagated."""
        count = sum(isinstance(loss, Tensor) for loss in losses) if self._ddp else 0
        if count > 1:
            raise ValueError(
                f"{count} losses were given as tensors, and DistributedDataParallel averages the gradients of one "
                "backward pass after a forward pass, so those of the others would stay local; give callables that "
                "each run the model, as buf.backward([lambda: loss(model(x)), ...])"
            )

    def check_open(self, call: str) -> None:
        """RuntimeError where gradients are to stay local."""
        if not self._are_any:
            return
        if any(not part.require_backward_grad_sync for part in self._ddp):
            raise RuntimeError(
                f"{call} inside no_sync(): DistributedDataParallel would leave these gradients local; record outside "
                "of it, and add up micro-batches by accumulate=True"
            )
        if any(not group.reduce_grads for group in self._param_groups()):
            raise RuntimeError(
                f"{call} after set_requires_gradient_sync(False): FSDP would add up the gradients of different losses; "
                "leave it on, and add up micro-batches by accumulate=True"
            )

    def check_close(self, call: str, is_reached: bool) -> None:
        """RuntimeError where a gradient came of a forward pass that had already been backpropagated."""
        if not self._ddp or not is_reached:
            return
        if not self._is_fresh:
            raise RuntimeError(
                f"{call} backpropagated a forward pass of DistributedDataParallel for the second time, so these "
                "gradients were not averaged over the ranks; run the model once for every loss"
            )
        self._is_fresh = False

    def note_forward(self) -> None:
        """The model runs."""
        self._is_fresh = self._is_fresh or torch.is_grad_enabled()

    def hold(self) -> None:
        """Keep parameters gathered over several losses' backward passes, until ``release``.

        Those that FSDP keeps from forward to backward pass, so that there is memory for them; else they are gathered
        for every loss, as FSDP was told.
        """
        if not self._fsdp:
            return
        self._held = [
            group
            for group in self._param_groups()
            if group.reshard_after_backward and getattr(group, "post_forward_mesh_info", group) is None
        ]
        for group in self._held:
            group.reshard_after_backward = False

    def release(self) -> None:
        """The last loss is about to be backpropagated, or none will."""
        for group in self._held:
            group.reshard_after_backward = True
        self._held = []

    def _param_groups(self) -> list[Any]:
        """FSDP2's own groups of parameters, one a wrapped module or several; older versions have one."""
        states = [cast(Any, part)._get_fsdp_state() for part in self._fsdp]
        groups = [getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] for state in states]
        return [group for some in groups for group in some if group is not None]


def _noting(reference: weakref.ref[Wrappers]) -> Callable[[Module, object], None]:
    def note(module: Module, inputs: object) -> None:
        del module, inputs
        wrappers = reference()
        if wrappers is not None:
            wrappers.note_forward()

    return note
