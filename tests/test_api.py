"""fc.combine, fc.gramian, fc.ConFIG and fc.Combination: forms of input and output, and what methods are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import as_numpy, assert_matches, config

import fastconfig as fc
from fastconfig import backends

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PUBLISHED = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = ("projection", "minimum", "maximum", "harmonic", "arithmetic", "geometric", 0, 2, -1)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def complex_normal(*shape: int) -> torch.Tensor:
    return torch.complex(normal(*shape), normal(*shape, seed=1))


# Forms of the gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_no_parameters_at_all(backend, m, dtype):
    combined = fc.combine(torch.empty(m, 0, dtype=dtype), backend=backend)
    assert combined.shape == (0,)
    assert combined.dtype == dtype
    assert torch.equal(fc.gramian(torch.empty(m, 0, dtype=dtype), backend=backend), torch.zeros(m, m).double())
    assert fc.combine([torch.empty(0, dtype=dtype)] * m, out=torch.empty(0, dtype=dtype), backend=backend).shape == (0,)


@pytest.mark.parametrize("length", ["projection", "minimum", "geometric", 0])
@pytest.mark.parametrize("weights", [None, [0.3]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_loss_is_followed_as_it_is(backend, dtype, weights, length):
    row = normal(33, dtype=dtype)
    combined = fc.combine([row], fc.ConFIG(weights, length), backend=backend)
    torch.testing.assert_close(combined, row, rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    zero = torch.zeros(33, dtype=dtype)
    assert torch.equal(fc.combine([zero], fc.ConFIG(weights, length), backend=backend), zero)


def test_matrix_list_tuple_and_parameters_are_the_same_gradients(backend):
    rows = normal(4, 50).requires_grad_()
    kept = rows.detach().clone()
    forms = (rows, list(rows), tuple(rows), torch.nn.Parameter(rows.detach()), [torch.nn.Parameter(r) for r in kept])
    for form in forms:
        combined = fc.combine(form, backend=backend)
        assert not combined.requires_grad
        assert_matches(combined, config(as_numpy(kept)))
        assert not fc.gramian(form, backend=backend).requires_grad
    assert torch.equal(rows, kept)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_rows_and_out_at_any_address(backend, offset):
    block = normal(3, 100)
    rows, out = block[:, offset : offset + 90], torch.full((100,), 7.0)[offset : offset + 90]
    assert_matches(fc.combine(rows, out=out, backend=backend), config(as_numpy(rows)))


def test_one_row_of_memory_for_every_loss(backend):
    row = normal(1, 40)
    rows = row.expand(5, 40)
    assert_matches(fc.combine(rows, backend=backend), config(as_numpy(rows)))


@pytest.mark.parametrize("n", [1, 2, 30])
def test_views_that_negate_lazily_are_read_with_their_sign(backend, n):
    rows = complex_normal(3, n).conj().imag
    assert rows.is_neg()
    values = rows.resolve_neg().contiguous()
    assert_matches(fc.combine(rows, backend=backend), config(as_numpy(values)))
    assert_matches(fc.combine(list(rows), backend=backend), config(as_numpy(values)))
    contiguous = torch._neg_view(normal(3, n))
    assert_matches(fc.combine(contiguous, backend=backend), config(-as_numpy(normal(3, n))))


# Complex gradients


def real_view(rows: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(rows.resolve_conj().contiguous()).flatten(1)


@pytest.mark.parametrize(
    "rows",
    [
        complex_normal(3, 20),
        complex_normal(3, 20).to(torch.complex128),
        complex_normal(3, 20).conj(),
        complex_normal(20, 3).T,
        complex_normal(3, 40)[:, ::2],
        complex_normal(1, 20),
        complex_normal(3, 0),
    ],
    ids=["complex64", "complex128", "conjugated", "transposed", "strided", "one loss", "no parameters"],
)
def test_complex_gradients_are_combined_as_their_real_view(backend, rows):
    expected = config(as_numpy(real_view(rows)))
    out = torch.full((rows.shape[1] + 2,), complex(7, 7), dtype=rows.dtype)
    for form in (rows, list(rows)):
        combined = fc.combine(form, backend=backend)
        assert combined.dtype == rows.dtype
        assert_matches(torch.view_as_real(combined).flatten(), expected)
        written = fc.combine(form, out=out[1:-1], backend=backend)
        assert torch.equal(written, combined)
        assert out[0] == out[-1] == complex(7, 7)
        inner = (rows @ rows.conj().T).real.double()
        torch.testing.assert_close(fc.gramian(form, backend=backend), inner, rtol=1e-5, atol=1e-5)


# out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 1000])
def test_out_is_returned_and_nothing_beside_it_is_written(backend, n, dtype):
    rows = normal(3, n, dtype=dtype)
    kept = rows.clone()
    memory = torch.full((n + 70,), 7.0, dtype=dtype)
    out = memory[35:-35].fill_(torch.nan)
    result = fc.combine(rows, out=out, backend=backend)
    assert result is out
    assert torch.equal(out, fc.combine(kept, backend=backend))
    assert (memory[:35] == 7.0).all()
    assert (memory[-35:] == 7.0).all()
    assert torch.equal(rows, kept)


def test_out_is_written_whole_whatever_the_answer(backend):
    row = normal(40)
    for rows, value in (([row, -row], 0.0), ([0 * row, 0 * row], 0.0), ([row, row / 0.0], torch.nan)):
        out = torch.full((40,), 5.0)
        fc.combine(rows, out=out, backend=backend)
        assert torch.equal(out.nan_to_num(-1.0), torch.full((40,), value).nan_to_num(-1.0))


def test_out_with_a_method_of_the_users(backend):
    out = torch.full((3,), torch.nan)
    assert fc.combine(PUBLISHED, SumOfAll(), out=out, backend=backend) is out
    assert torch.equal(out, torch.tensor([2.0, 2.0, 2.0]))


# ConFIG


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 0.0, 1.0]])
def test_length_models(backend, length, weights):
    rows = normal(5, 30, dtype=torch.float64) * torch.tensor([[1.0], [30.0], [0.2], [5.0], [0.0]], dtype=torch.float64)
    combined = fc.combine(rows, fc.ConFIG(weights, length), backend=backend)
    assert_matches(combined, config(as_numpy(rows), weights, length))


@pytest.mark.parametrize("form", [float, lambda length: length, lambda length: np.float64(float(length))])
def test_callable_length_gets_norms_and_cosines(backend, form):
    rows = normal(4, 30, dtype=torch.float64)
    rows[1] = 0.0
    seen = []

    def length(norms, cosines):
        seen.append((norms.clone(), cosines.clone()))
        return form(norms.max() * cosines.sum())

    combined = fc.combine(rows, fc.ConFIG([1.0, 1.0, 2.0, 4.0], length), backend=backend)
    answer = config(as_numpy(rows), [1.0, 1.0, 2.0, 4.0], length=lambda norms, cosines: norms.max() * cosines.sum())
    assert_matches(combined, answer)
    ((norms, cosines),) = seen
    torch.testing.assert_close(norms, rows.norm(dim=1))
    torch.testing.assert_close(cosines, torch.from_numpy(answer.cosines))
    assert norms[1] == cosines[1] == 0.0


def test_weights_are_read_once_and_kept_in_full_precision():
    given = torch.tensor([0.1, 0.7], dtype=torch.float64)
    method = fc.ConFIG(given)
    given.fill_(9.0)
    for same in (method, fc.ConFIG([0.1, 0.7]), fc.ConFIG((0.1, 0.7)), fc.ConFIG(np.array([0.1, 0.7]))):
        assert same.rule.direction == (0.1, 0.7)
    # Scaled by a power of two, which loses nothing: only ratios matter, and squares must not leave float64's range.
    assert fc.ConFIG([1, 2**53 + 1.0]).rule.direction == (2.0**-54, 0.5)
    assert repr(fc.ConFIG([1e300, 1e299])) == repr(fc.ConFIG([1e300, 1e299]))
    assert "1e+300" in repr(fc.ConFIG([1e300, 1e299]))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_direction_weights_matter_by_their_ratio_at_any_scale(backend, scale):
    rows = normal(2, 30, dtype=torch.float64)
    wanted = fc.combine(rows, fc.ConFIG([1.0, 3.0]), backend=backend)
    torch.testing.assert_close(fc.combine(rows, fc.ConFIG([scale, 3.0 * scale]), backend=backend), wanted)


def test_out_is_written_as_autograd_sees_it(backend):
    rows, out = normal(2, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    w = torch.ones(5, dtype=torch.float64, requires_grad=True)
    y = (w * out).sum()
    fc.combine(rows, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_weights_of_a_gramian_are_the_coefficients_of_the_combination(backend):
    rows = normal(4, 25, dtype=torch.float64)
    for method in (fc.ConFIG(), fc.ConFIG([1.0, 2.0, 3.0, 4.0], "harmonic")):
        weights = method.weights(fc.gramian(rows, backend=backend))
        assert weights.dtype == torch.float64
        torch.testing.assert_close(weights @ rows, fc.combine(rows, method, backend=backend))


@pytest.mark.parametrize("rtol", [0.0, 1e-12, 1e-3, 0.5])
def test_rtol_moves_the_cut(backend, rtol):
    # Eigenvalues of C for cosine 0.9: 1.9 and 0.1, a ratio of 0.053.
    rows = torch.tensor([[1.0, 0.0], [0.9, math.sqrt(1 - 0.81)]], dtype=torch.float64)
    combined = fc.combine(rows, fc.ConFIG([1.0, 3.0], rtol=rtol), backend=backend)
    assert_matches(combined, config(as_numpy(rows), [1.0, 3.0], rtol=rtol))
    equal_cosines = (rows @ combined / rows.norm(dim=1)).diff().abs() < 1e-9
    assert bool(equal_cosines) == (rtol == 0.5)


def test_repr_says_every_parameter():
    method = fc.ConFIG(weights=[1.0, 2.0], length="minimum", rtol=1e-9, nonfinite="drop")
    assert repr(method) == "ConFIG(weights=[1.0, 2.0], length='minimum', rtol=1e-09, nonfinite='drop')"


# Methods of the user's


class SumOfAll:
    def weights(self, gramian):
        return torch.ones_like(gramian[0])


class Sized(SumOfAll):
    def __len__(self):
        return 0


class Halved(fc.ConFIG):
    def weights(self, gramian):
        return 0.5 * super().weights(gramian)


def test_any_object_with_weights_is_a_method(backend):
    rows = normal(3, 20, dtype=torch.float64)
    assert isinstance(SumOfAll(), fc.Method)
    assert isinstance(fc.ConFIG(), fc.Method)
    for method in (SumOfAll(), Sized()):
        torch.testing.assert_close(fc.combine(rows, method, backend=backend), rows.sum(dim=0))
    torch.testing.assert_close(fc.combine(rows, Halved(), backend=backend), 0.5 * fc.combine(rows, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16], ids=str)
def test_weights_of_a_method_may_have_any_real_dtype(backend, dtype):
    class Counted:
        def weights(self, gramian):
            assert gramian.dtype == torch.float64
            assert gramian.shape == (2, 2)
            return torch.tensor([2, -1], dtype=dtype)

    assert torch.equal(fc.combine(PUBLISHED, Counted(), backend=backend), torch.tensor([-14.0, 1.0, 1.0]))


# Combination


def test_combination_says_what_it_was_made_of():
    rows = normal(4, 30, dtype=torch.float64)
    rows[1], rows[3] = 0.0, -2.0 * rows[0]
    gramian = fc.gramian(rows)
    info = fc.Combination(gramian, torch.arange(4.0).double(), 1e-12)
    torch.testing.assert_close(info.norms, rows.norm(dim=1))
    unit = torch.nn.functional.normalize(rows, dim=1)
    torch.testing.assert_close(info.cosines, unit @ unit.T, rtol=0.0, atol=1e-14)
    assert (info.cosines[1] == 0.0).all()
    assert info.cosines.abs().max() <= 1.0
    assert info.rank == 2
    assert info.norms is info.norms
    assert "weights=[0, 1, 2, 3], norms=[5.697, 0, 5.01, 11.39], cosines={0·3: -1, 2·3: -0.1231" in repr(info)
    assert repr(info).endswith("rank=2)")


@pytest.mark.parametrize(
    ("gramian", "rank"),
    [(torch.zeros(3, 3), 0), (torch.eye(3), 3), (torch.ones(3, 3), 1), (torch.full((3, 3), torch.nan), 0)],
    ids=["zero", "orthogonal", "equal", "not finite"],
)
def test_combination_rank(gramian, rank):
    assert fc.Combination(gramian.double(), torch.ones(3).double(), 1e-12).rank == rank


# Backends


def test_backend_by_name():
    for name in (None, "auto", "reference"):
        combined = fc.combine(PUBLISHED, backend=name)
        torch.testing.assert_close(combined, torch.tensor([0.1588, 2.0706, 2.0706]), rtol=0.0, atol=1e-4)
    with pytest.raises(ValueError, match="one of auto, reference, cpu, triton, got 'gpu'"):
        fc.gramian(PUBLISHED, backend="gpu")


def test_backend_from_the_environment_is_the_default(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "gpu")
    with pytest.raises(ValueError, match="got 'gpu'"):
        fc.combine(PUBLISHED)
    assert torch.equal(fc.combine(PUBLISHED, backend="reference"), fc.combine(PUBLISHED, backend="reference"))


def test_named_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["cpu"], "available", lambda: "the core is not built")
    with pytest.raises(RuntimeError, match="'cpu' cannot run: the core is not built; use 'auto' or 'reference'"):
        fc.combine(PUBLISHED, backend="cpu")


def test_cpu_backend_refuses_other_devices(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["cpu"], "available", lambda: None)
    with pytest.raises(RuntimeError, match="does not drive meta tensors"):
        fc.combine(PUBLISHED.to("meta"), backend="cpu")
    assert fc.combine(PUBLISHED.to("meta")).shape == (3,)
