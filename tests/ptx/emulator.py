"""The machine of ``machine/``, built where it is first needed, and what it says of a launch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .syntax import MOST_DESTINATIONS, MOST_SOURCES, Kernel

SOURCES = Path(__file__).parent / "machine"
BUILT = Path(__file__).parents[2] / "build" / "ptx"
KINDS = ("two writes", "a read after a write", "a write after a read")


class EmulationError(RuntimeError):
    """The kernel did what no kernel may, such as reading memory that is not its own."""


class _Operand(ctypes.Structure):
    _fields_ = (("is_constant", ctypes.c_int32), ("number", ctypes.c_int32))


class _Syntax(ctypes.Structure):
    _fields_ = (
        ("opcode", ctypes.c_int32),
        ("guard", ctypes.c_int32),
        ("guard_negated", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("destinations", ctypes.c_int32),
        ("sources", ctypes.c_int32),
        ("destination", ctypes.c_int32 * MOST_DESTINATIONS),
        ("source", _Operand * MOST_SOURCES),
    )


class _Region(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("programs", "warps", "shared_bytes", "parameter_bytes", "resident")),
        *((name, ctypes.c_int32) for name in ("multiprocessors", "quantum", "detects_races", "has_l1", "is_timed")),
        ("seed", ctypes.c_uint64),
        ("most_steps", ctypes.c_uint64),
    )


class _Outcome(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("steps", "barriers", "stale_reads", "issued")),
        ("cycles", ctypes.c_double),
        ("races", ctypes.c_int32),
    )


class _Race(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("first_pc", "second_pc", "kind", "same_block", "same_warp", "is_shared")),
        ("address", ctypes.c_int64),
        ("count", ctypes.c_int64),
    )


class Latencies(ctypes.Structure):
    """The numbers of the clock, in cycles; ``machine/clock.hpp`` says what they are."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("integer", "float64", "division", "special", "matrix")),
        *(
            (name, ctypes.c_double)
            for name in ("shuffle", "shared", "first_level", "second_level", "atomic", "barrier", "branch")
        ),
        *(
            (name, ctypes.c_double)
            for name in ("float64_interval", "division_interval", "special_interval", "matrix_interval")
        ),
        ("float64_units", ctypes.c_int32),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, compiled once for each state of its sources."""
    files = sorted(SOURCES.glob("*.[ch]pp"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    built = BUILT / f"machine-{digest}.so"
    if not built.exists():
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise RuntimeError("no C++ compiler for the PTX machine; install g++ or clang++, or name one in CXX")
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            fresh = Path(folder) / built.name
            sources = [str(file) for file in files if file.suffix == ".cpp"]
            flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, *sources, "-o", str(fresh)], check=True)
            fresh.replace(built)  # at once, whoever else builds it
    loaded = ctypes.CDLL(str(built))
    loaded.ptx_error.restype = ctypes.c_char_p
    loaded.ptx_load.restype = ctypes.c_void_p
    loaded.ptx_free.argtypes = [ctypes.c_void_p]
    loaded.ptx_races.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.ptx_executed.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.ptx_spent.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return loaded


@dataclass(frozen=True)
class Race:
    """Accesses to the same memory, one of them a write, that nothing puts in order."""

    kind: str
    between: str
    memory: str
    first: str
    second: str
    count: int

    def __str__(self) -> str:
        return (
            f"{self.kind} of {self.memory} memory by {self.between}, {self.count} times: {self.first} | {self.second}"
        )


@dataclass(frozen=True)
class Outcome:
    """What a launch did, whose results lie in the memory that it was given."""

    steps: int
    """Warp instructions."""
    barriers: int
    stale_reads: int
    """Reads that the first-level cache answered with what another multiprocessor had since overwritten."""
    races: tuple[Race, ...]
    executed: tuple[int, ...]
    """How often each instruction was."""
    spent: tuple[float, ...]
    """With a clock: cycles that the first warp waited for, and took for, each instruction."""
    issued: int
    """With a clock: warp instructions but for those that the assembler leaves nothing of."""
    cycles: float
    """With a clock: how long one program takes by the model."""


class Program:
    """A kernel that is ready to run."""

    def __init__(self, kernel: Kernel, shared_bytes: int) -> None:
        self.name, self.warps, self.shared_bytes = kernel.name, kernel.warps, shared_bytes
        self.parameters, self.parameter_bytes = kernel.parameters, kernel.parameter_bytes
        self.texts = [f"{this.place}: {this.text}" if this.place else this.text for this in kernel.instructions]
        """What the instructions are; no more of them is kept, as they are many objects."""
        self._tables = {name: ctypes.create_string_buffer(data, len(data)) for name, data in kernel.tables.items()}
        constants = (ctypes.c_uint64 * max(1, len(kernel.constants)))()
        for bits, place in kernel.constants.items():
            constants[place] = bits & (2**64 - 1)
        for name, place in kernel.table_uses.items():
            constants[place] = ctypes.addressof(self._tables[name])
        opcodes = list(dict.fromkeys(this.opcode for this in kernel.instructions))
        numbers = {opcode: number for number, opcode in enumerate(opcodes)}
        syntax = (_Syntax * len(kernel.instructions))()
        for filled, this in zip(syntax, kernel.instructions, strict=True):
            filled.opcode = numbers[this.opcode]
            filled.guard, filled.guard_negated = this.guard, this.guard_negated
            filled.target = kernel.labels[this.label] if this.label else 0
            filled.offset = this.offset
            filled.destinations, filled.sources = len(this.destinations), len(this.sources)
            for k, register in enumerate(this.destinations):
                filled.destination[k] = register
            for k, (is_constant, number) in enumerate(this.sources):
                filled.source[k].is_constant, filled.source[k].number = is_constant, number
        names = (ctypes.c_char_p * len(opcodes))(*(opcode.encode() for opcode in opcodes))
        self._handle = library().ptx_load(
            syntax, len(syntax), names, constants, len(kernel.constants), kernel.registers
        )
        if not self._handle:
            raise EmulationError(f"{kernel.name}: {library().ptx_error().decode()}")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            library().ptx_free(self._handle)

    def run(
        self,
        programs: int,
        arguments: Sequence[int | float],
        memory: Iterable[tuple[int, int]],
        *,
        seed: int = 0,
        resident: int = 6,
        multiprocessors: int = 2,
        quantum: int = 8,
        detects_races: bool = True,
        has_l1: bool = True,
        clock: Latencies | None = None,
        most_steps: int = 10**10,
    ) -> Outcome:
        """Launch it.

        Args:
            programs: how many.
            arguments: numbers and addresses, one a parameter; those that Triton adds may be left out, and are 0.
            memory: (address, bytes) of everything that the kernel may touch.
            seed: of the order in which programs and warps go on.
            resident, multiprocessors: programs at a time, and on how many first-level caches.
            quantum: the most instructions of a warp in a row.
            clock: count the cycles of one program, instead of going on at random.

        Raises:
            EmulationError: it left its memory, met a barrier only in part, or does not end.
        """
        given = bytearray(self.parameter_bytes)
        filled = [*arguments, *([0] * (len(self.parameters) - len(arguments)))]
        for parameter, value in zip(self.parameters, filled, strict=True):
            at, size = parameter.offset, parameter.bytes
            if parameter.kind in ("f64", "f32"):
                struct.pack_into("<d" if size == 8 else "<f", given, at, value)
            else:
                given[at : at + size] = (int(value) % 2 ** (8 * size)).to_bytes(size, "little")
        spans = [*memory, *((ctypes.addressof(table), len(table)) for table in self._tables.values())]
        regions = (_Region * max(1, len(spans)))(*spans)
        launch = _Launch(
            programs=programs,
            warps=self.warps,
            shared_bytes=self.shared_bytes,
            parameter_bytes=len(given),
            resident=resident,
            multiprocessors=multiprocessors,
            quantum=quantum,
            detects_races=detects_races,
            has_l1=has_l1,
            is_timed=clock is not None,
            seed=seed,
            most_steps=most_steps,
        )
        outcome = _Outcome()
        failed = library().ptx_run(
            ctypes.c_void_p(self._handle),
            ctypes.byref(launch),
            bytes(given),
            regions,
            len(spans),
            ctypes.byref(clock or Latencies()),
            ctypes.byref(outcome),
        )
        if failed:
            raise EmulationError(self._located(library().ptx_error().decode()))
        races = (_Race * outcome.races)()
        library().ptx_races(self._handle, races)
        executed = (ctypes.c_uint64 * len(self.texts))()
        library().ptx_executed(self._handle, executed)
        spent = (ctypes.c_double * len(self.texts))()
        library().ptx_spent(self._handle, spent)
        return Outcome(
            outcome.steps,
            outcome.barriers,
            outcome.stale_reads,
            tuple(self._race(race) for race in races),
            tuple(executed),
            tuple(spent),
            outcome.issued,
            outcome.cycles,
        )

    def _located(self, message: str) -> str:
        """The machine's message with the instruction that it names, and its line."""
        text = f"{self.name}: {message}"
        number = message.partition("[instruction ")[2].partition(",")[0]
        return f"{text}: {self.texts[int(number)]}" if number else text

    def _race(self, race: _Race) -> Race:
        between = "one warp" if race.same_warp else "one program" if race.same_block else "two programs"
        memory = "shared" if race.is_shared else "global"
        first, second = self.texts[race.first_pc], self.texts[race.second_pc]
        return Race(KINDS[race.kind], between, memory, first, second, race.count)
