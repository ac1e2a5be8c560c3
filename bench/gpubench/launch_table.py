"""The sections on ``kernels/geometry.py``: whether its choices are the quickest, and what they compile to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from fastconfig.backends import triton as backend
from gpubench.inputs import combinations, gradients
from gpubench.results import Run
from gpubench.shapes import ONE_LAUNCH, TUNED, Shape
from gpubench.timing import Call, device_seconds, kernels_of, time_calls, time_replays


def measure_one_launch(run: Run) -> None:
    """One launch of one program against two launches of many, on both sides of the limit between them."""
    from fastconfig.kernels import geometry

    for shape in map(run.shrunk, run.cases(ONE_LAUNCH, 4.0)):
        record: dict[str, object] = dict(shape.labels)
        record["limit_bytes"] = geometry.ONE_LAUNCH_BYTES
        record["bytes"] = shape.m * shape.n * shape.dtype.itemsize
        with run.case(shape):
            block = gradients(shape, run)
            calls = combinations(block)
            for name, limit in (("one", 1 << 50), ("two", 0)):
                with replaced(geometry, "ONE_LAUNCH_BYTES", limit):
                    record[f"{name}_eager_s"] = time_calls(calls, run, 0.1).median_s
                    if run.on_gpu:
                        record[f"{name}_replayed_s"] = time_replays(calls, run, 0.1).median_s
                        record[f"{name}_kernels_s"] = device_seconds(kernels_of(calls))
            run.add(record)
            del block, calls


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def measure_launch_table(run: Run) -> None:
    """The launches of ``kernels/geometry.py`` and their neighbours, each in a whole combination or an apply."""
    for shape in map(run.shrunk, run.cases(TUNED, 6.0)):
        with run.case(shape):
            block = gradients(shape, run, copies=1)
            for kind, candidates in candidates_of(shape).items():
                for i, candidate in run.cases(list(enumerate(candidates)), 3.0):
                    with run.case(f"{shape} {candidate}"), table_of_one(kind, candidate):
                        timing = time_calls([call_for(kind, block[0])], run, 0.1)
                        record = {**shape.labels, "kind": kind, "choice": i, "launch": str(candidate), **asdict(timing)}
                        if run.bandwidth:
                            record["of_bandwidth"] = bytes_of(kind, shape) / run.bandwidth / timing.median_s
                        run.add(record)
            del block


def bytes_of(kind: str, shape: Shape) -> int:
    """What the call timed for a kind of launch must move: the second launch's, or all of it."""
    return (shape.m + 1) * shape.n * shape.dtype.itemsize if kind == "combination" else shape.floor_bytes


def candidates_of(shape: Shape) -> dict[str, list]:
    """For each launch of a combination: the table's choices, its first one first, then others near by."""
    from fastconfig.kernels import geometry

    if shape.m <= geometry.FEW:
        few = list(geometry.few(shape.m))
        more = [geometry.Few(warps, unroll, programs) for warps, unroll, programs in few_neighbours(shape.m)]
        found: dict[str, list] = {"few": few + [launch for launch in more if launch not in few]}
    else:
        lanes = backend.device_of(torch.device("cuda")).lanes if torch.cuda.is_available() else 32
        many = list(geometry.many(shape.m, shape.dtype.itemsize, lanes))
        first = many[0]
        more = [
            geometry.Many(first.left, first.right, depth, first.warps, programs)
            for depth, programs in ((8, 1), (16, 1), (32, 1), (16, 2))
        ]
        found = {"many": many + [launch for launch in more if launch not in many]}
    table = list(geometry.combination(shape.m))
    more = [geometry.Combination(programs, warps) for programs, warps in ((16, 4), (6, 4), (4, 4), (2, 8), (3, 8))]
    found["combination"] = table + [launch for launch in more if launch not in table]
    return found


def few_neighbours(m: int) -> list[tuple[int, int, int]]:
    """(warps, unroll, programs) that fit the registers more or less."""
    if m <= 4:
        return [(4, 1, 8), (4, 2, 6), (4, 4, 4), (8, 2, 2), (8, 1, 4)]
    return [(4, 1, 2), (4, 2, 2), (4, 1, 3), (8, 1, 1)]


@contextmanager
def table_of_one(kind: str, launch: object) -> Iterator[None]:
    from fastconfig.kernels import geometry

    with replaced(geometry, kind, lambda *_: (launch,)), replaced(geometry, "ONE_LAUNCH_BYTES", 0):
        yield


def call_for(kind: str, grads: Tensor) -> Call:
    """A whole combination, or the second launch of it alone."""
    from fastconfig.backends import select
    from fastconfig.validation import check_rows

    if kind != "combination":
        return combinations(grads.unsqueeze(0))[0]
    rows, backend = check_rows(grads), select(grads.device)
    weights = torch.linspace(0.5, 1.5, rows.m, dtype=torch.float64, device=grads.device)
    out = torch.empty(rows.n, dtype=rows.dtype, device=rows.device)
    return lambda: backend.apply(rows, weights, out)


def list_kernels(run: Run) -> None:
    """Registers and spills of every kernel that this process has launched."""
    from fastconfig.kernels import launched, launched_momentum

    kernels = {
        launched: ("config_of_few", "config_of_many", "combination", "config_of_gramian"),
        launched_momentum: ("moments_of_few", "moments_of_many", "momentum_update"),
    }
    for module, name in ((module, name) for module, names in kernels.items() for name in names):
        with run.case(name):
            function = getattr(module, name)
            for cache in getattr(function, "device_caches", {}).values():
                for kernel in cache[0].values():
                    run.add({"kernel": name, **description(function, kernel)})


def description(function: object, kernel: object) -> dict[str, object]:
    constants = {
        function.arg_names[path[0]]: value
        for path, value in kernel.src.constants.items()
        if isinstance(path, tuple) and len(path) == 1 and isinstance(value, (int, bool))
    }
    return {
        "registers": kernel.n_regs,
        "spills": kernel.n_spills,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "maxnreg": getattr(kernel.metadata, "maxnreg", None),
        **{key: constants.get(key) for key in ("M", "UNROLL", "VECTOR", "ALIGNED", "LEFT", "RIGHT", "DEPTH")},
    }
