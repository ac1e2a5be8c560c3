"""The Gramian on devices with few float64 units or no matrix units for float64, by the kernels that are made for them.

As tests/test_triton.py: by the interpreter, or compiled on the emulator. What a sum in two float32 numbers is held to
is the sum without rounding, to within the bound that ``kernels/two_float.py`` proves, and the accuracy that it says
the tests see.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fastconfig.kernels import geometry
from guarded import rows_in_poison
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import COMPILED, DEVICE, assert_gramian, assert_solved, combined, launches
from ptx import EMULATED
from torch import Tensor

from fastconfig.backends import reference
from fastconfig.backends import triton as backend
from fastconfig.validation import check_rows

__all__ = ["launches"]  # the fixture

NARROW = [torch.float32, torch.bfloat16, torch.float16]
BOUND = 1408 * 2.0**-48
"""Of the 2⁻³⁷ = 2048·2⁻⁴⁸ that are proved for longer sums than these."""
SEEN = 2.0**-44

pytestmark = [
    pytest.mark.usefixtures("interpreter", "poisoned_memory", "one_thread", "few_units"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered"),
]


def made_for(monkeypatch: pytest.MonkeyPatch, **how: bool) -> None:
    """The backend sees a device that is so, with small programs, of which each has several runs."""
    device = backend.device_of(torch.device(DEVICE))._replace(multiprocessors=1, **how)
    monkeypatch.setattr(backend, "device_of", lambda _: device)
    monkeypatch.setattr(backend, "_WORKSPACES", {})
    monkeypatch.setattr(geometry, "few_in_two_floats", lambda m: geometry.Few(warps=1, unroll=1, programs=3, group=2))
    blocks = geometry.blocks
    monkeypatch.setattr(geometry, "blocks", lambda m: geometry.Blocks(blocks(m).block, warps=1, programs=12, group=2))


@pytest.fixture
def few_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device like an RTX 4090: two float64 units beside 128."""
    made_for(monkeypatch, has_quick_float64=False, has_matrix_units=False)
    monkeypatch.setattr(geometry, "ONE_LAUNCH_BYTES_OF_FEW_UNITS", 0)


def gramian(grads: Tensor | list[Tensor]) -> Tensor:
    return backend.gramian(check_rows(grads)).cpu()


def exact(grads: Tensor) -> tuple[Tensor, Tensor]:
    """(K, Σ|xy|) with sums that do not round: of float32 products in float64, by Python's fsum."""
    wide = grads.cpu().to(torch.float64).numpy()
    m = len(wide)
    sums = torch.empty(m, m, dtype=torch.float64)
    sizes = torch.empty(m, m, dtype=torch.float64)
    for i in range(m):
        for j in range(m):
            sums[i, j] = math.fsum(wide[i] * wide[j])
            sizes[i, j] = math.fsum(np.abs(wide[i] * wide[j]))
    return sums, sizes


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 13] if COMPILED else [1, 2, 3, 9])
def test_gramian_equals_the_reference(m: int, dtype: torch.dtype) -> None:
    for i, n in enumerate([0, 1, 7, 31, 300] if m <= 3 or COMPILED else [70]):
        rows = check_rows(rows_in_poison(m, n, dtype, ["contiguous", "padded", "vectors", "aligned"][i % 4], 0, DEVICE))
        assert_gramian(backend.gramian(rows), rows)


@pytest.mark.emulated
@pytest.mark.parametrize("layout", ["contiguous", "padded", "vectors", "aligned"])
@pytest.mark.parametrize(("m", "dtype"), [(1, torch.float16), (3, torch.float32), (5, torch.bfloat16)], ids=str)
def test_few_losses(m: int, dtype: torch.dtype, layout: str, launches: list[str]) -> None:
    rows = check_rows(rows_in_poison(m, 2603, dtype, layout, device=DEVICE))
    assert_solved(rows, combined(rows, offset=1))
    assert launches == ["config_of_few", "combination"]


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("m", "dtype", "layout"),
    [
        (9, torch.float32, "vectors"),
        (9, torch.float64, "aligned"),
        *([(13, torch.bfloat16, "aligned"), (17, torch.float32, "padded")] if COMPILED else []),
    ],
    ids=str,
)
def test_many_losses(m: int, dtype: torch.dtype, layout: str, launches: list[str]) -> None:
    rows = check_rows(rows_in_poison(m, 403, dtype, layout, device=DEVICE))
    assert_solved(rows, combined(rows))
    table = ["table_of_addresses"] if layout == "vectors" else []
    assert launches == [*table, "config_of_blocks", "combination"]


@pytest.mark.emulated
def test_many_losses_in_float64_where_there_are_no_matrix_units(
    monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    made_for(monkeypatch, has_quick_float64=True, has_matrix_units=False)
    rows = check_rows(rows_in_poison(10, 700, torch.float32, "aligned", device=DEVICE))
    assert_solved(rows, combined(rows))
    assert launches == ["config_of_blocks", "combination"]


@pytest.mark.emulated
@pytest.mark.parametrize(("n", "small"), [(1300, True), (1400, False)])
def test_a_small_problem_is_one_launch(
    n: int, small: bool, monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    monkeypatch.setattr(geometry, "ONE_LAUNCH_BYTES_OF_FEW_UNITS", 16 << 10)
    rows = check_rows(rows_in_poison(3, n, torch.float32, "aligned", device=DEVICE))
    assert_solved(rows, combined(rows))
    assert launches == (["config_of_few"] if small else ["config_of_few", "combination"])


@pytest.mark.emulated
@pytest.mark.parametrize("m", [2, 9] if COMPILED else [2])
def test_long_sums_of_one_sign_and_sums_that_cancel(m: int) -> None:
    """Several runs a program, as long as they get, at the error that is seen."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3 * 128 * 32 * 3 + 5, generator=generator)
    half = len(x) // 2
    y = torch.cat([x[:half], -x[half:].flip(0)]) + 1e-9 * torch.randn(len(x), generator=generator)
    grads = torch.stack([x, y, *torch.randn(m - 2, len(x), generator=generator)]).to(DEVICE)
    sums, sizes = exact(grads)
    assert ((gramian(grads) - sums).abs() <= SEEN * sizes).all()


OUTSIDE = {
    "tiny": lambda g: g * 1e-30,
    "denormal": lambda g: g * 1e-42,
    "huge": lambda g: g * 1e30,
    "a tiny row beside a huge one": lambda g: torch.cat([g[:1] * 1e-35, g[1:] * 1e35]),
    "one huge element": lambda g: g.index_fill(1, torch.tensor([5], device=g.device), 3e38),
    "a zero row": lambda g: torch.cat([g[:1] * 0.0, g[1:]]),
    "zeros but for one denormal": lambda g: (g * 0.0).index_fill(1, torch.tensor([9], device=g.device), 1e-45),
    "at the edges": lambda g: torch.cat([g[:1].sign() * 2.0**-60, g[1:].sign() * 2.0**26]),
}


@pytest.mark.emulated
@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.parametrize("m", [2, 9] if COMPILED else [2])
def test_rows_that_leave_the_exponents_of_float32(m: int, case: str) -> None:
    grads = OUTSIDE[case](torch.randn(m, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    sums, sizes = exact(grads)
    got = gramian(grads)
    assert ((got - sums).abs() <= SEEN * sizes).all(), (got, sums)


@pytest.mark.emulated
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("m", [3, 9] if COMPILED else [3])
def test_non_finite_rows_are_as_in_the_reference(m: int, bad: float) -> None:
    grads = torch.randn(m, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grads[1, 17] = bad
    torch.testing.assert_close(
        gramian(grads), reference.gramian(check_rows(grads.cpu())), rtol=1e-12, atol=1e-12, equal_nan=True
    )


@pytest.mark.emulated
def test_the_same_bits_every_time() -> None:
    rows = check_rows(rows_in_poison(3, 1003, torch.float32, "padded", device=DEVICE))
    first = backend.gramian(rows)
    assert all(torch.equal(backend.gramian(rows), first) for _ in range(3))


ELEMENTS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-10.0, 10.0, width=32),
    st.sampled_from([0.0, 1.0, -1.0, 1.0 + 2.0**-23, 2.0**-149, -(2.0**-126), 2.0**-60, 2.0**26]),
)


@pytest.mark.emulated
@settings(max_examples=100 if EMULATED else 10)
@given(
    pool=st.lists(ELEMENTS, min_size=2, max_size=16),
    n=st.integers(1, 700),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1.0, 1.0, 1e-20, 1e15]),
)
def test_any_rows_to_within_the_bound(pool: list[float], n: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    picked = torch.tensor(pool, dtype=torch.float64)[torch.randint(len(pool), (2, n), generator=generator)]
    grads = (picked * scale).clamp(-3.4e38, 3.4e38).to(torch.float32).to(DEVICE)
    sums, _ = exact(grads)
    norms = sums.diagonal().sqrt()
    assert ((gramian(grads) - sums).abs() <= (BOUND + n * 2.0**-53) * norms.outer(norms)).all()


@pytest.mark.parametrize(
    ("capability", "quick"),
    [((8, 0), True), ((8, 6), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((10, 3), False)],
)
def test_which_nvidia_devices_have_few_float64_units(capability: tuple[int, int], quick: bool) -> None:
    device = backend.describe(100, 32, nvidia=True, capability=capability)
    assert device.has_quick_float64 is quick
    assert device.one_launch_bytes == (128 << 10 if quick else 0)


@pytest.mark.parametrize(("name", "quick"), [("gfx90a", True), ("gfx942:sramecc+", True), ("gfx1100", False)])
def test_which_amd_devices_have_few_float64_units(name: str, quick: bool) -> None:
    assert backend.describe(100, 64, nvidia=False, name=name).has_quick_float64 is quick
