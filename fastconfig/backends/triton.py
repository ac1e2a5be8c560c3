"""The GPU backend: ``kernels/`` on CUDA and ROCm tensors. What each function means stands in ``reference``.

Nothing here waits for the device, except where ``nonfinite="raise"`` asks to. Up to 64 losses ConFIG is two launches,
for a small problem one; more losses are solved by torch.linalg.eigh on the device, which synchronises inside PyTorch.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fastconfig.backends import reference
from fastconfig.backends.launching import Kernel
from fastconfig.backends.launching import launch as launch_kernel
from fastconfig.backends.moments import HEAD
from fastconfig.backends.philox import WORDS
from fastconfig.backends.rows import WITHOUT_MEMORY, Rows
from fastconfig.backends.rules import LENGTH_NAMES, ConFIGRule, GramianRule

OLDEST = (3, 6)
"""The oldest Triton that the kernels compile on; the tests compile them on this one and on the newest."""
OLDEST_WITH_ALL_MATRIX_UNITS = (3, 9)
"""The oldest Triton that makes float64 matrix products, which the Gramian of more than 8 losses is made of, for every
device that has units for them: older ones do for compute capability 8.0 and 9.0 alone, and on AMD not all compile."""

_WITH_FLOAT64_MATRIX_UNITS = ("gfx90a", "gfx94", "gfx95")
"""AMD's architectures that have them."""

_WITH_QUICK_FLOAT64 = ((8, 0), (9, 0), (10, 0))
"""NVIDIA's compute capabilities with half as many float64 units as float32 units: A100, H100, B200. All others since
8.0 have 2 beside 128: the A10, L4, RTX cards and B300 among them."""
_AMD_WITH_QUICK_FLOAT64 = "gfx9"
"""AMD's of data centres, CDNA and what was before it; RDNA, gfx10 and on, has a sixteenth or less."""

try:
    import triton
    import triton.language as tl

    from fastconfig.kernels import geometry, gramian_rules, launched, launched_rules
except Exception as error:  # a broken Triton fails in many ways, and the CPU does without it
    IMPORT_ERROR = str(error)
else:
    IMPORT_ERROR = ""
    DTYPES = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs the kernels in Python, on tensors of any device: how they are tested where there is no GPU."""

AUTOTUNE = os.environ.get("FASTCONFIG_AUTOTUNE") == "1"
"""Try the launches of ``kernels/geometry.py`` at the first call of a kind instead of taking the table's."""

_ADDRESSES_A_LAUNCH = 16
_NO_ADDRESSES = (0,) * 8
"""What a kernel that takes up to 8 separate vectors is given for none."""
_TABLES_KEPT = 256
_ENDLESS = 1 << 16
"""Tiles of a run that need not end."""


def available() -> str | None:
    """Why the kernels cannot run here, or None where they can."""
    if IMPORT_ERROR:
        return f"Triton could not be imported ({IMPORT_ERROR}); pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'"
    if _version() < OLDEST:
        return f"Triton {triton.__version__} is too old; pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'"
    if not INTERPRETED and not torch.cuda.is_available():
        return "PyTorch sees no CUDA or ROCm device"
    return None


@lru_cache(maxsize=64)
def drives(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, or None where they can."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it does not drive {device.type} tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


Returned = TypeVar("Returned")
Arguments = ParamSpec("Arguments")


class HasDevice(Protocol):
    """What lies on a device."""

    @property
    def device(self) -> torch.device:
        """The device."""


Placed = TypeVar("Placed", bound=HasDevice)


def on_its_device(
    function: Callable[Concatenate[Placed, Arguments], Returned],
) -> Callable[Concatenate[Placed, Arguments], Returned]:
    """The function with the device of its first argument made the current one, which is where Triton launches."""

    @wraps(function)
    def call(operand: Placed, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        device = operand.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(operand, *args, **kwargs)
        with torch.cuda.device(device):
            return function(operand, *args, **kwargs)

    return call


@on_its_device
def gramian(rows: Rows) -> Tensor:
    """As reference.gramian, in one launch; a few more where the addresses of over 8 separate vectors are new."""
    result = torch.empty(rows.m, rows.m, dtype=torch.float64, device=rows.device)
    workspace = workspace_for(rows.device)
    with workspace.lock:
        _launch_gramian(_operand(rows, workspace, None), workspace, result, None, None)
    return result


@on_its_device
def apply(rows: Rows, weights: Tensor, out: Tensor) -> None:
    """As reference.apply, in one launch; as in gramian with over 8 separate vectors. Each output is written once."""
    weights = weights.to(torch.float64).contiguous()
    workspace = workspace_for(rows.device)
    with workspace.lock:
        _launch_combination(_operand(rows, workspace, out), workspace, weights, out)


@on_its_device
def graddrop(rows: Rows, leak: Tensor | None, seed: Tensor, column: int, out: Tensor) -> None:
    """As reference.graddrop, in one launch; as in gramian with over 4 separate vectors. Each output is written once.

    The kernel reads the seed from the device: a captured graph draws by what it holds when it is replayed.
    """
    if leak is not None:
        leak = leak.to(torch.float64).contiguous()
    workspace = workspace_for(rows.device)
    with workspace.lock:
        operand = _operand(rows, workspace, out, geometry.DROPPED_TOGETHER)
        _launch_graddrop(operand, leak, seed, column, out)


@on_its_device
def config_weights(gramian: Tensor, rule: ConFIGRule) -> Tensor:
    """As reference.config_weights, in one launch; a callable length model, or over 64 losses, run there."""
    m = len(gramian)
    if callable(rule.length) or m > geometry.SOLVED:
        return reference.config_weights(gramian, rule)
    if rule.nonfinite == "raise":
        reference.raise_if_nonfinite(gramian)
    weights = torch.empty(m, dtype=torch.float64, device=gramian.device)
    workspace = workspace_for(gramian.device)
    with workspace.lock:
        _launch_solve(workspace, gramian.contiguous(), weights, rule)
    return weights


@on_its_device
def config_combine(
    rows: Rows, rule: ConFIGRule, out: Tensor, gramian_out: Tensor | None = None, weights_out: Tensor | None = None
) -> None:
    """As reference.config_combine: two launches, or one where one program does it all. No callable length model."""
    if rows.m > geometry.SOLVED or rule.nonfinite == "raise":
        weights = partial(config_weights, rule=rule)
        reference.combine_in_steps(gramian, weights, apply, rows, out, gramian_out, weights_out)
        return
    workspace = workspace_for(rows.device)
    with workspace.lock:
        workspace.reserve_square(rows.m)
        operand = _operand(rows, workspace, out)
        k = workspace.gramian if gramian_out is None else gramian_out
        c = workspace.weights if weights_out is None else weights_out
        if operand.is_small:
            _launch_few(operand, geometry.one(rows.m), 1, workspace, k, c, rule, out)
        else:
            _launch_gramian(operand, workspace, k, c, rule)
            _launch_combination(operand, workspace, c, out)


@on_its_device
def rule_weights(gramian: Tensor, rule: GramianRule, operand: Tensor | None) -> Tensor:
    """As reference.rule_weights, in one launch; over 64 losses run there."""
    m = len(gramian)
    if m > geometry.SOLVED:
        return reference.rule_weights(gramian, rule, operand)
    if rule.nonfinite == "raise":
        reference.raise_if_nonfinite(gramian)
    weights = torch.empty(m, dtype=torch.float64, device=gramian.device)
    workspace = workspace_for(gramian.device)
    with workspace.lock:
        _launch_rule(workspace, gramian.contiguous(), weights, rule, operand)
    return weights


@on_its_device
def rule_combine(
    rows: Rows,
    rule: GramianRule,
    operand: Tensor | None,
    out: Tensor,
    gramian_out: Tensor | None = None,
    weights_out: Tensor | None = None,
) -> None:
    """As reference.rule_combine, in one launch after the other: Gramian, rule, combination."""
    weights = partial(rule_weights, rule=rule, operand=operand)
    reference.combine_in_steps(gramian, weights, apply, rows, out, gramian_out, weights_out)


class Device(NamedTuple):
    """What a launch needs to know of a device."""

    multiprocessors: int
    lanes: int
    """Threads of a warp (NVIDIA) or wavefront (AMD)."""
    has_matrix_units: bool
    """Whether this Triton compiles float64 matrix products for it."""
    has_quick_float64: bool
    """Whether its float64 rate is not much lower than that of float32: see ``kernels/two_float.py``."""
    limits_registers: bool
    """Whether a launch may say how many registers a thread gets."""
    barrier_orders_all: bool
    """Whether a barrier orders what its threads stored for the whole device; see ``kernels/arrival.py``."""

    @property
    def one_launch_bytes(self) -> int:
        """Up to how many bytes of gradients one program does everything."""
        quick: int = geometry.ONE_LAUNCH_BYTES
        return quick if self.has_quick_float64 else int(geometry.ONE_LAUNCH_BYTES_OF_FEW_UNITS)

    def fence(self, warps: int) -> int:
        """FENCE of a launch of so many warps."""
        return 0 if self.barrier_orders_all else warps * self.lanes


class Operand(NamedTuple):
    """Rows as the kernels take them."""

    pointer: Tensor
    """A tensor that begins with the first row, a table of more than 8 vectors' addresses, or one of fewer vectors."""
    stride: int
    """Elements from one row to the next; 0 for separate vectors."""
    addresses: tuple[int, ...]
    """Where up to 8 separate vectors begin, and zeros."""
    separate: bool
    """Whether they do."""
    aligned: bool
    """Whether every row, and the output, begins at a multiple of 16 bytes."""
    m: int
    n: int
    dtype: torch.dtype
    device: torch.device

    vector: int
    """Elements of a thread's widest load."""
    is_small: bool
    """Whether one program is the quickest to do it all."""
    run: int
    """How many tiles ``two_float`` sums at most before their sums join those in float64; 0 where all sums are."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What a compilation depends on of it."""
        return self.separate, self.aligned, self.m, self.dtype, self.device, self.pointer.dtype, self.run

    def constants(self) -> dict[str, object]:
        """The same as arguments of a kernel that takes separate vectors, too."""
        return {"SEPARATE": self.separate, "ALIGNED": self.aligned}


@dataclass
class Workspace:
    """Memory that launches on one stream share: partial sums, tickets, and the m×m numbers.

    Launches of one stream follow each other, so one workspace a stream is enough, as long as no other thread's
    launches come between two that belong together: hence the lock. It may be taken again by its holder: compiling a
    kernel under it runs whatever Python runs meanwhile.
    """

    device: torch.device

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.partials = torch.empty(0, dtype=torch.float64, device=self.device)
        self.tickets = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.gramian = self.weights = self.scratch = self.decision = self.partials
        self.tables: dict[object, Tensor] = {}
        self.rule_scratch = self.partials
        # What there is room for; asking a tensor takes longer.
        self._m = self._partials = self._tickets = self._rule_scratch = 0

    def reserve_square(self, m: int) -> None:
        """Make room for solving the m×m problem; as in ``reserve_sums``, a steady state allocates nothing."""
        if m > self._m:
            self.gramian = self.partials.new_empty(m * m)
            self.weights = self.partials.new_empty(m)
            self.scratch = self.partials.new_empty(geometry.scratch_elements(m))
            self.decision = self.partials.new_empty(HEAD + 3 * m)
            self._m = m  # last: memory may run out

    def reserve_rule(self, elements: int) -> None:
        """Make room for a method's rule."""
        if elements > self._rule_scratch:
            self.rule_scratch = self.partials.new_empty(elements)
            self._rule_scratch = elements

    def reserve_sums(self, partials: int, tickets: int) -> None:
        """Make room for partial sums and tickets."""
        if partials > self._partials:
            self.partials = self.partials.new_empty(partials)
            self._partials = partials
        if tickets > self._tickets:
            self.tickets = self.tickets.new_zeros(tickets)  # zeros once: every launch leaves them so
            self._tickets = tickets

    def table(self, key: object, words: int, write: Callable[[Tensor], None]) -> Tensor:
        """A table of int64 that begins as zeros, written by ``write`` at the first call with this key, then kept.

        Nobody writes it again, so a launch that reads it may be any time away.
        """
        table = self.tables.get(key)
        if table is None:
            if len(self.tables) >= _TABLES_KEPT:
                self.tables.clear()  # the memory is given out again on this stream alone, behind what reads it now
            table = torch.zeros(words, dtype=torch.int64, device=self.device)
            write(table)
            self.tables[key] = table
        return table

    def table_for(self, addresses: tuple[int, ...]) -> Tensor:
        """The (m,) addresses on the device, written there by launches where they are new: no copy from the host."""

        def write(table: Tensor) -> None:
            options = compiler_options(self.device, 1, 1)
            for first in range(0, len(addresses), _ADDRESSES_A_LAUNCH):
                some = addresses[first : first + _ADDRESSES_A_LAUNCH]
                padding = (0,) * (_ADDRESSES_A_LAUNCH - len(some))
                arguments = (table, first, len(some), *some, *padding)
                launch_kernel(launched.table_of_addresses, 1, self.device, arguments, lambda: ({}, options))

        return self.table(addresses, len(addresses), write)


_WORKSPACES: dict[tuple[torch.device, int], Workspace] = {}
_WORKSPACES_LOCK = threading.Lock()


def workspace_for(device: torch.device) -> Workspace:
    """The workspace of the current stream of a device, which is the current one.

    PyTorch's own streams live as long as the process. One of another library that is destroyed with launches under way
    may hand its number, and so its workspace, on too early.
    """
    stream = 0
    if device.type == "cuda":
        # A graph keeps the memory that it was captured with, and may be replayed beside anything: it gets its own.
        if torch.cuda.is_current_stream_capturing():
            return Workspace(device)
        stream = torch.cuda.current_stream(device).cuda_stream
    workspace = _WORKSPACES.get((device, stream))
    if workspace is None:
        with _WORKSPACES_LOCK:
            workspace = _WORKSPACES.setdefault((device, stream), Workspace(device))
    return workspace


@lru_cache(maxsize=256)
def compiler_options(device: torch.device, warps: int, programs: int) -> dict[str, object]:
    """Compiler options of a launch of which ``programs`` are to run on a multiprocessor at once."""
    options: dict[str, object] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}  # the kernels do both
    if device_of(device).limits_registers:
        options["maxnreg"] = geometry.registers(warps, programs)
    return options


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """What a launch needs to know of this device."""
    if INTERPRETED:
        return Device(
            2, 32, has_matrix_units=True, has_quick_float64=True, limits_registers=True, barrier_orders_all=True
        )
    properties = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    lanes = getattr(properties, "warp_size", 32 if nvidia else 64)  # an attribute of newer PyTorch
    name = getattr(properties, "gcnArchName", "")
    capability = (properties.major, properties.minor)
    return describe(properties.multi_processor_count, lanes, nvidia, capability, name)


def describe(
    multiprocessors: int, lanes: int, nvidia: bool, capability: tuple[int, int] = (0, 0), name: str = ""
) -> Device:
    """What a launch needs to know of a device of this size and NVIDIA's compute capability or AMD's name."""
    newest = _version() >= OLDEST_WITH_ALL_MATRIX_UNITS
    if nvidia:
        matrix_units = capability in ((8, 0), (9, 0)) or (newest and (10, 0) <= capability < (12, 0))
        quick = capability in _WITH_QUICK_FLOAT64
    else:
        matrix_units = newest and name.startswith(_WITH_FLOAT64_MATRIX_UNITS)
        quick = name.startswith(_AMD_WITH_QUICK_FLOAT64)
    return Device(multiprocessors, lanes, matrix_units, quick, limits_registers=nvidia, barrier_orders_all=nvidia)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


def _operand(rows: Rows, workspace: Workspace, out: Tensor | None, few: int | None = None) -> Operand:
    """Rows as the kernels take them, on the workspace's device; up to ``few`` separate vectors go without a table."""
    m, n, dtype, device, matrix, vectors = rows
    itemsize = dtype.itemsize
    starts = 0 if out is None else out.data_ptr()  # of several numbers, a bit is set where it is set in any of them
    addresses: tuple[int, ...] = _NO_ADDRESSES
    separate = False
    if n and out is not None and not starts:
        raise ValueError(f"out {WITHOUT_MEMORY}")
    if matrix is not None:
        pointer, stride = matrix, matrix.stride(0) if m > 1 else 0
        start = matrix.data_ptr()
        if n and not start:
            raise ValueError(f"grads {WITHOUT_MEMORY}")
        starts |= start | stride * itemsize
    else:
        own = tuple(vector.data_ptr() for vector in vectors)
        if n and 0 in own:
            raise ValueError(f"grads[{own.index(0)}] {WITHOUT_MEMORY}")
        for start in own:
            starts |= start
        separate = m <= (few or geometry.FEW)
        stride = 0
        if separate:
            pointer, addresses = vectors[0], own + _NO_ADDRESSES[m:]
        else:
            pointer = workspace.table_for(own)
    widest = geometry.VECTOR_BYTES
    on = device_of(device)
    small = m <= geometry.FEW and m * n * itemsize <= on.one_launch_bytes
    run = 0 if on.has_quick_float64 or itemsize == 8 else geometry.RUN_COLUMNS * itemsize // widest
    aligned = starts % widest == 0
    return Operand(pointer, stride, addresses, separate, aligned, m, n, dtype, device, widest // itemsize, small, run)


def _launch_gramian(
    operand: Operand, workspace: Workspace, k: Tensor, c: Tensor | None, rule: ConFIGRule | None
) -> None:
    """K into ``k`` and, where a rule is given, ConFIG's weights into ``c``."""
    device = device_of(operand.device)

    def launch_few(launch: geometry.Few) -> None:
        tile = launch.warps * device.lanes * operand.vector * launch.unroll
        programs = geometry.programs(
            operand.n, tile, launch.programs * device.multiprocessors, launch.group, device.multiprocessors
        )
        _launch_few(operand, launch, programs, workspace, k, c, rule, None)

    def launch_many(launch: geometry.Many) -> None:
        _launch_many(operand, launch, workspace, k, c, rule)

    if operand.m > geometry.FEW and (operand.run or not device.has_matrix_units):
        _launch_blocks(operand, geometry.blocks(operand.m), workspace, k, c, rule)
    elif operand.m > geometry.FEW:
        launch_many(tuned(geometry.many(operand.m, operand.dtype.itemsize, device.lanes), operand, launch_many))
    elif operand.is_small:
        _launch_few(operand, geometry.one(operand.m), 1, workspace, k, c, rule, None)
    elif operand.run:
        launch_few(geometry.few_in_two_floats(operand.m))
    else:
        launch_few(tuned(geometry.few(operand.m), operand, launch_few))


def _launch_few(
    operand: Operand,
    launch: geometry.Few,
    programs: int,
    workspace: Workspace,
    k: Tensor,
    c: Tensor | None,
    rule: ConFIGRule | None,
    out: Tensor | None,
) -> None:
    partials = tickets = None
    if programs > 1 or operand.run:
        groups = -(-programs // launch.group)
        shares = programs + groups + (programs if operand.run else 0)
        workspace.reserve_sums(shares * geometry.pairs(operand.m), 1 + groups)
        partials = workspace.partials
        tickets = workspace.tickets if programs > 1 else None
    direction = direction_on(rule, operand.device)
    tracked, rtol, constants = rule_numbers(rule, operand.m)
    has = (tickets is not None, c is not None, out is not None, direction is not None)
    kind = (operand.kind, launch, constants, has)
    launch_kernel(
        launched.config_of_few,
        programs,
        kind,
        (
            operand.pointer,
            operand.stride,
            operand.n,
            *operand.addresses,
            partials,
            tickets,
            k,
            c,
            out,
            direction,
            tracked,
            rtol,
            workspace.scratch,
        ),
        lambda: (
            {
                **operand.constants(),
                **dict(constants),
                **few_constants(launch, operand.m, operand.vector, operand.device),
                "RUN": operand.run,
            },
            compiler_options(operand.device, launch.warps, launch.programs),
        ),
    )


def few_constants(launch: geometry.Few, m: int, vector: int, device: torch.device) -> dict[str, object]:
    """The constants that say how a Gramian of up to 8 rows is launched."""
    return {
        "PAIRS": geometry.pairs(m),
        "THREADS": launch.warps * device_of(device).lanes,
        "VECTOR": vector,
        "UNROLL": launch.unroll,
        "GROUP": launch.group,
        "FENCE": device_of(device).fence(launch.warps),
    }


def _launch_blocks(
    operand: Operand,
    launch: geometry.Blocks,
    workspace: Workspace,
    k: Tensor,
    c: Tensor | None,
    rule: ConFIGRule | None,
) -> None:
    device = device_of(operand.device)
    threads = launch.warps * device.lanes
    block_pairs = launch.block_pairs(operand.m)
    most = launch.most(operand.m, device.multiprocessors)
    programs = geometry.programs(operand.n, threads * operand.vector, most, launch.group)
    groups = -(-programs // launch.group)
    pairs = geometry.power_of_two(launch.block**2)
    workspace.reserve_sums(block_pairs * (2 * programs + groups) * pairs, 1 + block_pairs * (1 + groups))
    constants = {
        "BLOCK": launch.block,
        "PAIRS": pairs,
        "THREADS": threads,
        "VECTOR": operand.vector,
        "RUN": operand.run or _ENDLESS,
        "TWO_FLOAT": operand.run > 0,
    }
    _launch_by_table(
        launched.config_of_blocks, programs * block_pairs, operand, launch, workspace, k, c, rule, constants
    )


def _launch_many(
    operand: Operand,
    launch: geometry.Many,
    workspace: Workspace,
    k: Tensor,
    c: Tensor | None,
    rule: ConFIGRule | None,
) -> None:
    strip_pairs = launch.strip_pairs(operand.m)
    most = max(1, launch.programs * device_of(operand.device).multiprocessors // strip_pairs)
    programs = geometry.programs(operand.n, launch.warps * launch.depth, most, launch.group)
    groups = -(-programs // launch.group)
    workspace.reserve_sums(
        strip_pairs * (programs + groups) * launch.partial_elements(), 1 + strip_pairs * (1 + groups)
    )
    constants = {"LEFT": launch.left, "RIGHT": launch.right, "WARPS": launch.warps, "DEPTH": launch.depth}
    _launch_by_table(launched.config_of_many, programs * strip_pairs, operand, launch, workspace, k, c, rule, constants)


def _launch_by_table(
    kernel: Kernel,
    programs: int,
    operand: Operand,
    launch: geometry.Blocks | geometry.Many,
    workspace: Workspace,
    k: Tensor,
    c: Tensor | None,
    rule: ConFIGRule | None,
    shape: dict[str, object],
) -> None:
    """A kernel of more than 8 losses, which reads separate rows by a table; ``shape`` are the constants of it alone."""
    direction = direction_on(rule, operand.device)
    tracked, rtol, constants = rule_numbers(rule, operand.m)
    launch_kernel(
        kernel,
        programs,
        (operand.kind, launch, constants, c is not None, direction is not None),
        (
            operand.pointer,
            operand.stride,
            operand.n,
            workspace.partials,
            workspace.tickets,
            k,
            c,
            direction,
            tracked,
            rtol,
            workspace.scratch,
        ),
        lambda: (
            {
                **dict(constants),
                **shape,
                "ALIGNED": operand.aligned,
                "DTYPE": DTYPES[operand.dtype],
                "GROUP": launch.group,
                "FENCE": device_of(operand.device).fence(launch.warps),
            },
            compiler_options(workspace.device, launch.warps, launch.programs),
        ),
    )


def _launch_solve(workspace: Workspace, gramian: Tensor, weights: Tensor, rule: ConFIGRule) -> None:
    m = len(gramian)
    workspace.reserve_square(m)
    direction = direction_on(rule, workspace.device)
    tracked, rtol, constants = rule_numbers(rule, m)
    launch_kernel(
        launched.config_of_gramian,
        1,
        (workspace.device, gramian.dtype, constants, direction is not None),
        (gramian, weights, direction, tracked, rtol, workspace.scratch),
        lambda: (dict(constants), compiler_options(workspace.device, geometry.solve_warps(m), 1)),
    )


def _launch_rule(
    workspace: Workspace, gramian: Tensor, weights: Tensor, rule: GramianRule, operand: Tensor | None
) -> None:
    m, device = len(gramian), workspace.device
    parts = m if rule.kind == "upgrad" else 0
    warps = geometry.solve_warps(m, parts)
    workspace.reserve_rule(geometry.rule_elements(m, parts))
    workspace.reserve_sums(0, 1)
    preferences = numbers_on(rule, "preferences", m, device)
    if rule.kind == "priority":
        operand = numbers_on(rule, "places", m, device)
    numbers, constants = gramian_rule_numbers(rule, m)
    tickets = workspace.tickets if parts else None
    launch_kernel(
        launched_rules.rule_of_gramian,
        max(1, parts),
        (device, gramian.dtype, constants, preferences is not None, None if operand is None else operand.dtype),
        (gramian, weights, preferences, operand, *numbers, workspace.rule_scratch, tickets),
        lambda: ({**dict(constants), "FENCE": device_of(device).fence(warps)}, compiler_options(device, warps, 1)),
    )


_BY_SHARES = ("cagrad", "aligned", "dualproj", "upgrad", "sdmgrad")
"""Kinds that take the preferences over their sum."""
_ONLY_PREFERRED = ("inverse_norm", "cagrad", "nash", "fairgrad")
"""Kinds in which a row of preference 0 takes no part."""


@lru_cache(maxsize=256)
def gramian_rule_numbers(rule: GramianRule, m: int) -> tuple[tuple[float, ...], tuple[tuple[str, object], ...]]:
    """(a method's four numbers, the constants that say which rule is applied)."""
    numbers = rule.parameters
    if rule.kind == "cagrad":
        c, rescale = numbers
        numbers = c, (1.0, 1.0 + c * c, 1.0 + c)[int(rescale)]
    elif rule.kind == "nash":
        numbers = 1.0, *numbers
    elif rule.kind == "fairgrad":
        numbers = 1.0 / numbers[0], 0.0
    elif rule.kind == "priority":
        numbers = ()
    constants: dict[str, object] = {
        "M": m,
        "MP": geometry.power_of_two(m),
        "KIND": gramian_rules.KIND_NAMES.index(rule.kind),
        "DROP": rule.nonfinite == "drop",
        "SHARES": rule.kind in _BY_SHARES,
        "ONLY_PREFERRED": rule.kind in _ONLY_PREFERRED,
    }
    return (*numbers, *(0.0,) * 4)[:4], tuple(constants.items())


def numbers_on(rule: GramianRule, name: str, m: int, device: torch.device) -> Tensor | None:
    """A rule's preferences, or its losses' places in Priority's order, on a device; kept as by ``direction_on``."""
    numbers: Sequence[float] | None = rule.preferences
    if name == "places":
        order = [int(loss) for loss in rule.parameters] or range(m)
        numbers = [float(order.index(loss)) for loss in range(m)]
    if numbers is None:
        return None
    kept: dict[tuple[str, int, torch.device], Tensor] = rule.__dict__.setdefault("_kept", {})
    if (name, m, device) not in kept:
        kept[name, m, device] = torch.tensor(numbers, dtype=torch.float64, device=device)
    return kept[name, m, device]


def _launch_combination(operand: Operand, workspace: Workspace, weights: Tensor, out: Tensor) -> None:
    device = device_of(workspace.device)

    def launch_combination(launch: geometry.Combination) -> None:
        tile = launch.warps * device.lanes * operand.vector
        launch_kernel(
            launched.combination,
            geometry.programs(operand.n, tile, launch.programs * device.multiprocessors),
            (operand.kind, launch),
            (operand.pointer, operand.stride, operand.n, *operand.addresses, weights, out),
            lambda: (
                {
                    **operand.constants(),
                    "M": operand.m,
                    "THREADS": launch.warps * device.lanes,
                    "VECTOR": operand.vector,
                },
                compiler_options(workspace.device, launch.warps, launch.programs),
            ),
        )

    launch_combination(tuned(geometry.combination(operand.m), operand, launch_combination))


def _launch_graddrop(operand: Operand, leak: Tensor | None, seed: Tensor, column: int, out: Tensor) -> None:
    device = device_of(operand.device)
    split = column % WORDS != 0
    launch = geometry.graddrop(operand.m, operand.dtype.itemsize, split)
    tile = launch.warps * device.lanes * operand.vector
    launch_kernel(
        launched.graddrop,
        geometry.programs(operand.n, tile, launch.programs * device.multiprocessors),
        (operand.kind, launch, split, leak is not None),
        (
            operand.pointer,
            operand.stride,
            operand.n,
            *operand.addresses[: geometry.DROPPED_TOGETHER],
            leak,
            seed,
            column,
            out,
        ),
        lambda: (
            {
                **operand.constants(),
                "SPLIT": split,
                "M": operand.m,
                "THREADS": launch.warps * device.lanes,
                "VECTOR": operand.vector,
            },
            compiler_options(operand.device, launch.warps, launch.programs),
        ),
    )


RuleNumbers = tuple[int, float, tuple[tuple[str, object], ...]]


@lru_cache(maxsize=256)
def rule_numbers(rule: ConFIGRule | None, m: int) -> RuleNumbers:
    """(the loss whose norm is tracked, rtol, the constants of the rule that the last program applies).

    Without a rule, of values that nothing uses.
    """
    length, tracked, rtol, drops = 0, 0, 0.0, False
    if rule is not None:
        rtol, drops = rule.rtol, rule.nonfinite == "drop"
        if isinstance(rule.length, int):
            length, tracked = len(LENGTH_NAMES), rule.length % m
        else:
            length = LENGTH_NAMES.index(str(rule.length))
    constants = {"M": m, "MP": geometry.power_of_two(m), "LENGTH": length, "DROP": drops}
    return tracked, rtol, tuple(constants.items())


def direction_on(rule: ConFIGRule | None, device: torch.device) -> Tensor | None:
    """The direction weights on a device, copied there once, at the first combination with them.

    The rule keeps them, not a cache: a captured graph reads them for as long as its method lives.
    """
    if rule is None or rule.direction is None:
        return None
    kept: dict[torch.device, Tensor] = rule.__dict__.setdefault("_directions", {})
    if device not in kept:
        kept[device] = torch.tensor(rule.direction, dtype=torch.float64, device=device)
    return kept[device]


Launch = TypeVar("Launch")
_TUNED: dict[tuple[object, ...], object] = {}


def tuned(candidates: Sequence[Launch], operand: Operand, launch: Callable[[Launch], None]) -> Launch:
    """The table's choice, the first; with FASTCONFIG_AUTOTUNE=1 the quickest on this device, tried once a kind of size.

    A kind is m, the dtype, the alignment and n to the next power of two. Trying waits for the device, and is left out
    while a graph is captured on this stream; none may be captured on another meanwhile.
    """
    if not AUTOTUNE or len(candidates) == 1:
        return candidates[0]
    size = operand.n.bit_length()
    key = (type(candidates[0]), operand.m, size, operand.dtype, operand.aligned, operand.device)
    if key not in _TUNED:
        if operand.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _TUNED[key] = min(candidates, key=lambda candidate: _median_time(lambda: launch(candidate)))
    return cast("Launch", _TUNED[key])


def _median_time(call: Callable[[], None]) -> float:
    try:
        call()
    except triton.runtime.errors.OutOfResources:
        return float("inf")  # this device has too little for this launch
    return float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median"))
