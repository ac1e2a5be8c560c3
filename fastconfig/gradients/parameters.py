"""Which parameters gradients are of: what a user gave, checked, and whether it is still what it was."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Module

from fastconfig.gradients.local import local_of
from fastconfig.validation import FLOAT_DTYPES, REAL_OF_COMPLEX

Parameters = Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
"""A module, or as from ``model.parameters()``, or pairs as from ``model.named_parameters()``."""


class Source:
    """What a user gave as parameters, remembered, so that a change in it is noticed.

    Args:
        parameters: a module, tensors, or pairs of name and tensor.

    Attributes:
        module: the module, where one was given.
        tensors: all that was given, those that need no gradient included.
        names: by identity; None where they have none.

    Raises:
        TypeError: some are pairs and some are not.
        ValueError: two of one name.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.module = parameters if isinstance(parameters, Module) else None
        self.tensors, self.names = _with_names(parameters)
        self._watched: list[Mapping[str, object]] | None = None
        self._held: list[object] = []  # alive: else another object may get the identity of one that is gone
        self._identities: list[int] = []
        self._look()

    def now(self) -> tuple[list[Tensor], dict[int, str] | None]:
        """The module's parameters and their names as they are now; what else was given cannot have changed."""
        return (self.tensors, self.names) if self.module is None else _with_names(self.module)

    def read_again(self) -> None:
        """Take the module's parameters as they are now."""
        self.tensors, self.names = self.now()
        self._look()

    def resting_but(self, trained: Collection[int]) -> list[Tensor]:
        """Those given whose identity is not among the trained."""
        return [tensor for tensor in self.tensors if id(tensor) not in trained]

    def belongs_to(self, module: Module | None) -> None:
        """Be of a module that may still be under construction, as in a copy: what it is made of is seen when asked."""
        self.module = module
        self._watched = None

    def has_other_modules(self) -> bool:
        """Whether a module or parameter within the module is not the object that it was: the quick question."""
        if self._watched is None:
            self._look()
            return False
        return [id(value) for values in self._watched for value in values.values()] != self._identities

    def label(self, tensor: Tensor) -> str:
        """How an error calls a parameter: by its name, or by its place."""
        if self.names is not None and id(tensor) in self.names:
            return f"parameter {self.names[id(tensor)]!r}"
        place = next((i for i, given in enumerate(self.tensors) if given is tensor), None)
        return "a parameter" if place is None else f"parameters[{place}]"

    def _look(self) -> None:
        modules = list(self.module.modules()) if self.module is not None else []
        watched: list[Mapping[str, object]] = [
            values for module in modules for values in (module._parameters, module._modules)
        ]
        self._watched = watched
        self._held = [value for values in watched for value in values.values()]
        self._identities = list(map(id, self._held))


class Watch:
    """Whether the parameters that rows or averages were made for are still all that there are to train.

    Args:
        source: what the user gave.
        trained: those of them that were taken.
        owner: the class that errors name.
    """

    def __init__(self, source: Source, trained: Sequence[Tensor], owner: str) -> None:
        self._source = source
        self._trained = frozenset(map(id, trained))
        self._resting = source.resting_but(self._trained)
        self._owner = owner

    def check(self, call: str) -> None:
        """Raise RuntimeError where a parameter needs a gradient that has no column: unfrozen, or new in the module.

        Asked once a step: some 40 ns a module and a frozen parameter.
        """
        if any(tensor.requires_grad for tensor in self._resting):
            unfrozen = next(tensor for tensor in self._resting if tensor.requires_grad)
            raise RuntimeError(
                f"{call}: {self._source.label(unfrozen)}, shape {tuple(unfrozen.shape)}, requires a gradient now and "
                f"did not when the {self._owner} was made, so it is not trained with the others; call refresh() after "
                "requires_grad_() to take it in"
            )
        if self._source.has_other_modules():
            self._check_module(call)

    def _check_module(self, call: str) -> None:
        before = set((self._source.names or {}).values())
        tensors, names = self._source.now()
        for tensor in tensors:
            if tensor.requires_grad and id(tensor) not in self._trained:
                name = (names or {})[id(tensor)]
                raise RuntimeError(
                    f"{call}: parameter {name!r}, shape {tuple(tensor.shape)}, "
                    f"{'was replaced' if name in before else 'is new in the module'} after the {self._owner} was made, "
                    "so it is not trained with the others; call refresh() after such a change"
                )
        self._source.read_again()
        self._resting = self._source.resting_but(self._trained)


class Made(NamedTuple):
    """What a parameter was when rows were made for it: its storage must stay the one that views were shaped for."""

    address: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    @classmethod
    def of(cls, parameter: Tensor, address: int) -> Made:
        """As it is now, but for the address, which is given: no compiler can ask for one."""
        return cls(address, parameter.dtype, parameter.device, parameter.shape)

    def changes(self, now: Made) -> str:
        """What is no longer so, in words."""
        told = [
            f"{name} was {_plain(was)}, is {_plain(value)}"
            for name, was, value in zip(self._fields[1:], self[1:], now[1:], strict=True)
            if was != value
        ]
        return ", ".join(told) or f"its memory lies elsewhere, {self.dtype} on {self.device} as before"


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _with_names(parameters: Parameters) -> tuple[list[Tensor], dict[int, str] | None]:
    """The parameters of a module, of pairs or as they are, otherwise unchecked; and their names by identity."""
    if isinstance(parameters, Module):
        parameters = parameters.named_parameters()
    elif isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters must be a module or an iterable of tensors, got one {type(parameters).__name__}; pass "
            "model.parameters()"
        )
    given = list(parameters)
    pairs = [item for item in given if _is_pair(item)]
    if not pairs:
        return cast("list[Tensor]", given), None
    if len(pairs) < len(given):
        named = 2 * len(pairs) >= len(given)  # then the odd one is a tensor
        i, odd = next((i, item) for i, item in enumerate(given) if _is_pair(item) != named)
        raise TypeError(
            f"parameters[{i}] is a {type(odd).__name__} among {'(name, tensor) pairs' if named else 'tensors'}; give "
            "every parameter a name, as in [*model.named_parameters(), ('nu', nu)], or none"
        )
    owners: dict[str, int] = {}
    for name, parameter in cast("list[tuple[str, Tensor]]", pairs):
        if owners.setdefault(name, id(parameter)) != id(parameter):
            raise ValueError(
                f"parameters must have a name each, got {name!r} for two; prefix those of a second model, as "
                "model.named_parameters(prefix='head') does"
            )
    names: dict[int, str] = {}
    for name, identity in owners.items():
        names.setdefault(identity, name)
    return [parameter for _, parameter in cast("list[tuple[str, Tensor]]", pairs)], names


def _is_pair(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The distinct parameters that need a gradient, checked.

    Raises:
        TypeError: not dense floating-point or complex tensors.
        ValueError: none that needs a gradient; a non-leaf or uninitialised one.
    """
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters must be an iterable of tensors, got one {type(parameters).__name__}; pass model.parameters()"
        )
    distinct: dict[int, Tensor] = {}
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(parameter).__name__}")
        if parameter.requires_grad:
            _check_trained(parameter, i)
            distinct.setdefault(id(parameter), parameter)
    if not distinct:
        raise ValueError("there are no parameters to train: none was given that requires a gradient")
    return list(distinct.values())


def _check_trained(parameter: Tensor, index: int) -> None:
    if torch.nn.parameter.is_lazy(parameter):
        raise ValueError(f"parameters[{index}] is not initialised yet; run the model once first")
    if not parameter.is_leaf:
        raise ValueError(
            f"parameters[{index}] is not a leaf: it has no .grad of its own; pass the parameter it is from"
        )
    if parameter.layout is not torch.strided or parameter.dtype not in (*FLOAT_DTYPES, *REAL_OF_COMPLEX):
        raise TypeError(
            f"parameters[{index}] must be a dense float32, float64, bfloat16, float16 or complex tensor, got "
            f"{parameter.dtype}, layout {parameter.layout}"
        )


def check_in_memory(parameters: Iterable[Tensor]) -> None:
    """ValueError where one that needs a gradient is on the meta device."""
    for i, parameter in enumerate(parameters):
        if parameter.requires_grad and parameter.device.type == "meta":
            raise ValueError(
                f"parameters[{i}], shape {tuple(parameter.shape)}, is on the meta device and has no memory; pass the "
                "parameters after model.to_empty(device=...) and their initialisation"
            )


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Of a parameter's ``.grad``: its own, or the ``grad_dtype`` that newer PyTorch lets it have.

    Where that is None, a gradient may be of any dtype: float32 then holds those of 16 bits, too.
    """
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", parameter.dtype)
    if dtype is None:
        return torch.promote_types(parameter.dtype, torch.float32)
    return dtype


def by_kind(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters grouped by device and by their gradients' dtype, in order of first appearance."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, gradient_dtype(parameter)), []).append(parameter)
    return list(groups.values())


def columns_of(parameter: Tensor) -> int:
    """How many columns a parameter takes on this rank: its elements here, two for a complex one."""
    return local_of(parameter).numel() * elements_to_columns(parameter)


def elements_to_columns(parameter: Tensor) -> int:
    """How many columns an element takes: a complex number two."""
    return 2 if parameter.is_complex() else 1


def shaped_like(parameter: Tensor, flat: Tensor) -> Tensor:
    """``flat`` (..., columns) with the parameter's shape last, and its strides where they are dense.

    The shape is that of the part that lies on this rank. So optimizers take their fast path, and what lies in memory in
    one order is added up in one order.
    """
    if parameter.is_complex():
        flat = torch.view_as_complex(flat.unflatten(-1, (-1, 2)))
    parameter = local_of(parameter)
    leading = flat.dim() - 1
    return flat.as_strided(
        (*flat.shape[:leading], *parameter.shape), (*flat.stride()[:leading], *_dense_strides(parameter))
    )


def is_dense(parameter: Tensor) -> bool:
    """Whether a parameter's elements fill a run of memory, in any order of its dimensions."""
    parameter = local_of(parameter)
    strides = zip(parameter.shape, parameter.stride(), _dense_strides(parameter), strict=True)
    return parameter.numel() == 0 or all(size == 1 or ours == dense for size, ours, dense in strides)


def memory_of(parameter: Tensor) -> Tensor:
    """The memory of a dense parameter as a (columns,) real vector, in the order of its columns in a segment."""
    here = local_of(parameter)
    flat = here.detach().as_strided((here.numel(),), (1,))
    return torch.view_as_real(flat).flatten() if flat.is_complex() else flat


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's strides where they are dense and do not overlap, else those that it would have if they were."""
    return torch.empty_like(parameter, device="meta").stride()
