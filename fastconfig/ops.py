"""The backends' functions as operators of torch, ``torch.ops.fastconfig``: the only place with schemas.

What traces a program (``torch.compile``, ``torch.export``, ``make_fx``, a FakeTensorMode) cannot look into a kernel
that reads addresses; it records these operators instead, and knows from their fakes what they return. Everything else
calls the backends directly: passing torch's dispatcher takes as long as a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastconfig import backends
from fastconfig.backends import Backend, reference
from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import ConFIGRule, GramianRule
from fastconfig.validation import check_out, check_rows

__all__ = ["Operators", "backend_for", "is_recorded", "is_traced"]

Implementation = TypeVar("Implementation", bound=Callable[..., Tensor | None])

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
"""Types whose memory a kernel may read by its address. A fake tensor outlives its mode, and its address is 0."""


def is_traced(tensor: Tensor | None, vectors: Sequence[Tensor] = (), out: Tensor | None = None) -> bool:
    """Whether the operators must stand for the kernels: somebody records the program, or a tensor may hold no memory.

    Args:
        tensor: a matrix that a kernel would read, if any.
        vectors: the vectors that it would read.
        out: what it would write, if it was given.
    """
    # This runs in front of calls of microseconds, so the questions are those that are answered quickest. Any other
    # tracer than dynamo is a dispatch mode.
    if is_dynamo_compiling() or (is_in_torch_dispatch_mode() and _is_in_a_mode()):
        return True
    if type(tensor) not in _PLAIN or type(out) not in _PLAIN:
        return True
    return bool(vectors) and not _PLAIN.issuperset(map(type, vectors))


def _is_in_a_mode() -> bool:
    """Whether there is a dispatch mode at this moment. What is quicker to ask says so for ever in PyTorch 2.4.

    There a mode that is entered within itself, as torch.compile does, leaves the answer behind.
    """
    return bool(torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch())


def is_recorded() -> bool:
    """Whether make_fx, or a torch.export that is not strict, records what runs."""
    # The newer get_proxy_mode looks into both places, this one in PyTorch 2.4 only into the first.
    before_dispatch = torch._ops._get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)
    return get_innermost_proxy_mode() is not None or before_dispatch is not None


def backend_for(device: torch.device, name: str | None, traced: bool) -> Backend:
    """The backend to call for tensors on ``device``: the module itself, or its operators where ``traced``.

    Args:
        device: where the gradients are.
        name: as in ``backends.select``.
        traced: what ``is_traced`` says of the tensors.

    Raises:
        ValueError, RuntimeError: as ``backends.select``; where traced, when the operator is recorded.
    """
    return Operators(name or backends.FORCED) if traced else backends.select(device, name)


class Operators:
    """A backend whose functions are the operators, for tensors that may hold no memory. It is not differentiable.

    Args:
        backend: "auto" or a backend's name: what the operators will run.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def available(self) -> str | None:
        """None: the operators exist everywhere."""
        return None

    def gramian(self, rows: Rows) -> Tensor:
        """As reference.gramian."""
        gramian: Tensor = torch.ops.fastconfig.gramian(_tensors_of(rows), self._backend)
        return gramian

    def apply(self, rows: Rows, weights: Tensor, out: Tensor) -> None:
        """As reference.apply."""
        torch.ops.fastconfig.apply(_tensors_of(rows), weights, out, self._backend)

    def graddrop(self, rows: Rows, leak: Tensor | None, seed: Tensor, column: int, out: Tensor) -> None:
        """As reference.graddrop."""
        torch.ops.fastconfig.graddrop(_tensors_of(rows), leak, seed, column, out, self._backend)

    def config_weights(self, gramian: Tensor, rule: ConFIGRule) -> Tensor:
        """As reference.config_weights, which is traced through for a callable length model: no schema can hold one."""
        if callable(rule.length):
            return reference.config_weights(gramian, rule)
        weights: Tensor = torch.ops.fastconfig.config_weights(gramian.detach(), *_encoded(rule), self._backend)
        return weights

    def config_combine(
        self,
        rows: Rows,
        rule: ConFIGRule,
        out: Tensor,
        gramian_out: Tensor | None = None,
        weights_out: Tensor | None = None,
    ) -> None:
        """As reference.config_combine. No callable length model."""
        torch.ops.fastconfig.config_combine(
            _tensors_of(rows), *_encoded(rule), out, gramian_out, weights_out, self._backend
        )

    def rule_weights(self, gramian: Tensor, rule: GramianRule, operand: Tensor | None) -> Tensor:
        """As reference.rule_weights."""
        weights: Tensor = torch.ops.fastconfig.rule_weights(
            gramian.detach(), rule.kind, rule.parameters, rule.preferences, rule.nonfinite, operand, self._backend
        )
        return weights

    def rule_combine(
        self,
        rows: Rows,
        rule: GramianRule,
        operand: Tensor | None,
        out: Tensor,
        gramian_out: Tensor | None = None,
        weights_out: Tensor | None = None,
    ) -> None:
        """As reference.rule_combine, in three operators."""
        reference.combine_in_steps(
            self.gramian,
            lambda gramian: self.rule_weights(gramian, rule, operand),
            self.apply,
            rows,
            out,
            gramian_out,
            weights_out,
        )


class _Encoded(NamedTuple):
    """A ConFIGRule in the types that a schema knows: a tracked loss is the length "tracked" and its index."""

    direction: Sequence[float] | None
    length: str
    tracked: int
    rtol: float
    nonfinite: str


def _encoded(rule: ConFIGRule) -> _Encoded:
    if isinstance(rule.length, int):
        return _Encoded(rule.direction, "tracked", rule.length, rule.rtol, rule.nonfinite)
    return _Encoded(rule.direction, str(rule.length), 0, rule.rtol, rule.nonfinite)


@lru_cache(maxsize=256)
def _decoded(direction: tuple[float, ...] | None, length: str, tracked: int, rtol: float, nonfinite: str) -> ConFIGRule:
    return ConFIGRule(direction, tracked if length == "tracked" else length, rtol, nonfinite)


@lru_cache(maxsize=256)
def _rule_of(
    kind: str, parameters: tuple[float, ...], preferences: tuple[float, ...] | None, nonfinite: str
) -> GramianRule:
    """The same object every time: backends keep on it what they copied to a device."""
    return GramianRule(kind, parameters, preferences, nonfinite)


def _tensors_of(rows: Rows) -> list[Tensor]:
    """The rows as an operator takes them: one matrix, or m vectors."""
    return [tensor.detach() for tensor in (rows.vectors if rows.matrix is None else (rows.matrix,))]


def _checked_rows(tensors: Sequence[Tensor]) -> Rows:
    """What ``_tensors_of`` took apart; contiguous again where a compiler chose other strides."""
    return check_rows(tensors[0] if tensors[0].dim() == 2 else tensors)


def _check_float64(tensor: Tensor | None, name: str, shape: tuple[int, ...]) -> None:
    """Kernels read and write by address: nothing else would notice another shape, dtype or order."""
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != torch.float64 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous float64 tensor of shape {shape}, "
            f"got {tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )


_LIBRARY = torch.library.Library("fastconfig", "DEF")
_TAGS: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,)
if hasattr(torch.Tag, "cudagraph_unsafe"):
    # mode="reduce-overhead" would run the kernels with memory that it takes back, and their workspaces would stay.
    _TAGS += (torch.Tag.cudagraph_unsafe,)
_RULE = "float[]? direction, str length, int tracked, float rtol, str nonfinite"
_BACKEND = 'str backend="auto"'


def _operator(schema: str, fake: Callable[..., Tensor | None]) -> Callable[[Implementation], Implementation]:
    """Define an operator: its schema, what it returns where there is no memory, and (decorated) what it does.

    One implementation serves every device, as the choice of a backend is that of an eager call.
    """

    def define(implementation: Implementation) -> Implementation:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastconfig::{name}", fake, lib=_LIBRARY)
        return implementation

    return define


def _check_named(backend: str, device: torch.device) -> None:
    """Raise while tracing where an eager call would. "auto" always runs, and of its device only a fake may be here."""
    if backend != "auto":
        backends.select(device, backend)


def _fake_gramian(rows: Sequence[Tensor], backend: str = "auto") -> Tensor:
    _check_named(backend, rows[0].device)
    m = len(rows[0]) if rows[0].dim() == 2 else len(rows)
    return rows[0].new_empty((m, m), dtype=torch.float64)


@_operator(f"gramian(Tensor[] rows, {_BACKEND}) -> Tensor", _fake_gramian)
def _gramian(rows: Sequence[Tensor], backend: str = "auto") -> Tensor:
    return backends.select(rows[0].device, backend).gramian(_checked_rows(rows))


def _fake_apply(rows: Sequence[Tensor], weights: Tensor, out: Tensor, backend: str = "auto") -> None:
    _check_named(backend, rows[0].device)


@_operator(f"apply(Tensor[] rows, Tensor weights, Tensor(a!) out, {_BACKEND}) -> ()", _fake_apply)
def _apply(rows: Sequence[Tensor], weights: Tensor, out: Tensor, backend: str = "auto") -> None:
    checked = _checked_rows(rows)
    check_out(out, rows, checked)
    weights = weights.contiguous()  # what a method returned: rightly of any strides
    _check_float64(weights, "weights", (checked.m,))
    backends.select(checked.device, backend).apply(checked, weights, out)
    torch.autograd.graph.increment_version(out)


def _fake_graddrop(
    rows: Sequence[Tensor], leak: Tensor | None, seed: Tensor, column: int, out: Tensor, backend: str = "auto"
) -> None:
    _check_named(backend, rows[0].device)


@_operator(
    f"graddrop(Tensor[] rows, Tensor? leak, Tensor seed, SymInt column, Tensor(a!) out, {_BACKEND}) -> ()",
    _fake_graddrop,
)
def _graddrop(
    rows: Sequence[Tensor], leak: Tensor | None, seed: Tensor, column: int, out: Tensor, backend: str = "auto"
) -> None:
    checked = _checked_rows(rows)
    check_out(out, rows, checked)
    _check_float64(leak, "leak", (checked.m,))
    if seed.shape != (1,) or seed.dtype != torch.int64:
        raise ValueError(f"seed must be an int64 tensor of one element, got {seed.dtype}, shape {tuple(seed.shape)}")
    if column < 0:
        raise ValueError(f"column must be the number of a column, from 0 on, got {column}")
    backends.select(checked.device, backend).graddrop(checked, leak, seed, column, out)
    torch.autograd.graph.increment_version(out)


def _fake_config_weights(
    gramian: Tensor,
    direction: Sequence[float] | None,
    length: str,
    tracked: int,
    rtol: float,
    nonfinite: str,
    backend: str = "auto",
) -> Tensor:
    _check_named(backend, gramian.device)
    return gramian.new_empty((len(gramian),), dtype=torch.float64)


@_operator(f"config_weights(Tensor gramian, {_RULE}, {_BACKEND}) -> Tensor", _fake_config_weights)
def _config_weights(
    gramian: Tensor,
    direction: Sequence[float] | None,
    length: str,
    tracked: int,
    rtol: float,
    nonfinite: str,
    backend: str = "auto",
) -> Tensor:
    rule = _decoded(None if direction is None else tuple(direction), length, tracked, rtol, nonfinite)
    gramian = gramian.contiguous()
    _check_float64(gramian, "gramian", (len(gramian), len(gramian)))
    rule.check_losses(len(gramian))
    return backends.select(gramian.device, backend).config_weights(gramian, rule)


def _fake_config_combine(
    rows: Sequence[Tensor],
    direction: Sequence[float] | None,
    length: str,
    tracked: int,
    rtol: float,
    nonfinite: str,
    out: Tensor,
    gramian: Tensor | None,
    weights: Tensor | None,
    backend: str = "auto",
) -> None:
    _check_named(backend, rows[0].device)


@_operator(
    f"config_combine(Tensor[] rows, {_RULE}, Tensor(a!) out, Tensor(b!)? gramian, Tensor(c!)? weights, {_BACKEND})"
    " -> ()",
    _fake_config_combine,
)
def _config_combine(
    rows: Sequence[Tensor],
    direction: Sequence[float] | None,
    length: str,
    tracked: int,
    rtol: float,
    nonfinite: str,
    out: Tensor,
    gramian: Tensor | None,
    weights: Tensor | None,
    backend: str = "auto",
) -> None:
    checked = _checked_rows(rows)
    check_out(out, rows, checked)
    _check_float64(gramian, "gramian", (checked.m, checked.m))
    _check_float64(weights, "weights", (checked.m,))
    rule = _decoded(None if direction is None else tuple(direction), length, tracked, rtol, nonfinite)
    rule.check_losses(checked.m)
    backends.select(checked.device, backend).config_combine(checked, rule, out, gramian, weights)
    # Operators defined by a schema do not do it by themselves; autograd may have saved what was overwritten.
    for tensor in (out, gramian, weights):
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)


def _fake_rule_weights(
    gramian: Tensor,
    kind: str,
    parameters: Sequence[float],
    preferences: Sequence[float] | None,
    nonfinite: str,
    operand: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    _check_named(backend, gramian.device)
    return gramian.new_empty((len(gramian),), dtype=torch.float64)


@_operator(
    "rule_weights(Tensor gramian, str kind, float[] parameters, float[]? preferences, str nonfinite, "
    f"Tensor(a!)? operand, {_BACKEND}) -> Tensor",
    _fake_rule_weights,
)
def _rule_weights(
    gramian: Tensor,
    kind: str,
    parameters: Sequence[float],
    preferences: Sequence[float] | None,
    nonfinite: str,
    operand: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    rule = _rule_of(kind, tuple(parameters), None if preferences is None else tuple(preferences), nonfinite)
    gramian = gramian.contiguous()
    _check_float64(gramian, "gramian", (len(gramian), len(gramian)))
    rule.check_losses(len(gramian))
    if operand is None and kind in ("gradvac", "sdmgrad"):
        raise ValueError(f"operand must be given for {kind}, got None; call the method's weights instead")
    _check_float64(operand, "operand", rule.operand_shape(len(gramian)))
    if operand is not None:
        torch.autograd.graph.increment_version(operand)
    return backends.select(gramian.device, backend).rule_weights(gramian, rule, operand)
