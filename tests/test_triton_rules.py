"""The methods' rules by the Triton kernel against the reference, and against what optimal means; see test_triton.py.

Where the interpreter runs the kernel, a call of 40 losses takes seconds: hence few of them. Each kind of rule is met at
each kind of Gramian at a small m; the solvers that they share, at a large one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fastconfig.kernels import geometry, gramian_rules
from gramians import NUMBERS, operand
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import reference
from fastconfig.backends import triton as backend
from fastconfig.backends.rules import GramianRule

DEVICE = "cpu" if backend.INTERPRETED else "cuda"
PREFERRED = [kind for kind in NUMBERS if kind not in ("mgda", "imtlg")]

pytestmark = [
    pytest.mark.usefixtures("interpreter", "poisoned_memory", "one_thread"),
    # The interpreter is numpy, which speaks of inf·0 and of 1/0.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered"),
]


@pytest.fixture(autouse=True)
def fresh_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins with workspaces of its own, whose memory holds NaN (see ``poisoned_memory``)."""
    monkeypatch.setattr(backend, "_WORKSPACES", {})


def rule_of(kind: str, m: int, preferences: tuple[float, ...] | None = None, nonfinite: str = "propagate"):
    numbers = tuple(float(i) for i in np.random.default_rng(m).permutation(m)) if kind == "priority" else NUMBERS[kind]
    return GramianRule(kind, numbers, preferences, nonfinite)


def operand_of(kind: str, m: int, seed: int = 0) -> Tensor | None:
    """What a rule takes besides."""
    made = operand(kind, m, seed)
    return None if made is None else torch.from_numpy(made).to(DEVICE)


def in_poison(values: np.ndarray) -> Tensor:
    """A float64 tensor of these values between NaN."""
    block = torch.full((values.size + 128,), math.nan, dtype=torch.float64, device=DEVICE)
    inside = block[64:-64].view(values.shape)
    inside.copy_(torch.from_numpy(values))
    return inside


def gradients(m: int, case: str = "mixed") -> np.ndarray:
    """(m, n) rows that conflict, and, but for "mixed", are hard in one way."""
    random = np.random.default_rng(m)
    rows = random.standard_normal((m, 2 * m)) * np.logspace(-1, 1, m)[:, None]
    half = m // 2
    if case == "a zero row":
        rows[half] = 0.0
    elif case == "zeros alone":
        rows[:] = 0.0
    elif case == "duplicates":
        rows[half:] = rows[: m - half] * random.uniform(0.5, 2.0, (m - half, 1))
    elif case == "opposed":
        rows[half:] = -1.5 * rows[: m - half]
    elif case == "dependent":
        rows[-1] = rows[:half].sum(axis=0) - rows[half:-1].sum(axis=0)
    elif case == "norms from 1e-6 to 1e6":
        rows *= np.logspace(-5, 5, m)[::-1, None]
    elif case == "condition 1e10":
        basis = np.linalg.qr(random.standard_normal((m, m)))[0]
        rows = basis * np.logspace(0, -5, m) @ basis.T
    else:
        assert case == "mixed"
    return rows


def gramian_of(m: int, case: str = "mixed") -> np.ndarray:
    rows = gradients(m, case)
    return rows @ rows.T


def both(gramian: np.ndarray, rule: GramianRule, operand: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's weights and the reference's, after both have updated an operand of their own alike."""
    ours = None if operand is None else in_poison(operand.cpu().numpy())
    theirs = None if operand is None else operand.clone()
    got = backend.rule_weights(in_poison(gramian), rule, ours)
    wanted = reference.rule_weights(torch.from_numpy(gramian).to(DEVICE), rule, theirs)
    assert got.dtype == torch.float64
    if ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return got.cpu().numpy(), wanted.cpu().numpy()


def length_of(gramian: np.ndarray, weights: np.ndarray) -> float:
    """|Σ c_i g_i|."""
    return float(np.sqrt(max(weights @ gramian @ weights, 0.0)))


def assert_same_combination(gramian: np.ndarray, got: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-9) -> None:
    """Whichever weights equal rows have; relative to the longest |c_i g_i|."""
    scale = np.abs(wanted * np.sqrt(np.diagonal(gramian))).max()
    assert length_of(gramian, got - wanted) <= tolerance * scale


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_equals_the_reference(m: int, kind: str) -> None:
    preferences = tuple(np.linspace(0.5, 1.5, m)) if kind in PREFERRED and m % 2 else None
    got, wanted = both(gramian_of(m), rule_of(kind, m, preferences), operand_of(kind, m))
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["pcgrad", "gradvac", "priority", "sdmgrad", "inverse_norm"])
def test_rules_without_a_solver_equal_the_reference_at_40_losses(kind: str) -> None:
    got, wanted = both(gramian_of(40), rule_of(kind, 40), operand_of(kind, 40))
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())


CASES = ["a zero row", "zeros alone", "duplicates", "opposed", "dependent", "norms from 1e-6 to 1e6", "condition 1e10"]
UNCERTAIN = {("aligned", "norms from 1e-6 to 1e6"): 1e-3, ("aligned", "condition 1e10"): 1e-5}
"""Eigenvalues near the cut are known to ε over their part of the largest."""


@pytest.mark.emulated
@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("case", CASES)
def test_hard_gramians_as_the_reference(kind: str, case: str) -> None:
    m = 4
    gramian = gramian_of(m, case)
    got, wanted = both(gramian, rule_of(kind, m), operand_of(kind, m))
    assert np.isfinite(got).all()
    assert_same_combination(gramian, got, wanted, UNCERTAIN.get((kind, case), 1e-8))
    if case == "a zero row":
        assert got[m // 2] == 0.0
    if case == "zeros alone" or (case == "opposed" and kind in ("mgda", "imtlg", "nash", "fairgrad")):
        assert not got.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", NUMBERS)
def test_non_finite_rows(kind: str, bad: float) -> None:
    m = 3
    gramian = gramian_of(m)
    gramian[1, :] = gramian[:, 1] = bad
    operand = operand_of(kind, m)
    before = None if operand is None else operand.clone()
    got = backend.rule_weights(in_poison(gramian), rule_of(kind, m), operand)
    assert got.isnan().all()
    if kind in ("gradvac", "sdmgrad"):
        assert torch.equal(operand, before)
    got, wanted = both(gramian, rule_of(kind, m, None, "drop"), operand)
    assert got[1] == 0.0
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())
    with pytest.raises(FloatingPointError, match="loss 1"):
        backend.rule_weights(in_poison(gramian), rule_of(kind, m, None, "raise"), operand)


@pytest.mark.parametrize("kind", PREFERRED)
def test_a_preference_of_zero(kind: str) -> None:
    gramian = gramian_of(3)
    got, wanted = both(gramian, rule_of(kind, 3, (1.0, 0.0, 3.0)), operand_of(kind, 3))
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("constant", (0.0,)),
        ("inverse_norm", (0.0,)),
        ("inverse_norm", (2.0,)),
        ("cagrad", (0.0, 2.0)),
        ("cagrad", (0.01, 2.0)),
        ("cagrad", (10.0, 0.0)),
        ("nash", (0.0,)),
        ("fairgrad", (0.5,)),
        ("fairgrad", (1.0,)),
        ("aligned", (0.0,)),
        ("aligned", (2.0,)),
        ("gradvac", (0.0,)),
        ("sdmgrad", (0.0, 10.0, 0.0, 1.0)),
        ("sdmgrad", (0.3, 1e18, 0.5, 3.0)),
    ],
)
def test_other_numbers(kind: str, numbers: tuple[float, ...]) -> None:
    gramian = gramian_of(5)
    got, wanted = both(gramian, GramianRule(kind, numbers, None, "propagate"), operand_of(kind, 5))
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())


def test_a_tiny_gradient_without_preference_leaves_the_others_factors() -> None:
    gramian = np.diag([1e-80, 1.0, 4.0])
    got, wanted = both(gramian, GramianRule("inverse_norm", (10.0,), (0.0, 1.0, 1.0), "propagate"), None)
    assert got[1] > got[2] > 0.0
    np.testing.assert_allclose(got, wanted, rtol=1e-10)


def test_preferences_of_dropped_rows_alone() -> None:
    gramian = np.array([[np.nan, np.nan], [np.nan, 4.0]])
    for kind in PREFERRED:
        if kind not in ("constant", "gradvac", "sdmgrad", "priority"):
            got, wanted = both(gramian, rule_of(kind, 2, (1.0, 0.0), "drop"), None)
            np.testing.assert_allclose(got, wanted, atol=1e-12, err_msg=kind)


def test_without_an_operand_rows_meet_in_their_order_and_weights_are_the_preferences() -> None:
    gramian = gramian_of(5)
    for rule in (GramianRule("pcgrad", (), None, "propagate"), GramianRule("priority", (), None, "propagate")):
        got, wanted = both(gramian, rule)
        np.testing.assert_allclose(got, wanted, rtol=1e-9)
    given = torch.arange(5.0, dtype=torch.float64, device=DEVICE)
    for divided in (0.0, 1.0):
        got, _ = both(gramian, GramianRule("constant", (divided,), (2.0,) * 5, "propagate"), given)
        assert got.tolist() == [i / 10.0**divided for i in range(5)]


def test_equal_keys_count_in_the_order_of_the_losses() -> None:
    gramian = gramian_of(8)
    keys = torch.zeros(8, 8, dtype=torch.float64, device=DEVICE)
    rule = rule_of("pcgrad", 8)
    assert torch.equal(
        backend.rule_weights(in_poison(gramian), rule, keys), backend.rule_weights(in_poison(gramian), rule, None)
    )


# What optimal means, by conditions that hold for nothing else.


def unit_of(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.sqrt(np.diagonal(gramian))
    unit = gramian / norms / norms[:, None]
    np.fill_diagonal(unit, 1.0)
    return unit, norms


def assert_minimum(unit: np.ndarray, target: np.ndarray, y: np.ndarray) -> None:
    """The conditions of Karush, Kuhn and Tucker for min ½yᵀCy - bᵀy over y ≥ 0, to 1e-9 of their terms."""
    assert (y >= 0.0).all()
    slope = target - unit @ y
    terms = np.abs(unit) @ y + np.abs(target)
    assert (slope <= 1e-9 * terms).all()
    assert (np.abs(slope[y > 0.0]) <= 1e-9 * terms[y > 0.0]).all()


HARD = ["mixed", "dependent", "norms from 1e-6 to 1e6", "condition 1e10"]


@pytest.mark.parametrize(("m", "case"), [(64, "mixed"), *((17, case) for case in HARD[1:])])
def test_dualproj_is_the_projection(m: int, case: str) -> None:
    gramian = gramian_of(m, case)
    unit, norms = unit_of(gramian)
    got = backend.rule_weights(in_poison(gramian), rule_of("dualproj", m), None).cpu().numpy()
    assert_minimum(unit, -unit @ (norms / m), np.maximum((got - 1.0 / m) * norms, 0.0))
    assert (got >= 1.0 / m).all()


@pytest.mark.parametrize("case", ["mixed", "condition 1e10"])
def test_upgrad_projects_every_row(case: str) -> None:
    """Each row's part alone, by a preference for it; their sum, from the parts."""
    m = 3
    gramian = gramian_of(m, case)
    unit, norms = unit_of(gramian)
    total = np.zeros(m)
    for i in range(m):
        only = tuple(1.0 if j == i else 0.0 for j in range(m))
        part = backend.rule_weights(in_poison(gramian), rule_of("upgrad", m, only), None).cpu().numpy()
        part[i] -= 1.0
        assert_minimum(unit, -unit[i], np.maximum(part * norms / norms[i], 0.0))
        part[i] += 1.0
        total += part / m
    got = backend.rule_weights(in_poison(gramian), rule_of("upgrad", m), None).cpu().numpy()
    assert_same_combination(gramian, got, total)


@pytest.mark.parametrize(("m", "case"), [(40, "condition 1e10"), (17, "duplicates"), (17, "norms from 1e-6 to 1e6")])
def test_mgda_is_the_point_of_the_hull_that_is_nearest_to_zero(m: int, case: str) -> None:
    """g_i · d ≥ |d|² for all rows: then no other point of the hull is nearer."""
    gramian = gramian_of(m, case)
    got = backend.rule_weights(in_poison(gramian), rule_of("mgda", m), None).cpu().numpy()
    assert got.sum() == pytest.approx(1.0, rel=1e-12)
    assert (got >= 0.0).all()
    products = gramian @ got
    terms = np.abs(gramian) @ got
    assert (products - got @ products >= -1e-9 * terms).all()
    assert (np.abs(products - got @ products)[got > 0.0] <= 1e-9 * terms[got > 0.0]).all()


@pytest.mark.parametrize("c", [0.05, 0.5, 20.0])
@pytest.mark.parametrize(("m", "rank"), [(5, 2), (6, 3), (12, 12)])
def test_cagrad_reaches_what_its_dual_says_that_none_can_pass(m: int, rank: int, c: float) -> None:
    """The least g_i·d is g_w·g_0 + radius·|g_w| for some w of the simplex; rows that depend on others, too."""
    random = np.random.default_rng(26)
    rows = random.standard_normal((m, rank)) + (2.0 if rank < m else 0.0)
    gramian = rows @ rows.T
    got = backend.rule_weights(in_poison(gramian), GramianRule("cagrad", (c, 0.0), None, "propagate"), None)
    added = got.cpu().numpy() - 1.0 / m
    mean = np.full(m, 1.0 / m)
    radius = c * length_of(gramian, mean)
    assert length_of(gramian, added) == pytest.approx(radius, rel=1e-9)
    w = added / added.sum()
    assert (w >= 0.0).all()
    least = (gramian @ (mean + added)).min()
    assert least == pytest.approx(w @ gramian @ mean + radius * length_of(gramian, w), rel=1e-9)


@pytest.mark.parametrize("case", ["duplicates", "norms from 1e-6 to 1e6", "condition 1e10"])
@pytest.mark.parametrize(("kind", "exponent"), [("nash", 1.0), ("fairgrad", 0.5)])
def test_a_bargain_is_one(kind: str, exponent: float, case: str) -> None:
    m = 8
    gramian = gramian_of(m, case)
    numbers = (0.0,) if kind == "nash" else (1.0 / exponent,)
    got = backend.rule_weights(in_poison(gramian), GramianRule(kind, numbers, None, "propagate"), None).cpu().numpy()
    assert (got > 0.0).all()
    difference = gramian @ got - got**-exponent
    assert (np.abs(difference) <= 1e-9 * (np.abs(gramian) @ got)).all()


# How it is launched.


def test_every_kind_of_the_methods_is_there() -> None:
    from fastconfig.backends.problem import _REFERENCES

    assert set(gramian_rules.KIND_NAMES) == set(NUMBERS) == set(_REFERENCES)


def test_the_same_bits_tickets_at_zero_and_memory_kept() -> None:
    gramian = in_poison(gramian_of(3))
    for kind in ("upgrad", "cagrad"):
        first = backend.rule_weights(gramian, rule_of(kind, 3), None)
        (workspace,) = backend._WORKSPACES.values()
        held = workspace.rule_scratch.data_ptr()
        assert torch.equal(backend.rule_weights(gramian, rule_of(kind, 3), None), first)
        assert not workspace.tickets.any()
        assert workspace.rule_scratch.data_ptr() == held
        assert len(workspace.rule_scratch) == geometry.rule_elements(3, 3)


def test_where_a_barrier_does_not_order_all_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD; see test_triton.py."""
    monkeypatch.setattr(backend, "device_of", lambda device: backend.Device(2, 64, True, True, False, False))
    got, wanted = both(gramian_of(3), rule_of("upgrad", 3))
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_more_losses_than_one_program_solves() -> None:
    got, wanted = both(gramian_of(65), rule_of("inverse_norm", 65))
    np.testing.assert_array_equal(got, wanted)


def test_a_gramian_that_is_not_contiguous() -> None:
    gramian = torch.from_numpy(gramian_of(6)).to(DEVICE)
    wide = torch.full((6, 9), math.nan, dtype=torch.float64, device=DEVICE)
    wide[:, :6] = gramian
    rule = rule_of("dualproj", 6)
    assert torch.equal(backend.rule_weights(wide[:, :6], rule, None), backend.rule_weights(gramian, rule, None))


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (fc.methods.UPGrad(), (0.2929, 1.9004, 1.9004)),
        (fc.methods.CAGrad(c=0.5), (0.1835, 1.2041, 1.2041)),
        (fc.methods.PCGrad(order="fixed"), (0.5848, 3.8012, 3.8012)),
        (fc.methods.IMTLG(), (0.0767, 1.0, 1.0)),
        (fc.methods.MGDA(), (0.0, 1.0, 1.0)),
        (fc.methods.AlignedMTL(), (0.2133, 0.9673, 0.9673)),
        (fc.methods.NashMTL(max_norm=1.0), (0.0542, 0.7061, 0.7061)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_combinations_by_the_kernels_have_the_values_that_torchjd_documents(method, wanted) -> None:
    grads = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64, device=DEVICE)
    got = fc.combine(grads, method, backend="triton")
    torch.testing.assert_close(got.cpu(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=6e-4)
