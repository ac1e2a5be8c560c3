"""Compiling ahead: one process a few kernels, so that neither tests nor measurements wait for one after the other."""

from __future__ import annotations

from functools import partial

import torch

from gpubench import methods, momentum
from gpubench.launch_table import call_for, candidates_of, table_of_one
from gpubench.shapes import SHAPES, TUNED, Shape
from gpubench.timing import Call


def compilations(device: torch.device) -> list[Call]:
    """Calls that between them compile every kernel that is measured; a kernel depends on no n."""
    from fastconfig.kernels import geometry

    import fastconfig as fc

    def combine(m: int, dtype: torch.dtype, n: int) -> Call:
        return lambda: fc.combine(torch.randn(m, n, device=device).to(dtype))

    def with_table(kind: str, launch: object, m: int, dtype: torch.dtype) -> None:
        with table_of_one(kind, launch):
            call_for(kind, torch.randn(m, 65_536, device=device).to(dtype))()

    jobs: list[Call] = []
    kinds = dict.fromkeys((shape.m, shape.dtype, shape.n % 8 == 0) for shape in SHAPES)
    for m, dtype, aligned in kinds:
        large = geometry.ONE_LAUNCH_BYTES // m // dtype.itemsize // 64 * 64 + (128 if aligned else 129)
        jobs.append(combine(m, dtype, large))
        if aligned and m <= geometry.FEW:
            jobs.append(combine(m, dtype, 64))
    for shape in TUNED:
        for kind, launches in candidates_of(shape).items():
            jobs += [partial(with_table, kind, launch, shape.m, shape.dtype) for launch in launches]
    for m, n in ((3, 64), (3, 65_536), (40, 65_536)):
        jobs.append(lambda m=m, n=n: momentum.steps(Shape(m, n), 1, device)[0]())
    return [*jobs, *methods.compilations(device)]


def compile_some(device: torch.device, part: int, parts: int) -> None:
    """Every ``parts``-th of the compilations."""
    for job in compilations(device)[part::parts]:
        compile_if_possible(job)


def compile_if_possible(job: Call) -> None:
    """What fails here fails again where it is measured, and is noted there."""
    try:
        job()
    except Exception as error:
        print(f"compiling ahead: {type(error).__name__}: {str(error)[:300]}", flush=True)
