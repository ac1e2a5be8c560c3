"""The compiled CPU backend: ``csrc/`` on the tensors' own memory. What each function means stands in ``reference``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch  # first: it loads the OpenMP runtime that the core then shares
from torch import Tensor

from fastconfig.backends import reference
from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import ConFIGRule, GramianRule, NonFiniteError, Rule

try:
    from fastconfig import _core
except ImportError as error:
    _IMPORT_ERROR = str(error)
    if any(Path(__file__).parent.parent.glob("_core*.so")):  # built, but not for this Python or without its libraries
        warnings.warn(f"fastconfig's compiled core does not load, the slow reference runs: {error}", stacklevel=2)
else:
    _IMPORT_ERROR = ""
    DTYPES = {
        torch.float32: _core.DType.float32,
        torch.float64: _core.DType.float64,
        torch.bfloat16: _core.DType.bfloat16,
        torch.float16: _core.DType.float16,
    }
    if os.environ.get("FASTCONFIG_ISA"):
        _core.use_tier(os.environ["FASTCONFIG_ISA"])


def available() -> str | None:
    """Why the compiled core cannot run here, or None where it can."""
    return f"the compiled core could not be imported ({_IMPORT_ERROR})" if _IMPORT_ERROR else None


def tiers() -> list[str]:
    """The ISA tiers this machine can run, weakest first."""
    return list(_core.tiers())


def active_tier() -> str:
    """The ISA tier in use: the strongest, or the one FASTCONFIG_ISA or ``use_tier`` forced."""
    return str(_core.active_tier())


def use_tier(name: str) -> None:
    """Force an ISA tier for the whole process. ValueError where this machine cannot run it."""
    _core.use_tier(name)


def advise_huge_pages(address: int, size: int) -> bool:
    """Ask the operating system for huge pages in a block of ``size`` bytes; whether it will."""
    return bool(_core.advise_huge_pages(address, size))


def gramian(rows: Rows) -> Tensor:
    """As reference.gramian, in one pass over the rows."""
    result = torch.empty(rows.m, rows.m, dtype=torch.float64, device=rows.device)
    _core.gramian(_addresses(rows), rows.n, DTYPES[rows.dtype], result.data_ptr(), torch.get_num_threads())
    return result


def apply(rows: Rows, weights: Tensor, out: Tensor) -> None:
    """As reference.apply, in one pass over the rows of non-zero weight, each output written once."""
    weights = weights.to(torch.float64).contiguous()
    _core.apply(
        _addresses(rows),
        rows.n,
        DTYPES[rows.dtype],
        weights.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def graddrop(rows: Rows, leak: Tensor | None, seed: Tensor, column: int, out: Tensor) -> None:
    """As reference.graddrop, in one pass over the rows, each output written once."""
    if leak is not None:
        leak = leak.to(torch.float64).contiguous()
    _core.graddrop(
        _addresses(rows),
        rows.n,
        DTYPES[rows.dtype],
        0 if leak is None else leak.data_ptr(),
        seed.data_ptr(),
        column,
        out.data_ptr(),
        torch.get_num_threads(),
    )


def config_weights(gramian: Tensor, rule: ConFIGRule) -> Tensor:
    """As reference.config_weights; a callable length model runs there."""
    if callable(rule.length):
        return reference.config_weights(gramian, rule)
    return _weights(gramian, rule, None)


def rule_weights(gramian: Tensor, rule: GramianRule, operand: Tensor | None) -> Tensor:
    """As reference.rule_weights."""
    return _weights(gramian, rule, operand)


def _weights(gramian: Tensor, rule: Rule, operand: Tensor | None) -> Tensor:
    gramian = gramian.contiguous()
    m = len(gramian)
    weights = torch.empty(m, dtype=torch.float64, device=gramian.device)
    bad = _core.rule_weights(
        gramian.data_ptr(),
        m,
        native_rule(rule, m),
        0 if operand is None else operand.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    if bad != _core.FINITE:
        raise NonFiniteError(bad)
    return weights


def config_combine(
    rows: Rows, rule: ConFIGRule, out: Tensor, gramian_out: Tensor | None = None, weights_out: Tensor | None = None
) -> None:
    """As reference.config_combine, in one call into the core: two passes over the rows. No callable length model."""
    _combine(rows, rule, None, out, gramian_out, weights_out)


def rule_combine(
    rows: Rows,
    rule: GramianRule,
    operand: Tensor | None,
    out: Tensor,
    gramian_out: Tensor | None = None,
    weights_out: Tensor | None = None,
) -> None:
    """As reference.rule_combine, in one call into the core: two passes over the rows."""
    _combine(rows, rule, operand, out, gramian_out, weights_out)


def _combine(
    rows: Rows,
    rule: Rule,
    operand: Tensor | None,
    out: Tensor,
    gramian_out: Tensor | None,
    weights_out: Tensor | None,
) -> None:
    bad = _core.combine(
        _addresses(rows),
        rows.n,
        DTYPES[rows.dtype],
        native_rule(rule, rows.m),
        0 if operand is None else operand.data_ptr(),
        out.data_ptr(),
        0 if gramian_out is None else gramian_out.data_ptr(),
        0 if weights_out is None else weights_out.data_ptr(),
        torch.get_num_threads(),
    )
    if bad != _core.FINITE:
        raise NonFiniteError(bad)


def combine_parts(
    rows: Rows,
    columns: Sequence[tuple[int, int]],
    rules: Sequence[tuple[Rule, Tensor | None]],
    out: Tensor,
    gramians: Tensor,
    weights: Tensor,
) -> None:
    """As ``config_combine`` or ``rule_combine`` of each part's columns, in one call: two passes over all of them.

    Args:
        rows: of all columns.
        columns: of each part, the first, and the last but not with it.
        rules: of each, its rule, and what that takes besides the Gramian.
        out: (n,), of which the parts' columns are written.
        gramians: (P, m, m) float64, contiguous, overwritten with K of each.
        weights: (P, m) float64, contiguous, overwritten with c of each.

    Raises:
        NonFiniteError: as there; ``out`` is untouched.
    """
    native = {id(rule): native_rule(rule, rows.m) for rule in {id(rule): rule for rule, _ in rules}.values()}
    bad = _core.combine_parts(
        _addresses(rows),
        rows.n,
        DTYPES[rows.dtype],
        [
            (first, last, native[id(rule)], 0 if operand is None else operand.data_ptr())
            for (first, last), (rule, operand) in zip(columns, rules, strict=True)
        ],
        out.data_ptr(),
        gramians.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    if bad != _core.FINITE:
        raise NonFiniteError(bad)


def _addresses(rows: Rows) -> tuple[int, int, int] | list[int]:
    """Where the rows are: (first address, bytes between rows, m), or the address of each."""
    matrix = rows.matrix
    if matrix is None:
        return [vector.data_ptr() for vector in rows.vectors]
    return matrix.data_ptr(), matrix.stride(0) * matrix.element_size(), rows.m


@lru_cache(maxsize=256)
def native_rule(rule: Rule, m: int) -> _core.Rule:
    """The rule as the core reads it; a negative index of a tracked loss counts from the end."""
    nonfinite = getattr(_core.NonFinite, rule.nonfinite)
    if isinstance(rule, GramianRule):
        return _core.GramianRule(rule.kind, list(rule.parameters), list(rule.preferences or ()), nonfinite)
    if isinstance(rule.length, int):
        length, tracked = _core.Length.tracked, rule.length % m
    else:
        length, tracked = getattr(_core.Length, str(rule.length)), 0
    return _core.ConfigRule(list(rule.direction or ()), length, tracked, rule.rtol, nonfinite)
