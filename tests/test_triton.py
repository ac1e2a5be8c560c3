"""The Triton kernels against the reference: compiled where there is a GPU, else by Triton's interpreter on the CPU.

The interpreter takes a fraction of a second a launch, runs programs one after the other (so a race never shows) and
cuts float32 to bfloat16 instead of rounding it: hence the small sizes, and a whole unit in the last place. What only a
device can show is tested in tests/gpu.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from fastconfig.kernels import geometry
from guarded import poisoned
from kernel_problems import (
    COMPILED,
    DEVICE,
    assert_combination,
    assert_gramian,
    assert_solved,
    combined,
    fresh_workspaces,
    launches,
    problem,
    small_programs,
)
from torch import Tensor

import fastconfig as fc
from fastconfig import backends
from fastconfig.backends import reference
from fastconfig.backends import triton as backend
from fastconfig.validation import check_rows

LOSSES = [1, 2, 3, 5, 8, 9, 17, 40, 64, 65]
SIZES = [0, 1, 15, 16, 17, 31, 1000]
SIZES_OF_MANY = [0, 1, 17, 150]  # beyond 16 losses, where a call takes the interpreter a second
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "padded", "vectors", "aligned"]
DEFICIENT = [(2, 1), (3, 2), (5, 1), (5, 3), (8, 4), (16, 8), (17, 1), *([(64, 1)] if COMPILED else [])]

__all__ = ["fresh_workspaces", "launches", "small_programs"]  # the fixtures

pytestmark = [
    pytest.mark.usefixtures("interpreter", "poisoned_memory", "one_thread", "fresh_workspaces"),
    # The interpreter is numpy, which speaks of inf·0 and of 1/0.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", LOSSES)
def test_gramian_equals_the_reference(m: int, dtype: torch.dtype) -> None:
    for i, n in enumerate(SIZES if m <= 16 else SIZES_OF_MANY):
        rows = problem(m, n, dtype, LAYOUTS[i % 4])
        assert_gramian(backend.gramian(rows), rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", LOSSES)
def test_apply_equals_the_reference(m: int, dtype: torch.dtype) -> None:
    weights = torch.linspace(-1.5, 2.0, m, dtype=torch.float64, device=DEVICE)
    weights[m // 2] = 0.0 if m > 2 else weights[m // 2]
    for i, n in enumerate(SIZES if m <= 16 else SIZES_OF_MANY):
        rows = problem(m, n, dtype, LAYOUTS[(i + m) % 4])
        block, out = poisoned(n, dtype, offset=i % 3, device=DEVICE)
        backend.apply(rows, weights, out)
        assert_combination(out, rows, weights)
        assert (block[: 8 + i % 3] == -1).all()
        assert (block[8 + i % 3 + n :] == -1).all()


@pytest.mark.emulated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8])
def test_one_program_does_it_all(m: int, layout: str, launches: list[str]) -> None:
    rows = problem(m, 2500, torch.float32, layout)
    assert_solved(rows, combined(rows))
    assert launches == ["config_of_few"]


@pytest.mark.emulated
@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 2, 3, 6, 8])
def test_two_launches_of_many_programs(m: int, layout: str, launches: list[str]) -> None:
    rows = problem(m, 2500, torch.bfloat16 if m == 6 else torch.float32, layout)
    assert_solved(rows, combined(rows, offset=1))
    assert launches == ["config_of_few", "combination"]


@pytest.mark.emulated
@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize(
    ("m", "dtype"),
    [*((m, torch.float32) for m in (9, 17, 33, 50, 64)), *((m, torch.bfloat16) for m in (9, 50))],
    ids=str,
)
def test_two_launches_by_matrix_units(m: int, dtype: torch.dtype, launches: list[str]) -> None:
    rows = problem(m, 301, dtype, "padded" if m % 2 else "aligned")
    assert_solved(rows, combined(rows))
    assert launches == ["config_of_many", "combination"]


@pytest.mark.emulated
def test_separate_vectors_cost_a_launch_only_beyond_eight(launches: list[str]) -> None:
    for m, wanted in ((8, ["config_of_few"]), (9, ["table_of_addresses", "config_of_many", "combination"])):
        launches.clear()
        rows = problem(m, 100, layout="vectors")
        assert_solved(rows, combined(rows))
        assert launches == wanted
    launches.clear()
    rows = problem(70, 20, layout="vectors")
    assert_gramian(backend.gramian(rows), rows)
    assert launches == ["table_of_addresses"] * 5 + ["config_of_many"]
    launches.clear()
    backend.gramian(rows)  # of which the table is known
    assert launches == ["config_of_many"]


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("m", [3, 20])
def test_where_a_barrier_does_not_order_all_stores(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD, with wavefronts of 64; the interpreter shows no race, but that the fence counts for nothing."""
    monkeypatch.setattr(backend, "device_of", lambda device: backend.Device(2, 64, True, True, False, False))
    rows = problem(m, 1500 if m == 3 else 300)
    assert_solved(rows, combined(rows))


@pytest.mark.parametrize("m", [65, 100])
def test_more_losses_than_one_program_solves(m: int) -> None:
    rows = problem(m, 200)
    assert_solved(rows, combined(rows))


@pytest.mark.emulated
@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize(("m", "n"), [(3, 2500), (20, 300)])
def test_the_same_bits_and_tickets_at_zero_every_time(m: int, n: int) -> None:
    rows = problem(m, n)
    first = combined(rows)
    (workspace,) = backend._WORKSPACES.values()
    held = workspace.partials.data_ptr()
    for _ in range(2):
        assert not workspace.tickets.any()
        assert all(torch.equal(a, b) for a, b in zip(combined(rows), first, strict=True))
    assert workspace.partials.data_ptr() == held


@pytest.mark.parametrize("length", ["projection", "minimum", "maximum", "harmonic", "arithmetic", "geometric", 0, -1])
@pytest.mark.parametrize("m", [3, 12])
def test_every_length_model(m: int, length: str | int) -> None:
    rule = fc.ConFIG(weights=torch.linspace(0.5, 2.0, m), length=length).rule
    rows = problem(m, 100)
    assert_solved(rows, combined(rows, rule), rule)


def test_a_callable_length_model_runs_in_the_reference() -> None:
    method = fc.ConFIG(length=lambda norms, cosines: norms.sum() * cosines.min())
    gramian = reference.gramian(problem(4, 50))
    got = backend.config_weights(gramian, method.rule)
    torch.testing.assert_close(got, reference.config_weights(gramian, method.rule))


def spectrum_gramian(eigenvalues: Tensor, seed: int) -> Tensor:
    """A Gramian with unit diagonal whose factor has these eigenvalues."""
    m = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    matrix = basis * eigenvalues @ basis.T
    scale = matrix.diagonal().rsqrt()
    return (matrix * scale.unsqueeze(0) * scale.unsqueeze(1)).to(DEVICE)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("m", "rank"), [(2, 1), (3, 2), (5, 1), (5, 3), (8, 4), (16, 8), (17, 1), *[(64, 1)] * COMPILED]
)
def test_deficient_spectra_give_the_truncated_pseudo_inverse(m: int, rank: int) -> None:
    eigenvalues = torch.zeros(m, dtype=torch.float64)
    eigenvalues[:rank] = torch.logspace(0, -3, rank, dtype=torch.float64)
    gramian = spectrum_gramian(eigenvalues, seed=m)
    got = backend.config_weights(gramian, fc.ConFIG().rule)
    wanted = reference.config_weights(gramian, fc.ConFIG().rule)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.emulated
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_the_eigen_decomposition_ends_because_it_has_converged(rank: int) -> None:
    """It leaves orthogonal columns; without an end of its own it would run to the last sweep."""
    m = 16
    eigenvalues = torch.zeros(m, dtype=torch.float64)
    eigenvalues[:rank] = torch.logspace(0, -3, rank, dtype=torch.float64)
    matrix = spectrum_gramian(eigenvalues, seed=m)
    rule = fc.ConFIG(rtol=0.999).rule  # nothing is regular by this cut
    backend.config_weights(matrix, rule)
    (workspace,) = backend._WORKSPACES.values()
    unit, columns = workspace.scratch[: 2 * m * m].view(2, m, m)
    lengths = columns.norm(dim=0)
    wanted = torch.linalg.eigvalsh(unit)
    torch.testing.assert_close(lengths.sort().values, wanted.clamp(min=0.0), rtol=1e-12, atol=1e-14)
    kept = columns[:, lengths > 1e-10]
    products = kept.T @ kept / (kept.norm(dim=0).unsqueeze(0) * kept.norm(dim=0).unsqueeze(1))
    assert kept.shape[1] == rank
    assert (products - torch.eye(rank, dtype=torch.float64, device=DEVICE)).abs().max() < 2e-14


@pytest.mark.emulated
@pytest.mark.parametrize(("m", "condition"), [*itertools.product([3, 16], [1e2, 1e6, 1e9, 1e11, 1e13]), (64, 1e9)])
def test_ill_conditioned_gramians(m: int, condition: float) -> None:
    """Gauss-Jordan, its refusal, and truncation (past 1e12) join without a seam; both sides err by about eps·cond."""
    eigenvalues = torch.ones(m, dtype=torch.float64)
    eigenvalues[-1] = 1.0 / condition
    gramian = spectrum_gramian(eigenvalues, seed=7)
    got, wanted = (gramian @ solver.config_weights(gramian, fc.ConFIG().rule) for solver in (backend, reference))
    tolerance = 1e-15 * m * min(condition, 1e12)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_a_wider_cut_truncates_more() -> None:
    gramian = spectrum_gramian(torch.tensor([1.0, 0.5, 1e-4, 1e-5], dtype=torch.float64), seed=1)
    for rtol in (0.0, 1e-12, 1e-3):
        rule = fc.ConFIG(rtol=rtol).rule
        got, wanted = backend.config_weights(gramian, rule), reference.config_weights(gramian, rule)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


DEGENERATE = {
    "a zero row": lambda g: g.index_fill(0, torch.tensor([1], device=g.device), 0.0),
    "zeros alone": torch.zeros_like,
    "two equal rows": lambda g: torch.cat([g[:1], g[:-1]]),
    "two opposed rows": lambda g: torch.cat([g[:1], -g[:1], g[2:]]),
    "all opposed": lambda g: torch.cat([g[:1], -g[:1]]),
    "more rows than columns": lambda g: g[:, :2],
    "tiny rows": lambda g: g * 1e-30,
    "huge rows": lambda g: g * 1e30,
}


@pytest.mark.emulated
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("m", [4, 10])
def test_degenerate_rows(m: int, case: str) -> None:
    generator = torch.Generator().manual_seed(3)
    grads = DEGENERATE[case](torch.randn(m, 40, generator=generator)).to(DEVICE)
    rows = check_rows(grads)
    out, k, c = combined(rows)
    assert_gramian(k, rows)
    wanted = torch.empty_like(out)
    reference.config_combine(rows, fc.ConFIG().rule, wanted)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert torch.isfinite(c).all()
    if case in ("zeros alone", "all opposed"):
        assert not out.any()


@pytest.mark.emulated
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("m", [3, 10])
def test_non_finite_rows(m: int, bad: float) -> None:
    grads = torch.randn(m, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    good = torch.cat([grads[:1], grads[2:]])
    grads[1, 17] = bad
    rows = check_rows(grads)
    out, _, c = combined(rows)
    assert out.isnan().all()
    assert c.isnan().all()
    out, _, c = combined(rows, fc.ConFIG(nonfinite="drop").rule)
    assert c[1] == 0
    torch.testing.assert_close(out, combined(check_rows(good))[0])
    block, out = poisoned(300, torch.float32, device=DEVICE)
    with pytest.raises(FloatingPointError, match="loss 1"):
        backend.config_combine(rows, fc.ConFIG(nonfinite="raise").rule, out)
    assert out.isnan().all()
    del block


def test_a_row_of_weight_zero_is_not_read() -> None:
    for m in (3, 10):
        grads = torch.ones(m, 700, device=DEVICE)
        grads[1] = math.nan
        weights = torch.ones(m, dtype=torch.float64, device=DEVICE)
        weights[1] = 0.0
        out = torch.empty(700, device=DEVICE)
        backend.apply(check_rows(grads), weights, out)
        assert (out == m - 1).all()


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("m", [3, 10])
def test_offsets_past_two_to_the_31(m: int) -> None:
    """By the rows' distance, not by memory: what lies between them is never touched, and so never mapped."""
    n, stride = 300, 2**31 // (m - 1) + 64
    block = torch.empty(0, dtype=torch.float16, device=DEVICE)
    torch.use_deterministic_algorithms(False)  # or PyTorch would fill, and so map, all of it
    block = torch.empty((m - 1) * stride + n, dtype=torch.float16, device=DEVICE)
    rows = block.as_strided((m, n), (stride, 1))
    for i in range(m):
        rows[i] = torch.randn(n, generator=torch.Generator().manual_seed(i))
    assert (m - 1) * stride > 2**31
    assert_solved(check_rows(rows), combined(check_rows(rows)))


def test_repeated_rows() -> None:
    row = torch.randn(100, device=DEVICE)
    got = backend.gramian(check_rows(row.expand(3, 100)))
    torch.testing.assert_close(got, (row.double() @ row.double()).expand(3, 3))


def test_the_public_functions_take_the_backend_by_name() -> None:
    grads = torch.randn(3, 50, device=DEVICE)
    torch.testing.assert_close(fc.combine(grads, backend="triton"), fc.combine(grads, backend="reference"))
    torch.testing.assert_close(fc.gramian(grads, backend="triton"), fc.gramian(grads, backend="reference"))


def test_a_buffer_combines_by_the_kernels(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(backends, "FORCED", "triton")
    model = torch.nn.Linear(5, 3).to(DEVICE)
    buffer = fc.GradientBuffer(model.parameters(), num_losses=3)
    buffer.backward(list(model(torch.ones(5, device=DEVICE)).square()))
    info = buffer.combine()
    assert launches == ["config_of_few"]
    wanted = torch.empty_like(buffer.grad)
    reference.config_combine(check_rows(buffer.rows), fc.ConFIG().rule, wanted)
    torch.testing.assert_close(buffer.grad, wanted)
    assert info.weights.isfinite().all()


# The choice of the backend.


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch):
    """What was decided about a device is decided anew, before and after the test."""
    backends._automatic.cache_clear()
    monkeypatch.setattr(backends, "FORCED", "auto")
    yield
    backends._automatic.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_auto_falls_back_to_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda: "Triton is not there; pip install triton")
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match=r"reference on cuda:0: Triton is not there; pip install triton"):
        assert backends.select(device) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(device) is reference
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: Triton is not there"):
        backends.select(device, "triton")


@pytest.mark.usefixtures("forgetful")
def test_auto_takes_the_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda: None)
    monkeypatch.setattr(backend, "drives", lambda device: None)
    assert backends.select(torch.device("cuda", 0)) is backend


@pytest.mark.usefixtures("forgetful")
def test_a_device_without_kernels_has_the_reference_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(torch.device("xla", 0)) is reference


@pytest.mark.parametrize(("version", "reason"), [("3.5.1", "3.5.1 is too old"), ("3.6.0", None), ("4.0.0+git", None)])
def test_an_old_triton_is_told_from_a_new_one(
    monkeypatch: pytest.MonkeyPatch, version: str, reason: str | None
) -> None:
    monkeypatch.setattr(backend.triton, "__version__", version)
    found = backend.available()
    assert found is None if reason is None else reason in str(found)


# The launch table.


@pytest.mark.parametrize("m", [*range(1, 9), 12, 40, 64, 200])
def test_launches_fit_the_reduction_and_the_registers(m: int) -> None:
    for launch in [*geometry.few(min(m, 8)), geometry.one(min(m, 8)), *geometry.combination(m)]:
        assert launch.warps * launch.programs * 32 * geometry.registers(launch.warps, launch.programs) <= 65536
    for many in geometry.many(max(m, 9), 4, 32):
        assert many.warps * many.programs * 32 * geometry.registers(many.warps, many.programs) <= 65536
        assert geometry.programs(10**10, 512, 10**6, many.group) == many.group**2
    assert geometry.programs(10**10, 512, 8 * 304, 32, wave=304) == 3 * 304
    assert geometry.programs(10**10, 512, 2 * 132, 32, wave=132) == 2 * 132
    assert geometry.programs(0, 512, 100, 32) == 1
    assert geometry.programs(513, 512, 100, 32) == 2


@pytest.mark.parametrize("m", [*range(9, 65), 100, 1000])
def test_blocks_are_filled_and_their_programs_solve(m: int) -> None:
    launch = geometry.blocks(m)
    count = math.ceil(m / launch.block)
    assert launch.block <= geometry.PAIRED
    assert launch.block * count - m < count
    assert launch.warps >= geometry.solve_warps(min(m, geometry.SOLVED))


@pytest.mark.parametrize("multiprocessors", [58, 72, 128, 170])
@pytest.mark.parametrize("m", [9, 16, 24, 40, 48, 64, 100])
def test_pairs_of_blocks_keep_all_multiprocessors_busy(m: int, multiprocessors: int) -> None:
    launch = geometry.blocks(m)
    programs = launch.most(m, multiprocessors) * launch.block_pairs(m)
    waves = math.ceil(programs / multiprocessors)
    assert programs >= 0.9 * waves * multiprocessors
    assert waves <= 8


def test_the_table_is_taken_unless_tuning_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "ONE_LAUNCH_BYTES", 0)
    timed: list[float] = []

    def time_of(call) -> float:
        call()
        timed.append(-len(timed))  # each is quicker than the one before
        return timed[-1]

    monkeypatch.setattr(backend, "_median_time", time_of)
    rows = problem(2, 600)
    assert_solved(rows, combined(rows))
    assert not timed
    monkeypatch.setattr(backend, "AUTOTUNE", True)
    monkeypatch.setattr(backend, "_TUNED", {})
    assert_solved(rows, combined(rows))
    assert len(timed) == len(geometry.few(2)) + len(geometry.combination(2))
    assert set(backend._TUNED.values()) == {geometry.few(2)[-1], geometry.combination(2)[-1]}
    assert_solved(rows, combined(rows))
    assert len(timed) == len(geometry.few(2)) + len(geometry.combination(2))
