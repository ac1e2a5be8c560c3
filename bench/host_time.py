"""Our own Python a call of ``fc.combine`` by the kernels, without a GPU: Triton's launch is replaced by nothing.

``PYTHONPATH=.venv/triton-3.9.0 .venv/bin/python bench/host_time.py``: the least of ten rounds, in microseconds.
Triton's launcher and the driver come on top; ``tests/ptx/test_launcher.py`` counts its Python calls.
"""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable

# Before the kernels are imported: it is not the interpreter's time that is asked for.
os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.runtime.jit import JITFunction

import fastconfig as fc
from fastconfig.backends import triton as backend
from fastconfig.validation import check_rows

ROUNDS, CALLS = 10, 2000


class Nothing:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: object) -> None:
        """Do nothing."""


def microseconds(call: Callable[[], object]) -> float:
    call()
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    nothing, device = Nothing(), backend.describe(132, 32, nvidia=True, capability=(9, 0))
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: nothing
    backend.INTERPRETED = True  # on tensors of any device
    backend.device_of = lambda _: device
    problems = {
        "3 × 1e4, one launch": torch.randn(3, 10_000),
        "3 × 1e4, separate vectors": [torch.randn(10_000) for _ in range(3)],
        "3 × 1e6, two launches": torch.randn(3, 1_000_000),
        "40 × 1e3, separate vectors": [torch.randn(1000) for _ in range(40)],
    }
    for name, grads in problems.items():
        rows, rule = check_rows(grads), fc.ConFIG().rule
        out = torch.empty(rows.n)
        inside = microseconds(lambda rows=rows, out=out, rule=rule: backend.config_combine(rows, rule, out))
        whole = microseconds(lambda grads=grads, out=out: fc.combine(grads, out=out, backend="triton"))
        print(f"{name:28} backend {inside:6.1f} µs, fc.combine(out=) {whole:6.1f} µs")


if __name__ == "__main__":
    main()
