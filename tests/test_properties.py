"""What ConFIG promises, as properties: on every backend, for random, degenerate and badly scaled gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracle import as_numpy, assert_matches, config

import fastconfig as fc

LENGTHS = ("projection", "minimum", "maximum", "harmonic", "arithmetic", "geometric")

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def normal_rows(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, n)))


def condition(rows: torch.Tensor) -> float:
    singular = np.linalg.svd(as_numpy(torch.nn.functional.normalize(rows, dim=1)), compute_uv=False)
    return singular[0] / singular[-1]


@st.composite
def independent_rows(draw, least: int = 1, most: int = 7) -> torch.Tensor:
    """(m, n) float64 rows of unequal norms, n ≥ m, with κ(U) ≤ 100."""
    m = draw(st.integers(least, most))
    rows = normal_rows(m, draw(st.integers(m, 60)), draw(st.integers(0, 2**32)))
    rows = rows * torch.tensor(draw(st.lists(st.floats(0.01, 100.0), min_size=m, max_size=m))).double().unsqueeze(1)
    assume(condition(rows) <= 100.0)
    return rows


@st.composite
def integer_rows(draw) -> torch.Tensor:
    """(m, n) small integers: zero, repeated, opposed and otherwise dependent rows come up all the time.

    Their singular values are either exactly 0 or far above the cut, so the pseudo-inverse is well defined.
    """
    m, n = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    values = draw(st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=m, max_size=m))
    return torch.tensor(values, dtype=torch.float64)


seeds = st.integers(0, 2**32)
positive = st.floats(0.1, 10.0)


def weights_for(m: int) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(positive, min_size=m, max_size=m).map(lambda values: torch.tensor(values, dtype=torch.float64))


dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(rows=independent_rows(), data=st.data())
def test_cosines_with_the_gradients_are_in_the_ratio_of_the_weights(backend, rows, data):
    m = len(rows)
    weights = data.draw(weights_for(m))
    combined = fc.combine(rows, fc.ConFIG(weights=weights), backend=backend)
    cosines = torch.nn.functional.cosine_similarity(rows, combined.unsqueeze(0))
    ratio = cosines / weights
    assert ratio.min() > 0
    torch.testing.assert_close(ratio, ratio.mean().expand(m), rtol=1e-9, atol=0.0)


@given(rows=independent_rows(least=2), data=st.data())
def test_a_loss_of_direction_weight_zero_is_left_orthogonal(backend, rows, data):
    weights = data.draw(weights_for(len(rows)))
    weights[0] = 0.0
    combined = fc.combine(rows, fc.ConFIG(weights=weights), backend=backend)
    assert combined.norm() > 0
    assert abs(rows[0] @ combined) <= 1e-9 * rows[0].norm() * combined.norm()


@given(rows=independent_rows(), data=st.data(), length=st.sampled_from(LENGTHS))
def test_order_of_the_losses_does_not_matter(backend, rows, data, length):
    m = len(rows)
    weights = data.draw(weights_for(m))
    order = data.draw(st.permutations(range(m)))
    given_order = fc.combine(rows, fc.ConFIG(weights, length), backend=backend)
    other_order = fc.combine(rows[order], fc.ConFIG(weights[order], length), backend=backend)
    torch.testing.assert_close(other_order, given_order, rtol=1e-9, atol=1e-9 * float(given_order.norm()))


@given(rows=independent_rows(), data=st.data(), scale=st.floats(1e-3, 1e3))
def test_scaling_one_gradient_changes_only_the_length(backend, rows, data, scale):
    row = data.draw(st.integers(0, len(rows) - 1))
    scaled = rows.clone()
    scaled[row] *= scale
    before, after = fc.combine(rows, backend=backend), fc.combine(scaled, backend=backend)
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-9, atol=1e-9)
    projection = (scaled @ (before / before.norm())).sum()
    torch.testing.assert_close(after.norm(), projection, rtol=1e-9, atol=0.0)


@given(rows=independent_rows(), scale=st.floats(1e-20, 1e20), length=st.sampled_from(LENGTHS))
def test_scaling_all_gradients_scales_the_answer(backend, rows, scale, length):
    method = fc.ConFIG(length=length)
    before, after = fc.combine(rows, method, backend=backend), fc.combine(rows * scale, method, backend=backend)
    torch.testing.assert_close(after / scale, before, rtol=1e-9, atol=1e-9 * float(before.norm()))


@given(rows=independent_rows(), data=st.data(), length=st.sampled_from(LENGTHS), dtype=dtypes)
def test_zero_gradients_change_nothing(backend, rows, data, length, dtype):
    rows = rows.to(dtype)
    weights = data.draw(weights_for(len(rows)))
    padded, weights_of_padded = list(rows), weights.tolist()
    for place in data.draw(st.lists(st.integers(0, len(rows)), min_size=1, max_size=4)):
        padded.insert(place, torch.zeros(rows.shape[1], dtype=dtype))
        weights_of_padded.insert(place, 3.0)
    method = fc.ConFIG(torch.tensor(weights_of_padded, dtype=torch.float64), length)
    assert_matches(fc.combine(padded, method, backend=backend), config(as_numpy(rows), weights, length))


@given(rows=independent_rows(), data=st.data())
def test_a_repeated_gradient_leaves_the_direction(backend, rows, data):
    # U d = 1 has the same smallest solution whether an equation stands there once or twice.
    again = st.tuples(st.integers(0, len(rows) - 1), st.sampled_from([1.0, 0.5, 4.0]))
    repeats = data.draw(st.lists(again, min_size=1, max_size=3))
    repeated = [*rows, *(rows[place] * scale for place, scale in repeats)]
    direction = fc.combine(rows, backend=backend)
    direction = direction / direction.norm()
    expected = (torch.stack(repeated) @ direction).sum() * direction
    combined = fc.combine(repeated, backend=backend)
    torch.testing.assert_close(combined, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))


@given(seed=seeds, n=st.integers(1, 50), scale=positive, dtype=dtypes, length=st.sampled_from([*LENGTHS, 0, 1]))
def test_opposed_gradients_give_exactly_zero(backend, seed, n, scale, dtype, length):
    row = normal_rows(1, n, seed)[0].to(dtype)
    opposite = (-scale * row.double()).to(dtype) if dtype is torch.float64 else -2.0 * row
    combined = fc.combine([row, opposite], fc.ConFIG(length=length), backend=backend)
    assert torch.equal(combined, torch.zeros(n, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("losses", [3, 4, 5, 6, 9, 12])
def test_gradients_that_cancel_all_around_give_exactly_zero(backend, losses, dtype):
    angles = 2 * math.pi * torch.arange(losses, dtype=torch.float64) / losses
    plane = torch.linalg.qr(normal_rows(30, 2, 0)).Q.T  # (2, n) orthonormal
    rows = torch.stack([angles.cos(), angles.sin()], dim=1) @ plane
    combined = fc.combine(rows.to(dtype), backend=backend)
    assert torch.equal(combined, torch.zeros(30, dtype=dtype))


@given(seed=seeds, n=st.integers(3, 40))
def test_an_opposed_pair_beside_another_loss_stays_at_right_angles(backend, seed, n):
    first, other = normal_rows(2, n, seed)
    combined = fc.combine([first, -2.0 * first, other], backend=backend)
    assert abs(first @ combined) <= 1e-9 * first.norm() * combined.norm()
    assert other @ combined > 0


@given(rows=integer_rows(), data=st.data(), length=st.sampled_from(LENGTHS), dtype=dtypes)
@example(rows=torch.zeros(3, 2, dtype=torch.float64), data=None, length="harmonic", dtype=torch.float32)
def test_dependent_gradients_follow_the_pseudo_inverse(backend, rows, data, length, dtype):
    weights = None if data is None else data.draw(st.none() | weights_for(len(rows)))
    answer = config(as_numpy(rows), weights, length)
    combined = fc.combine(rows.to(dtype), fc.ConFIG(weights, length), backend=backend)
    assert_matches(combined, answer)


@given(rows=integer_rows(), data=st.data())
def test_every_loss_can_be_the_tracked_one(backend, rows, data):
    tracked = data.draw(st.integers(-len(rows), len(rows) - 1))
    combined = fc.combine(rows, fc.ConFIG(length=tracked), backend=backend)
    assert_matches(combined, config(as_numpy(rows), length=tracked))


def symmetric_pair(near: str, distance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Unit vectors u = cos φ·e + sin φ·f and v = cos φ·e - sin φ·f, with u·v = ±(1 - distance): e, f, cos φ, sin φ."""
    e, f = torch.linalg.qr(normal_rows(20, 2, seed)).Q.T
    small, large = math.sqrt(distance / 2), math.sqrt(1 - distance / 2)
    return (e, f, large, small) if near == "parallel" else (e, f, small, large)


@pytest.mark.parametrize("distance", [10.0**-k for k in range(2, 11)])
@pytest.mark.parametrize("near", ["parallel", "opposed"])
@settings(max_examples=15)
@given(seed=seeds, norms=st.tuples(positive, positive), weights=weights_for(2))
@example(seed=0, norms=(1.0, 1.0), weights=torch.ones(2, dtype=torch.float64))
@example(seed=0, norms=(10.0, 0.1), weights=torch.ones(2, dtype=torch.float64))
def test_nearly_parallel_and_nearly_opposed_pairs(backend, near, distance, seed, norms, weights):
    e, f, cosine, sine = symmetric_pair(near, distance, seed)
    rows = torch.stack([norms[0] * (cosine * e + sine * f), norms[1] * (cosine * e - sine * f)])
    # U d = ŵ in the plane of e and f, by hand.
    along, across = (weights[0] + weights[1]) / (2 * cosine), (weights[0] - weights[1]) / (2 * sine)
    size = math.hypot(along, across)
    length = (norms[0] * weights[0] + norms[1] * weights[1]) / size
    expected = length * (along * e + across * f) / size
    combined = fc.combine(rows, fc.ConFIG(weights), backend=backend)
    # The pair itself is rounded to float64, and so is its Gramian: 1 - |cos| is known to 1e-16/distance.
    error = float((combined - expected).norm() / expected.norm())
    assert error <= 1e-14 + 100 * 2.0**-53 / distance
    assert (rows @ combined > 0).all()


scales = st.lists(st.integers(-30, 30), min_size=1, max_size=5)
wide_dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@given(seed=seeds, powers=scales, length=st.sampled_from(LENGTHS), dtype=wide_dtypes)
@example(seed=0, powers=[30, -30], length="projection", dtype=torch.float32)
@example(seed=0, powers=[30, -30], length="minimum", dtype=torch.float32)
@example(seed=0, powers=[-30, -30, -30], length="geometric", dtype=torch.float32)
@example(seed=0, powers=[30, 30, 30], length="harmonic", dtype=torch.bfloat16)
def test_any_scales_beside_each_other(backend, seed, powers, length, dtype):
    rows = normal_rows(len(powers), 12, seed)
    assume(condition(rows) < 100.0)
    rows = (rows * 10.0 ** torch.tensor(powers, dtype=torch.float64).unsqueeze(1)).to(dtype)
    combined = fc.combine(rows, fc.ConFIG(length=length), backend=backend)
    assert_matches(combined, config(as_numpy(rows), length=length))
    unit = torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-60)
    gramian = fc.gramian(rows, backend=backend)
    norms = gramian.diagonal().sqrt()
    torch.testing.assert_close(gramian / norms / norms.unsqueeze(1), unit @ unit.T, rtol=0.0, atol=1e-14)


bad_values = st.sampled_from([math.nan, math.inf, -math.inf])


@given(rows=independent_rows(least=2), data=st.data(), bad=bad_values, length=st.sampled_from(LENGTHS), dtype=dtypes)
def test_nonfinite_rows_propagate_drop_or_raise(backend, rows, data, bad, length, dtype):
    rows = rows.to(dtype)
    m, n = rows.shape
    broken = sorted(data.draw(st.sets(st.integers(0, m - 1), min_size=1)))
    spoilt = rows.clone()
    spoilt[broken, data.draw(st.integers(0, n - 1))] = bad

    assert fc.combine(spoilt, fc.ConFIG(length=length), backend=backend).isnan().all()

    dropped = fc.combine(spoilt, fc.ConFIG(length=length, nonfinite="drop"), backend=backend)
    rest = [i for i in range(m) if i not in broken]
    assert_matches(dropped, config(as_numpy(rows[rest]), length=length))

    out = torch.full((n,), 7.0, dtype=dtype)
    with pytest.raises(FloatingPointError, match=f"gradient of loss {broken[0]} is inf or NaN"):
        fc.combine(spoilt, fc.ConFIG(length=length, nonfinite="raise"), out=out, backend=backend)
    assert torch.equal(out, torch.full((n,), 7.0, dtype=dtype))


@given(rows=independent_rows(), nonfinite=st.sampled_from(["propagate", "drop", "raise"]))
def test_finite_rows_are_treated_alike_by_every_rule(backend, rows, nonfinite):
    combined = fc.combine(rows, fc.ConFIG(nonfinite=nonfinite), backend=backend)
    assert torch.equal(combined, fc.combine(rows, backend=backend))


@given(rows=independent_rows(least=2), bad=bad_values, dtype=dtypes)
def test_a_row_that_a_method_gives_weight_zero_is_not_read(backend, rows, bad, dtype):
    class AllButTheFirst:
        def weights(self, gramian):
            return torch.tensor([0.0, *[0.5] * (len(gramian) - 1)], device=gramian.device)

    rows = rows.to(dtype)
    expected = (0.5 * rows[1:].double()).sum(dim=0)
    rows[0, 0] = bad
    combined = fc.combine(rows, AllButTheFirst(), backend=backend)
    tolerance = len(rows) * float(rows[1:].abs().max()) * torch.finfo(dtype).eps
    torch.testing.assert_close(combined.double(), expected, rtol=0, atol=tolerance)


@given(rows=integer_rows(), data=st.data())
def test_gramian_is_the_products_of_the_rows(backend, rows, data):
    # Integers: every product and sum is exact in float64, whatever the dtype of the rows.
    gramian = fc.gramian(rows.to(data.draw(dtypes)), backend=backend)
    assert torch.equal(gramian, rows @ rows.T)
