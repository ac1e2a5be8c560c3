"""The combination itself, Gramian -> weights -> combined gradient, over one or several segments, and its record."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from typing import Protocol, cast

import torch
from torch import Tensor

from fastconfig.backends import Backend, cpu
from fastconfig.backends.rows import Rows
from fastconfig.gradients.losses import Losses
from fastconfig.methods import (
    DEFAULT_METHOD,
    ConFIG,
    GramianMethod,
    Method,
    StreamingMethod,
    check_weights_of,
    is_streaming,
    method_for_one_call,
)
from fastconfig.ops import backend_for, is_traced
from fastconfig.validation import check_method_weights

Run = tuple[int, int, int]
"""Columns: of which segment, the first, and the last but not with it."""


class Scaler(Protocol):
    """What a combination asks of a ``torch.amp.GradScaler``."""

    def scale(self, outputs: Tensor, /) -> Tensor:
        """The tensor times the scale, on its device."""


def scale_of(scaler: Scaler | None, device: torch.device) -> Tensor | None:
    """By what a scaler has multiplied the losses, 0-d float64; None without one."""
    return None if scaler is None else scaler.scale(torch.ones((), dtype=torch.float64, device=device))


def overflow_of(gramian: Tensor) -> Tensor:
    """0-d: 0, or NaN where a row is not finite, to be left where a scaler looks: a method may have dropped the row."""
    return torch.where(torch.isfinite(gramian.diagonal()).all(), 0.0, torch.nan)


def checked_method(method: Method | StreamingMethod | str | None, num_losses: int) -> Method | StreamingMethod:
    """The method of one call over m losses, ``ConFIG()`` where none is named.

    Raises:
        TypeError: no method.
        ValueError: no such name, or one that remembers; preferences for another number of losses.
    """
    if isinstance(method, str):
        return method_for_one_call(method, num_losses)
    method = DEFAULT_METHOD if method is None else method
    if isinstance(method, GramianMethod) or type(method) is ConFIG:
        method.rule.check_losses(num_losses)
    elif not is_streaming(method):
        check_weights_of(method)
    return method


def rtol_of(method: Method | StreamingMethod) -> float:
    """Under which share of the largest an eigenvalue of the cosines counts as zero, for the record."""
    return (method if isinstance(method, ConFIG) else DEFAULT_METHOD).rule.rtol


def combine_rows(
    backend: Backend,
    rows: Rows,
    method: Method | StreamingMethod,
    out: Tensor,
    gramian_out: Tensor | None = None,
    weights_out: Tensor | None = None,
) -> None:
    """Combine validated rows into ``out`` (n,), and keep K (m, m) and c (m,) where tensors for them are given.

    A streaming method has no c: it is kept as NaN.
    """
    if type(method) is ConFIG and not callable(method.rule.length):
        method.rule.check_losses(rows.m)
        backend.config_combine(rows, method.rule, out, gramian_out, weights_out)
        return
    if isinstance(method, GramianMethod) and method.is_fused:
        method.rule.check_losses(rows.m)
        backend.rule_combine(rows, method.rule, method.operand(rows.m, rows.device), out, gramian_out, weights_out)
        return
    if is_streaming(method):
        gramian = None if gramian_out is None else backend.gramian(rows)
        method.combine_rows([(backend, rows, out)])
        if gramian_out is not None and gramian is not None:
            gramian_out.copy_(gramian)
        if weights_out is not None:
            weights_out.fill_(torch.nan)
        return
    gramian = backend.gramian(rows)
    weights = check_method_weights(weights_of(method, gramian), gramian, method)
    backend.apply(rows, weights, out)
    if gramian_out is not None:
        gramian_out.copy_(gramian)
    if weights_out is not None:
        weights_out.copy_(weights)


def combine_segments(
    segments: Sequence[tuple[Rows, Tensor]],
    method: Method | StreamingMethod,
    gramian: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
) -> None:
    """Combine segments of columns as one problem: the Gramian is additive over columns, the weights are shared.

    Args:
        segments: for each, its rows and its (n_segment,) output. Dtypes and devices may differ between segments.
        method: the rule from the summed Gramian to the weights, or the streaming method.
        gramian: (m, m) float64, overwritten with K, on the device where the method is to run.
        weights: (m,) float64, overwritten with c, on the same device; NaN by a streaming method, which has none.
        scale: 0-d float64 there, by which the rows are larger than the gradients: K is the gradients', and so is c; the
            output stays as much larger. None for 1.
    """
    if len(segments) == 1 and scale is None:
        rows, out = segments[0]
        combine_rows(_backend_of(rows, out), rows, method, out, gramian, weights)
        return
    gramian.zero_()
    for rows, out in segments:
        gramian += _backend_of(rows, out).gramian(rows).to(gramian.device)
    if scale is not None:
        gramian /= scale.square()
    if is_streaming(method):
        method.combine_rows([(_backend_of(rows, out), rows, out) for rows, out in segments])
        weights.fill_(torch.nan)
        return
    weights.copy_(check_method_weights(weights_of(method, gramian), gramian, method))
    for rows, out in segments:
        _backend_of(rows, out).apply(rows, weights.to(rows.device), out)


def combine_parts(
    segments: Sequence[tuple[Rows, Tensor]],
    parts: Sequence[Sequence[Run]],
    methods: Sequence[Method],
    gramians: Tensor,
    weights: Tensor,
    scale: Tensor | None,
) -> None:
    """Combine the parts of a model each by its own Gramian.

    Args:
        segments: as in ``combine_segments``.
        parts: of each, its runs of columns.
        methods: of each.
        gramians: (P, m, m) float64, contiguous, overwritten with K of each, on the device where the methods are to run.
        weights: (P, m) float64, contiguous, overwritten with c of each, on the same device.
        scale: as in ``combine_segments``.

    Raises:
        What a method does, before anything has been written to an output.
    """
    if len(segments) == 1 and scale is None and all(len(runs) == 1 for runs in parts):
        ((rows, out),) = segments
        different = {id(method): method for method in methods}.values()
        if _backend_of(rows, out) is cpu and all(map(_is_native, different)):
            rules = {id(method): cast(ConFIG, method).rule for method in different}
            columns = [(first, last) for ((_, first, last),) in parts]
            own = [(rules[id(method)], _operand_of(method, rows)) for method in methods]
            cpu.combine_parts(rows, columns, own, out, gramians, weights)
            return
    cut = [[(segments[s][0].columns(first, last), segments[s][1][first:last]) for s, first, last in p] for p in parts]
    gramians.zero_()
    for runs, gramian in zip(cut, gramians.unbind(), strict=True):
        for rows, out in runs:
            gramian += _backend_of(rows, out).gramian(rows).to(gramian.device)
    if scale is not None:
        gramians /= scale.square()
    for method, gramian, found in zip(methods, gramians.unbind(), weights.unbind(), strict=True):
        found.copy_(check_method_weights(weights_of(method, gramian), gramian, method))
    for runs, found in zip(cut, weights.unbind(), strict=True):
        for rows, out in runs:
            _backend_of(rows, out).apply(rows, found.to(rows.device), out)


def _is_native(method: Method) -> bool:
    """Whether the core knows a method whole, and it cannot raise once another has updated what it remembers."""
    if type(method) is ConFIG or (isinstance(method, GramianMethod) and method.is_fused):
        return not may_raise(method)
    return False


def _operand_of(method: Method, rows: Rows) -> Tensor | None:
    """What a native method's rule takes besides the Gramian."""
    return method.operand(rows.m, rows.device) if isinstance(method, GramianMethod) else None


def may_raise(method: Method) -> bool:
    """Whether to ask a method may fail: a user's rule, or one that raises on gradients that are not finite."""
    if isinstance(method, (ConFIG, GramianMethod)):
        return method.rule.nonfinite == "raise" or (isinstance(method, ConFIG) and callable(method.rule.length))
    return True


def _backend_of(rows: Rows, out: Tensor) -> Backend:
    return backend_for(rows.device, None, is_traced(rows.matrix, rows.vectors, out))


def weights_of(method: object, gramian: Tensor) -> object:
    """What a method answers, unchecked. TypeError where it has no weights to answer with."""
    return check_weights_of(method).weights(gramian)


class Combination:
    """What one combination was made of. Everything derived is computed when read, so a step pays for none of it.

    Attributes:
        gramian: (m, m) float64, K_ij = g_i · g_j.
        weights: (m,) float64, the coefficients c of Σ c_i g_i; NaN where there are none: of GradDrop, and of a model
            that was combined part by part.
        rtol: under which share of the largest an eigenvalue of the cosines counts as zero.
        names: the m losses' names; "0", "1" ... where they have none.
        absent: the indices of losses that had no labels in this step. Their rows were zero and took no part: norm and
            weight are 0, here; a monitor shows a gap.

    Args:
        gramian: as above.
        weights: as above.
        rtol: as above.
        losses: how the losses are called.
        absent: as above.
        parts: the names of the model's parts, each combined by its own Gramian, (P, m, m) and (P, m) their K and c.
    """

    def __init__(
        self,
        gramian: Tensor,
        weights: Tensor,
        rtol: float,
        losses: Losses | None = None,
        absent: Sequence[int] = (),
        parts: tuple[Sequence[str], Tensor, Tensor] | None = None,
    ) -> None:
        self.gramian = gramian
        self.weights = weights
        self.rtol = rtol
        self._losses = Losses(len(weights)) if losses is None else losses
        self.names = self._losses.names
        self.absent = tuple(absent)
        self._parts = parts

    @cached_property
    def parts(self) -> dict[str, Combination]:
        """What each part of the model was combined by, by its name, of ``combine(by=...)``; else empty.

        The whole then has the sum of the parts' Gramians, and NaN for weights, as there are none for all of it.
        """
        if self._parts is None:
            return {}
        names, gramians, weights = self._parts
        return {
            name: Combination(gramian, found, self.rtol, self._losses, self.absent)
            for name, gramian, found in zip(names, gramians.unbind(), weights.unbind(), strict=True)
        }

    @cached_property
    def _directed(self) -> Tensor:
        """(m,) bool: which gradients have a direction, being neither zero nor non-finite."""
        squares = self.gramian.diagonal()
        return torch.isfinite(squares) & (squares > 0)

    @cached_property
    def norms(self) -> Tensor:
        """(m,) float64: the gradients' norms |g_i|."""
        return self.gramian.diagonal().sqrt()

    @cached_property
    def cosines(self) -> Tensor:
        """(m, m) float64: cosines between the gradients, 0 with a zero or non-finite one; else 1 on the diagonal."""
        pairs = self._directed.unsqueeze(0) & self._directed.unsqueeze(1)
        inverse = torch.where(self._directed, 1.0 / self.norms, 0.0)
        cosines = torch.where(pairs, self.gramian, 0.0) * inverse.unsqueeze(0) * inverse.unsqueeze(1)
        return cosines.clamp(-1.0, 1.0).diagonal_scatter(self._directed.to(cosines.dtype))

    @cached_property
    def rank(self) -> int:
        """How many independent directions the finite gradients span: eigenvalues of the cosines over rtol·λ_max.

        Reading it waits for the device.
        """
        eigenvalues = torch.linalg.eigvalsh(self.cosines)
        return int((eigenvalues > self.rtol * eigenvalues[-1].clamp(min=0.0)).sum())

    def __repr__(self) -> str:
        """Four significant digits, the most conflicting pairs first. Reading it waits for the device."""
        names = [f"losses={list(self.names)}"] if self._losses.named else []
        parts = [
            *names,
            f"weights={self._listed(self.weights)}",
            f"norms={self._listed(self.norms)}",
            f"cosines={self._listed_cosines()}",
            f"rank={self.rank}",
        ]
        return f"Combination({', '.join(parts)})"

    def _listed(self, values: Tensor) -> str:
        told = ("absent" if i in self.absent else f"{value:.4g}" for i, value in enumerate(values.tolist()))
        return f"[{', '.join(told)}]"

    def _listed_cosines(self) -> str:
        cosines, directed = self.cosines.tolist(), self._directed.tolist()
        pairs = [pair for pair in combinations(range(len(directed)), 2) if directed[pair[0]] and directed[pair[1]]]
        pairs.sort(key=lambda pair: cosines[pair[0]][pair[1]])
        told = [f"{self.names[i]}·{self.names[j]}: {cosines[i][j]:.4g}" for i, j in pairs[:_MOST_PAIRS]]
        more = len(pairs) - len(told)
        return "{" + ", ".join(told) + (f", {more} more" if more else "") + "}"


_MOST_PAIRS = 6
"""Of cosines in a repr."""
