"""The reference backend against an independent singular-value decomposition, at every size, dtype and memory layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import UNIT_ROUNDOFF, as_numpy, assert_matches, config

import fastconfig as fc
from fastconfig.backends import reference

LOSSES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 40, 64, 128)
SIZES = (0, 1, 15, 16, 17, 31, 1000)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def random_rows(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * m + n)
    scales = torch.logspace(-1, 1, m, dtype=torch.float64).unsqueeze(1)
    return (torch.randn(m, n, generator=generator, dtype=torch.float64) * scales).to(dtype)


def padded_rows(rows: torch.Tensor) -> torch.Tensor:
    block = torch.full((rows.shape[0], rows.shape[1] + 5), torch.nan, dtype=rows.dtype)
    block[:, 2:-3] = rows
    return block[:, 2:-3]


def strided_vectors(rows: torch.Tensor) -> list[torch.Tensor]:
    block = torch.full((rows.shape[1], 2 * rows.shape[0]), torch.nan, dtype=rows.dtype)
    block[:, ::2] = rows.T
    return list(block.unbind(dim=1)[::2])


LAYOUTS = {
    "contiguous": lambda rows: rows,
    "padded rows": padded_rows,
    "transposed": lambda rows: rows.T.contiguous().T,
    "every second row": lambda rows: rows.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda rows: rows.repeat_interleave(2, dim=1)[:, ::2],
    "list of vectors": lambda rows: [row.clone() for row in rows],
    "tuple of strided vectors": lambda rows: tuple(strided_vectors(rows)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("m", LOSSES)
def test_combine_matches_the_oracle(m, n, dtype):
    # Where m > n the rows are dependent: n singular values stand far above the cut, the others are rounding noise far
    # below it, so the pseudo-inverse is well defined and the comparison is the same.
    rows = random_rows(m, n, dtype)
    combined = fc.combine(rows, backend="reference")
    assert combined.dtype == dtype
    assert_matches(combined, config(as_numpy(rows)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("m", LOSSES)
def test_gramian_matches_float64_products(m, n, dtype):
    rows = random_rows(m, n, dtype)
    values = as_numpy(rows)
    gramian = fc.gramian(rows, backend="reference")
    assert gramian.dtype == torch.float64
    norms = np.linalg.norm(values, axis=1)
    np.testing.assert_array_less(
        np.abs(gramian.numpy() - np.einsum("in,jn->ij", values, values)),
        (n + 2) * UNIT_ROUNDOFF[torch.float64] * np.outer(norms, norms) + 1e-300,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 17), (5, 31), (17, 15), (8, 1000), (3, 0), (4, 1)])
def test_layouts_hold_the_same_gradients(backend, m, n, dtype, layout):
    rows = random_rows(m, n, dtype)
    given = LAYOUTS[layout](rows)
    assert torch.equal(torch.stack(list(given)), rows)
    assert_matches(fc.combine(given, backend=backend), config(as_numpy(rows)))
    gramian = fc.gramian(given, backend=backend)
    torch.testing.assert_close(gramian, fc.gramian(rows, backend=backend), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 7, 40, 41])
@pytest.mark.parametrize("layout", ["contiguous", "list of vectors"])
def test_any_chunking_of_the_columns_gives_the_same(monkeypatch, elements, layout):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", elements)
    rows = random_rows(4, 101, torch.float32)
    assert_matches(fc.combine(LAYOUTS[layout](rows), backend="reference"), config(as_numpy(rows)))


@pytest.mark.parametrize("m", [2, 3, 7, 16, 17, 64])
def test_gramian_is_symmetric_to_the_bit(backend, m):
    gramian = fc.gramian(random_rows(m, 1000, torch.float32), backend=backend)
    assert torch.equal(gramian, gramian.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cut_does_not_move_with_the_number_of_parameters(backend, dtype):
    # pinv and lstsq cut at eps·n: at this n and these scales in float32 they return conflicting directions.
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400_000, generator=generator)
    rows = torch.stack([shared + 0.05 * torch.randn(400_000, generator=generator) for _ in range(3)])
    rows = (rows * torch.tensor([[1.0], [100.0], [-0.01]])).to(dtype)
    combined = fc.combine(rows, backend=backend).double()
    cosines = torch.nn.functional.cosine_similarity(rows.double(), combined.unsqueeze(0))
    # The rows' common part cancels in the answer, which therefore carries the output's rounding many times over.
    spread = 1e-4 if dtype is torch.float32 else 1e-2
    assert cosines.min() > 0
    assert (cosines.max() - cosines.min()) < spread * cosines.max()


def test_norm_that_overflows_or_vanishes_in_the_rows_dtype(backend):
    large = torch.tensor([[3e38, 3e38, 0.0], [0.0, 0.0, 3e38]])
    small = torch.tensor([[1e-40, 0.0, 0.0], [0.0, 1e-42, 0.0]])  # subnormal in float32
    half = torch.tensor([[6e4, 6e4, 0.0], [0.0, 0.0, 6e-8]], dtype=torch.float16)
    for rows in (large, small, half):
        minimum = fc.combine(rows, fc.ConFIG(length="minimum"), backend=backend)
        assert_matches(minimum, config(as_numpy(rows), length="minimum"))
