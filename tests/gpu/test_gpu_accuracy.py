"""Combination and Gramian on a device against float64 on the CPU: every path through the kernels, and their edges.

Compiling a kernel takes seconds, and each (m, dtype, aligned or not, small or not) is another one, while n costs
nothing: hence few combinations and several sizes of each.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fastconfig.kernels import geometry
from guarded import poisoned, rows_in_poison
from oracle import as_numpy, assert_matches, config
from torch import Tensor

import fastconfig as fc

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LARGE = [65_537, 98_304]
"""Past what one program does alone, for every m here; a tail, and whole tiles."""
SMALL = [1, 17, 1000, 4093]

FLOAT32 = [(m, torch.float32, "aligned") for m in (*range(1, 9), 9, 16, 17, 40, 64, 100)]
OTHERS = [
    (3, torch.float64, "aligned"),
    (3, torch.bfloat16, "aligned"),
    (3, torch.float16, "aligned"),
    (17, torch.float64, "aligned"),
    (17, torch.bfloat16, "aligned"),
    (3, torch.float32, "padded"),
    (17, torch.float32, "padded"),
    (3, torch.float32, "vectors"),
    (9, torch.float32, "vectors"),
]


def on_cpu(grads: Tensor | list[Tensor]) -> np.ndarray:
    return as_numpy(grads.cpu() if isinstance(grads, Tensor) else [row.cpu() for row in grads])


def check(m: int, n: int, dtype: torch.dtype, layout: str, offset: int = 0) -> None:
    """The combination written between guards, to memory that held NaN, from rows with NaN for neighbours."""
    grads = rows_in_poison(m, n, dtype, layout, device=DEVICE)
    block, out = poisoned(n, dtype, offset, DEVICE)
    assert fc.combine(grads, out=out) is out
    assert_matches(out.cpu(), config(on_cpu(grads)))
    assert (block[: 8 + offset] == -1).all()
    assert (block[8 + offset + n :] == -1).all()


@pytest.mark.parametrize(("m", "dtype", "layout"), [*FLOAT32, *OTHERS])
def test_combination(m: int, dtype: torch.dtype, layout: str) -> None:
    for n in LARGE:
        check(m, n, dtype, layout)


@pytest.mark.parametrize(
    ("m", "dtype", "layout"),
    [
        (1, torch.float32, "aligned"),
        (3, torch.float32, "aligned"),
        (3, torch.bfloat16, "aligned"),
        (8, torch.float32, "aligned"),
        (17, torch.float32, "aligned"),
    ],
)
def test_combination_of_few_columns(m: int, dtype: torch.dtype, layout: str) -> None:
    for n in SMALL:
        check(m, n, dtype, layout)


def test_both_sides_of_the_one_launch_limit() -> None:
    limit = geometry.ONE_LAUNCH_BYTES // (3 * 4)
    for n in (limit - 1, limit, limit + 1):
        check(3, n, torch.float32, "aligned")


def test_every_program_takes_part() -> None:
    """Enough columns for all the programs of the device, and for several tiles each."""
    check(3, 3_000_001, torch.float32, "aligned")
    check(17, 600_001, torch.float32, "aligned")


def test_an_output_that_is_not_aligned() -> None:
    for n in (1000, 65_537):
        check(3, n, torch.float32, "aligned", offset=1)


@pytest.mark.parametrize("m", [3, 8, 17, 100])
def test_gramian(m: int) -> None:
    for n in (1, 1000, *LARGE):
        grads = rows_in_poison(m, n, torch.float32, "aligned", device=DEVICE)
        got = fc.gramian(grads).cpu()
        wanted = torch.from_numpy(on_cpu(grads) @ on_cpu(grads).T)
        norms = wanted.diagonal().sqrt()
        assert (got - wanted).abs().le(1e-13 * norms.outer(norms)).all()
        assert torch.equal(got, got.T)


def test_rows_that_are_not_contiguous() -> None:
    n = 65_536
    block = torch.randn(6, 2 * n, device=DEVICE)
    for grads in (block[::2, :n], block[:3, ::2], block[:3, :n].T.contiguous().T):
        assert_matches(fc.combine(grads).cpu(), config(on_cpu(grads)))


def test_complex_gradients() -> None:
    grads = torch.randn(3, 50_000, dtype=torch.complex64, device=DEVICE)
    got = fc.combine(grads)
    assert got.dtype == torch.complex64
    wanted = config(np.stack([torch.view_as_real(row).flatten().double().numpy() for row in grads.cpu()]))
    assert_matches(torch.view_as_real(got).flatten().cpu(), wanted)


def test_no_columns() -> None:
    assert fc.combine(torch.empty(3, 0, device=DEVICE)).shape == (0,)
    assert not fc.gramian(torch.empty(3, 0, device=DEVICE)).any()


DEGENERATE = {
    "a zero row": lambda g: torch.cat([g[:1], torch.zeros_like(g[:1]), g[2:]]),
    "zeros alone": torch.zeros_like,
    "two equal rows": lambda g: torch.cat([g[:1], g[:-1]]),
    "two opposed rows": lambda g: torch.cat([g[:1], -g[:1], g[2:]]),
    "all opposed": lambda g: torch.cat([g[:1], -g[:1], torch.zeros_like(g[2:])]),
    "tiny rows": lambda g: g * 1e-30,
    "huge rows": lambda g: g * 1e30,
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize(("m", "n"), [(3, 1000), (3, 65_536), (9, 5000)])
def test_degenerate_rows_as_the_reference(m: int, n: int, case: str) -> None:
    grads = DEGENERATE[case](torch.randn(m, n, generator=torch.Generator().manual_seed(3))).to(DEVICE)
    got, wanted = fc.combine(grads), fc.combine(grads, backend="reference")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    if case in ("zeros alone", "all opposed"):
        assert not got.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("m", "n"), [(3, 1000), (3, 65_536), (9, 5000)])
def test_non_finite_rows_as_the_reference(m: int, n: int, bad: float) -> None:
    grads = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grads[1, n - 1] = bad
    assert fc.combine(grads).isnan().all()
    method = fc.ConFIG(nonfinite="drop")
    got = fc.combine(grads, method)
    assert got.isfinite().all()
    torch.testing.assert_close(got, fc.combine(grads, method, backend="reference"), rtol=1e-5, atol=1e-5)
    out = torch.full((n,), 7.0, device=DEVICE)
    with pytest.raises(FloatingPointError, match="loss 1"):
        fc.combine(grads, fc.ConFIG(nonfinite="raise"), out=out)
    assert (out == 7.0).all()


def test_weights_from_anywhere() -> None:
    grads = torch.randn(3, 65_536, device=DEVICE)
    wanted = config(on_cpu(grads), weights=[1.0, 2.0, 0.5])
    for weights in ([1.0, 2.0, 0.5], torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, 0.5], device=DEVICE)):
        assert_matches(fc.combine(grads, fc.ConFIG(weights=weights)).cpu(), wanted)


def test_a_method_in_plain_pytorch() -> None:
    class Mean:
        def weights(self, gramian: Tensor) -> Tensor:
            return torch.full((len(gramian),), 1.0 / len(gramian), device=gramian.device)

    grads = torch.randn(3, 65_536, device=DEVICE)
    torch.testing.assert_close(fc.combine(grads, Mean()), grads.mean(0))


def test_several_devices_in_one_call_raise() -> None:
    here, there = torch.randn(100, device=DEVICE), torch.randn(100)
    with pytest.raises(ValueError, match=r"grads\[1\] is on cpu"):
        fc.combine([here, there])
    with pytest.raises(ValueError, match="out must be on the gradients' device"):
        fc.combine(torch.stack([here, here]), out=there)


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    """16 losses on the 171,798,203 parameters of a large model: the last rows begin beyond 2^31 elements."""
    m, n, chunk = 16, 171_798_203, 1 << 20
    assert m * n > 2**31
    if torch.cuda.mem_get_info()[0] < 9 << 30:
        pytest.skip("needs 9 GiB of free device memory")
    grads = torch.empty(m, n, dtype=torch.bfloat16, device=DEVICE)
    for i in range(m):
        grads[i].normal_(generator=torch.Generator(DEVICE).manual_seed(i)).mul_(i + 1)
    wanted = torch.zeros(m, m, dtype=torch.float64, device=DEVICE)
    for start in range(0, n, chunk):
        part = grads[:, start : start + chunk].double()
        wanted += part @ part.T
    norms = wanted.diagonal().sqrt()
    assert ((fc.gramian(grads) - wanted).abs() <= 1e-12 * norms.outer(norms)).all()

    out = torch.full((n,), math.nan, dtype=grads.dtype, device=DEVICE)
    fc.combine(grads, out=out)
    weights = fc.ConFIG().weights(wanted.cpu()).to(DEVICE)
    worst = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for start in range(0, n, chunk):
        exact = weights @ grads[:, start : start + chunk].double()
        error = (out[start : start + chunk].double() - exact).abs() / exact.abs().clamp(min=1e-3)
        worst = torch.maximum(worst, error.max())  # a NaN stays
    assert float(worst) <= 1.01 * 2.0**-8  # half a unit in the last place, rounded by way of float32
