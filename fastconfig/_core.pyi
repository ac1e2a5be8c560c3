"""The compiled core, ``csrc/bindings.cpp``: addresses in, results in place. Private to ``backends.cpu``."""

from typing import ClassVar

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

class ConfigRule:
    def __init__(
        self, direction: list[float], length: Length, tracked: int, rtol: float, nonfinite: NonFinite, /
    ) -> None: ...

FINITE: int

_Rows = tuple[int, int, int] | list[int]

def gramian(rows: _Rows, n: int, dtype: DType, out: int, threads: int, /) -> None: ...
def apply(rows: _Rows, n: int, dtype: DType, weights: int, out: int, threads: int, /) -> None: ...
def config_combine(
    rows: _Rows,
    n: int,
    dtype: DType,
    rule: ConfigRule,
    out: int,
    gramian: int,
    weights: int,
    threads: int,
    /,
) -> int: ...
def config_weights(gramian: int, m: int, rule: ConfigRule, weights: int, /) -> int: ...
def tiers() -> list[str]: ...
def active_tier() -> str: ...
def use_tier(name: str, /) -> None: ...
