"""The state of an MConFIG as a checkpoint holds it: checked as a whole before any of it is taken over."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastconfig.backends.moments import Ledger

IN_GROUP = "shared"
"""Under which name the first parameter group of a state holds what belongs to no parameter."""

OPTIONS = {"lr", "betas", "eps", "weight_decay", "maximize"}
"""Of a parameter group; schedulers put more there."""


class PackedState(NamedTuple):
    """A checked checkpoint."""

    parameters: dict[int, dict[str, Tensor]]
    """What it holds of each parameter, by the position among those that the optimizer trains."""
    shared: dict[str, Any]


def packed_state(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    trained: Sequence[Tensor],
    num_losses: int,
) -> PackedState:
    """What of a ``state_dict`` belongs to which of the trained parameters.

    Raises:
        TypeError: not the state of an MConFIG.
        ValueError: of other losses or parameters.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        found = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise TypeError(
            f"state_dict must be what MConFIG.state_dict() returned, with state, param_groups and shared, got {found}"
        )
    if "shared" in state_dict:
        shared = _checked_shared(state_dict["shared"], num_losses)
    else:
        shared = _checked_shared(_shared_of(state_dict["param_groups"]), num_losses)
    saved = [group["params"] for group in state_dict["param_groups"]]
    ours = [group["params"] for group in groups]
    if list(map(len, saved)) != list(map(len, ours)):
        raise ValueError(
            f"state_dict has parameter groups of {list(map(len, saved))} parameters, this optimizer of "
            f"{list(map(len, ours))}"
        )
    for i, theirs in enumerate(state_dict["param_groups"]):
        if missing := sorted(OPTIONS - theirs.keys()):
            raise ValueError(f"state_dict's parameter group {i} lacks {', '.join(missing)}; it holds {sorted(theirs)}")
    position = {id(parameter): i for i, parameter in enumerate(trained)}
    parameters = {}
    for ids, group in zip(saved, ours, strict=True):
        for key, parameter in zip(ids, group, strict=True):
            if state_dict["state"].get(key):
                if id(parameter) not in position:
                    raise ValueError(
                        f"state_dict holds averages of parameter {key}, shape {tuple(parameter.shape)}, which needed "
                        "no gradient when this optimizer was made; make one after requires_grad_()"
                    )
                parameters[position[id(parameter)]] = _checked(state_dict["state"][key], key, parameter, num_losses)
    return PackedState(parameters, shared)


def in_group(shared: Mapping[str, Any], losses_per_step: int) -> dict[str, Any]:
    """What belongs to no parameter, in the form in which a parameter group holds it.

    Torch's distributed checkpoints keep of an optimizer nothing but state and parameter groups, and read tensors into
    those that are there, so these are of a size that does not change.
    """
    selection, generator = shared["selection"], shared["selection"]["generator"]
    round_of = [*selection["round"], *[-1] * losses_per_step][:losses_per_step]
    return {
        "num_losses": shared["num_losses"],
        **{name: shared[name] for name in Ledger._fields},
        "cursor": selection["cursor"],
        "round": torch.tensor(round_of, dtype=torch.int64),
        "drawn": torch.tensor(selection["drawn"], dtype=torch.int64),
        "generator": generator,
        "method": _as_text(shared["method"]),  # of any size and kind: what is no tensor is kept as it is
    }


def _shared_of(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The inverse of ``in_group``."""
    packed = groups[0].get(IN_GROUP) if groups else None
    if not isinstance(packed, Mapping):
        raise TypeError(
            "state_dict must be what MConFIG.state_dict() returned, and lacks shared, which holds what belongs to no "
            "parameter; of torch.distributed.checkpoint's options leave flatten_optimizer_state_dict out"
        )
    return {
        **{name: packed[name] for name in ("num_losses", *Ledger._fields) if name in packed},
        "selection": {
            "cursor": packed["cursor"],
            "round": [loss for loss in packed["round"].tolist() if loss >= 0],
            "drawn": packed["drawn"].tolist(),
            "generator": packed["generator"],
        },
        "method": torch.load(
            io.BytesIO(base64.b64decode(packed["method"])), weights_only=True
        ),  # a checkpoint may be anybody's
    }


def _as_text(value: object) -> str:
    file = io.BytesIO()
    torch.save(value, file)
    return base64.b64encode(file.getvalue()).decode()  # PyTorch 2.4 reads no bytes with weights_only=True


def _checked_shared(shared: Mapping[str, Any], num_losses: int) -> dict[str, Any]:
    needed = ("num_losses", *Ledger._fields, "selection")
    if not isinstance(shared, Mapping) or not shared.keys() >= set(needed):
        found = sorted(shared) if isinstance(shared, Mapping) else type(shared).__name__
        raise TypeError(f"state_dict's shared must hold {', '.join(needed)}, got {found}")
    if shared["num_losses"] != num_losses:
        raise ValueError(f"state_dict is of num_losses={shared['num_losses']}, this optimizer of {num_losses}")
    for name, wanted in Ledger.zeros(num_losses, torch.device("meta"))._asdict().items():
        value = shared[name]
        if value.shape != wanted.shape:
            raise ValueError(f"state_dict's {name} must have shape {tuple(wanted.shape)}, got {tuple(value.shape)}")
        if value.device.type == "meta":
            raise ValueError(f"state_dict's {name} is on the meta device and holds no numbers")
    return {"method": None, **shared}  # checkpoints of before there were methods with a state lack it


def _checked(state: Mapping[str, Tensor], key: object, parameter: Tensor, num_losses: int) -> dict[str, Tensor]:
    shapes = {"exp_avgs": (num_losses, *parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
    if state.keys() != shapes.keys():
        raise TypeError(f"state_dict's parameter {key} must hold {', '.join(shapes)}, got {sorted(state)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"state_dict's {name} of parameter {key} has shape {tuple(state[name].shape)}, the parameter here "
                f"needs {shape}; load it into a model of the same shapes"
            )
        if state[name].device.type == "meta":
            raise ValueError(f"state_dict's {name} of parameter {key} is on the meta device and holds no numbers")
    return dict(state)


@torch.no_grad()
def copy_state(
    packed: PackedState, state: Mapping[Tensor, Mapping[str, Tensor]], trained: Sequence[Tensor], ledger: Ledger
) -> None:
    """Copy a checked checkpoint into the views of ``state`` and into the ledger."""
    for i, values in packed.parameters.items():
        for name, value in values.items():
            state[trained[i]][name].copy_(value)
    for name, value in ledger._asdict().items():
        value.copy_(packed.shared[name])
