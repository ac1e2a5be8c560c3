"""The compiled core, ``csrc/bindings.cpp``: addresses in, results in place. Private to ``backends.cpu``."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

class DType:
    float32: ClassVar[DType]
    float64: ClassVar[DType]
    bfloat16: ClassVar[DType]
    float16: ClassVar[DType]

class Length:
    projection: ClassVar[Length]
    minimum: ClassVar[Length]
    maximum: ClassVar[Length]
    harmonic: ClassVar[Length]
    arithmetic: ClassVar[Length]
    geometric: ClassVar[Length]
    tracked: ClassVar[Length]

class NonFinite:
    propagate: ClassVar[NonFinite]
    drop: ClassVar[NonFinite]
    # and `raise`, which is no Python identifier

class Rule: ...

class ConfigRule(Rule):
    def __init__(
        self, direction: list[float], length: Length, tracked: int, rtol: float, nonfinite: NonFinite, /
    ) -> None: ...

class GramianRule(Rule):
    def __init__(
        self, name: str, parameters: list[float], preferences: list[float], nonfinite: NonFinite, /
    ) -> None: ...

FINITE: int

_Rows = tuple[int, int, int] | list[int]

def gramian(rows: _Rows, n: int, dtype: DType, out: int, threads: int, /) -> None: ...
def apply(rows: _Rows, n: int, dtype: DType, weights: int, out: int, threads: int, /) -> None: ...
def graddrop(
    rows: _Rows, n: int, dtype: DType, leak: int, seed: int, column: int, out: int, threads: int, /
) -> None: ...
def combine(
    rows: _Rows,
    n: int,
    dtype: DType,
    rule: Rule,
    operand: int,
    out: int,
    gramian: int,
    weights: int,
    threads: int,
    /,
) -> int: ...
def combine_parts(
    rows: _Rows,
    n: int,
    dtype: DType,
    parts: list[tuple[int, int, Rule, int]],
    out: int,
    gramian: int,
    weights: int,
    threads: int,
    /,
) -> int: ...
def rule_weights(gramian: int, m: int, rule: Rule, operand: int, weights: int, threads: int, /) -> int: ...
def tiers() -> list[str]: ...
def active_tier() -> str: ...
def use_tier(name: str, /) -> None: ...
def advise_huge_pages(address: int, size: int, /) -> bool: ...

class Recorded:
    def __init__(self, losses: Sequence[int], gradients: list[int], dtype: DType, /) -> None: ...

class StepRule:
    def __init__(self, beta1: float, beta2: float, groups: list[tuple[float, float, float, bool]], /) -> None: ...

class MomentumSegment:
    def __init__(
        self,
        first: int,
        step: int,
        m: int,
        second: int,
        n: int,
        state: DType,
        pieces: list[tuple[int, int, int, int]],
        /,
    ) -> None: ...
    def products(self, recorded: Recorded, scales: int, beta1: float, out: int, threads: int, /) -> None: ...
    def update(self, recorded: Recorded, rule: StepRule, decision: int, threads: int, /) -> None: ...
    def update_square(self, recorded: Recorded, rule: StepRule, decision: int, threads: int, /) -> float: ...
    def step(
        self,
        recorded: Recorded,
        rule: StepRule,
        method: Rule,
        operand: int,
        scales: int,
        found_inf: bool,
        gramian: int,
        weights: int,
        counts: int,
        totals: int,
        threads: int,
        /,
    ) -> int: ...

class Sweep:
    def __init__(self, parameters: tuple[Tensor, ...], /) -> None: ...
    def lies_where_it_did(self) -> bool: ...
    def is_unchanged(self) -> bool: ...
    def take(self) -> tuple[list[Tensor | None], tuple[bool, ...]]: ...
    def give(self, grads: list[Tensor | None], are_none: bool, /) -> None: ...
    def show(
        self, aliases: list[Tensor], addresses: list[int], flags: tuple[bool, ...], hides: bool, begin: int, /
    ) -> int: ...

class Copies:
    def __init__(self, copies: list[tuple[int, int, int]], dtype: torch.dtype, layout: torch.layout, /) -> None: ...
    def copy(self, grads: list[Tensor | None], /) -> list[int]: ...
