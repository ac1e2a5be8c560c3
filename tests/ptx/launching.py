"""Every ``kernel[grid](...)`` compiled for a GPU that is not there, and run by the emulator on the CPU's tensors.

``install`` replaces Triton's launch, nothing else: signatures, constants and options are those that Triton derives from
the arguments, so what runs is what a GPU would be given.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastconfig.backends.triton import describe

from .emulator import EmulationError, Program
from .syntax import Kernel

ORIGINAL_RUN = JITFunction.run
"""Triton's own launch."""
WARP = 32
PROCESSORS = 2
"""Multiprocessors, each with a first-level cache of its own: enough for one to miss what the other writes."""
QUANTA = (1, 4, 30)
"""Warps that alternate at every instruction, and warps that run ahead."""


@dataclass
class Tally:
    """What was run since the emulator was installed."""

    launches: int = 0
    searches: int = 0
    """Launches by Triton's own way, which looks for what was compiled."""
    specialisations: int = 0
    steps: int = 0
    stale_reads: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, this.name) + getattr(other, this.name) for this in fields(Tally)))

    def __str__(self) -> str:
        return (
            f"{self.launches:,} launches of {self.specialisations:,} compiled kernels, "
            f"{self.steps:,} warp instructions, {self.stale_reads:,} stale reads"
        )


@dataclass
class Emulator:
    """Compiles for one architecture and runs what it compiled."""

    capability: int
    edit: Callable[[str], str] = str
    """Applied to the PTX before it is run: how the tests of the emulator break a kernel."""
    returns_kernels: bool = False
    """Whether a launch returns what was compiled, as Triton's do, so that it can be launched without them."""
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.random = random.Random(0)
        """What orders programs and warps."""
        device = describe(PROCESSORS, WARP, nvidia=True, capability=divmod(self.capability, 10))
        # What the kernels of many losses and of quick float64 compile to is slow on some, but is to run, too.
        self.device = device._replace(has_matrix_units=True, has_quick_float64=True)
        """As the backend is to see it."""
        self.target = GPUTarget("cuda", self.capability, WARP)
        self.backend = make_backend(self.target)
        self._binders: dict[JITFunction, Callable[..., Any]] = {}
        self._programs: dict[object, tuple[Program, dict[str, Any]]] = {}

    def install(self) -> None:
        """Let every launch of this process come here."""
        emulator = self
        gc.collect()
        gc.freeze()  # or every launch would look for tensors among all that PyTorch is made of

        def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Kept | None:
            return emulator.launch(self, args, grid, kwargs)

        JITFunction.run = run

    def launch(self, function: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Kept | None:
        """Compile, where it is new, and run. Returns what to launch it with again, where ``returns_kernels``.

        Raises:
            EmulationError: it left its memory, met a barrier only in part, does not end, or races.
        """
        program, signature, bound = self.compiled(function, args, kwargs)
        self.tally.searches += 1
        kept = Kept(self, function, program, signature)
        kept.run((grid(bound) if callable(grid) else grid)[0], bound)
        return kept if self.returns_kernels else None

    def compiled(
        self, function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, dict[str, Any], dict[str, Any]]:
        """(the program, its signature, the arguments by name)."""
        if function not in self._binders:
            self._binders[function] = create_function_from_signature(function.signature, function.params, self.backend)
        kwargs = {"debug": False, **kwargs}
        bound, specialization, options = self._binders[function](*args, **kwargs)
        key = (function, str(specialization), str(sorted((name, str(value)) for name, value in options.items())))
        if key not in self._programs:
            packed = function._pack_args(self.backend, kwargs, bound, specialization, options)
            compiler_options, signature, constants, attributes = packed
            source = ASTSource(function, signature, constants, attributes)
            compiled = triton.compile(source, target=self.target, options=compiler_options.__dict__)
            self._programs[key] = self.program_of(compiled), signature
            self.tally.specialisations += 1
        return *self._programs[key], bound

    def program_of(self, compiled: CompiledKernel) -> Program:
        """What Triton compiled, ready to run."""
        return Program(Kernel(self.edit(compiled.asm["ptx"])), compiled.metadata.shared)


@dataclass(frozen=True)
class Kept:
    """A compiled kernel, launched as Triton's are: by its arguments in order, the constants among them ignored."""

    emulator: Emulator
    function: JITFunction
    program: Program
    signature: dict[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            self.run(grid[0], dict(zip(self.function.arg_names, args, strict=True)))

        return launch

    def run(self, programs: int, bound: dict[str, Any]) -> None:
        """Run it on arguments by name."""
        kinds = {name: kind for name, kind in self.signature.items() if kind != "constexpr"}
        values = flattened([bound[name] for name in kinds])
        flat = [value for value, kind in zip(values, flattened([*kinds.values()]), strict=True) if kind != "constexpr"]
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        emulator = self.emulator
        outcome = self.program.run(
            programs,
            [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in flat],
            memory_of(tensors).items(),
            seed=emulator.random.getrandbits(60),
            multiprocessors=PROCESSORS,
            quantum=emulator.random.choice(QUANTA),
        )
        emulator.tally.launches += 1
        emulator.tally.steps += outcome.steps
        emulator.tally.stale_reads += outcome.stale_reads
        if outcome.races:
            races = "; ".join(str(race) for race in outcome.races)
            raise EmulationError(f"{self.function.__name__} races: {races}")


def flattened(values: Any) -> Iterator[Any]:
    """The elements of nested tuples, as Triton passes them."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from flattened(value)
    else:
        yield values


def memory_of(arguments: list[torch.Tensor]) -> dict[int, int]:
    """Where the storages of all CPU tensors that live begin, and their bytes: addresses in tables may lead anywhere."""
    found: dict[int, int] = {}
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    for tensor in [*tensors, *arguments]:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found
