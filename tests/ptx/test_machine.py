"""The machine on kernels written by hand: what opcodes mean, and that it sees what a kernel must not do."""

from __future__ import annotations

import ctypes
import math
import re
import struct

import numpy as np
import pytest
import torch

from ptx.emulator import EmulationError, Latencies, Outcome, Program
from ptx.syntax import Kernel, SyntaxUnknownError

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<99>;
	.reg .f64 	%fd<99>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mul.wide.u32 	%rd3, %r1, 8;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
{body}
	ret;
}}
"""
"""%r1: the thread; %r2: the program; %rd4 and %rd5: the thread's 8 bytes of either array."""
TICKET = "atom.global.gpu.acq_rel.add.u32 %r20, [ %rd2 + 0 ], 1;"
SYNCHRONOUS = Latencies(
    **dict.fromkeys(("integer", "shuffle", "shared", "first_level", "second_level", "atomic", "branch"), 5.0),
    **dict.fromkeys(("float64", "division", "special", "matrix"), 20.0),
    barrier=30.0,
    **dict.fromkeys(("float64_interval", "division_interval", "special_interval", "matrix_interval"), 2.0),
    float64_units=4,
)


def program_of(body: str, warps: int = 1, shared_bytes: int = 4096) -> Program:
    return Program(Kernel(HEAD.format(threads=32 * warps, body=body)), shared_bytes)


def run(body: str, first: np.ndarray, second: np.ndarray, programs: int = 1, warps: int = 1, **how) -> Outcome:
    spans = [(array.ctypes.data, array.nbytes) for array in (first, second)]
    addresses = [array.ctypes.data for array in (first, second)]
    return program_of(body, warps).run(programs, addresses, spans, **how)


def words(values: list[float] | list[int], code: str = "d") -> np.ndarray:
    """Values in the lowest bytes of 64-bit words, one a thread, the last repeated."""
    packed = [struct.unpack("<Q", struct.pack(f"<{code}", value).ljust(8, b"\0"))[0] for value in values]
    return np.array(packed + packed[-1:] * (32 - len(packed)), np.uint64)


def results(line: str, *operands: list, code: str = "d", out: str = "d", count: int) -> list:
    """What ``line`` makes of operands a, b and c, in ``%rd50`` and on, into ``%rd60``."""
    arrays = [words(operand, code) for operand in operands]
    given, made = np.concatenate(arrays), np.zeros(32, np.uint64)
    loads = "".join(f"ld.global.b64 %rd{50 + k}, [ %rd4 + {256 * k} ];\n" for k in range(len(arrays)))
    outcome = run(f"{loads}{line}\nst.global.b64 [ %rd5 + 0 ], {{ %rd60 }};", given, made)
    assert not outcome.races
    size = struct.calcsize(out)
    return [struct.unpack(f"<{out}", int(word).to_bytes(8, "little")[:size])[0] for word in made[:count]]


INF, NAN = math.inf, math.nan
FLOATS = {
    "add.rn.f64 %rd60, %rd50, %rd51;": ([1.0, INF, 1e300], [2.0, -1.0, 1e300], [3.0, INF, 2e300]),
    "sub.rn.f64 %rd60, %rd50, %rd51;": ([1.0], [2.0], [-1.0]),
    "mul.rn.f64 %rd60, %rd50, 0d4000000000000000;": ([1.5, -INF], [0.0], [3.0, -INF]),
    "div.rn.f64 %rd60, %rd50, %rd51;": ([1.0, 1.0], [3.0, 0.0], [1 / 3, INF]),
    "sqrt.rn.f64 %rd60, %rd50;": ([2.0], [0.0], [math.sqrt(2)]),
    "min.f64 %rd60, %rd50, %rd51;": ([1.0, NAN, -0.0], [2.0, 5.0, 0.0], [1.0, 5.0, -0.0]),
    "max.f64 %rd60, %rd50, %rd51;": ([1.0, NAN, -0.0], [2.0, 5.0, 0.0], [2.0, 5.0, 0.0]),
    "neg.f64 %rd60, %rd50;": ([0.0, 2.0], [0.0], [-0.0, -2.0]),
    "abs.f64 %rd60, %rd50;": ([-3.0, 2.0], [0.0], [3.0, 2.0]),
    "copysign.f64 %rd60, %rd50, %rd51;": ([-1.0], [5.0], [-5.0]),
    "setp.lt.f64 %p1, %rd50, %rd51;\nselp.f64 %rd60, %rd50, %rd51, %p1;": ([1.0, NAN], [2.0, 3.0], [1.0, 3.0]),
    "setp.ltu.f64 %p1, %rd50, %rd51;\nselp.f64 %rd60, 1, 0, %p1;": ([1.0, NAN], [2.0, 3.0], [1.0, 1.0]),
}


@pytest.mark.parametrize("line", FLOATS)
def test_arithmetic_of_float64(line: str) -> None:
    a, b, wanted = FLOATS[line]
    got = results(line, a, b, count=len(wanted))
    assert [struct.pack("<d", value) for value in got] == [struct.pack("<d", value) for value in wanted]


def test_fused_multiply_adds_round_once() -> None:
    tiny = 2.0**-53
    (got,) = results("fma.rn.f64 %rd60, %rd50, %rd51, %rd52;", [1 + 2 * tiny], [1 - tiny], [-1.0], count=1)
    assert got == tiny - 2 * tiny * tiny


INTEGERS = {
    "add.s64 %rd60, %rd50, %rd51;": ("q", [5, 2**63 - 1], [-7, 1], [-2, -(2**63)]),
    "sub.s64 %rd60, %rd50, %rd51;": ("q", [5], [7], [-2]),
    "mul.lo.s64 %rd60, %rd50, %rd51;": ("q", [-5, 2**40], [7, 2**30], [-35, 0]),
    "mul.hi.u64 %rd60, %rd50, %rd51;": ("Q", [2**63], [6], [3]),
    "mad.lo.s64 %rd60, %rd50, %rd51, -1;": ("q", [-5], [7], [-36]),
    "shl.b64 %rd60, %rd50, 3;": ("q", [-1], [0], [-8]),
    "shr.s64 %rd60, %rd50, 3;": ("q", [-17], [0], [-3]),
    "shr.u64 %rd60, %rd50, 64;": ("q", [-17], [0], [0]),
    "and.b64 %rd60, %rd50, %rd51;": ("Q", [12], [10], [8]),
    "or.b64 %rd60, %rd50, %rd51;": ("Q", [12], [10], [14]),
    "xor.b64 %rd60, %rd50, %rd51;": ("Q", [12], [10], [6]),
    "min.s64 %rd60, %rd50, %rd51;": ("q", [-1, 4], [1, 3], [-1, 3]),
    "max.u64 %rd60, %rd50, %rd51;": ("Q", [2**64 - 1], [1], [2**64 - 1]),
    "div.s64 %rd60, %rd50, %rd51;": ("q", [-7], [2], [-3]),
    "rem.s64 %rd60, %rd50, %rd51;": ("q", [-7], [2], [-1]),
    "setp.gt.s64 %p1, %rd50, %rd51;\nselp.b64 %rd60, 1, 2, %p1;": ("q", [-1, 3], [1, 2], [2, 1]),
    "setp.gt.u64 %p1, %rd50, %rd51;\nselp.b64 %rd60, 1, 2, %p1;": ("q", [-1, 3], [1, 2], [1, 1]),
}


@pytest.mark.parametrize("line", INTEGERS)
def test_arithmetic_of_integers(line: str) -> None:
    code, a, b, wanted = INTEGERS[line]
    assert results(line, a, b, code=code, out=code, count=len(wanted)) == wanted


NARROW = {
    "mul.wide.s32 %rd60, %r3, %r4;": ([-3, 2**31 - 1], [5, 4], [-15, 2**33 - 4]),
    "mad.wide.u32 %rd60, %r3, %r4, 1;": ([-3], [2], [2 * (2**32 - 3) + 1]),
    "mul.hi.u32 %r5, %r3, %r4;\ncvt.u64.u32 %rd60, %r5;": ([-1], [-1], [2**32 - 2]),
    "bfe.u32 %r5, %r3, 4, 8;\ncvt.u64.u32 %rd60, %r5;": ([0xABCD], [0], [0xBC]),
    "bfe.s32 %r5, %r3, 4, 8;\ncvt.s64.s32 %rd60, %r5;": ([0xABCD], [0], [0xBC - 256]),
    "prmt.b32 %r5, %r3, %r4, 0x5410;\ncvt.u64.u32 %rd60, %r5;": ([0x11112222], [0x33334444], [0x44442222]),
    "not.b32 %r5, %r3;\ncvt.u64.u32 %rd60, %r5;": ([0], [0], [2**32 - 1]),
    "shf.l.wrap.b32 %r5, %r3, %r4, 8;\ncvt.u64.u32 %rd60, %r5;": ([0x11223344], [0x55667788], [0x66778811]),
    "cvt.u16.u32 %rs1, %r3;\ncvt.u64.u16 %rd60, %rs1;": ([0x12345], [0], [0x2345]),
    "cvt.rn.f64.u32 %rd61, %r3;\ncvt.rzi.s64.f64 %rd60, %rd61;": ([-1], [0], [2**32 - 1]),
}


@pytest.mark.parametrize("line", NARROW)
def test_arithmetic_of_narrow_integers(line: str) -> None:
    a, b, wanted = NARROW[line]
    narrowed = f"cvt.u32.u64 %r3, %rd50;\ncvt.u32.u64 %r4, %rd51;\n{line}"
    assert results(narrowed, a, b, code="q", out="q", count=len(wanted)) == wanted


ROUNDED = [0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-9, 1e-45, 3e38, -2.5, 1e-40, 65519.0, 65520.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_is_pytorchs(dtype: torch.dtype) -> None:
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    line = f"cvt.rn.f32.f64 %r3, %rd50;\ncvt.rn.{name}.f32 %rs1, %r3;\ncvt.f64.{name} %rd60, %rs1;"
    got = results(line, ROUNDED, count=len(ROUNDED))
    assert got == torch.tensor(ROUNDED, dtype=torch.float32).to(dtype).double().tolist()


def test_registers_are_split_and_joined() -> None:
    line = "mov.b64 {%r3, %r4}, %rd50;\nmov.b64 %rd60, {%r4, %r3};"
    assert results(line, [0x0123456789ABCDEF], code="Q", out="Q", count=1) == [0x89ABCDEF01234567]


def test_registers_of_an_inner_scope_are_its_own() -> None:
    line = "\t{\n.reg .b64 %rd50;\nmov.b64 %rd50, 7;\n\t}\nmov.b64 %rd60, %rd50;"
    assert results(line, [5], code="Q", out="Q", count=1) == [5]


def test_shuffles_votes_and_reductions() -> None:
    lanes = list(range(32))
    head = "cvt.u32.u64 %r3, %rd50;\n"
    tail = "\ncvt.u64.u32 %rd60, %r4;"
    for line, wanted in (
        ("shfl.sync.bfly.b32 %r4, %r3, 5, 31, -1;", [lane ^ 5 for lane in lanes]),
        ("shfl.sync.idx.b32 %r4|%p1, %r3, 9, 31, -1;", [9] * 32),
        ("shfl.sync.up.b32 %r4, %r3, 1, 0, -1;", [0, *lanes[:-1]]),
        ("shfl.sync.down.b32 %r4, %r3, 1, 31, -1;", [*lanes[1:], 31]),
        ("redux.sync.add.s32 %r4, %r3, -1;", [sum(lanes)] * 32),
        ("redux.sync.max.s32 %r4, %r3, -1;", [31] * 32),
        ("setp.lt.u32 %p1, %r3, 3;\nvote.sync.ballot.b32 %r4, %p1, -1;", [7] * 32),
    ):
        assert results(head + line + tail, lanes, code="Q", out="Q", count=32) == wanted


def fragments(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> list[float]:
    return [float(matrix[row, column]) for row, column in zip(rows, columns, strict=True)]


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_matrix_products_of_16_rows(depth: int) -> None:
    """By the layouts of the PTX manual's "Matrix Fragments for mma.m16n8k4 with .f64" and the two after it."""
    generator = np.random.default_rng(depth)
    a, b, c = (generator.integers(-9, 9, shape).astype(float) for shape in ((16, depth), (depth, 8), (16, 8)))
    lane = np.arange(32)
    group, place = lane // 4, lane % 4
    of_a = [fragments(a, group + k % 2 * 8, place + k // 2 * 4) for k in range(depth // 2)]
    of_b = [fragments(b, place + k * 4, group) for k in range(depth // 4)]
    of_c = [fragments(c, group + k // 2 * 8, place * 2 + k % 2) for k in range(4)]
    names = [f"%rd{10 + k}" for k in range(len(of_a) + len(of_b) + 4)]
    groups = names[: len(of_a)], names[len(of_a) : -4], names[-4:]
    loads = "".join(f"ld.global.b64 {name}, [ %rd4 + {256 * k} ];\n" for k, name in enumerate(names))
    listed = ", ".join("{ " + ", ".join(some) + " }" for some in groups)
    line = f"mma.sync.aligned.m16n8k{depth}.row.col.f64.f64.f64.f64 {{ %fd1, %fd2, %fd3, %fd4 }}, {listed};\n"
    stores = "".join(f"st.global.b64 [ %rd5 + {256 * k} ], {{ %fd{k + 1} }};\n" for k in range(4))
    made = np.zeros((4, 32))
    run(loads + line + stores, np.array([*of_a, *of_b, *of_c]), made)
    wanted = a @ b + c
    for k in range(4):
        assert made[k].tolist() == fragments(wanted, group + k // 2 * 8, place * 2 + k % 2)


def test_matrices_of_16_bits_pass_through_shared_memory_and_are_transposed() -> None:
    given, made = np.arange(32, dtype=np.uint64) * 0x20001 + 0x10000, np.zeros(32, np.uint64)
    body = """
        ld.global.b64 %rd6, [ %rd4 + 0 ];
        cvt.u32.u64 %r3, %rd6;
        and.b32 %r4, %r1, 7;
        shl.b32 %r5, %r4, 4;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [ %r5 + 0 ], { %r3 };
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 { %r6 }, [ %r5 + 0 ];
        cvt.u64.u32 %rd7, %r6;
        st.global.b64 [ %rd5 + 0 ], { %rd7 };
    """
    assert not run(body, given, made).races
    halves = given.view(np.uint16).reshape(32, 4)[:, :2].reshape(8, 8)
    assert made.view(np.uint16).reshape(32, 4)[:, :2].reshape(8, 8).tolist() == halves.T.tolist()


# What a kernel must not do.


def arrays(words: int = 256) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(words), np.zeros(words)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ld.global.b64 %rd6, [ %rd4 + 1800 ];", r"out of bounds: read of 8 bytes.*instruction \d+.*ld.global"),
        ("st.global.b64 [ %rd4 + -8 ], { %rd1 };", "out of bounds: write of 8 bytes"),
        ("ld.global.v2.b64 { %rd6, %rd7 }, [ %rd4 + 0 ];", "misaligned: read of 16 bytes"),
        ("st.shared.b64 [ %r1 + 4096 ], { %rd1 };", "out of bounds: write of shared memory"),
        ("ld.shared.b32 %r3, [ %r1 + 4093 ];", "out of bounds: read of shared memory"),
        ("@%p1 bar.sync 0;", "lanes do not all reach the barrier"),
        ("setp.lt.u32 %p1, %r1, 8;\n@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "lanes do not all take part"),
        ("$L__again:\nbra.uni $L__again;", "too many steps"),
    ],
)
def test_faults_are_told(line: str, message: str) -> None:
    first, second = arrays(32 + 192)
    aligned = "setp.eq.u32 %p1, %r1, 0;\n" + line  # the 16-byte read of thread 1 is 8 bytes off
    with pytest.raises(EmulationError, match=message):
        run(aligned, first, second, most_steps=10_000)


def test_barriers_that_differ_are_told() -> None:
    first, second = arrays()
    body = """
        setp.lt.u32 %p1, %r1, 32;
        @%p1 bra $L__other;
        bar.sync 0;
        bra.uni $L__end;
        $L__other:
        bar.sync 0;
        $L__end:
    """
    with pytest.raises(EmulationError, match="different barriers"):
        run(body, first, second, warps=2)


def test_an_unknown_opcode_is_an_error() -> None:
    with pytest.raises(EmulationError, match=re.escape("tanh.approx.f32: unknown opcode")):
        program_of("tanh.approx.f32 %r3, %r1;")
    with pytest.raises(EmulationError, match=re.escape("red.global.gpu.add.u32")):
        program_of("red.global.gpu.add.u32 [ %rd1 + 0 ], 1;")
    with pytest.raises(SyntaxUnknownError, match="not declared"):
        program_of("mov.b32 %r3, %q1;")


HANDED_ON = """
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [ %r3 + 0 ], { %r1 };
    BARRIER
    xor.b32 %r4, %r3, DISTANCE;
    ld.shared.b32 %r5, [ %r4 + 0 ];
"""


@pytest.mark.parametrize(
    ("barrier", "distance", "raced"),
    [
        ("bar.sync 0;", 128, ""),
        ("bar.sync 0;", 4, ""),
        ("bar.warp.sync -1;", 4, ""),
        ("bar.warp.sync -1;", 128, "one program"),
        ("", 128, "one program"),
        ("", 4, "one warp"),
    ],
)
def test_races_in_a_program(barrier: str, distance: int, raced: str) -> None:
    """Between warps, and between lanes of one."""
    body = HANDED_ON.replace("BARRIER", barrier).replace("DISTANCE", str(distance))
    found = [run(body, *arrays(), warps=2, seed=seed).races for seed in range(8)]
    assert {race.between for races in found for race in races} == ({raced} if raced else set())
    assert not raced or all(found)


def test_copies_of_one_value_do_not_race() -> None:
    body = "mov.b32 %r6, 0;\nst.shared.b32 [ %r6 + 0 ], { %r2 };"
    assert not run(body, *arrays(), warps=2).races
    assert run(body.replace("%r2", "%r1"), *arrays(), warps=2).races


RELEASED = """
    mul.wide.u32 %rd6, %r2, 256;
    add.s64 %rd7, %rd4, %rd6;
    cvt.rn.f64.u32 %rd8, %r1;
    st.global.b64 [ %rd7 + 0 ], { %rd8 };
    ORDERED
    setp.eq.u32 %p1, %r1, 0;
    mov.b32 %r20, 0;
    @%p1 TICKET
    shl.b32 %r21, %r1, 2;
    st.shared.b32 [ %r21 + 0 ], { %r20 };
    bar.sync 0;
    mov.b32 %r22, 0;
    ld.shared.b32 %r23, [ %r22 + 0 ];
    setp.ne.u32 %p2, %r23, 3;
    @%p2 ret;
    ld.global.b64 %rd9, [ %rd4 + 0 ];
    ld.global.b64 %rd10, [ %rd4 + 768 ];
"""


@pytest.mark.parametrize(
    ("ordered", "ticket", "raced"),
    [
        ("bar.sync 0;", TICKET, False),
        ("", TICKET, True),
        ("bar.sync 0;", TICKET.replace("acq_rel", "relaxed"), True),
        ("bar.sync 0;\nbar.sync 0;", TICKET, False),
    ],
)
def test_races_between_programs(ordered: str, ticket: str, raced: bool) -> None:
    """The last of four to take a ticket reads what the others stored: barrier, release and acquire, or a race."""
    body = RELEASED.replace("ORDERED", ordered).replace("TICKET", ticket)
    found = []
    for seed in range(6):
        first, second = arrays()
        found.append(run(body, first, second, programs=4, warps=1, seed=seed, has_l1=False).races)
    if raced:
        assert all(found)
        assert all(race.between == "two programs" for races in found for race in races)
    else:
        assert not any(found)


@pytest.mark.parametrize(("modifier", "seen"), [("", True), (".cg", False)])
def test_the_first_level_cache_may_be_stale(modifier: str, seen: bool) -> None:
    """Program 0 reads twice what program 1, elsewhere, overwrites: past the cache it never gets an old value late."""
    body = f"""
        setp.eq.u32 %p1, %r2, 1;
        @%p1 bra $L__writes;
        ld.global{modifier}.b64 %rd6, [ %rd1 + 0 ];
        ld.global{modifier}.b64 %rd7, [ %rd1 + 0 ];
        ld.global{modifier}.b64 %rd8, [ %rd1 + 0 ];
        bra.uni $L__end;
        $L__writes:
        st.global.b64 [ %rd1 + 0 ], {{ %rd1 }};
        $L__end:
    """
    stale = 0
    for seed in range(40):
        stale += run(body, *arrays(), programs=2, seed=seed, quantum=2, detects_races=False).stale_reads
    assert (stale > 0) == seen


def test_constant_tables_are_read() -> None:
    table = ".global .align 8 .b8 numbers[16] = {1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0};\n"
    text = table + HEAD.format(
        threads=32,
        body="mov.b64 %rd6, numbers;\nld.global.b64 %rd7, [ %rd6 + 8 ];\nst.global.b64 [ %rd1 + 0 ], { %rd7 };",
    )
    out = np.zeros(1, np.uint64)
    Program(Kernel(text), 0).run(1, [out.ctypes.data, 0], [(out.ctypes.data, 8)])
    assert out[0] == 0x102


def test_the_clock_knows_chains_from_independent_work() -> None:
    chain = "fma.rn.f64 %fd1, %fd1, %fd1, %fd1;\n" * 50
    wide = "".join(f"fma.rn.f64 %fd{k}, %fd{k}, %fd{k}, %fd{k};\n" for k in range(1, 51))
    long, short = (run(body, *arrays(), clock=SYNCHRONOUS) for body in (chain, wide))
    assert 50 * 20 <= long.cycles < 50 * 20 + 100
    assert 50 * 2 <= short.cycles < 50 * 2 + 100
    assert long.issued == short.issued


def test_the_clock_counts_barriers_and_leaves_out_moves() -> None:
    moves = "mov.b64 %rd6, %rd7;\n" * 20
    still, moved = (run(body, *arrays(), warps=4, clock=SYNCHRONOUS) for body in ("", moves))
    assert still.issued == moved.issued
    assert still.cycles == moved.cycles
    met = run("bar.sync 0;\n" * 10, *arrays(), warps=4, clock=SYNCHRONOUS)
    assert met.cycles - still.cycles >= 300
    assert met.barriers == 10


def test_instructions_are_counted() -> None:
    body = """
        mov.b32 %r3, 0;
        $L__loop:
        add.s32 %r3, %r3, 1;
        setp.lt.u32 %p1, %r3, 7;
        @%p1 bra $L__loop;
    """
    outcome = run(body, *arrays(), warps=2)
    assert outcome.executed.count(14) == 3
    assert outcome.steps == sum(outcome.executed)


def test_the_structures_are_the_machines() -> None:
    """A field too many or too few in emulator.py would shift all that follow it."""
    assert ctypes.sizeof(Latencies) == 17 * 8
