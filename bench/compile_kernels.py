"""Compiles the Triton kernels ahead of time, on a machine without a GPU, and says how well: registers, spills, loads.

What is compiled is what ``fastconfig.backends.triton`` really launches for a list of problems, recorded, on devices of
each architecture: the same signatures, constants and compiler options. The result is a table and
``bench/results/kernels-triton-<version>.json``. The exit code is 1 where a specialisation does not compile, spills,
takes more shared memory than there is, reads aligned rows by less than 16 bytes, or lacks the barrier before a ticket.

The full run compiles some 400 specialisations an architecture. --subset, for CI, takes some minutes of two cores
for all architectures. Every kernel and architecture is in it, with 3 and 40 losses; it leaves out most pairs of m and
dtype, most length models, misaligned vectors, the launches that FASTCONFIG_AUTOTUNE=1 would try beside the table's, and
for devices with few float64 units all that compiles as for the others.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from fastconfig.kernels import (
    combination,
    geometry,
    graddrop,
    gramian,
    gramian_rules,
    launched,
    launched_momentum,
    launched_rules,
    launched_tables,
    pairs,
    writing,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastconfig.backends import reference
from fastconfig.backends import triton as backend
from fastconfig.backends.moments import HEAD, Decision, Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.momentum import triton as momentum
from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import LENGTH_NAMES, ConFIGRule, GramianRule

HERE = Path(__file__).parent
KIB = 1024

# ---------------------------------------------------------------------------------------------------- architectures


class Architecture(NamedTuple):
    """What is compiled for, and a device of it."""

    target: GPUTarget
    device: backend.Device
    shared_bytes: int
    """Shared memory that one program may have."""


def nvidia(capability: int, multiprocessors: int, shared_kib: int) -> Architecture:
    device = backend.describe(multiprocessors, lanes=32, nvidia=True, capability=divmod(capability, 10))
    return Architecture(GPUTarget("cuda", capability, 32), device, shared_kib * KIB)


def amd(name: str, multiprocessors: int, shared_kib: int, lanes: int = 64) -> Architecture:
    device = backend.describe(multiprocessors, lanes=lanes, nvidia=False, name=name)
    return Architecture(GPUTarget("hip", name, lanes), device, shared_kib * KIB)


ARCHITECTURES = {
    "sm_80": nvidia(80, multiprocessors=108, shared_kib=163),  # A100
    "sm_86": nvidia(86, multiprocessors=84, shared_kib=99),  # A10
    "sm_89": nvidia(89, multiprocessors=128, shared_kib=99),  # RTX 4090, L4
    "sm_90": nvidia(90, multiprocessors=132, shared_kib=227),  # H100
    "sm_100": nvidia(100, multiprocessors=148, shared_kib=227),  # B200
    "sm_120": nvidia(120, multiprocessors=170, shared_kib=99),  # RTX 5090
    "gfx90a": amd("gfx90a", multiprocessors=104, shared_kib=64),  # MI250X
    "gfx1100": amd("gfx1100", multiprocessors=48, shared_kib=64, lanes=32),  # RX 7900
    "gfx942": amd("gfx942", multiprocessors=304, shared_kib=64),  # MI300X
}

# --------------------------------------------------------------------------------------------------------- problems

LARGE = 1 << 17  # columns: many programs
SMALL = 1 << 10  # one program
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FEW = range(1, geometry.FEW + 1)
MANY = (9, 16, 24, 40, 48, 64, 100)
SOLVED = (2, 8, 16, 33, 64)


@dataclass(frozen=True)
class Problem:
    """One call of the backend."""

    m: int
    dtype: torch.dtype = torch.float32
    n: int = LARGE
    call: str = "config_combine"
    vectors: bool = False
    """Separate vectors instead of a matrix."""
    aligned: bool = True
    length: str | int = "projection"
    directed: bool = False
    nonfinite: str = "propagate"
    leaky: bool = False
    column: int = 0
    """Of GradDrop: whether anything leaks, and the number of the first column."""

    def rows(self) -> Rows:
        """Uninitialised memory, which nothing reads: only its addresses matter."""
        skipped = 0 if self.aligned else 1
        matrix = torch.empty(self.m, self.n + skipped, dtype=self.dtype)[:, skipped:]
        if self.vectors:
            return Rows(self.m, self.n, self.dtype, matrix.device, None, tuple(matrix))
        return Rows(self.m, self.n, self.dtype, matrix.device, matrix, ())

    def rule(self) -> ConFIGRule:
        direction = tuple(float(i + 1) for i in range(self.m)) if self.directed else None
        return ConFIGRule(direction, self.length, 1e-12, self.nonfinite)

    def run(self) -> None:
        rows = self.rows()
        if self.call == "gramian":
            backend.gramian(rows)
        elif self.call == "apply":
            backend.apply(rows, torch.empty(self.m), torch.empty(self.n, dtype=self.dtype))
        elif self.call == "graddrop":
            leak = torch.empty(self.m, dtype=torch.float64) if self.leaky else None
            seed = torch.empty(1, dtype=torch.int64)
            backend.graddrop(rows, leak, seed, self.column, torch.empty(self.n, dtype=self.dtype))
        elif self.call == "config_weights":
            backend.config_weights(torch.empty(self.m, self.m, dtype=torch.float64), self.rule())
        else:
            backend.config_combine(rows, self.rule(), torch.empty(self.n, dtype=self.dtype))


@dataclass(frozen=True)
class Momentum:
    """One call of a momentum segment."""

    m: int
    dtype: torch.dtype = torch.float32
    n: int = LARGE
    call: str = "step"
    gradient: torch.dtype | None = None
    """The dtype of gradients and parameters; None for the averages' own."""
    aligned: bool = True
    length: str | int = "projection"
    directed: bool = False
    nonfinite: str = "propagate"
    scaled: bool = False
    """Whether a GradScaler says what it has found."""

    def run(self) -> None:
        skipped = 0 if self.aligned else 1
        state = torch.empty(self.m + 1, self.n + skipped, dtype=self.dtype)[:, skipped:]
        rows = torch.empty(1, self.n + skipped, dtype=self.gradient or self.dtype)[:, skipped:]
        segment = momentum.Segment(Moments(state[:-1], state[-1]), [Piece(torch.empty_like(rows[0]), 0, 0)])
        recorded = Recorded((self.m - 1,), tuple(rows))
        rule = StepRule(0.9, 0.999, (Group(1e-3, 0.0, 1e-8, False),))
        numbers = torch.empty(HEAD + 2 * self.m + 1, dtype=torch.float64)
        scales = numbers[-1:]
        if self.call == "products":
            segment.products(recorded, scales, 0.9)
        elif self.call == "update":
            segment.update(recorded, rule, Decision.of(numbers, self.m))
        elif self.call == "update_square":
            segment.update_square(recorded, rule, Decision.of(numbers, self.m))
        else:
            method = Problem.rule(self)
            ledger = Ledger.zeros(self.m, torch.device("cpu"))
            segment.step(ledger, recorded, rule, method, scales, scales.float() if self.scaled else None)


def momentum_problems() -> Iterator[Momentum]:
    """M-ConFIG's step, in every number of losses and pair of dtypes, and every other choice one at a time."""
    for m, dtype, n in itertools.product(FEW, (torch.float32, torch.float64), (LARGE, SMALL)):
        yield Momentum(m, dtype, n)
    for m in (*FEW, 9, 24, 40, 64):
        yield Momentum(m, gradient=torch.bfloat16)
        yield Momentum(m, call="update_square")
    for m in (9, 16, 24, 40, 48, 64):
        yield Momentum(m)
        yield Momentum(m, torch.float64)
    for problem in (Momentum(3), Momentum(3, n=SMALL), Momentum(40)):
        yield from other_rules(problem)
        yield replace(problem, scaled=True)
        yield replace(problem, aligned=False)
        yield replace(problem, gradient=torch.float16)
        yield replace(problem, call="products")
    for m in (8, 100):
        yield Momentum(m, call="products")
        yield Momentum(m, call="update")
    yield Momentum(4, torch.float64, gradient=torch.float32)


def momentum_subset() -> Iterator[Momentum]:
    """For CI, as ``subset_problems``."""
    yield Momentum(3)
    yield Momentum(3, n=SMALL, scaled=True)
    yield Momentum(5, gradient=torch.bfloat16)
    yield Momentum(3, aligned=False, call="update_square")
    yield Momentum(40)


@dataclass(frozen=True)
class Weights:
    """One call of another method's rule."""

    m: int
    kind: str
    preferred: bool = False
    operand: bool = True
    """Whether a rule that may do without one gets one."""
    nonfinite: str = "propagate"

    def run(self) -> None:
        square = torch.empty(self.m, self.m, dtype=torch.float64)
        numbers = {"constant": 1, "pcgrad": 0, "priority": 0, "mgda": 0, "imtlg": 0, "dualproj": 0, "upgrad": 0}
        parameters = (1.0,) * {"cagrad": 2, "sdmgrad": 4, **numbers}.get(self.kind, 1)
        operand = {"pcgrad": square, "gradvac": torch.stack([square, square]), "sdmgrad": square[0]}.get(self.kind)
        preferences = (1.0,) * self.m if self.preferred else None
        rule = GramianRule(self.kind, parameters, preferences, self.nonfinite)
        backend.rule_weights(square, rule, operand if self.operand else None)


def weights_problems() -> Iterator[Weights]:
    """Every rule at a few numbers of losses, and every other choice one at a time."""
    for kind, m in itertools.product(gramian_rules.KIND_NAMES, SOLVED):
        yield Weights(m, kind)
    for kind in gramian_rules.KIND_NAMES:
        yield Weights(33, kind, preferred=True)
        yield Weights(33, kind, nonfinite="drop")
    yield Weights(33, "pcgrad", operand=False)


def weights_subset() -> Iterator[Weights]:
    """For CI: each solver once, the one that takes the most registers with 40 losses."""
    yield Weights(40, "cagrad")
    yield Weights(16, "fairgrad")
    yield Weights(8, "upgrad", preferred=True)
    yield Weights(3, "imtlg", nonfinite="drop")
    yield Weights(17, "aligned")
    yield Weights(40, "gradvac")
    yield Weights(3, "priority")
    yield Weights(3, "sdmgrad")
    yield Weights(3, "inverse_norm")


def base_problems() -> Iterator[Problem]:
    """Every number of losses with every dtype."""
    for m, dtype, n in itertools.product(FEW, DTYPES, (LARGE, SMALL)):
        yield Problem(m, dtype, n)
    for m, dtype in itertools.product(MANY, DTYPES):
        yield Problem(m, dtype)
    for m in SOLVED:
        yield Problem(m, call="config_weights")


def varied_problems() -> Iterator[Problem]:
    """Every other choice, one at a time, on a few of these."""
    few = itertools.product((Problem(3), Problem(6, torch.bfloat16)), (LARGE, SMALL))
    for problem in (*(replace(problem, n=n) for problem, n in few), Problem(40)):
        yield from other_rules(problem)
        yield from other_layouts(problem)
        yield replace(problem, call="gramian")
        yield replace(problem, call="apply")
    for m in (8, 33):
        yield from other_rules(Problem(m, call="config_weights"))
    yield from drop_problems()


def drop_problems() -> Iterator[Problem]:
    """GradDrop by number of losses and dtype, and every other choice one at a time."""
    for m, dtype in itertools.product((*FEW, 9, 40), DTYPES):
        yield Problem(m, dtype, call="graddrop")
        yield Problem(m, dtype, call="graddrop", leaky=True)
    for m, dtype in itertools.product((3, 8, 40), DTYPES):
        yield from other_layouts(Problem(m, dtype, call="graddrop", leaky=m == 8))
        yield Problem(m, dtype, call="graddrop", column=1)


def other_rules(problem: Problem) -> Iterator[Problem]:
    for length in (*LENGTH_NAMES[1:], 1):
        yield replace(problem, length=length)
    yield replace(problem, directed=True)
    yield replace(problem, nonfinite="drop")


def other_layouts(problem: Problem) -> Iterator[Problem]:
    yield replace(problem, aligned=False)
    yield replace(problem, vectors=True)
    yield replace(problem, vectors=True, aligned=False)


def subset_problems() -> Iterator[Problem]:
    """For CI: every kernel, in each of its forms, on few of the numbers of losses and dtypes."""
    yield Problem(3)
    yield Problem(3, n=SMALL)
    yield Problem(3, aligned=False, call="gramian")
    yield Problem(3, vectors=True, length="geometric", nonfinite="drop")
    yield Problem(1, torch.float16, SMALL)
    yield Problem(5, torch.bfloat16, call="gramian")
    yield Problem(8, torch.float64, directed=True, length=1)
    yield Problem(16, torch.float64, call="gramian")
    yield Problem(40)
    yield Problem(40, vectors=True, call="apply")
    yield Problem(64, torch.float16, vectors=True, call="gramian")
    yield Problem(2, call="config_weights")
    yield Problem(64, call="config_weights")
    yield Problem(3, call="graddrop")
    yield Problem(8, torch.bfloat16, call="graddrop", leaky=True)
    yield Problem(4, call="graddrop", vectors=True)
    yield Problem(2, torch.float64, call="graddrop", aligned=False, column=1)
    yield Problem(5, torch.float64, call="graddrop")
    yield Problem(40, call="graddrop", leaky=True)


def few_units_subset() -> Iterator[Problem]:
    """For CI, of a device with few float64 units: what is made for such; all else compiles as for the others."""
    yield Problem(3)
    yield Problem(3, n=SMALL // 2)
    yield Problem(3, aligned=False, call="gramian")
    yield Problem(8, torch.bfloat16, call="gramian")
    yield Problem(40)
    yield Problem(64, torch.float16, vectors=True, call="gramian")
    yield Problem(16, torch.float64, call="gramian")


# -------------------------------------------------------------------------------------------------------- recording

MODULES = {
    launched: (
        "config_of_few",
        "config_of_many",
        "config_of_blocks",
        "config_of_gramian",
        "combination",
        "graddrop",
        "table_of_addresses",
    ),
    launched_rules: ("rule_of_gramian",),
    launched_momentum: ("moments_of_few", "moments_of_many", "momentum_update"),
    launched_tables: ("table_of_gradients", "table_of_group"),
}
KERNELS = {name: getattr(module, name) for module, names in MODULES.items() for name in names}


@dataclass(frozen=True)
class Specialisation:
    """One compilation of a kernel, as the launch would ask for it."""

    architecture: str
    kernel: str
    choice: str
    """Whether geometry's table takes this launch, or FASTCONFIG_AUTOTUNE=1 alone tries it."""
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return repr((self.kernel, self.signature, self.constants, self.attributes, sorted(self.options.items())))

    def named(self) -> dict[str, Any]:
        """The constants by their parameters' names."""
        names = KERNELS[self.kernel].arg_names
        return {names[path[0]]: value for path, value in self.constants.items()}

    def labels(self) -> dict[str, Any]:
        """What identifies it in the result."""
        rows = next(
            (self.signature[name] for name in ("rows", "vectors", "averages") if name in self.signature), "*fp64"
        )
        return {
            "architecture": self.architecture,
            "kernel": self.kernel,
            "choice": self.choice,
            "rows": rows if isinstance(rows, str) else f"{len(rows)} of {rows[0]}",
            "warps": self.options["num_warps"],
            "register_limit": self.options.get("maxnreg"),
            "constants": {
                name: value if value is None or isinstance(value, int) else str(value)
                for name, value in self.named().items()
            },
        }


class StandIn(NamedTuple):
    """What is launched as a kernel is: subscripted with a grid, called with arguments."""

    launch: Callable[..., None]

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch


@dataclass
class Recorder:
    """Takes the place of the kernels: keeps what a launch would compile, and launches nothing."""

    architecture: str
    found: dict[str, Specialisation] = field(default_factory=dict)
    choice: str = "table"

    def kernel(self, name: str) -> StandIn:
        """What takes the place of the kernel of that name."""
        function = KERNELS[name]
        compiler = make_backend(ARCHITECTURES[self.architecture].target)
        binder = create_function_from_signature(function.signature, function.params, compiler)

        def launch(*args: object, **kwargs: object) -> None:
            bound, specialised, options = binder(*args, **kwargs)
            parsed, signature, constants, attributes = function._pack_args(
                compiler, kwargs, bound, specialised, options
            )
            options = dict(parsed.__dict__)
            this = Specialisation(self.architecture, name, self.choice, signature, constants, attributes, options)
            self.found.setdefault(this.key, this)

        return StandIn(launch)

    def tuned(self, candidates: Sequence[Any], operand: object, launch: Callable[[Any], None]) -> object:
        """As the backend's tuned, which takes the first; the others are recorded too."""
        self.choice = "autotune"
        for candidate in candidates[1:]:
            launch(candidate)
        self.choice = "table"
        return candidates[0]


@contextlib.contextmanager
def recording(recorder: Recorder, alternatives: bool) -> Iterator[None]:
    """The backend made to believe in a device of the architecture and launching into the recorder."""
    device = ARCHITECTURES[recorder.architecture].device
    forget_devices()
    stand_ins = {
        module: SimpleNamespace(**{name: recorder.kernel(name) for name in names}) for module, names in MODULES.items()
    }
    replaced = {
        "launched": stand_ins[launched],
        "launched_rules": stand_ins[launched_rules],
        "device_of": lambda _: device,
        # Where the kernels do not go, as float64 matrix products on AMD with an old Triton: nothing to compile.
        "reference": SimpleNamespace(
            gramian=lambda rows: torch.empty(rows.m, rows.m, dtype=torch.float64),
            config_weights=lambda gramian, rule: torch.empty(len(gramian), dtype=torch.float64),
            combine_in_steps=reference.combine_in_steps,
        ),
        "_WORKSPACES": {},  # where tables written for another architecture are kept
    }
    if alternatives:
        replaced["tuned"] = recorder.tuned
    replaced_too = {"launched_momentum": stand_ins[launched_momentum], "launched_tables": stand_ins[launched_tables]}
    with mock.patch.multiple(backend, **replaced), mock.patch.multiple(momentum, **replaced_too):
        yield
    forget_devices()


def forget_devices() -> None:
    """Empty the backend's caches: what it remembers of the one CPU device belongs to another architecture."""
    for function in vars(backend).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def specialisations(architecture: str, subset: bool) -> list[Specialisation]:
    """What the problems launch, each once."""
    recorder = Recorder(architecture)
    quick = ARCHITECTURES[architecture].device.has_quick_float64
    with recording(recorder, alternatives=False):
        wanted = (
            ((subset_problems, momentum_subset, weights_subset) if quick else (few_units_subset,))
            if subset
            else (base_problems, varied_problems, momentum_problems, weights_problems)
        )
        for problem in itertools.chain.from_iterable(problems() for problems in wanted):
            problem.run()
    if not subset:
        with recording(recorder, alternatives=True):
            for problem in base_problems():
                problem.run()
    return list(recorder.found.values())


# ---------------------------------------------------------------------------------------------------- machine code


class Place(NamedTuple):
    """A line of the kernels' source."""

    file: str
    line: int


class Instruction(NamedTuple):
    """A machine instruction and where it comes from: its own line, then the line that called this function, ..."""

    text: str
    places: tuple[Place, ...]

    @property
    def opcode(self) -> str:
        return self.text.split()[0] if self.text else ""


class Lines(NamedTuple):
    """A range of lines of a file."""

    file: str
    first: int
    last: int

    def __contains__(self, place: object) -> bool:
        return isinstance(place, Place) and place.file == self.file and self.first <= place.line <= self.last


READERS = ("pair_products", "row_tiles", "block_tile", "used_elements", "row_elements", "state_tile")
"""The functions that read elements of rows and nothing else."""
MASKED_BY_THREADS = ("row_tiles",)
"""Those whose mask leaves loads as wide as they are."""
GRADIENT_READERS = ("gradient_tile",)
"""Those that read elements of gradients which may be narrower than the averages that they enter."""


def calls_in(module: ModuleType) -> Iterator[tuple[Lines, str, bool]]:
    """The calls in a file of kernels of its functions and of readers: lines, function, whether it takes whole tiles.

    The latter is told by what is passed for a last parameter MASKED or WHOLE. Those calls are the streaming loops; the
    other calls are for the columns that are left, at most one tile a launch, and read element by element.
    """
    path = Path(inspect.getsourcefile(module))
    tree = ast.parse(path.read_text())
    last_parameter = {f.name: f.args.args[-1].arg for f in tree.body if isinstance(f, ast.FunctionDef) and f.args.args}
    known = {*last_parameter, *READERS, *GRADIENT_READERS}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in known:
            wanted = {"MASKED": False, "WHOLE": True}.get(last_parameter.get(call.func.id))
            last = call.args[-1]
            whole = wanted is not None and isinstance(last, ast.Constant) and last.value is wanted
            whole |= call.func.id in MASKED_BY_THREADS
            yield Lines(path.name, call.lineno, call.end_lineno), call.func.id, whole


CALLS = (*calls_in(gramian), *calls_in(pairs), *calls_in(combination), *calls_in(graddrop), *calls_in(writing))
READING = tuple(lines for lines, name, _ in CALLS if name in READERS)
READING_GRADIENTS = tuple(lines for lines, name, _ in CALLS if name in GRADIENT_READERS)
STREAMING = tuple(lines for lines, _, whole in CALLS if whole)


def any_within(places: Sequence[Place], ranges: Sequence[Lines]) -> bool:
    return any(place in lines for place in places for lines in ranges)


LOADS = r"ld\.global|(global|buffer|flat)_load"


def reads_rows(instruction: Instruction, readers: Sequence[Lines]) -> bool:
    """Whether it is a load of rows' elements in a streaming loop, by a reader that is called at one of these lines.

    It is one if the innermost function is a reader, which the line of its call says; LLVM numbers the lines of inline
    assembly onwards from that of the load, so that the load's own line may lie past the function's end.
    """
    return (
        re.match(LOADS, instruction.opcode) is not None
        and any_within(instruction.places[1:2], readers)
        and any_within(instruction.places[1:], STREAMING)
    )


def is_wide(instruction: Instruction) -> bool:
    """Whether a load takes 16 bytes a thread, or more."""
    return re.search(r"\.v4\.\w32\b|\.v2\.\w64\b|dwordx4|_b128", instruction.opcode) is not None


def instructions_of(assembly: str) -> Iterator[Instruction]:
    """Of what LLVM wrote, PTX or AMD's: .loc directives, each with the instructions that come from there.

    The callers stand in the directive's comment, or, in PTX by newer LLVMs, in ``inlined_at`` one step at a time.
    """
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', assembly)}
    callers: dict[tuple[str, ...], tuple[str, ...] | None] = {}
    places: tuple[Place, ...] = ()
    for line in assembly.splitlines():
        located = re.match(r"\s+\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?", line)
        instruction = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][^;]*)", line)
        if located and "@[" in line:
            places = tuple(Place(file, int(number)) for file, number in re.findall(r"([\w.]+\.py):(\d+):\d+", line))
        elif located:
            callers[located.groups()[:3]] = located.groups()[3:] if located[4] else None
            places = tuple(Place(files[file], int(number)) for file, number, _ in chain(located.groups()[:3], callers))
        elif instruction:
            yield Instruction(instruction[1].strip(), places)


def chain(start: tuple[str, ...], callers: dict[tuple[str, ...], tuple[str, ...] | None]) -> Iterator[tuple[str, ...]]:
    """``start``, the place it was called from, and so on."""
    place: tuple[str, ...] | None = start
    for _ in range(16):  # deeper than any call; a place that seems to call itself ends here
        if place is None:
            return
        yield place
        place = callers.get(place)


def nvidia_report(compiled: Any, readers: Sequence[Lines]) -> dict[str, int]:
    """Registers, spills and products from the machine code, loads and tickets from PTX, which says where they are."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = output_of(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        disassembly = output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", disassembly, re.MULTILINE)
    kinds = Counter(opcode.split(".")[0] for opcode in opcodes)
    instructions = list(instructions_of(compiled.asm["ptx"]))
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": kinds["LDL"] + kinds["STL"],
        "scalar_spills": 0,
        "tickets_unfenced": unfenced_tickets(opcodes),
        "matrix_products": kinds["DMMA"],
        "fused_multiply_adds": kinds["DFMA"],
        **loads_report(instructions, readers),
        "all_wide_loads": sum(re.match(r"LDG.*\.(128|256)\b", opcode) is not None for opcode in opcodes),
        **tickets_report(instructions, r"atom\b.*acq_rel", r"st\.global", r"(bar|barrier)(\.\w+)*\.sync"),
    }


def unfenced_tickets(opcodes: Sequence[str]) -> int:
    """How many tickets do not stand between a fence and the first-level cache's invalidation, in the machine code.

    The fence, for the whole device, makes what this program stored visible before the ticket is taken; the invalidation
    makes this multiprocessor read anew what others stored before theirs.
    """
    tickets = [place for place, opcode in enumerate(opcodes) if re.match(r"ATOMG?\.E\.ADD", opcode)]
    unfenced = 0
    for place in tickets:
        before = [opcode for opcode in opcodes[max(0, place - FENCE_DISTANCE) : place] if opcode.startswith("MEMBAR")]
        behind = [opcode for opcode in opcodes[place : place + FENCE_DISTANCE] if opcode.startswith("CCTL.IVALL")]
        unfenced += not (before and before[-1].endswith(".GPU") and behind)
    return unfenced


def amd_report(compiled: Any, readers: Sequence[Lines]) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]
    instructions = list(instructions_of(assembly))
    kinds = Counter(instruction.opcode for instruction in instructions)

    def noted(name: str) -> int:
        return int(re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)[1])

    return {
        "registers": noted("vgpr_count"),
        "stack_bytes": noted("private_segment_fixed_size"),
        "spills": noted("vgpr_spill_count"),
        "scalar_spills": noted("sgpr_spill_count"),
        "matrix_products": sum(count for kind, count in kinds.items() if re.match(r"v_mfma_f64", kind)),
        "fused_multiply_adds": sum(count for kind, count in kinds.items() if re.match(r"v_fma(c)?_f64", kind)),
        **loads_report(instructions, readers),
        "all_wide_loads": sum(
            is_wide(instruction) for instruction in instructions if re.match(LOADS, instruction.opcode)
        ),
        **tickets_report(
            instructions,
            r"(global|flat|buffer)_atomic_add(_u32)?\b.*\b(sc0|glc)",  # with a result; a fence's atomic has none
            r"(global|flat|buffer)_store",
            r"s_barrier",
            AMD_WAIT_OF_GFX11 if str(compiled.metadata.target.arch).startswith("gfx11") else AMD_WAIT,
        ),
    }


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loads_report(instructions: Sequence[Instruction], readers: Sequence[Lines]) -> dict[str, int]:
    loads = [is_wide(instruction) for instruction in instructions if reads_rows(instruction, readers)]
    return {"wide_loads": sum(loads), "narrow_loads": len(loads) - sum(loads)}


FENCE_DISTANCE = 24
"""Machine instructions within which a ticket's fence and its invalidation stand."""

AMD_WAIT = r"s_waitcnt\b.*vmcnt\(0\)"
AMD_WAIT_OF_GFX11 = r"s_waitcnt_vscnt\b.*(null|off), ?(0x)?0"
"""The instruction by which a wavefront waits for its own stores to arrive in memory; gfx11 counts them apart."""


def tickets_report(
    instructions: Sequence[Instruction], ticket: str, store: str, barrier: str, wait: str | None = None
) -> dict[str, int]:
    """How many tickets are taken, and before how many the stores to global memory are not in order.

    The atomic orders the stores of its own thread only; the barrier orders the other threads' before it. On AMD a
    barrier does not wait for the other wavefronts' stores to arrive where the atomic could publish them: each has to
    wait for its own first (LLVM's pull request 161638 tells of the same on later devices).
    """
    tickets = without_barrier = without_wait = 0
    ordered = arrived = arrived_before_barrier = True
    for instruction in instructions:
        text = instruction.text
        if re.match(ticket, text):
            tickets += 1
            without_barrier += not ordered
            without_wait += ordered and not arrived_before_barrier
        elif re.match(store, text):
            ordered = arrived = False
        elif wait is not None and re.match(wait, text):
            arrived = True
        elif re.match(barrier, text):
            ordered, arrived_before_barrier = True, arrived or wait is None
    return {"tickets": tickets, "tickets_without_barrier": without_barrier, "tickets_without_wait": without_wait}


# -------------------------------------------------------------------------------------------------------- compiling


class Accepted(NamedTuple):
    """Spills that are known, and why they stay."""

    triton: str
    architecture: str
    padded: int
    """MP, the power of two that holds the losses; of kernels that solve nothing, M."""
    stack_bytes: int
    """At most."""
    reason: str
    kernel: str = "config_of"
    """What its name begins with."""


AROUND_THE_LOOP = "numbers of 33 to 48 averages, written before the loop over columns and read back once behind it"
A_TILE = "numbers of 33 and more averages beside their gradients, read back once a tile"
IN_THE_CACHE = "numbers and addresses kept through the loops of a solver whose matrices lie in the same cache"
ACCEPTED = (
    *(Accepted("3.6.", name, 64, 360, IN_THE_CACHE, "rule_of_gramian") for name in ("sm_80", "sm_90", "sm_100")),
    Accepted("3.6.", "sm_80", 64, 24, "three numbers, kept through the solve's two ways, once a launch"),
    Accepted("3.6.", "sm_90", 64, 24, "three addresses of 33 to 48 float64 rows, read back once a tile"),
    Accepted("3.6.", "sm_90", 128, 8, "one number of over 64 float64 rows, read back once a launch"),
    *(Accepted("3.6.", "sm_90", padded, 112, A_TILE, "moments_of_many") for padded in (64, 128)),
    Accepted("3.6.", "sm_80", 64, 32, A_TILE, "moments_of_many"),
    Accepted("3.6.", "sm_90", 4, 8, "two numbers of 4 averages, read back once a tile", "momentum_update"),
    Accepted("3.", "sm_90", 64, 32, AROUND_THE_LOOP, "moments_of_many"),
    Accepted("3.", "sm_100", 64, 32, AROUND_THE_LOOP, "moments_of_many"),
)


def reason_accepted(this: Specialisation, stack_bytes: int) -> str:
    """Why spills of so many bytes are no finding; empty where they are one, or where there are none."""
    constants = this.named()
    for accepted in ACCEPTED if stack_bytes else ():
        if (
            triton.__version__.startswith(accepted.triton)
            and this.kernel.startswith(accepted.kernel)
            and this.architecture == accepted.architecture
            and constants.get("MP", constants.get("M")) == accepted.padded
            and stack_bytes <= accepted.stack_bytes
        ):
            return accepted.reason
    return ""


def compiled_report(this: Specialisation) -> dict[str, Any]:
    """Compile one specialisation, from nothing, and say what came of it; in a process of the pool."""
    architecture = ARCHITECTURES[this.architecture]
    source = ASTSource(KERNELS[this.kernel], this.signature, this.constants, this.attributes)
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache, TRITON_DISABLE_LINE_INFO="0"),
    ):
        started = time.perf_counter()
        try:
            compiled = triton.compile(source, target=architecture.target, options=this.options)
        except Exception as error:  # whatever the compiler stumbles over is the finding
            return {**this.labels(), "findings": [f"does not compile: {summary(error)}"]}
        seconds = time.perf_counter() - started
    report = {
        **this.labels(),
        **(nvidia_report if architecture.target.backend == "cuda" else amd_report)(compiled, readers_of(this)),
        "shared_bytes": compiled.metadata.shared,
        "seconds": round(seconds, 1),
    }
    report["accepted"] = reason_accepted(this, report["stack_bytes"])
    return {**report, "findings": list(findings(this, report))}


def summary(error: BaseException) -> str:
    """The end of the first error's message, which is where compilers say what was wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {text[-1][:200] if text else ''}"


def readers_of(this: Specialisation) -> Sequence[Lines]:
    """Where elements are read that 16-byte loads are due for."""
    return READING + READING_GRADIENTS if gradients_are_wide(this) else READING


def gradients_are_wide(this: Specialisation) -> bool:
    """Whether the gradients that enter averages are as wide as these."""
    gradient = this.named().get("GRADIENT")
    return gradient is not None and f"*{gradient}" == this.signature["averages"]


def has_narrow_gradients(this: Specialisation) -> bool:
    """Whether gradients enter averages that are wider, by blocks."""
    return this.kernel == "moments_of_many" and not gradients_are_wide(this)


def findings(this: Specialisation, report: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a compilation."""
    limit = ARCHITECTURES[this.architecture].shared_bytes
    # Scalar registers of AMD spill into lanes of a vector register: told, but no finding, as no memory is involved.
    if not report["accepted"]:
        if report["stack_bytes"]:
            yield f"has a stack of {report['stack_bytes']} bytes"
        if report["spills"]:
            yield f"has {report['spills']} spills"
    if report["shared_bytes"] > limit:
        yield f"takes {report['shared_bytes']} bytes of shared memory, of {limit}"
    expected = wide_loads_a_step(this)
    narrow = report["narrow_loads"] if not has_narrow_gradients(this) else 0  # the same function reads these by blocks
    if report["wide_loads"] < expected or (expected and narrow):
        yield f"{report['wide_loads']} loads of 16 bytes, of {expected}, and {report['narrow_loads']} narrower ones"
    elif report["all_wide_loads"] < expected:
        yield f"{report['all_wide_loads']} loads of 16 bytes are left in the machine code, of {expected}"
    if report["tickets"] != tickets_taken(this):
        yield f"takes {report['tickets']} tickets where {tickets_taken(this)} are due"
    if report["tickets_without_barrier"]:
        yield f"{report['tickets_without_barrier']} tickets without a barrier after the last store"
    if report.get("tickets_unfenced"):
        yield f"{report['tickets_unfenced']} tickets that do not stand between a fence and an invalidation"
    if report["tickets_without_wait"]:
        yield f"{report['tickets_without_wait']} tickets before whose barrier wavefronts do not wait for their stores"


def wide_loads_a_step(this: Specialisation) -> int:
    """At least how many 16-byte loads a thread has in its streaming loops, each written once; 0 where not aligned."""
    constants = this.named()
    if not constants.get("ALIGNED"):
        return 0
    m = constants["M"]
    if this.kernel == "config_of_blocks":
        return 2 * constants["BLOCK"]
    if this.kernel == "config_of_few":
        return m * (1 if constants["RUN"] else constants["UNROLL"]) + (m if "out" not in constants else 0)
    if this.kernel == "combination":
        return min(m, geometry.FEW)
    if this.kernel == "graddrop":
        # Of more rows, loads that LLVM merges where it unrolls the loop over them lose the line that they stand on.
        return m if m <= geometry.DROPPED_TOGETHER else 1
    each = 2 if gradients_are_wide(this) else 1
    written = each * math.ceil(m / math.ceil(m / writing.TOGETHER.value)) + 1
    if this.kernel == "moments_of_few":
        return each * m * constants["UNROLL"] + (written if "second" not in constants else 0)
    if this.kernel == "momentum_update":
        return written
    lanes = ARCHITECTURES[this.architecture].device.lanes
    block_bytes = geometry.BLOCK_ROWS * constants["DEPTH"] * constants["DTYPE"].primitive_bitwidth // 8
    blocks = constants["LEFT"] + constants["RIGHT"]
    loads = blocks * max(1, block_bytes // (geometry.VECTOR_BYTES * lanes))
    # Where a program has all rows, the compiler leaves out loads that are of none.
    return loads if constants["RIGHT"] else max(1, loads * m // (blocks * geometry.BLOCK_ROWS))


def tickets_taken(this: Specialisation) -> int:
    """How many tickets stand in the kernel: one a level of the reduction, and one before strips' sums are solved."""
    constants = this.named()
    if this.kernel in ("config_of_many", "config_of_blocks", "moments_of_many"):
        return 2 if "weights" in constants else 3
    if this.kernel in ("config_of_few", "moments_of_few", "momentum_update"):
        return 2 if "tickets" not in constants else 0
    if this.kernel == "rule_of_gramian":
        return 1 if "tickets" not in constants else 0
    return 0


def makes_matrix_products(architecture: str) -> bool:
    """Whether the kernel of many losses, launched whatever the device has, is compiled to matrix products."""
    recorder = Recorder(architecture)
    device = ARCHITECTURES[architecture].device._replace(has_matrix_units=True, has_quick_float64=True)
    with recording(recorder, alternatives=False), mock.patch.object(backend, "device_of", return_value=device):
        Problem(9, call="gramian").run()
    (this,) = recorder.found.values()
    return bool(compiled_report(this).get("matrix_products"))


def compile_all(wanted: Sequence[Specialisation], jobs: int) -> list[dict[str, Any]]:
    """Reports of all, in no particular order."""
    reports = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(compiled_report, this): this for this in wanted}
        for done in track(as_completed(running), "compiling", total=len(running), console=Console(stderr=True)):
            if isinstance(done.exception(), BrokenProcessPool):
                crashed = "does not compile: the compiler crashed, on this or on what ran at the same time"
                reports.append({**running[done].labels(), "findings": [crashed]})
            else:
                reports.append(done.result())
    return reports


# ---------------------------------------------------------------------------------------------------------- results


def main() -> int:
    arguments = parse_arguments()
    if backend.INTERPRETED:
        print("TRITON_INTERPRET=1 replaces the compiler; unset it", file=sys.stderr)
        return 2
    wanted = [this for name in arguments.arch for this in specialisations(name, arguments.subset)]
    reports = sorted(compile_all(wanted, arguments.jobs), key=lambda report: json.dumps(order_of(report)))
    units = {name: [this.device.has_matrix_units, makes_matrix_products(name)] for name, this in ARCHITECTURES.items()}
    head = {
        "triton": triton.__version__,
        "subset": arguments.subset,
        "architectures": arguments.arch,
        "matrix units (taken for granted, found)": units,
    }
    path = arguments.out or HERE / "results" / f"kernels-triton-{triton.__version__}.json"
    path.write_text(as_json(head, reports))
    console = Console(width=150)
    console.print(table_of(reports))
    wrong = [report for report in reports if report["findings"]]
    for report in wrong:
        for finding in report["findings"]:
            console.print(f"{name_of(report)}: {finding}", style="red", highlight=False, soft_wrap=True)
    console.print(f"{len(reports)} specialisations, {len(wrong)} with findings; written: {path.name}")
    return 1 if wrong else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--subset", action="store_true", help="what CI compiles")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: bench/results)")
    return parser.parse_args()


def order_of(report: dict[str, Any]) -> list[Any]:
    """What reports are sorted by: all of their labels."""
    first = [report["architecture"], report["kernel"], f"{report['constants'].get('M', 0):03}", report["rows"]]
    return [*first, report["choice"], report["warps"], report["constants"]]


def as_json(head: dict[str, Any], reports: Sequence[dict[str, Any]]) -> str:
    """A table with one specialisation a line, so that two results compare line by line; null where not compiled."""
    columns = list(dict.fromkeys(name for report in reports for name in report))
    rows = ",\n".join(json.dumps([report.get(name) for name in columns], separators=(",", ":")) for report in reports)
    return f'{json.dumps({**head, "columns": columns})[:-1]}, "rows": [\n{rows}\n]}}\n'


def name_of(report: dict[str, Any]) -> str:
    """One line that says which specialisation a report is of."""
    constants = ", ".join(f"{name}={value}" for name, value in report["constants"].items())
    launch = f"{report['warps']} warps, at most {report['register_limit'] or 'any'} registers, {report['choice']}"
    return f"{report['architecture']} {report['kernel']} {report['rows']} ({constants}; {launch})"


def table_of(reports: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"kernels compiled by Triton {triton.__version__}: the most of each, over all specialisations")
    for name in ("architecture", "kernel"):
        table.add_column(name)
    for name in ("compiled", "registers", "stack", "spills", "shared", "16-byte loads", "matrix products", "seconds"):
        table.add_column(name, justify="right")
    for (architecture, kernel), group in itertools.groupby(reports, lambda r: (r["architecture"], r["kernel"])):
        group = list(group)
        good = [report for report in group if "registers" in report]
        table.add_row(architecture, kernel, f"{len(good)} of {len(group)}", *columns_of(good))
    return table


def columns_of(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not reports:
        return
    for name in ("registers", "stack_bytes", "spills", "shared_bytes"):
        yield f"{max(report[name] for report in reports):,}"
    read = [report for report in reports if report["wide_loads"] + report["narrow_loads"]]
    wide = sum(report["narrow_loads"] == 0 for report in read)
    yield f"all in {wide} of {len(read)}" if read else ""
    yield f"{max(report['matrix_products'] for report in reports)}"
    yield f"{max(report['seconds'] for report in reports):.1f}"


if __name__ == "__main__":
    sys.exit(main())
