"""Timing in turns: a shared machine changes its speed between cases, so what is compared alternates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def medians(calls: Sequence[Callable[[], object]], seconds: float, least: int = 5, most: int = 300) -> list[float]:
    """Median times in seconds, the calls taking turns for about so many seconds in all, after one turn to warm up."""
    turn = sum(_time(call) for call in calls)
    turns = min(most, max(least, round(seconds / turn)))
    times = [[_time(call) for call in calls] for _ in range(turns)]
    return [statistics.median(of_call) for of_call in zip(*times, strict=True)]


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
