"""The answers of conflictfree and torchjd from PyPI, where those are right (n ≤ 1e5), and of the paper's example."""

from __future__ import annotations

import conflictfree.grad_operator
import conflictfree.length_model
import conflictfree.weight_model
import pytest
import torch
import torchjd.aggregation

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("one_thread", "lstsq_by_svd")

SIZES = [(2, 3), (2, 1000), (3, 10), (5, 5), (5, 1000), (10, 10_000)]
LARGE = [(3, 100_000), (20, 100_000)]  # in float32 the other packages' own rounding passes 1e-5 here: float64 only
LENGTHS = {
    "projection": conflictfree.length_model.ProjectionLength,
    "minimum": conflictfree.length_model.TrackMinimum,
    "maximum": conflictfree.length_model.TrackMaximum,
    "harmonic": conflictfree.length_model.TrackHarmonicAverage,
    "arithmetic": conflictfree.length_model.TrackArithmeticAverage,
    "geometric": conflictfree.length_model.TrackGeometricAverage,
    0: lambda: conflictfree.length_model.TrackSpecific(0),
    1: lambda: conflictfree.length_model.TrackSpecific(1),
}


def gradients(m: int, n: int) -> torch.Tensor:
    """float32 rows of norms 0.1 to 10 that lean on each other and are independent enough for a float32 solver."""
    generator = torch.Generator().manual_seed(m * n)
    rows = torch.nn.functional.normalize(torch.randn(m, n, generator=generator), dim=1)
    rows = rows + 0.5 * torch.nn.functional.normalize(torch.randn(1, n, generator=generator), dim=1)
    if m == n:
        rows = rows + 2 * torch.eye(m)
    return rows * torch.logspace(-1, 1, m).unsqueeze(1)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.norm() > 0
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()


def test_published_value(backend):
    rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    expected = torch.tensor([0.1588, 2.0706, 2.0706])
    torch.testing.assert_close(fc.combine(rows, backend=backend), expected, rtol=0.0, atol=5e-5)


@pytest.mark.parametrize("least_squares", [True, False], ids=["lstsq", "pinv"])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_conflictfree(backend, m, n, least_squares):
    rows = gradients(m, n)
    theirs = conflictfree.grad_operator.ConFIG_update(rows, use_least_square=least_squares)
    assert_same(fc.combine(rows, backend=backend), theirs)


class FixedWeights(conflictfree.weight_model.WeightModel):
    """conflictfree's own weights are float32 ones, at which it refuses float64 gradients."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = weights

    def get_weights(self, gradients=None, losses=None, device=None):
        del gradients, losses
        return self.weights.to(device)


@pytest.mark.parametrize("least_squares", [True, False], ids=["lstsq", "pinv"])
@pytest.mark.parametrize(("m", "n"), SIZES + LARGE)
def test_conflictfree_in_float64(backend, m, n, least_squares):
    rows = gradients(m, n).double()
    ones = FixedWeights(torch.ones(m, dtype=torch.float64))
    theirs = conflictfree.grad_operator.ConFIG_update(rows, weight_model=ones, use_least_square=least_squares)
    assert_same(fc.combine(rows, backend=backend), theirs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("m", "n"), [(2, 50), (5, 1000)])
def test_length_models_of_conflictfree(backend, m, n, length):
    rows = gradients(m, n)
    theirs = conflictfree.grad_operator.ConFIG_update(rows, length_model=LENGTHS[length]())
    assert_same(fc.combine(rows, fc.ConFIG(length=length), backend=backend), theirs)


def test_two_losses_shortcut_of_conflictfree(backend):
    rows = gradients(2, 1000)
    assert_same(fc.combine(rows, backend=backend), conflictfree.grad_operator.ConFIG_update_double(rows[0], rows[1]))


def test_weights_of_conflictfree(backend):
    rows, weights = gradients(4, 500), [1.0, 3.0, 0.5, 2.0]
    theirs = conflictfree.grad_operator.ConFIG_update(rows, weight_model=FixedWeights(torch.tensor(weights)))
    assert_same(fc.combine(rows, fc.ConFIG(weights), backend=backend), theirs)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_torchjd(backend, m, n):
    rows = gradients(m, n)
    assert_same(fc.combine(rows, backend=backend), torchjd.aggregation.ConFIG()(rows))


@pytest.mark.parametrize(("m", "n"), SIZES + LARGE)
def test_torchjd_in_float64(backend, m, n):
    rows = gradients(m, n).double()
    assert_same(fc.combine(rows, backend=backend), torchjd.aggregation.ConFIG()(rows))


def test_weights_of_torchjd(backend):
    rows, weights = gradients(5, 300), torch.tensor([1.0, 2.0, 0.5, 0.0, 4.0])
    theirs = torchjd.aggregation.ConFIG(pref_vector=weights)(rows)
    assert_same(fc.combine(rows, fc.ConFIG(weights), backend=backend), theirs)


def test_zero_gradient_in_torchjd(backend):
    rows = gradients(4, 300)
    rows[2] = 0.0
    assert_same(fc.combine(rows, backend=backend), torchjd.aggregation.ConFIG()(rows))
