"""The compiled CPU backend against the reference, on every ISA tier this machine has."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from guarded import assert_close_in_units, poisoned, row_of, rows_in_poison
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import BACKENDS, cpu, reference
from fastconfig.validation import check_rows

LOSSES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 37, 40, 64, 128]
SIZES = [0, 1, 15, 16, 17, 31, 1000, 65537]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TIERS = cpu.tiers() if cpu.available() is None else []


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.active_tier()
    cpu.use_tier(request.param)
    yield request.param
    cpu.use_tier(before)


def test_the_core_is_built() -> None:
    assert BACKENDS["cpu"].available() is None
    assert "baseline" in TIERS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", LOSSES)
def test_gramian_equals_the_reference(tier: str, m: int, dtype: torch.dtype) -> None:
    for n in SIZES:
        for layout in ("contiguous", "padded", "vectors") if n <= 1000 else ("padded",):
            rows = check_rows(rows_in_poison(m, n, dtype, layout))
            got, wanted = cpu.gramian(rows), reference.gramian(rows)
            bound = wanted.diagonal().sqrt().outer(wanted.diagonal().sqrt())
            assert (got - wanted).abs().le(1e-13 * bound).all(), (n, layout)
            assert torch.equal(got, got.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", LOSSES)
def test_apply_equals_the_reference(tier: str, m: int, dtype: torch.dtype) -> None:
    weights = torch.linspace(-1.5, 2.0, m, dtype=torch.float64)
    weights[m // 2] = 0.0 if m > 2 else weights[m // 2]
    for n in SIZES:
        for layout, offset in (("contiguous", 0), ("padded", 1), ("vectors", 3)) if n <= 1000 else (("padded", 1),):
            rows = check_rows(rows_in_poison(m, n, dtype, layout))
            block, got = poisoned(n, dtype, offset)
            wanted = torch.empty(n, dtype=dtype)
            cpu.apply(rows, weights, got)
            reference.apply(rows, weights, wanted)
            scale = sum(weights[i].abs() * row_of(rows, i).abs() for i in range(m))
            assert_close_in_units(got, wanted, dtype, scale)
            assert (block[: 8 + offset] == -1).all()
            assert (block[8 + offset + n :] == -1).all()


@pytest.mark.parametrize("length", ["projection", "minimum", "maximum", "harmonic", "arithmetic", "geometric", 0, -1])
def test_config_weights_equal_the_reference(length: str | int) -> None:
    for m in LOSSES:
        rows = check_rows(rows_in_poison(m, 1000, torch.float64, "contiguous"))
        gramian = reference.gramian(rows)
        rule = fc.ConFIG(weights=torch.linspace(0.5, 2.0, m), length=length).rule
        torch.testing.assert_close(
            cpu.config_weights(gramian, rule), reference.config_weights(gramian, rule), rtol=1e-10, atol=1e-12
        )


def spectrum_gramian(eigenvalues: Tensor, seed: int) -> Tensor:
    """A Gramian with unit diagonal whose rank and conditioning follow ``eigenvalues`` of the factor's spectrum."""
    m = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    matrix = basis * eigenvalues @ basis.T
    scale = matrix.diagonal().rsqrt()
    return matrix * scale.unsqueeze(0) * scale.unsqueeze(1)


@pytest.mark.parametrize("rank", ["full", "half", "one"])
@pytest.mark.parametrize("m", [2, 3, 5, 8, 17, 40, 64, 128])
def test_deficient_spectra_give_the_truncated_pseudo_inverse(m: int, rank: str) -> None:
    kept = {"full": m, "half": (m + 1) // 2, "one": 1}[rank]
    eigenvalues = torch.zeros(m, dtype=torch.float64)
    eigenvalues[:kept] = torch.logspace(0, -3, kept, dtype=torch.float64)
    gramian = spectrum_gramian(eigenvalues, seed=m)
    rule = fc.ConFIG().rule
    got, wanted = cpu.config_weights(gramian, rule), reference.config_weights(gramian, rule)
    solution = torch.linalg.pinv(gramian, hermitian=True, rtol=1e-10) @ torch.ones(m, dtype=torch.float64)
    direction = solution / (solution @ gramian @ solution).sqrt()
    opposed = solution.abs().max() < 1e-10  # two losses of rank one may be g and -g
    oracle = torch.zeros_like(solution) if opposed else direction * (gramian @ direction).sum()
    torch.testing.assert_close(got, oracle, rtol=1e-7, atol=1e-7 * float(oracle.abs().max()))
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7 * float(oracle.abs().max()))


def test_tiny_entries_do_not_starve_the_eigen_decomposition() -> None:
    """Rank-deficient, with cosines of 1e-155 whose squares are subnormal."""
    grads = torch.zeros(5, 6, dtype=torch.float64)
    for i, j in enumerate((0, 1, 2, 3, 3)):
        grads[i, j] = 1.0
    grads[0, 1:4] = 1e-155
    got, wanted = fc.combine(grads, backend="cpu"), fc.combine(grads, backend="reference")
    torch.testing.assert_close(got, wanted)


def test_flushing_subnormals_is_not_left_to_one_thread() -> None:
    """torch.set_flush_denormal acts on the calling thread alone; the bits must not depend on which block it gets."""
    torch.set_flush_denormal(False)  # what PyTorch 2.4's inductor compiles sets it where it is loaded
    grads = torch.full((2, 1 << 18), 1e-40)
    before = torch.get_num_threads()
    wanted = fc.gramian(grads, backend="cpu")
    torch.set_flush_denormal(True)
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fc.gramian(grads, backend="cpu"))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert all(torch.equal(gramian, wanted) for gramian in found)
    assert wanted.all()


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9, 1e11, 1e13])
@pytest.mark.parametrize("m", [3, 16, 64])
def test_ill_conditioned_gramians(m: int, condition: float) -> None:
    """Cholesky, its refusal, and truncation (past 1e12) must join without a seam; both sides err by about eps·cond."""
    eigenvalues = torch.ones(m, dtype=torch.float64)
    eigenvalues[-1] = 1.0 / condition
    gramian = spectrum_gramian(eigenvalues, seed=7)
    got, wanted = (backend.config_weights(gramian, fc.ConFIG().rule) for backend in (cpu, reference))
    products_got, products_wanted = gramian @ got, gramian @ wanted
    tolerance = 1e-15 * m * min(condition, 1e12)
    torch.testing.assert_close(
        products_got, products_wanted, rtol=tolerance, atol=tolerance * float(products_wanted.abs().max())
    )


HALVES = [torch.bfloat16, torch.float16]


def exact_combination(grads: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ c_i g_i and Σ |c_i g_i| in float64."""
    terms = grads.double() * weights.unsqueeze(1)
    return terms.sum(0), terms.abs().sum(0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(2, 1), (2, 37), (3, 1000), (8, 515), (9, 1023), (40, 2051), (100, 700)])
def test_sixteen_bits_are_combined_within_float32s_bound(tier: str, m: int, n: int, dtype: torch.dtype) -> None:
    grads = torch.randn(m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
    exact, terms = exact_combination(grads, fc.ConFIG().weights(fc.gramian(grads, backend="cpu")))
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * (exact.abs() + info.smallest_normal)
    error = (fc.combine(grads, backend="cpu").double() - exact).abs()
    assert (error <= rounding + (m + 1) * 2.0**-24 * terms).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_cancels_in_sixteen_bits_is_summed_in_float64(tier: str, dtype: torch.dtype) -> None:
    """Nearly opposed: the terms are 1e3 to 1e4 times the result, whose digits float32 would lose."""
    torch.manual_seed(0)
    common, other = torch.randn(1000), torch.randn(1000)
    grads = torch.stack([common, -common + 2e-3 * other]).to(dtype)
    exact, terms = exact_combination(grads, fc.ConFIG().weights(fc.gramian(grads, backend="cpu")))
    assert float(terms.norm()) > 100 * float(exact.norm())
    assert torch.equal(fc.combine(grads, backend="cpu"), exact.to(torch.float32).to(dtype))


@pytest.mark.parametrize("m", [3, 11])
def test_sums_beyond_float32_of_sixteen_bits(tier: str, m: int) -> None:
    """Partial sums leave float32's range and come back; one strip of them must not hide another's infinity."""
    grads = torch.full((m, 1500), 3e38, dtype=torch.bfloat16)
    grads[m // 2 + 1 :] *= -1
    wanted = (grads[0].double() * (2 * (m // 2 + 1) - m)).to(torch.bfloat16)
    assert torch.equal(fc.combine(grads, fc.Sum(), backend="cpu"), wanted)
    half = torch.full((2, 1500), 60000.0, dtype=torch.float16)
    half[:, 700] = 1.0
    got = fc.combine(half, fc.Sum(), backend="cpu")
    assert got[700] == 2.0
    assert got.isinf().sum() == 1499


@pytest.mark.parametrize("weight", [3.3e-45, 1e40])
def test_weights_beyond_float32_of_sixteen_bits(tier: str, weight: float) -> None:
    grads = torch.tensor([[1e30, -3.0, 7e-30, 0.0], [2e30, 5.0, 1e-30, 1.0]]).to(torch.bfloat16)
    exact, _ = exact_combination(grads, torch.tensor([weight, 2 * weight], dtype=torch.float64))
    got = fc.combine(grads, fc.Constant([weight, 2 * weight]), backend="cpu")
    assert torch.equal(got, exact.to(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n"), [(3, 1000), (3, 200_001), (9, 100_003), (40, 50_021)])
def test_same_bits_for_any_number_of_threads(tier: str, m: int, n: int, dtype: torch.dtype) -> None:
    rows = rows_in_poison(m, n, dtype, "padded")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((fc.gramian(rows, backend="cpu"), fc.combine(rows, backend="cpu")))
    finally:
        torch.set_num_threads(before)
    for gramian, combined in results[1:]:
        assert torch.equal(gramian, results[0][0])
        assert torch.equal(combined, results[0][1])


def test_streamed_output_equals_stored_output(tier: str) -> None:
    """From 8 MiB of output on, stores bypass the cache; an unaligned output takes the plain ones."""
    n = 2_300_017
    rows = check_rows(rows_in_poison(3, n, torch.float32, "contiguous"))
    weights = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    aligned = torch.full((n,), math.nan)
    block, unaligned = poisoned(n, torch.float32, offset=1)
    cpu.apply(rows, weights, aligned)
    cpu.apply(rows, weights, unaligned)
    wanted = sum(weights[i] * row_of(rows, i) for i in range(3))
    assert_close_in_units(aligned, wanted.to(torch.float32), torch.float32, wanted.abs())
    assert torch.equal(aligned, unaligned)
    assert (block[:9] == -1).all()
    assert (block[9 + n :] == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value_is_read_and_written_exactly(tier: str, dtype: torch.dtype) -> None:
    everything = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty_like(everything)
    cpu.apply(check_rows([everything]), torch.ones(1, dtype=torch.float64), out)
    number = ~everything.isnan()
    assert torch.equal(out[number].view(torch.int16) | 0, (everything[number]).view(torch.int16) | 0)
    assert out[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_precision_is_to_nearest_even(tier: str, dtype: torch.dtype) -> None:
    """Halfway cases, subnormals and overflow: one row in float32's grid, halved weights make ties."""
    everything = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = everything[everything.isfinite()]
    for weight in (0.5, 1.5, 0.25 + 2**-20, 3.0, 2**-9 * 1.5):
        out = torch.empty_like(finite)
        cpu.apply(check_rows([finite]), torch.tensor([weight], dtype=torch.float64), out)
        wanted = (finite.to(torch.float64) * weight).to(torch.float32).to(dtype)
        assert torch.equal(out, wanted), weight


def test_expanded_rows_and_zero_stride(tier: str) -> None:
    row = torch.randn(1000)
    expanded = row.expand(3, 1000)
    torch.testing.assert_close(fc.gramian(expanded, backend="cpu"), (row.double() @ row.double()).expand(3, 3))


@pytest.mark.parametrize("name", ["baseline", "nonsense"])
def test_the_environment_forces_a_tier(name: str) -> None:
    code = "from fastconfig.backends import cpu; print(cpu.active_tier())"
    environment = {**os.environ, "FASTCONFIG_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if name == "baseline":
        assert done.stdout.strip() == "baseline"
    else:
        assert done.returncode != 0
        assert "nonsense" in done.stderr
        assert "baseline" in done.stderr
