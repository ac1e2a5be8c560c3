"""M-ConFIG's step by the compiled core against the reference, on every ISA tier this machine has.

Where averages are float32, both sides form them from the same exact sum (segments.BETA1), so these must be equal to
the bit. What is allowed elsewhere is counted in roundings, see ``allowed``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from segments import (
    ASSIGNING,
    BETA1,
    GAP,
    GROUPS,
    RULE,
    Built,
    Case,
    bits,
    copy_of,
    scales_of,
    unit,
)
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import cpu
from fastconfig.backends.moments import Decision, Ledger, Recorded, StepRule
from fastconfig.backends.momentum.reference import decide

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

TIERS = cpu.tiers() if cpu.available() is None else []  # test_cpu.py asserts that there are some
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float16),
]
"""(of the state, of gradients and parameters)"""
LOSSES = [1, 2, 3, 5, 8, 9, 10, 17, 40]
SIZES = [1, 2, 7, 15, 16, 17, 31, 33, 511, 513, 1025]
LARGE = 20_000
"""More than one block, more than one panel, and no multiple of either."""
WORK = 2.0**-53
"""The unit roundoff of what both sides compute in."""
ConFIG = fc.ConFIG().rule


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.active_tier()
    cpu.use_tier(request.param)
    yield request.param
    cpu.use_tier(before)


def sizes_of(m: int) -> list[int]:
    return [*SIZES, LARGE] if m in (3, 9, 17) else SIZES


def selections_of(m: int) -> list[int]:
    return sorted({1, min(2, m), m})


def sizes_and_selections_of(m: int, sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Every size with one number of recorded losses, these in turn; some sizes with each."""
    selections = selections_of(m)
    for i, n in enumerate(sizes):
        yield from ((n, k) for k in (selections if n in (17, 513) else [selections[i % len(selections)]]))


def each_dtype(test):
    return pytest.mark.parametrize(("state", "dtype"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))(test)


def assert_averages_agree(got: Tensor, wanted: Tensor, scale: Tensor) -> None:
    """Of float32 to the bit; of float64 up to the three roundings on either side."""
    if got.dtype == torch.float32:
        assert torch.equal(bits(got), bits(wanted))
    else:
        known = wanted.isfinite()
        assert torch.equal(got.isfinite(), known)
        assert (got - wanted).abs()[known].le(6 * WORK * scale[known]).all()


class Allowed:
    """How far two correct implementations may be apart after one step, column by column."""

    def __init__(self, case: Case, before: Tensor, after: Tensor, second: Tensor, decision: Decision, weights: float):
        """``weights``: the relative error of ``decision``'s own."""
        m, info = case.m, torch.finfo(case.state)
        old, new = before.double().nan_to_num(), after.double().nan_to_num()
        forward, backward = decision.forward, decision.backward
        sum_error = 4 * (m + 4) * WORK + weights
        f_error = sum_error * (forward.abs() @ new.abs())
        q_error = (f_error + sum_error * (backward.abs() @ old.abs())) / (1 - BETA1)
        f = forward @ new
        q = (f - backward @ old) / (1 - BETA1)
        v = RULE.beta2 * second.double() + (1 - RULE.beta2) * q.square()
        # Rounded once to the state's type, after about eight roundings to float64.
        self.second = (1 - RULE.beta2) * (2 * q.abs() * q_error + q_error**2) + (info.eps + 16 * WORK) * v
        root = (v * decision.second).sqrt()
        self._gradient, self._f, self._f_error, self._root = decision.gradient, f, f_error, root
        self._relative = 2.5 * info.eps + 16 * WORK + torch.where(v > 0, self.second / (2 * v), 0.0)

    def update(self, columns: Tensor | slice, eps: Tensor | float) -> Tensor:
        """Of ĝ/(√v̂ + ε), where the numerator, v̂ (twice), its root, ε and the sum, and the quotient are rounded."""
        beside = self._gradient / (self._root[columns] + eps)
        return self._f[columns].abs() * beside * self._relative[columns] + self._f_error[columns] * beside


def assert_step_agrees(
    case: Case, got: Built, wanted: Built, before: list[Tensor], decision: Decision, weights: float = 0.0
) -> None:
    first, second = before[:2]
    allowed = Allowed(case, first, wanted.moments.first, second, decision, weights)
    scale = first.double().abs() + sum(row.double().abs() for row in got.recorded.rows)
    assert_averages_agree(got.moments.first, wanted.moments.first, scale)
    difference = (got.moments.second.double() - wanted.moments.second.double()).abs()
    covered = ~wanted.moments.second.isnan()
    assert difference[covered].le(allowed.second[covered]).all()
    for start, count, group in case.layout:
        if group == GAP:
            columns = slice(start, start + count)
            assert torch.equal(bits(got.moments.second[columns]), bits(second[columns]))
    columns, value, eps, rate = parameters_of(wanted)
    assert value.isfinite().all()
    terms = value.abs() + torch.cat(before[2:]).double().abs()
    error = allowed.update(columns, eps) * decision.clip * rate + unit(value, case.dtype) + 16 * WORK * terms
    assert (parameters_of(got)[1] - value).abs().le(error).all()


def parameters_of(built: Built) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all pieces in a row: columns, values in float64, ε, and learning rate (1 where the update is assigned)."""
    counts = torch.tensor([len(piece.values) for piece in built.pieces])
    groups = [GROUPS[piece.group] for piece in built.pieces]
    columns = torch.cat([torch.arange(piece.first, piece.first + len(piece.values)) for piece in built.pieces])
    eps = torch.tensor([group.eps for group in groups], dtype=torch.float64)
    rate = torch.tensor([1.0 if group.assign else float(group.lr) for group in groups], dtype=torch.float64)
    values = torch.cat([piece.values for piece in built.pieces]).double()
    return columns, values, eps.repeat_interleave(counts), rate.repeat_interleave(counts)


# The passes one by one


@each_dtype
@pytest.mark.parametrize("m", LOSSES)
def test_products_equal_the_reference_and_write_nothing(tier, m, state, dtype):
    for n, k in sizes_and_selections_of(m, sizes_of(m)):
        case = Case(m, n, state, dtype)
        got, wanted = case.twins(case.losses(k))
        before, sizes = got.snapshot(), terms(got, scales_of(k))
        products = [built.segment.products(built.recorded, scales_of(k), BETA1) for built in (got, wanted)]
        wanted.segment.update(wanted.recorded, RULE, unweighted(case, scales_of(k)))
        new = wanted.moments.first.double()
        exact = new[list(got.recorded.losses)] @ new.T
        norms = sizes.norm(dim=1)
        bound = norms[list(got.recorded.losses)].outer(norms)
        for found in products:
            assert (found - exact).abs().le((n + 8) * WORK * bound).all(), (n, k)
        among = products[0][:, list(got.recorded.losses)]
        assert torch.equal(among, among.T)
        for tensor, then in zip(got.written(), before, strict=True):
            assert torch.equal(bits(tensor), bits(then))
        got.arena.assert_rest_untouched()


def terms(built: Built, scales: Tensor) -> Tensor:
    """(m, n) β₁|m_i| + (1 - β₁)|g_i|, what the rounding of new averages is relative to; |m_i| of the others."""
    size = built.moments.first.double().abs()
    for i, row, scale in zip(built.recorded.losses, built.recorded.rows, scales, strict=True):
        size[i] = BETA1 * size[i] + (1 - BETA1) * scale * row.double().abs()
    return size


def unweighted(case: Case, scales: Tensor) -> Decision:
    """Take the gradients, and update nothing."""
    decision = case.decision(scales)
    decision.update.zero_()
    return decision


@each_dtype
@pytest.mark.parametrize("m", LOSSES)
def test_update_equals_the_reference(tier, m, state, dtype):
    """Rows that neither sum weighs are NaN: they are not read."""
    for n, k in sizes_and_selections_of(m, sizes_of(m)):
        case = Case(m, n, state, dtype)
        losses = case.losses(k)
        decision = case.decision(scales_of(k))
        if m > 2 and m - 1 not in losses:
            case.first[m - 1] = math.nan
        got, wanted = case.twins(losses)
        before = got.snapshot()
        for built in (got, wanted):
            built.segment.update(built.recorded, RULE, decision)
        assert_step_agrees(case, got, wanted, before, decision)
        got.arena.assert_rest_untouched()
        quiet = [i for i in range(m) if i not in losses]
        assert torch.equal(bits(got.moments.first[quiet]), bits(before[0][quiet]))
        assert not torch.equal(got.moments.first[list(losses)], before[0][list(losses)])


@each_dtype
@pytest.mark.parametrize("m", [1, 2, 5, 9, 17])
def test_update_square_equals_the_reference_and_writes_nothing(tier, m, state, dtype):
    for n, k in sizes_and_selections_of(m, [*SIZES, LARGE]):
        case = Case(m, n, state, dtype)
        decision = case.decision(scales_of(k))
        got, wanted = case.twins(case.losses(k))
        before = got.snapshot()
        squares = [built.segment.update_square(built.recorded, RULE, decision) for built in (got, wanted)]
        for tensor, then in zip(got.written(), before, strict=True):
            assert torch.equal(bits(tensor), bits(then))
        got.arena.assert_rest_untouched()
        wanted.segment.update(wanted.recorded, RULE, decision)
        allowed = Allowed(case, before[0], wanted.moments.first, before[1], decision, 0.0)
        columns, _, eps, _ = parameters_of(wanted)
        error = (2 * update_of(wanted, decision, columns, eps).abs() * allowed.update(columns, eps)).sum()
        assert (squares[0] - squares[1]).abs() <= 1.01 * error + 1e-12 * squares[1]
        assert squares[1] > 0


def update_of(built: Built, decision: Decision, columns: Tensor | slice, eps: Tensor | float) -> Tensor:
    """The update in float64, from what the step wrote, ``clip`` left out."""
    f = decision.forward @ built.moments.first[:, columns].double().nan_to_num()
    root = (built.moments.second[columns].double() * decision.second).sqrt()
    return f * decision.gradient / (root + eps)


@each_dtype
def test_parameters_are_rounded_to_nearest(tier, state, dtype):
    """By way of the state's float32 where it is that: half a unit in the last place, and a little."""
    case = Case(3, 1025, state, dtype)
    decision = case.decision(scales_of(1))
    got, _ = case.twins((1,))
    before = got.snapshot()
    got.segment.update(got.recorded, RULE, decision)
    allowed = Allowed(case, before[0], got.moments.first, before[1], decision, 0.0)
    for piece, then in zip(got.pieces, before[2:], strict=True):
        group, lr = GROUPS[piece.group], float(GROUPS[piece.group].lr)
        columns = slice(piece.first, piece.first + len(piece.values))
        step = update_of(got, decision, columns, group.eps) * decision.clip
        exact = then.double() * (1 - lr * group.weight_decay) + (lr if group.maximize else -lr) * step
        exact, lr = (step, 1.0) if group.assign else (exact, lr)
        exponent = torch.frexp(exact).exponent.clamp(min=math.frexp(torch.finfo(dtype).smallest_normal)[1])
        half = torch.finfo(dtype).eps / 4 * 2.0 ** exponent.double()
        slack = lr * decision.clip * allowed.update(columns, group.eps) + 16 * WORK * exact.abs()
        by_float32 = exact.abs() * 2.0**-24
        assert (piece.values.double() - exact).abs().le(half + by_float32 + slack).all()


def test_update_square_is_that_of_the_update_that_is_written(tier):
    """With ε = 0 and n no multiple of a vector, whose unused lanes must not join the sum as 0/0."""
    groups = (GROUPS[ASSIGNING]._replace(eps=0.0),) * 3
    rule = RULE._replace(groups=groups)
    for n in (1, 7, 17, 513):
        case = Case(5, n, torch.float32, torch.float32)
        got, _ = case.twins((2,))
        decision = case.decision(scales_of(1))
        decision.clip.fill_(1.0)
        square = got.segment.update_square(got.recorded, rule, decision)
        got.segment.update(got.recorded, rule, decision)
        written = torch.cat([piece.values for piece in got.pieces]).double()
        torch.testing.assert_close(square, written.square().sum(), rtol=1e-6, atol=0.0)


# The whole step


@each_dtype
@pytest.mark.parametrize("m", LOSSES)
def test_steps_equal_the_reference(tier, m, state, dtype):
    for n in (1 if m == 1 else 8 * m, 513 if m < 40 else 1025, *([LARGE] if m in (5, 10) else [])):
        for k in selections_of(m):
            case = Case(m, n, state, dtype)
            ledger = case.ledger()
            gots, wanteds = copy_of(ledger), copy_of(ledger)
            for _ in range(2 if n == LARGE else 3):
                losses = case.losses(k)
                got, wanted = case.twins(losses)
                before, weights = got.snapshot(), gots.weights.clone()
                for built, its in ((got, gots), (wanted, wanteds)):
                    built.segment.step(its, built.recorded, RULE, ConFIG, scales_of(k))
                assert_ledgers_agree(gots, wanteds, before[0], wanted.moments.first)
                decision = decision_of(wanteds, weights, scales_of(k))
                assert_step_agrees(case, got, wanted, before, decision, weights=1e-11)
                got.arena.assert_rest_untouched()
                case.first.copy_(got.moments.first)
                case.second.copy_(got.moments.second)
                gots = copy_of(wanteds)


def assert_ledgers_agree(got: Ledger, wanted: Ledger, before: Tensor, after: Tensor) -> None:
    norms = torch.maximum(before.double().norm(dim=1), after.double().norm(dim=1))
    assert (got.gramian - wanted.gramian).abs().le(1e-13 * norms.outer(norms)).all()
    assert torch.equal(got.gramian, got.gramian.T)
    torch.testing.assert_close(got.weights, wanted.weights, rtol=1e-11, atol=1e-11 * float(wanted.weights.abs().max()))
    assert torch.equal(got.counts, wanted.counts)
    assert torch.equal(got.totals, wanted.totals)


def decision_of(ledger: Ledger, weights_before: Tensor, scales: Tensor) -> Decision:
    """What a step must have decided, from the ledgers around it."""
    t = float(ledger.totals[0])
    head = torch.tensor([1.0, 1.0, 1 / (1 - BETA1**t), 1 / (1 - RULE.beta2**t), 1.0], dtype=torch.float64)
    return Decision.of(torch.cat([head, ledger.weights, BETA1 * weights_before, scales]), len(ledger.weights))


@pytest.mark.parametrize("m", [1, 3, 9])
@each_dtype
def test_nothing_is_updated_until_every_loss_has_been_seen(tier, m, state, dtype):
    """Averages go on, parameters and second moments stay to the bit, and an update that is written is zero."""
    case = Case(m, 130, state, dtype)
    case.first.zero_()
    case.second.zero_()
    gots, wanteds = (Ledger.zeros(m, torch.device("cpu")) for _ in range(2))
    for loss in range(m):
        got, wanted = case.twins((loss,))
        before = got.snapshot()
        for built, ledger in ((got, gots), (wanted, wanteds)):
            built.segment.step(ledger, built.recorded, RULE, ConFIG, scales_of(1))
        done = loss == m - 1
        assert gots.totals.tolist() == [float(done), 0.0]
        assert gots.counts.tolist() == [1.0] * (loss + 1) + [0.0] * (m - loss - 1)
        assert torch.equal(gots.totals, wanteds.totals)
        assert bool(gots.weights.any()) == done
        assert_averages_agree(got.moments.first, wanted.moments.first, terms(got, scales_of(1)))
        assert got.moments.first[loss].any()
        if not done:
            assert torch.equal(bits(got.moments.second), bits(before[1]))
            for piece, then in zip(got.pieces, before[2:], strict=True):
                unchanged = torch.zeros_like(then) if GROUPS[piece.group].assign else then
                assert torch.equal(bits(piece.values), bits(unchanged))
        else:
            decision = decision_of(wanteds, torch.zeros(m, dtype=torch.float64), scales_of(1))
            assert_step_agrees(case, got, wanted, before, decision, weights=1e-11)
        got.arena.assert_rest_untouched()
        case.first.copy_(got.moments.first)


@pytest.mark.parametrize("length", ["projection", "minimum", "harmonic", -1])
def test_config_is_the_one_that_was_asked_for(length):
    """Direction weights, length model and rtol reach the core."""
    rule = fc.ConFIG(weights=[1.0, 2.0, 0.5], length=length, rtol=1e-9).rule
    case = Case(3, 100, torch.float64, torch.float64)
    ledgers = []
    for built in case.twins((1,)):
        ledger = case.ledger()._replace(weights=torch.zeros(3, dtype=torch.float64))
        built.segment.step(ledger, built.recorded, RULE, rule, scales_of(1))
        ledgers.append(ledger)
    torch.testing.assert_close(ledgers[0].weights, ledgers[1].weights, rtol=1e-12, atol=0.0)
    plain = case.ledger()
    built.segment.step(plain, built.recorded, RULE, ConFIG, scales_of(1))
    assert not torch.allclose(plain.weights, ledgers[0].weights, rtol=1e-3)


# A step that is left out


@pytest.mark.parametrize("what", [math.inf, -math.inf, math.nan, "overflow", "found_inf"])
@each_dtype
def test_a_step_left_out_leaves_every_byte_as_it_was(tier, what, state, dtype):
    """Wherever the value that is not finite stands; but an update that is asked for is NaN, and the step is counted."""
    for n, m, k in ((1, 1, 1), (17, 3, 2), (700, 9, 1), (700, 10, 10)):
        case = Case(m, n, state, dtype)
        for column in sorted({0, n // 2, n - 1}):
            gradients, losses = case.gradients(k), case.losses(k)
            scales, found_inf = scales_of(k), None
            if what == "found_inf":
                found_inf = torch.tensor([1.0])
            elif what == "overflow":
                gradients[-1][column] = torch.finfo(dtype).max
                scales[-1] = 1e200 if dtype == torch.float64 else 1e300
            else:
                gradients[-1][column] = what
            ledger = case.ledger()
            wanted = copy_of(ledger)
            wanted.totals[1] += 1
            for backend in ("cpu", "reference"):
                its = copy_of(ledger)
                built = case.build(backend, losses, gradients)
                before = built.snapshot()
                built.segment.step(its, built.recorded, RULE, ConFIG, scales, found_inf)
                for found, expected in zip(its, wanted, strict=True):
                    assert torch.equal(found, expected)
                assert_nothing_written(built, before)
            finite = torch.tensor([0.0])
            if what == "found_inf":
                built.segment.step(its, built.recorded, RULE, ConFIG, scales, finite)
                assert its.totals.tolist() == [8.0, 3.0]


def assert_nothing_written(built: Built, before: list[Tensor]) -> None:
    for tensor, then in zip(built.written()[:2], before[:2], strict=True):
        assert torch.equal(bits(tensor), bits(then))
    for piece, then in zip(built.pieces, before[2:], strict=True):
        if GROUPS[piece.group].assign:
            assert piece.values.isnan().all()
        else:
            assert torch.equal(bits(piece.values), bits(then))
    built.arena.assert_rest_untouched()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_method_that_raises_names_the_loss_and_nothing_is_written(backend):
    case = Case(5, 40, torch.float32, torch.float32)
    gradients = case.gradients(3)
    gradients[1][7] = math.nan
    built = case.build(backend, (4, 2, 0), gradients)
    before, ledger = built.snapshot(), case.ledger()
    then = copy_of(ledger)
    with pytest.raises(FloatingPointError, match="loss 2"):
        built.segment.step(ledger, built.recorded, RULE, fc.ConFIG(nonfinite="raise").rule, scales_of(3))
    for tensor, expected in zip([*built.written(), *ledger], [*before, *then], strict=True):
        assert torch.equal(bits(tensor), bits(expected))


# Threads


@pytest.mark.parametrize(("m", "k", "n"), [(3, 1, 50_001), (10, 1, 40_000), (9, 2, 40_000), (40, 40, 33_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(tier, m, k, n, dtype):
    case = Case(m, n, torch.float32, dtype)
    losses, gradients, ledger = case.losses(k), case.gradients(k), case.ledger()
    decision = case.decision(scales_of(k))
    rule = RULE._replace(beta1=0.9)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)  # one_thread sets it back
        built, its = case.build("cpu", losses, gradients), copy_of(ledger)
        for _ in range(2):
            built.segment.step(its, built.recorded, rule, ConFIG, scales_of(k))
        square = built.segment.update_square(built.recorded, rule, decision)
        results.append([*built.snapshot(), *its, square])
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            assert torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
def test_flushing_subnormals_is_not_left_to_the_caller(state):
    """Averages of 1e-40 and second moments of 1e-320: whether torch flushes such numbers must not matter."""
    n = 40_000
    case = Case(3, n, state, state)
    tiny = 1e-40 if state == torch.float32 else 1e-310
    case.first.mul_(tiny)
    case.second.mul_(tiny)
    gradients = [torch.full((n,), tiny, dtype=state)]
    decision = case.decision(scales_of(1))
    decision.gradient.fill_(1.0)
    results = []
    try:
        for flush, threads in ((False, 1), (True, 1), (True, 2)):
            built = case.build("cpu", (1,), gradients)
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flush)
            square = built.segment.update_square(built.recorded, RULE, decision)
            built.segment.update(built.recorded, RULE, decision)
            torch.set_flush_denormal(False)
            results.append([*built.snapshot(), square])
    finally:
        torch.set_flush_denormal(False)
    assert results[0][0].abs().max() < torch.finfo(state).tiny * 20
    assert results[0][0].any()
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            assert torch.equal(bits(found), bits(wanted))


# What holds over many steps


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_gramian_does_not_drift(backend):
    """It is kept, not formed anew: after many steps of one loss each it still is that of the averages."""
    steps = 100_000 if backend == "cpu" else 2_000
    m, n = 4, 5
    torch.manual_seed(0)
    case = Case(m, n, torch.float32, torch.float32)
    case.first.zero_()
    case.second = case.second.nan_to_num(1.0)
    gradients = [torch.randn(n) for _ in range(37)]
    built, ledger = case.build(backend, (0,), gradients[:1]), Ledger.zeros(m, torch.device("cpu"))
    rule = StepRule(0.9, 0.999, GROUPS)
    scales = torch.ones(1, dtype=torch.float64)
    for step in range(steps):
        recorded = Recorded((step % m,), (gradients[step % 37],))
        built.segment.step(ledger, recorded, rule, ConFIG, scales)
    first = built.moments.first.double()
    norms = first.norm(dim=1)
    assert (ledger.gramian - first @ first.T).abs().le(1e-12 * norms.outer(norms)).all()
    assert ledger.totals[0] == steps - m + 1
    assert ledger.counts.sum() == steps


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("beta1", [0.9, 0.99])
def test_weights_recall_the_last_combined_gradient_as_exactly_as_a_stored_vector(backend, beta1):
    """f_{t-1} = Σ weights_i m_i of float32 averages: as near the float64 run as where a float32 f is stored."""
    m, n, steps = 3, 400, 150
    generator = torch.Generator().manual_seed(3)
    drift = torch.randn(m, n, generator=generator, dtype=torch.float64)
    gradients = [
        (drift[step % m] + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)).float()
        for step in range(steps)
    ]
    rule = StepRule(beta1, 0.99, (GROUPS[ASSIGNING],))
    exact, _ = second_moment(backend, rule, m, n, torch.float64, gradients)
    ours, weights = second_moment(backend, rule, m, n, torch.float32, gradients)
    stored = second_moment_of_stored(rule, m, gradients, weights)
    ours_error, stored_error = ((v.double() - exact).abs().sum() / exact.sum() for v in (ours, stored))
    assert 0 < ours_error <= 1.1 * stored_error
    assert stored_error < 1e-5  # or this comparison would be of nothing


def second_moment(
    backend: str, rule: StepRule, m: int, n: int, state: torch.dtype, gradients: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """v after the steps, and the weights of each."""
    case = Case(m, n, state, torch.float32)
    case.first.zero_()
    case.second = torch.zeros(n, dtype=state)
    case.layout, case.values = [(0, n, 0)], [torch.zeros(n)]
    built, ledger = case.build(backend, (0,), gradients[:1]), Ledger.zeros(m, torch.device("cpu"))
    weights = []
    for step, gradient in enumerate(gradients):
        recorded = Recorded((step % m,), (gradient,))
        built.segment.step(ledger, recorded, rule, ConFIG, torch.ones(1, dtype=torch.float64))
        weights.append(ledger.weights.clone())
    return built.moments.second, weights


def second_moment_of_stored(rule: StepRule, m: int, gradients: list[Tensor], weights: list[Tensor]) -> Tensor:
    """As the paper writes it down, f being one more float32 vector: sums in float64, each vector rounded once."""
    n = len(gradients[0])
    first, f, v = torch.zeros(m, n), torch.zeros(n), torch.zeros(n)
    for step, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        i = step % m
        first[i] = (rule.beta1 * first[i].double() + (1 - rule.beta1) * gradient.double()).float()
        if step < m - 1:
            continue
        now = weight @ first.double()
        q = (now - rule.beta1 * f.double()) / (1 - rule.beta1)
        v = (rule.beta2 * v.double() + (1 - rule.beta2) * q.square()).float()
        f = now.float()
    return v


def test_decide_is_the_same_by_either_backends_weights():
    """Both backends' m×m parts agree where the compiled core does not fuse them with the passes."""
    case = Case(5, 60, torch.float64, torch.float64)
    got, _ = case.twins((3, 1))
    fused, parts = case.ledger(), None
    parts = copy_of(fused)
    products = got.segment.products(got.recorded, scales_of(2), BETA1)
    decision, after = decide(
        parts, (3, 1), products, scales_of(2), RULE, lambda gramian: cpu.config_weights(gramian, ConFIG), None
    )
    parts.become(after)
    other = case.build("cpu", (3, 1), list(got.recorded.rows))
    got.segment.update(got.recorded, RULE, decision)
    other.segment.step(fused, other.recorded, RULE, ConFIG, scales_of(2))
    for ours, theirs in zip([*parts, *got.written()], [*fused, *other.written()], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13, equal_nan=True)
