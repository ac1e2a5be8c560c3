"""The methods: published values, optimality of every solver, independent oracles, the properties that papers prove."""

from __future__ import annotations

import copy
import math
import pickle

import cvxpy
import numpy as np
import pytest
import torch
import torchjd.aggregation as jd
import torchjd.linalg
from conflictfree import grad_operator as conflictfree
from gramians import KINDS, rows_of, terms_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

import fastconfig as fc
from fastconfig.backends import cpu, reference
from fastconfig.methods import GramianMethod, Stateful, solvers
from fastconfig.methods.base import StatefulMethod
from fastconfig.methods.catalogue import CATALOGUE

pytestmark = pytest.mark.usefixtures("one_thread", "lstsq_by_svd")

RULES = [name for name in CATALOGUE if name != "graddrop"]  # which has tests of its own
LOSSES = (1, 2, 3, 5, 8, 17, 40, 64)
PUBLISHED = {  # of torchjd, for the rows below; UPGrad and DualProj with its regularisation of 1e-4, so to 8e-4
    "upgrad": (0.2929, 1.9004, 1.9004),
    "cagrad": (0.1835, 1.2041, 1.2041),
    "pcgrad": (0.5848, 3.8012, 3.8012),
    "imtlg": (0.0767, 1.0, 1.0),
    "mgda": (0.0, 1.0, 1.0),
    "alignedmtl": (0.2133, 0.9673, 0.9673),
    "nashmtl": (0.0542, 0.7061, 0.7061),
    "dualproj": (0.5563, 1.1109, 1.1109),
    "config": (0.1588, 2.0706, 2.0706),
}
TWO = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def variants(m: int) -> list[GramianMethod]:
    """Every rule on every branch of its numbers."""
    preferences = [1.0 + i % 3 for i in range(m)]
    some = [float(i % 3) for i in range(1, m + 1)]
    return [
        fc.Sum(),
        fc.Mean(),
        fc.Constant(preferences),
        fc.RandomWeights(),
        fc.InverseNorm(),
        fc.InverseNorm(-1.5, weights=some),
        fc.PCGrad(order="fixed"),
        fc.PCGrad(weights=some),
        fc.Priority(),
        fc.Priority(order=list(range(m))[::-1], weights=preferences),
        fc.MGDA(),
        fc.CAGrad(),
        fc.CAGrad(3.0, rescale=1, weights=preferences),
        fc.CAGrad(0.1, rescale=2, weights=some),
        fc.IMTLG(),
        fc.NashMTL(),
        fc.NashMTL(max_norm=None, weights=some),
        fc.NashMTL(max_norm=2.0, weights=preferences),
        fc.FairGrad(),
        fc.FairGrad(2.0, weights=preferences),
        fc.FairGrad(0.5, weights=some),
        fc.AlignedMTL(),
        fc.AlignedMTL("median", weights=some),
        fc.AlignedMTL("rmse"),
        fc.DualProj(),
        fc.DualProj(weights=some),
        fc.UPGrad(),
        fc.UPGrad(weights=some),
        fc.GradVac(0.3),
        fc.GradVac(1.0, weights=some),
        fc.SDMGrad(),
        fc.SDMGrad(0.0, lr=0.1, momentum=0.9, steps=7, weights=preferences),
    ]


def gramian_of(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows @ rows.T)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(backend, name):
    expected = torch.tensor(PUBLISHED[name])
    tolerance = 8e-4 if name in ("upgrad", "dualproj") else 6e-5
    method = CATALOGUE[name].make(2)
    torch.testing.assert_close(fc.combine(TWO, method, backend=backend), expected, rtol=0.0, atol=tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", LOSSES)
def test_the_core_computes_what_the_reference_says(m, kind):
    rows = rows_of(kind, m)
    gramian = gramian_of(rows)
    torch.manual_seed(0)
    # A solution moves by the condition of what it solves times rounding.
    # With norms that differ by 1e12 the Gramian's small eigenvalues are known to 1e-4 of themselves.
    tolerance = {"ill-conditioned": 3e-6, "scaled": 1e-7}.get(kind, 1e-8)
    for method in variants(m):
        allowed = 2e-3 if kind == "scaled" and isinstance(method, fc.AlignedMTL) else tolerance
        for _ in range(2 if isinstance(method, StatefulMethod) else 1):  # the second step shows what is remembered
            operand = method.operand(m, gramian.device)
            beside = None if operand is None else operand.clone()
            found = cpu.rule_weights(gramian, method.rule, operand).numpy()
            wanted = reference.rule_weights(gramian, method.rule, beside).numpy()
            error = np.linalg.norm((found - wanted) @ rows)
            assert error <= allowed * np.linalg.norm(np.abs(wanted) * np.sqrt(np.diagonal(gramian))), method
            assert not (found[np.diagonal(gramian) == 0]).any()
            if operand is not None:
                torch.testing.assert_close(operand, beside, rtol=0.0, atol=1e-7)


def solved(method: GramianMethod, gramian: torch.Tensor, backend: str) -> np.ndarray:
    return {"cpu": cpu, "reference": reference}[backend].rule_weights(gramian, method.rule, None).numpy()


def active(rows: np.ndarray) -> np.ndarray:
    """The unit rows of those that are not zero."""
    norms = np.linalg.norm(rows, axis=1)
    return rows[norms > 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", LOSSES)
def test_mgda_satisfies_the_optimality_conditions(backend, m, kind):
    rows = active(rows_of(kind, m))
    gramian = rows @ rows.T
    w = solved(fc.MGDA(), torch.from_numpy(gramian), backend)
    if not w.any():  # the hull holds the origin: a nonnegative combination with Σ = 1 vanishes
        _, residual = nnls(np.vstack([rows.T / np.abs(rows).max(), np.ones(len(rows))]), np.eye(rows.shape[1] + 1)[-1])
        assert residual <= 1e-6
        return
    assert w.min() >= 0.0
    assert w.sum() == pytest.approx(1.0, abs=1e-14)
    products, square = gramian @ w, w @ gramian @ w
    scale = np.sqrt(np.diagonal(gramian)) * np.sqrt((w**2 * np.diagonal(gramian)).sum())
    assert ((products - square) / scale).min() >= -1e-9
    assert np.abs(w * (products - square)).max() <= 1e-9 * (w @ np.abs(gramian) @ w)


def projection_residual(gramian: np.ndarray, start: np.ndarray, weights: np.ndarray) -> float:
    """KKT of the nearest Gᵀc to Gᵀp with Gᵀc in the dual cone: c ≥ p, K c ≥ 0, (c - p)·K c = 0; relative to terms."""
    norms = np.sqrt(np.diagonal(gramian))
    length = max(np.linalg.norm(weights * norms), 1e-300)
    products = gramian @ weights / norms / length
    excess = (weights - start) * norms / length
    return max(-products.min(), -excess.min(), np.abs(products * excess).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", LOSSES)
def test_projections_satisfy_the_optimality_conditions(backend, m, kind):
    rows = active(rows_of(kind, m))
    gramian = rows @ rows.T
    k = len(rows)
    mean = np.full(k, 1.0 / k)
    weights = solved(fc.DualProj(), torch.from_numpy(gramian), backend)
    assert projection_residual(gramian, mean, weights) <= 1e-9
    total = np.zeros(k)
    for i in range(k):
        alone = np.eye(k)[i]
        preferences = torch.from_numpy(alone)
        weights = solved(fc.UPGrad(weights=preferences), torch.from_numpy(gramian), backend)
        assert projection_residual(gramian, alone, weights) <= 1e-9
        total += weights / k
    found = solved(fc.UPGrad(), torch.from_numpy(gramian), backend)
    assert np.linalg.norm((found - total) @ rows) <= 1e-9 * np.linalg.norm(np.abs(total) @ np.abs(rows))


@pytest.mark.parametrize("c", [0.1, 0.5, 0.99, 2.0, 50.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [2, 3, 8, 40, 64])
def test_cagrad_satisfies_the_optimality_conditions(backend, m, kind, c):
    """d = g₀ + Gᵀv, v ≥ 0: every product is at least some t, it is t where v > 0, and |d - g₀| is the radius or t 0."""
    rows = active(rows_of(kind, m))
    gramian = rows @ rows.T
    norms = np.sqrt(np.diagonal(gramian))
    weights = solved(fc.CAGrad(c), torch.from_numpy(gramian), backend)
    v = (weights - 1.0 / len(rows)) * norms
    length = np.linalg.norm(weights * norms)
    assert v.min() >= -1e-12 * length
    bound = v > 1e-12 * length
    products = gramian @ weights
    t = products[bound][norms[bound].argmin()] if bound.any() else products.min()
    slack = (products - t) / norms / length
    assert slack.min() >= -1e-9
    assert np.abs(slack * v).max() <= 1e-9 * length
    distance, radius = np.linalg.norm(rows.T @ (v / norms)), c * np.linalg.norm(rows.mean(axis=0))
    if abs(distance - radius) > 1e-9 * length:
        assert distance < radius
        assert abs(t) <= 1e-9 * norms.min() * length
        assert not fc.MGDA().weights(torch.from_numpy(gramian)).any()


@pytest.mark.parametrize("alpha", [None, 0.3, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", LOSSES)
def test_bargaining_solves_its_equation(backend, m, kind, alpha):
    rows = active(rows_of(kind, m))
    if kind == "scaled" and alpha in (0.3, 10.0):  # else the solution's cosines are out of float64's reach
        rows *= np.linalg.norm(rows, axis=1, keepdims=True) ** -0.5
    gramian = rows @ rows.T
    method = fc.NashMTL(max_norm=None) if alpha is None else fc.FairGrad(alpha)
    a = solved(method, torch.from_numpy(gramian), backend)
    if not a.any():  # opposed: some nonnegative combination, not zero, all but vanishes
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        _, residual = nnls(np.vstack([unit.T, np.ones(len(rows))]), np.eye(rows.shape[1] + 1)[-1])
        assert residual <= 1e-4
        return
    assert a.min() > 0.0
    wanted = a ** (-1.0 / (alpha or 1.0))
    assert (np.abs(gramian @ a - wanted) / (terms_of(gramian, a) + wanted)).max() <= 1e-9


def test_projections_where_rounding_leaves_the_program_unbounded(backend):
    """The first two gradients are one line to float64, and what the third asks of them goes beside that line."""
    rows = np.array([[1.0, 0.0], [-1.0, 4e-8], [0.0, -1.0]])
    for method in (fc.DualProj(), fc.UPGrad(), fc.CAGrad(0.5), fc.MGDA()):
        weights = solved(method, gramian_of(rows), backend)
        assert np.isfinite(weights).all()
        assert (rows @ (weights @ rows)).min() >= -1e-7, method


def test_bargaining_beside_nearly_opposed_gradients():
    for angle in (1e-1, 1e-3, 1e-5):
        rows = np.array([[1.0, angle], [-1.0, angle]])
        a = solved(fc.NashMTL(max_norm=None), gramian_of(rows), "cpu")
        np.testing.assert_allclose(gramian_of(rows).numpy() @ a, 1.0 / a, rtol=1e-4)
    assert not solved(fc.NashMTL(), gramian_of(np.array([[1.0, 1e-8], [-1.0, 1e-8]])), "cpu").any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("m", [2, 4, 7])
def test_convex_programs_of_a_general_solver(backend, m, seed):
    rows = np.random.default_rng([seed, m, 7]).standard_normal((m, m + 3)) + 0.2
    grads = torch.from_numpy(rows)

    direction = cvxpy.Variable(rows.shape[1])
    mean = rows.mean(axis=0)
    ball = cvxpy.norm(direction - mean) <= 0.5 * np.linalg.norm(mean)
    cvxpy.Problem(cvxpy.Maximize(cvxpy.min(rows @ direction)), [ball]).solve(solver="CLARABEL")
    found = fc.combine(grads, fc.CAGrad(), backend=backend).numpy()
    np.testing.assert_allclose(found, direction.value, atol=2e-4 * np.abs(mean).max())

    w = cvxpy.Variable(m)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(rows.T @ w)), [w >= 0, cvxpy.sum(w) == 1])
    problem.solve(solver="CLARABEL")
    np.testing.assert_allclose(fc.combine(grads, fc.MGDA(), backend=backend), w.value @ rows, atol=1e-6)

    a = cvxpy.Variable(m)
    objective = 0.5 * cvxpy.sum_squares(rows.T @ a) - cvxpy.sum(cvxpy.log(a))
    cvxpy.Problem(cvxpy.Minimize(objective)).solve(solver="CLARABEL")
    np.testing.assert_allclose(fc.combine(grads, fc.NashMTL(max_norm=None), backend=backend), a.value @ rows, atol=2e-4)

    for i in range(m):
        # The nearest point of the dual cone, by the non-negative least squares of scipy.
        v, _ = nnls(rows.T, -rows[i], maxiter=1000)
        alone = fc.combine(grads, fc.UPGrad(weights=np.eye(m)[i].tolist()), backend=backend)
        np.testing.assert_allclose(alone, rows[i] + v @ rows, atol=1e-10)


PEERS = {
    "alignedmtl": lambda m: jd.AlignedMTL(),
    "imtlg": lambda m: jd.IMTLG(),
    "cagrad": lambda m: jd.CAGrad(0.5),
    "dualproj": lambda m: jd.DualProj(projector=torchjd.linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)),
    "upgrad": lambda m: jd.UPGrad(projector=torchjd.linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)),
    "mgda": lambda m: jd.MGDA(epsilon=1e-7, max_iters=3000),
    "sum": lambda m: jd.Sum(),
    "mean": lambda m: jd.Mean(),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("m", [2, 3, 6])
def test_torchjd(backend, m, name):
    rows = torch.from_numpy(rows_of("crossed", m))
    theirs = PEERS[name](m)(rows)
    tolerance = {"mgda": 1e-3, "cagrad": 1e-4}.get(name, 1e-6)
    ours = fc.combine(rows, CATALOGUE[name].make(m), backend=backend)
    assert (ours - theirs).norm() <= tolerance * rows.norm()


@pytest.mark.parametrize("m", [2, 3, 6])
def test_orders_of_torchjd(backend, monkeypatch, m):
    """Both draw orders; with torchjd's made the fixed one, the same projections must result."""
    rows = torch.from_numpy(rows_of("crossed", m))
    monkeypatch.setattr(torch, "randperm", lambda count: torch.arange(count))
    ours = fc.combine(rows, fc.PCGrad(order="fixed"), backend=backend)
    torch.testing.assert_close(ours, jd.PCGrad()(rows), rtol=1e-10, atol=1e-12)
    vaccine, theirs = fc.GradVac(0.5), jd.GradVac(0.5, eps=0.0)
    keys = torch.arange(m, dtype=torch.float64).expand(m, m)
    state = torch.zeros(2, m, m, dtype=torch.float64)
    state[1] = keys
    for step in range(4):
        gramian = gramian_of(rows_of("crossed", m, seed=step))
        module = {"cpu": cpu, "reference": reference}[backend]
        weights = module.rule_weights(gramian, vaccine.rule, state)
        torch.testing.assert_close(weights, theirs.gramian_weighting(gramian), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_conflictfree(backend, m):
    rows = torch.from_numpy(rows_of("crossed", m)).float()
    for method, operator in ((fc.PCGrad(order="fixed"), "PCGradOperator"), (fc.IMTLG(), "IMTLGOperator")):
        theirs = getattr(conflictfree, operator)().calculate_gradient(rows)
        assert (fc.combine(rows, method, backend=backend) - theirs).norm() <= 1e-5 * rows.norm()


def random_rows(draw: st.DrawFn, least: int = 1) -> np.ndarray:
    m = draw(st.integers(least, 6))
    kind = draw(st.sampled_from(["plain", "leaning", "crossed", "flat", "duplicated"]))
    return rows_of(kind, m, seed=draw(st.integers(0, 10_000)))


gradients = st.composite(random_rows)


@given(gradients())
def test_no_loss_is_gone_against(rows):
    grads, norms = torch.from_numpy(rows), np.linalg.norm(rows, axis=1)
    for method in (fc.UPGrad(), fc.DualProj(), fc.MGDA(), fc.NashMTL(), fc.FairGrad(2.0)):
        update = fc.combine(grads, method).numpy()
        length = np.linalg.norm(fc.gramian(grads).numpy().diagonal() ** 0.5)
        assert (rows @ update / norms).min() >= -1e-9 * max(length, np.linalg.norm(update)), method


@given(gradients(), st.randoms(use_true_random=False))
def test_the_order_of_the_losses_does_not_matter(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    grads = torch.from_numpy(rows)
    for method in variants(len(rows)):
        if method.rule.preferences is None and not isinstance(method, (fc.PCGrad, fc.Priority, Stateful)):
            ours, other = fc.combine(grads, method), fc.combine(grads[order], method)
            assert (ours - other).norm() <= 1e-7 * (grads.norm() + ours.norm()), method


@given(gradients(), st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_upgrad_is_linear_under_scaling(rows, scales):
    scaling = np.array(scales[: len(rows)])[:, None]
    ours, twice = (
        fc.combine(torch.from_numpy(factor * scaling * rows + rows), fc.UPGrad()).numpy() for factor in (1.0, 2.0)
    )
    thrice = fc.combine(torch.from_numpy(3.0 * scaling * rows + rows), fc.UPGrad()).numpy()
    np.testing.assert_allclose(thrice - twice, twice - ours, atol=1e-9 * np.abs(scaling * rows).sum())


@given(gradients(least=2))
def test_strongly_stationary_points_stay(rows):
    """Where the gradients add up to zero in all ways that matter, there is nothing to gain."""
    grads = torch.from_numpy(np.vstack([rows, -rows.sum(axis=0)]))
    for name in ("sum", "mean", "mgda", "nashmtl", "fairgrad", "upgrad", "dualproj", "cagrad"):
        assert fc.combine(grads, CATALOGUE[name].make(len(grads))).norm() <= 1e-9 * grads.norm(), name


@pytest.mark.parametrize("name", RULES)
def test_a_single_loss(backend, name):
    grads = torch.tensor([[3.0, -4.0, 12.0]], dtype=torch.float64)
    update = fc.combine(grads, CATALOGUE[name].make(1), backend=backend)
    wanted = grads[0] / (13.0 if name in ("nashmtl", "fairgrad") else 1.0)
    torch.testing.assert_close(update, 1.5 * wanted if name == "cagrad" else wanted)


@pytest.mark.parametrize("name", RULES)
def test_degenerate_gradients(backend, name):
    torch.manual_seed(0)
    row = torch.tensor([1.0, -2.0, 0.5, 3.0])
    other = torch.tensor([0.5, 1.0, 2.0, -1.0])
    zero, bad = torch.zeros(4), torch.tensor([1.0, math.nan, 0.0, math.inf])
    method = CATALOGUE[name].make

    def combined(*rows):
        return fc.combine(list(rows), method(len(rows)), backend=backend)

    assert not combined(zero, zero, zero).any()
    assert torch.isfinite(combined(row, row, other)).all()
    assert torch.isfinite(combined(row, 2 * row, 3 * row)).all()
    assert torch.isfinite(combined(row, zero, other)).all()
    assert torch.isfinite(combined(1e-20 * row, 1e10 * other, row)).all()
    assert combined(row, bad, other).isnan().all()
    opposed = combined(row, -row)
    assert torch.isfinite(opposed).all()
    # Those of random weights, the protected first, and what inverse norms leave is but rounding.
    if name not in ("randomweights", "priority", "inversenorm"):
        assert not opposed.any()
    assert torch.isfinite(combined(row, -3 * row, zero)).all()
    assert torch.isfinite(combined(row, -row, other)).all()


@pytest.mark.parametrize("make", [fc.MGDA, fc.PCGrad, fc.NashMTL, fc.UPGrad, fc.GradVac, fc.SDMGrad, fc.Sum])
def test_non_finite_rows_are_dropped_or_raise(backend, make):
    rows = torch.tensor([[1.0, 2.0, 3.0], [math.inf, 0.0, 1.0], [2.0, -1.0, 1.0]])
    dropped = fc.combine(rows, make(nonfinite="drop"), backend=backend)
    torch.testing.assert_close(dropped, fc.combine(rows[[0, 2]], make(), backend=backend))
    with pytest.raises(FloatingPointError, match=r"loss 1.*nonfinite='drop'"):
        fc.combine(rows, make(nonfinite="raise"), backend=backend)


def test_what_is_not_finite_changes_no_state(backend):
    rows = torch.tensor([[1.0, 2.0, 3.0], [math.nan, 0.0, 1.0], [2.0, -1.0, 1.0]])
    for method in (fc.GradVac(0.5), fc.SDMGrad(), fc.CRMOGM(fc.MGDA())):
        fc.combine(torch.eye(3) - 0.4, method, backend=backend)
        before = method.state_dict()["state"]
        assert fc.combine(rows, method, backend=backend).isnan().all()
        state = method.state_dict()["state"]
        assert torch.equal(state[0], before[0])  # GradVac's second half is a draw


PREFERRING = (
    fc.InverseNorm,
    fc.PCGrad,
    fc.GradVac,
    fc.CAGrad,
    fc.SDMGrad,
    fc.DualProj,
    fc.UPGrad,
    fc.NashMTL,
    fc.FairGrad,
    fc.AlignedMTL,
)


@pytest.mark.parametrize("make", PREFERRING)
def test_preferences_of_dropped_rows_alone_leave_nothing_to_do(backend, make):
    rows = torch.tensor([[math.nan, 1.0, 2.0], [1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    update = fc.combine(rows, make(weights=[1.0, 0.0, 0.0], nonfinite="drop"), backend=backend)
    if make is fc.SDMGrad:  # its weights are of its own, and preferences only draw on them
        assert torch.isfinite(update).all()
    else:
        assert not update.any()


def test_no_size_or_spread_of_norms_leaves_float64(backend):
    rows = torch.from_numpy(rows_of("crossed", 4))
    for name in ("config", "imtlg", "mgda", "cagrad", "dualproj", "upgrad", "alignedmtl", "priority", "inversenorm"):
        method = fc.CAGrad(1e12) if name == "cagrad" else CATALOGUE[name].make(4)
        wanted = fc.combine(rows, method, backend=backend)
        for scale in (2.0**-495, 2.0**495):  # 1e-149 and 1e149, exactly
            found = fc.combine(scale * rows, method, backend=backend) / scale
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0.0)
    # CAGrad's level is then many orders under the largest product, and far to halve to.
    unit = rows / rows.norm(dim=1, keepdim=True)
    spread = unit * torch.tensor([[1e29], [1e-29], [1e-8], [1e30]], dtype=torch.float64)
    v = (solved(fc.CAGrad(0.5), fc.gramian(spread), backend) - 0.25) * spread.norm(dim=1).numpy()
    assert np.linalg.norm(v @ unit.numpy()) == pytest.approx(0.5 * spread.mean(dim=0).norm().item(), rel=1e-9)


def test_inverse_norms_of_rows_that_count(backend):
    """A tiny gradient without preference must not make the others' factors underflow."""
    rows = torch.diag(torch.tensor([1e-3, 1.0, 2.0], dtype=torch.float64))
    update = fc.combine(rows, fc.InverseNorm(300.0, weights=[0.0, 1.0, 1.0]), backend=backend)
    torch.testing.assert_close(update, torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))


def test_sdmgrad_begins_at_the_preferences():
    begun = fc.SDMGrad(weights=[1.0, 3.0]).operand(2, torch.device("cpu"))
    assert torch.equal(begun, torch.tensor([0.25, 0.75], dtype=torch.float64))


def test_sdmgrad_at_any_rate_keeps_to_the_simplex(backend):
    rows = torch.eye(3, dtype=torch.float64) - 0.4 + torch.arange(3.0)[:, None]
    for rate in (1e12, 1e20, 1e200):
        method = fc.SDMGrad(lr=rate)
        update = fc.combine(rows, method, backend=backend)
        state = method.state_dict()["state"]
        assert torch.equal(state.sort().values, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(update, (state + 0.1) / 1.3 @ rows)


def test_cagrad_between_the_mean_and_mgda(backend):
    rows = torch.from_numpy(rows_of("leaning", 5))
    assert torch.equal(fc.combine(rows, fc.CAGrad(0.0), backend=backend), fc.combine(rows, fc.Mean(), backend=backend))
    far = fc.combine(rows, fc.CAGrad(1e6), backend=backend)
    mgda = fc.combine(rows, fc.MGDA(), backend=backend)
    assert torch.nn.functional.cosine_similarity(far, mgda, dim=0) > 1 - 1e-9
    plain = fc.combine(rows, fc.CAGrad(0.4), backend=backend)
    for rescale, divisor in ((1, 1.16), (2, 1.4)):
        torch.testing.assert_close(fc.combine(rows, fc.CAGrad(0.4, rescale=rescale), backend=backend), plain / divisor)


def test_cagrad_of_a_subset_is_the_papers_program(backend):
    rows = torch.from_numpy(rows_of("crossed", 6))
    parameter = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    method = fc.CAGrad(0.5, fast=3, generator=torch.Generator().manual_seed(1))
    calls = []

    def loss(i):
        calls.append(i)
        return rows[i] @ parameter

    losses = [lambda i=i: loss(i) for i in range(6)]
    buf = fc.GradientBuffer([parameter], num_losses=6)
    buf.rows.fill_(math.nan)  # what other steps left in the rows must not matter
    chosen = method.reduced(losses)
    assert len(chosen) == 3
    for row, closure in chosen:
        with buf.record(row):
            closure().backward()
    assert sorted(calls) == list(range(6))
    info = buf.combine(method)
    singles = [row for row, _ in chosen[:-1]]
    others = [i for i in range(6) if i not in singles]
    # max min(⟨(K g₀ - Σ_S g_i)/(K - |S|), d⟩, min_S ⟨g_i, d⟩) over |d - g₀| ≤ c|g₀|
    subset = torch.stack([*rows[singles], rows[others].mean(dim=0)]).numpy()
    mean = rows.mean(dim=0).numpy()
    direction = cvxpy.Variable(rows.shape[1])
    ball = cvxpy.norm(direction - mean) <= 0.5 * np.linalg.norm(mean)
    cvxpy.Problem(cvxpy.Maximize(cvxpy.min(subset @ direction)), [ball]).solve(solver="CLARABEL")
    np.testing.assert_allclose(buf.grad, direction.value, atol=1e-4)
    assert {int(i) for i in info.weights.nonzero()} == {row for row, _ in chosen}


def test_gradvac_at_the_ends_of_what_a_cosine_can_be(backend):
    module = {"cpu": cpu, "reference": reference}[backend]
    for target, gramian in (
        (1.0 - 1e-14, torch.tensor([[1.0, 0.3], [0.3, 1.0]])),  # a turn that far is none that float64 knows
        (-1.0, torch.tensor([[1.0, -1.0], [-1.0, 1.0]])),
    ):
        state = torch.full((2, 2, 2), target, dtype=torch.float64)
        assert torch.equal(module.rule_weights(gramian.double(), fc.GradVac().rule, state), torch.ones(2).double())
    for seed in range(40):  # where rounding takes some cosines past -1 and 1
        row = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 7)))
        rows = row * torch.tensor([[1.0], [-1.0 / 3.0], [0.7]])
        method = fc.GradVac(0.5)
        for _ in range(3):
            assert torch.isfinite(fc.combine(rows, method, backend=backend)).all()
        assert method.targets.abs().max() <= 1.0


def test_gradvac_on_one_line_remembers_no_rounding():
    """A gradient that has vanished has no cosine but what rounding left of it, which differs from code to code."""
    torch.manual_seed(0)
    gramian = gramian_of(rows_of("flat", 5))
    for _ in range(30):
        method = fc.GradVac(0.3)
        for _ in range(2):
            operand = method.operand(5, gramian.device)
            beside = operand.clone()
            cpu.rule_weights(gramian, method.rule, operand)
            reference.rule_weights(gramian, method.rule, beside)
            torch.testing.assert_close(operand, beside, rtol=0.0, atol=1e-7)


def test_priority_protects_the_first(backend):
    rows = torch.from_numpy(rows_of("crossed", 6))
    for order in (None, [3, 1, 0, 5, 4, 2]):
        first = rows[0 if order is None else 3]
        update = fc.combine(rows, fc.Priority(order), backend=backend)
        assert update @ first >= first @ first * (1 - 1e-12)
    two = fc.combine(rows[:2], fc.Priority(), backend=backend)
    along = torch.clamp(rows[1] @ rows[0] / (rows[0] @ rows[0]), max=0.0)
    torch.testing.assert_close(two, rows[0] + rows[1] - along * rows[0])


def test_inverse_norms(backend):
    rows = torch.from_numpy(rows_of("leaning", 4)) * torch.tensor([[1e-3], [1.0], [50.0], [1e4]]).double()
    gramian = fc.gramian(rows, backend=backend)
    norms = gramian.diagonal().sqrt()
    weights = fc.InverseNorm().weights(gramian)
    torch.testing.assert_close(weights * norms, (weights * norms)[0].expand(4))
    assert weights.sum().item() == pytest.approx(4.0)
    torch.testing.assert_close(fc.InverseNorm(power=0.0).weights(gramian), torch.ones(4, dtype=torch.float64))
    for power, longest in (
        (300.0, 0),
        (-300.0, 3),
    ):  # no power overflows: all weight is the least or the largest norm's
        weights = solved(fc.InverseNorm(power), gramian, backend)
        np.testing.assert_allclose(weights, 4.0 * np.eye(4)[longest], atol=1e-12)


def test_nash_mtl_in_between_solutions(backend):
    method = fc.NashMTL(update_every=3)
    rows = [torch.from_numpy(rows_of("leaning", 3, seed=i)) for i in range(4)]
    first = fc.combine(rows[0], method, backend=backend)
    torch.testing.assert_close(first, fc.combine(rows[0], fc.NashMTL(), backend=backend))
    solution = fc.NashMTL(max_norm=None).weights(fc.gramian(rows[0]))
    for between in rows[1:3]:
        update = solution @ between
        expected = update / max(1.0, update.norm())
        torch.testing.assert_close(fc.combine(between, method, backend=backend), expected)
    torch.testing.assert_close(
        fc.combine(rows[3], method, backend=backend), fc.combine(rows[3], fc.NashMTL(), backend=backend)
    )


def test_nash_mtl_in_between_solutions_meets_gradients_that_are_not_finite(backend):
    good, bad = torch.eye(3), torch.eye(3)
    bad[0, 0] = math.nan

    def combined(rows, method):
        return fc.combine(rows, method, backend=backend)

    begun = fc.NashMTL(update_every=3)
    assert combined(bad, begun).isnan().all()  # as with a GradScaler whose scale is too large at first
    wanted = combined(good, fc.NashMTL())
    for _ in range(3):
        torch.testing.assert_close(combined(good, begun), wanted)
    zero = torch.eye(3)
    zero[0, 0] = 0.0
    method = fc.NashMTL(update_every=3)
    combined(zero, method)
    assert combined(bad, method).isnan().all()  # though the solution gives this row no weight
    torch.testing.assert_close(combined(good, method)[1:], wanted.new_tensor([0.5, 0.5]).sqrt())
    dropping = fc.NashMTL(update_every=3, nonfinite="drop")
    combined(good, dropping)
    torch.testing.assert_close(combined(bad, dropping), torch.tensor([0.0, 0.5, 0.5]).sqrt())
    raising = fc.NashMTL(update_every=3, nonfinite="raise")
    combined(good, raising)
    with pytest.raises(FloatingPointError, match="loss 0"):
        combined(bad, raising)
    free = fc.NashMTL(update_every=2, max_norm=None)
    torch.testing.assert_close(combined(good, free), torch.ones(3))
    torch.testing.assert_close(combined(5.0 * good, free), torch.full((3,), 5.0))


class Answering:
    """A method of a user."""

    def __init__(self, answer):
        self.answer = answer

    def weights(self, gramian):
        return self.answer


def test_crmogm_of_a_users_method(backend):
    parameter = torch.ones(2, requires_grad=True)
    method = fc.CRMOGM(Answering(2 * parameter), alpha=0.5)
    for _ in range(2):
        torch.testing.assert_close(fc.combine(torch.eye(2), method, backend=backend), torch.full((2,), 2.0))
        assert not method.state_dict()["state"].requires_grad  # else every step's graph would be kept
    for answer, error in (([1.0, 1.0], TypeError), (torch.ones(2, 1), ValueError), (torch.ones(3), ValueError)):
        with pytest.raises(error, match=r"Answering.weights must return .*\(2,\)"):
            fc.CRMOGM(Answering(answer)).weights(torch.eye(2))


def test_crmogm_smooths(backend):
    rows = [torch.from_numpy(rows_of("leaning", 3, seed=i)) for i in range(3)]
    method = fc.CRMOGM(fc.MGDA(), alpha=0.75)
    kept = None
    for each in rows:
        found = fc.MGDA().weights(fc.gramian(each))
        kept = found if kept is None else 0.75 * kept + 0.25 * found
        torch.testing.assert_close(fc.combine(each, method, backend=backend), kept @ each)


DRAWING = {
    "random weights": lambda generator: fc.RandomWeights(generator),
    "pcgrad": lambda generator: fc.PCGrad(generator=generator),
    "gradvac": lambda generator: fc.GradVac(0.5, generator),
    "sdmgrad": lambda generator: fc.SDMGrad(),
    "nash": lambda generator: fc.NashMTL(update_every=3),
    "crmogm": lambda generator: fc.CRMOGM(fc.PCGrad(generator=generator)),
    "cagrad": lambda generator: fc.CAGrad(fast=2, generator=generator),
}


@pytest.mark.parametrize("name", DRAWING)
def test_seeded_runs_repeat_and_state_survives_a_checkpoint(name):
    steps = [torch.from_numpy(rows_of("crossed", 4, seed=i)) for i in range(8)]

    def make():
        return DRAWING[name](torch.Generator().manual_seed(5))

    def run(method, rows):
        answers = []
        for each in rows:
            if name == "cagrad":
                method.reduced([each[i].sum() for i in range(4)])
            answers.append(fc.combine(each, method))
        return answers

    whole = run(make(), steps)
    again = make()
    half = run(again, steps[:4])
    resumed = make()
    resumed.load_state_dict(torch.load(_saved(again.state_dict()), weights_only=True))
    for ours, wanted in zip([*half, *run(resumed, steps[4:])], whole, strict=True):
        assert torch.equal(ours, wanted)
    if name in ("random weights", "pcgrad", "gradvac"):
        other = DRAWING[name](torch.Generator().manual_seed(6))
        assert not all(torch.equal(a, b) for a, b in zip(run(other, steps), whole, strict=True))


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", ["gradvac", "sdmgrad", "nash", "crmogm"])
def test_after_a_reset_the_next_combination_is_the_first(name):
    make = {**DRAWING, "gradvac": lambda _: fc.GradVac(0.5), "crmogm": lambda _: fc.CRMOGM(fc.NashMTL(update_every=3))}
    steps = [torch.from_numpy(rows_of("crossed", 4, seed=i)) for i in range(3)]

    def run(method):
        torch.manual_seed(0)
        return [fc.combine(rows, method) for rows in steps]

    method = make[name](None)
    first = run(method)
    fc.combine(steps[1], method)
    assert not all(map(torch.equal, first, run(method)))
    method.reset()
    assert all(map(torch.equal, first, run(method)))


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"state_dict must have the keys .*'generator', 'state'"):
        fc.GradVac().load_state_dict({"targets": None})
    with pytest.raises(ValueError, match="saved with a generator"):
        fc.GradVac().load_state_dict(fc.GradVac(generator=torch.Generator()).state_dict())
    other, targets = fc.SDMGrad(), fc.GradVac()
    fc.combine(torch.eye(2), other)
    targets.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"GradVac was given a state of shape \(2,\) and needs \(2, 2, 2\)"):
        fc.combine(torch.eye(2), targets)
    method = fc.SDMGrad()
    fc.combine(torch.eye(3), method)
    with pytest.raises(ValueError, match=r"remembers 3 losses and was asked for 2; call reset\(\)"):
        fc.combine(torch.eye(2), method)
    method.reset()
    fc.combine(torch.eye(2), method)


@pytest.mark.parametrize("name", CATALOGUE)
def test_copies_go_on_by_themselves(name):
    rows = torch.from_numpy(rows_of("crossed", 3))
    method = CATALOGUE[name].make(3)
    fc.combine(rows, method)
    copies = copy.deepcopy(method), pickle.loads(pickle.dumps(method))
    answers = []
    for each in (*copies, method):
        torch.manual_seed(0)
        answers.append([fc.combine(rows, each) for _ in range(2)])
        assert repr(each) == repr(method)
    for copied in answers[:-1]:
        assert all(map(torch.equal, copied, answers[-1]))


def test_a_state_of_a_checkpoint_in_another_precision_is_read():
    method, again = fc.SDMGrad(), fc.SDMGrad()
    fc.combine(torch.eye(3) - 0.4, method)
    state = method.state_dict()
    again.load_state_dict({**state, "state": state["state"].float().expand(2, 3).T[:, 0]})
    torch.testing.assert_close(fc.combine(torch.eye(3), again), fc.combine(torch.eye(3), method))


def test_random_orders_are_all_taken():
    rows = torch.from_numpy(rows_of("crossed", 3))
    generator = torch.Generator().manual_seed(0)
    answers = {tuple(fc.combine(rows, fc.PCGrad(generator=generator)).tolist()) for _ in range(200)}
    # Two orders for each of three gradients, where the order matters.
    assert 2 <= len(answers) <= 8
    keys = (
        fc.PCGrad(generator=generator).operand(3, rows.device),
        fc.GradVac(generator=generator).operand(3, rows.device)[1],
    )
    assert torch.stack(keys).unique().numel() == 18  # each gradient draws an order of its own
    weights = torch.stack([fc.RandomWeights(generator).weights(torch.eye(3)) for _ in range(2000)])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2000, dtype=torch.float64))
    torch.testing.assert_close(weights.mean(dim=0), torch.full((3,), 1 / 3).double(), rtol=0.0, atol=0.02)
    assert weights.min() > 0.0
    ratios = weights.log().diff(dim=1)[:, 0]  # of two normal numbers, the difference
    assert ratios.std().item() == pytest.approx(math.sqrt(2.0), rel=0.05)


@pytest.mark.parametrize("name", RULES)
def test_in_a_buffer_and_in_mconfig(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    inputs = torch.randn(7, 4)
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    method = CATALOGUE[name].make(3)
    buf.backward([lambda i=i: (model(inputs)[:, i] - i).square().mean() for i in range(3)])
    info = buf.combine(method)
    torch.testing.assert_close(buf.grad.double(), info.weights @ buf.rows.double(), rtol=1e-5, atol=1e-6)
    if name not in ("randomweights", "pcgrad", "gradvac", "sdmgrad"):
        torch.testing.assert_close(info.weights, CATALOGUE[name].make(3).weights(info.gramian))

    optimizer = fc.optim.MConFIG(model.parameters(), lr=0.05, num_losses=3, method=CATALOGUE[name].make(3))
    before = (model(inputs) - torch.arange(3.0)).square().mean().item()
    for _ in range(60):
        i = optimizer.next_loss()
        with optimizer.record(i):
            (model(inputs)[:, i] - i).square().mean().backward()
        optimizer.step()
    assert (model(inputs) - torch.arange(3.0)).square().mean().item() < before


class Halved(fc.MGDA):
    """A built-in method that a user changed."""

    def weights(self, gramian):
        return 0.5 * super().weights(gramian)


@pytest.mark.parametrize("base", [fc.MGDA, fc.NashMTL, fc.CAGrad])
def test_every_method_can_be_subclassed(backend, base):
    class Doubled(base):
        def weights(self, gramian):
            return 2.0 * super().weights(gramian)

    rows = torch.from_numpy(rows_of("leaning", 3))
    assert base().is_fused
    assert not Doubled().is_fused
    wanted = 2.0 * fc.combine(rows, base(), backend=backend)
    torch.testing.assert_close(fc.combine(rows, Doubled(), backend=backend), wanted)


def test_what_a_subclass_answers_counts_in_a_combination_and_over_several_segments(backend):
    rows = torch.from_numpy(rows_of("leaning", 3))
    wanted = fc.combine(rows, fc.MGDA(), backend=backend)
    torch.testing.assert_close(fc.combine(rows, Halved(), backend=backend), 0.5 * wanted)
    narrow, wide = (part.clone().requires_grad_() for part in (torch.zeros(10), torch.zeros(16, dtype=torch.float64)))
    buf = fc.GradientBuffer([narrow, wide], num_losses=3)
    buf.backward([rows[i, :10].float() @ narrow + rows[i, 10:] @ wide for i in range(3)])
    for method, share in ((fc.MGDA(), 1.0), (Halved(), 0.5)):
        info = buf.combine(method)
        torch.testing.assert_close(info.gramian, rows @ rows.T, rtol=1e-6, atol=1e-6)
        found = torch.cat([narrow.grad.double(), wide.grad])
        torch.testing.assert_close(found, share * wanted, rtol=1e-5, atol=1e-5)


WRONG = [
    (lambda: fc.Constant(None), ValueError, "weights must be a vector"),
    (lambda: fc.Constant([0.0, 0.0]), ValueError, "must not all be zero"),
    (lambda: fc.InverseNorm("one"), TypeError, "power must be a number, got 'one'"),
    (lambda: fc.InverseNorm(math.nan), ValueError, "power must be finite, got nan"),
    (lambda: fc.InverseNorm(weights=[1.0, -1.0]), ValueError, r"weights must not be negative, got \[1.0, -1.0\]"),
    (lambda: fc.PCGrad(order="sorted"), ValueError, "order must be 'random' or 'fixed', got 'sorted'"),
    (lambda: fc.PCGrad(generator=3), TypeError, "generator must be a torch.Generator, got 3"),
    (lambda: fc.Priority([0, 2]), ValueError, r"order must name each .* once, got \[0, 2\]"),
    (lambda: fc.CAGrad(-0.1), ValueError, "c must be finite and at least 0, got -0.1"),
    (lambda: fc.CAGrad(rescale=3), ValueError, "rescale must be 0"),
    (lambda: fc.CAGrad(fast=1), ValueError, "fast must be at least 2, got 1"),
    (lambda: fc.CAGrad(fast=2, weights=[1.0, 2.0]), ValueError, "weights cannot be combined with fast"),
    (lambda: fc.CAGrad().reduced([torch.ones(1)]), ValueError, "reduced needs fast"),
    (lambda: fc.NashMTL(max_norm=0.0), ValueError, "max_norm must be finite and above 0, got 0.0"),
    (lambda: fc.NashMTL(update_every=0), ValueError, "update_every must be at least 1, got 0"),
    (lambda: fc.FairGrad(0.0), ValueError, r"alpha must lie in \[0.05, 10\], got 0.0"),
    (lambda: fc.FairGrad(50), ValueError, r"alpha must lie in \[0.05, 10\], got 50"),
    (lambda: fc.CAGrad(rescale=1.0), TypeError, "rescale must be an int, got 1.0"),
    (lambda: fc.CAGrad(np.float32(-1.0)), ValueError, "c must be finite and at least 0, got -1.0"),
    (lambda: fc.Priority("01"), TypeError, "order must be a sequence of ints, .* got '01'"),
    (lambda: fc.Priority(3), TypeError, "order must be a sequence of ints, .* got 3"),
    (lambda: fc.MGDA().weights([[1.0]]), TypeError, r"gramian must be a tensor of shape \(m, m\), got list"),
    (lambda: fc.AlignedMTL("max"), ValueError, "scale must be one of min, median, rmse, got 'max'"),
    (lambda: fc.GradVac(1.5), ValueError, r"beta must lie in \[0, 1\], got 1.5"),
    (lambda: fc.SDMGrad(momentum=1.0), ValueError, "momentum must lie in"),
    (lambda: fc.SDMGrad(steps=1.5), TypeError, "steps must be an int, got 1.5"),
    (lambda: fc.CRMOGM(fc.MGDA), TypeError, "method must have weights"),
    (lambda: fc.MGDA(nonfinite="ignore"), ValueError, "nonfinite must be one of"),
    (lambda: fc.combine(torch.eye(3), fc.UPGrad(weights=[1.0, 2.0])), ValueError, "weights has 2 entries for 3 losses"),
    (lambda: fc.combine(torch.eye(3), fc.Priority([1, 0])), ValueError, "order has 2 entries for 3 losses"),
    (lambda: fc.MGDA().weights(torch.ones(2, 3)), ValueError, r"gramian must have shape \(m, m\), got \(2, 3\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_reprs_say_how_to_make_them_again():
    for method in variants(3):
        again = eval(repr(method), {name: getattr(fc, name) for name in fc.__all__})
        assert again.rule == method.rule


def test_the_references_minimum_of_rows_that_depend_exactly():
    """An exchange may leave such rows free, where a plain solve raises."""
    found = solvers._minimum(np.ones((3, 3)), np.ones(3), np.array([True, False, True]))
    np.testing.assert_allclose(found, [0.5, 0.0, 0.5])
