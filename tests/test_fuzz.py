"""Random inputs of every kind, judged by exact arithmetic. `make fuzz` tries as many as it is asked to.

Every property draws its sizes by hypothesis, which finds the smallest that fails, and its numbers by numpy from a seed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from exact import LARGEST, ExactConFIG, extended, sum_of_products
from gramians import KINDS, rows_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastconfig as fc
from fastconfig.backends import cpu, reference
from fastconfig.methods.base import GramianMethod
from fastconfig.methods.catalogue import CATALOGUE

FUZZED: Counter[str] = Counter()
"""How many inputs each property saw; conftest.py tells it in the end."""

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
TIERS = cpu.tiers() if cpu.available() is None else []  # test_cpu.py asserts that there are some
STRANDS = range(2 if settings().max_examples > 1000 else 1)
"""Long runs are cut in two, for two processes."""
GRAMIAN_METHODS = [name for name in CATALOGUE if isinstance(CATALOGUE[name].make(3), GramianMethod)]

seeds = st.integers(0, 2**63)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("strand", STRANDS),
    # numpy speaks of what overflows, which is wanted here.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def fewer(divisor: int) -> settings:
    """For what takes longer."""
    return settings(max_examples=max(10, settings().max_examples // divisor))


@st.composite
def shapes(draw) -> tuple[int, int]:
    """(m, n): tails of every vector, and some that have whole ones; at times as many rows as the core packs."""
    if draw(st.integers(0, 15)) == 7:
        return draw(st.integers(30, 45)), draw(st.integers(0, 40) | st.integers(90, 110))
    return draw(st.integers(1, 9) | st.integers(10, 21)), draw(st.integers(0, 70) | st.integers(500, 600))


def numbers(rng: np.random.Generator, m: int, n: int, dtype: torch.dtype, special: float) -> torch.Tensor:
    """(m, n) of any scale that the dtype has, a row having its own; a share of them zeros, subnormal or not finite."""
    info = torch.finfo(dtype)
    low, high = np.log2(info.smallest_normal), np.log2(info.max)
    reach = rng.choice([0.0, 0.2, 1.0])  # of the exponents
    exponents = rng.uniform(low, high, m) * reach
    spread = rng.choice([0.0, 1.0, 20.0])
    values = rng.standard_normal((m, n)) * np.exp2(
        np.clip(exponents[:, None] + spread * rng.uniform(-1, 1, (m, n)), low, high)
    )
    made = torch.from_numpy(np.clip(values, -info.max, info.max)).to(dtype)
    if special and n:
        tiny = info.smallest_normal * info.eps
        choices = [0.0, -0.0, tiny, -tiny, info.smallest_normal, info.max, -info.max]
        if rng.random() < 0.5:
            choices += [np.inf, -np.inf, np.nan]
        where = torch.from_numpy(rng.random((m, n)) < special)
        made[where] = torch.from_numpy(rng.choice(choices, (m, n))).to(dtype)[where]
        # A NaN with a payload of its own: quiet or signalling, of either sign.
        words = made.view(WORDS[dtype.itemsize])
        payload = torch.from_numpy(rng.integers(1, 8, (m, n))).to(words.dtype)
        infinity = torch.full((), np.inf, dtype=dtype).view(words.dtype)
        words[made.isnan()] = (infinity | payload)[made.isnan()]
    return made


def laid_out(rng: np.random.Generator, values: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """The same numbers in some place: what lies around them is NaN, and rows may begin at any element."""
    m, n = values.shape
    layout = rng.choice(["matrix", "padded", "shifted", "columns", "vectors", "strided vectors", "one vector"])
    if layout == "matrix":
        return values
    if layout in ("vectors", "strided vectors"):
        step = 1 if layout == "vectors" else int(rng.integers(2, 4))
        found = []
        for row in values:
            shift = int(rng.integers(0, 20))
            block = torch.full((shift + n * step + 3,), np.nan, dtype=values.dtype)
            block[shift : shift + n * step : step] = row
            found.append(block[shift : shift + n * step : step])
        return found
    if layout == "one vector":  # the same memory for all losses
        values[:] = values[:1].clone()
        return values[:1].expand(m, n)
    if layout == "columns":
        block = torch.full((n + 1, m), np.nan, dtype=values.dtype)
        block[:n] = values.T
        return block[:n].T
    padding, shift = int(rng.integers(1, 70)), int(rng.integers(0, 20)) if layout == "shifted" else 0
    block = torch.full((shift + m * (n + padding),), np.nan, dtype=values.dtype)
    matrix = block[shift:].view(m, n + padding)[:, :n]
    matrix.copy_(values)
    return matrix


def guarded(rng: np.random.Generator, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of -7 and the part of it that is to be written."""
    shift = int(rng.integers(0, 20))
    block = torch.full((shift + n + 20,), -7.0, dtype=dtype)
    return block, block[shift : shift + n]


def assert_only_inside(block: torch.Tensor, out: torch.Tensor) -> None:
    start = out.storage_offset()
    assert (block[:start] == -7).all()
    assert (block[start + len(out) :] == -7).all()


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(WORDS[values.dtype.itemsize])


@pytest.fixture(scope="module", params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.active_tier()
    cpu.use_tier(request.param)
    yield request.param
    cpu.use_tier(before)


class Given:
    """A method that returns what it was given."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.given = weights

    def weights(self, gramian: torch.Tensor) -> torch.Tensor:
        return self.given


# One property for the Gramian and one for the combination


@given(shape=shapes(), dtype=st.sampled_from(DTYPES), seed=seeds, special=st.sampled_from([0.0, 0.02, 0.5]))
def test_gramians(tier, strand, shape, dtype, seed, special):
    FUZZED["gramians"] += 1
    rng = np.random.default_rng(seed)
    values = numbers(rng, *shape, dtype, special)
    grads = laid_out(rng, values)
    before = bits(values).clone()
    gramian = fc.gramian(grads, backend="cpu").numpy()
    assert torch.equal(before, bits(values))
    assert np.array_equal(gramian, gramian.T, equal_nan=True)
    m, n = shape
    exact = extended(values)
    finite = [bool(values[i].isfinite().all()) for i in range(m)]
    for i in range(m):
        for j in range(i + 1):
            wanted, size = sum_of_products(exact[i], exact[j])
            if not (finite[i] and finite[j]):
                # Its diagonal says of every row whether it is finite, and that is what the methods ask.
                assert i != j or not np.isfinite(gramian[i, i])
                continue
            if size > 0.99 * LARGEST[torch.float64]:  # a product or a sum leaves float64
                assert i != j or size < 1.01 * LARGEST[torch.float64] or gramian[i, i] == np.inf
                continue
            allowed = (n + 8) * np.longdouble(2) ** -53 * size + n * np.longdouble(2) ** -1074
            assert abs(gramian[i, j] - wanted) <= allowed, (i, j, gramian[i, j], wanted)


@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
    special=st.sampled_from([0.0, 0.02, 0.5]),
    scale=st.sampled_from([0, 0, 10, 300, -300]),
)
def test_combinations(tier, strand, shape, dtype, seed, special, scale):
    FUZZED["combinations"] += 1
    rng = np.random.default_rng(seed)
    m, n = shape
    values = numbers(rng, m, n, dtype, special)
    weights = torch.from_numpy(rng.standard_normal(m) * 10.0**scale)
    weights[torch.from_numpy(rng.random(m) < 0.2)] = 0.0
    grads = laid_out(rng, values)
    before = bits(values).clone()
    block, out = guarded(rng, n, dtype)
    # In one call of the core, which may then sum 16-bit rows in float32, or in a call for each pass.
    # (Squared norms of float64 rows may leave float64, and such a row has no weight.)
    whole = rng.random() < 0.5 and dtype != torch.float64 and bool(weights.any())
    method = fc.Constant(weights.tolist(), nonfinite="drop") if whole else Given(weights)
    assert fc.combine(grads, method, out=out, backend="cpu") is out
    assert torch.equal(before, bits(values))
    assert_only_inside(block, out)
    used = weights.numpy() != 0.0  # a row of weight 0 is not read
    if whole:
        used &= fc.gramian(grads, backend="cpu").diagonal().isfinite().numpy()
    slack = (m + 1) * np.longdouble(2) ** -24 if whole and dtype.itemsize == 2 else 0
    exact, c = extended(values)[used], weights.numpy()[used].astype(np.longdouble)
    wanted, size = sum_of_products(exact.T, c)
    got = extended(out)
    unreadable = ~np.isfinite(exact).all(axis=0)
    assert not np.isfinite(got[unreadable]).any()
    info = torch.finfo(dtype)
    # Products that overflow float64, and results that overflow the dtype, may become infinite.
    overflows = (size > 0.99 * LARGEST[torch.float64]) | (np.abs(wanted) > info.max * (1 - info.eps))
    sure = ~unreadable & ~overflows
    rounding = 0.502 * info.eps * np.abs(wanted) + np.longdouble(info.smallest_normal) * info.eps
    allowed = rounding + ((m + 3) * np.longdouble(2) ** -53 + slack) * size + m * np.longdouble(2) ** -1074
    assert (np.abs(got - wanted)[sure] <= allowed[sure]).all()
    beyond = ~unreadable & (np.abs(wanted) > 1.01 * info.max) & (size < LARGEST[torch.float64])
    assert np.isinf(got[beyond]).all()


# ConFIG in 80 digits, and every rule beside the reference


@fewer(20)
@given(
    m=st.integers(1, 4),
    n=st.integers(1, 6),
    seed=seeds,
    dtype=st.sampled_from([torch.float64, torch.float32]),
    kind=st.sampled_from(["normal", "integers", "close", "opposed", "scaled"]),
)
def test_config_in_eighty_digits(backend, strand, m, n, seed, dtype, kind):
    FUZZED["config in eighty digits"] += 1
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((m, n)) if kind != "integers" else rng.integers(-2, 3, (m, n)).astype(float)
    if kind in ("close", "opposed"):
        rows = rows[:1] * (1 if kind == "close" else (-1.0) ** np.arange(m)[:, None]) + rng.choice(
            [1e-1, 1e-2, 1e-3, 1e-4]
        ) * rng.standard_normal((m, n))
    if kind == "scaled":
        rows *= 10.0 ** rng.uniform(-18, 18, (m, 1))
    grads = torch.from_numpy(rows).to(dtype)
    exact = ExactConFIG.of(grads.double().tolist())
    got = fc.combine(grads, backend=backend)
    if exact.margin < 1e3:  # too near to the line between regular and degenerate for float64 to know the side
        assert got.isfinite().all()
        return
    wanted = np.array([float(x) for x in exact.value])
    scale = float(np.linalg.norm(grads.double().numpy(), axis=1).sum())
    allowed = (2.0**-46 * exact.condition + torch.finfo(dtype).eps) * scale
    assert np.abs(got.double().numpy() - wanted).max() <= allowed


@fewer(2)
@given(
    name=st.sampled_from(GRAMIAN_METHODS),
    kind=st.sampled_from(sorted(KINDS)),
    m=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    power=st.integers(-300, 300),
)
def test_rules(strand, name, kind, m, seed, power):
    FUZZED["rules"] += 1
    rows = np.ldexp(rows_of(kind, m, seed=seed), power)
    gramian = torch.from_numpy(rows @ rows.T)
    method = CATALOGUE[name].make(m)
    torch.manual_seed(seed)
    operand = method.operand(m, gramian.device)
    beside = None if operand is None else operand.clone()
    found = cpu.rule_weights(gramian, method.rule, operand).numpy()
    wanted = reference.rule_weights(gramian, method.rule, beside).numpy()
    tolerance = {"ill-conditioned": 3e-5, "scaled": 2e-3 if name == "alignedmtl" else 1e-6}.get(kind, 1e-7)
    if name == "sdmgrad":  # twenty steps of descent carry rounding along
        tolerance = max(tolerance, 1e-6)
    error = np.linalg.norm((found - wanted) @ rows)
    assert error <= tolerance * np.linalg.norm(np.abs(wanted) * np.sqrt(np.diagonal(gramian))), (found, wanted)
    assert not found[np.diagonal(gramian) == 0].any()
    if operand is not None:
        torch.testing.assert_close(operand, beside, rtol=0.0, atol=1e-6)


@fewer(10)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    m=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
    name=st.sampled_from(["config", "upgrad", "pcgrad", "gradvac"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "maximize": st.booleans(),
            "max_update_norm": st.just(0.5),
            "state_dtype": st.just(torch.float64),
        },
    ),
)
def test_steps_of_momentum(strand, sizes, m, dtype, seed, name, options):
    """The core and the reference end alike, up to rounding, and neither touches what lies beside the parameters."""
    # Of one column all cosines are ±1, where GradVac's √(1 - cos²) turns a rounding of 1e-16 into 1e-8.
    assume(name != "gradvac" or sum(sizes) > 1)
    FUZZED["steps of momentum"] += 1
    rng = np.random.default_rng(seed)
    shifts = rng.integers(0, 20, len(sizes))
    start = [torch.from_numpy(rng.standard_normal(size)).to(dtype) for size in sizes]
    per_step = int(rng.integers(1, m + 1))
    gradients = [
        [torch.from_numpy(rng.standard_normal(size)).to(dtype) for size in sizes] for _ in range((m + 3) * per_step)
    ]
    ends = []
    for backend in ("cpu", "reference"):
        blocks = [
            torch.full((int(shift) + size + 20,), -7.0, dtype=dtype) for size, shift in zip(sizes, shifts, strict=True)
        ]
        views = [
            block[int(shift) : int(shift) + size] for block, size, shift in zip(blocks, sizes, shifts, strict=True)
        ]
        parameters = [torch.nn.Parameter(view) for view in views]
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)
        torch.manual_seed(0)
        optimizer = fc.optim.MConFIG(
            parameters,
            lr=0.01,
            num_losses=m,
            losses_per_step=per_step,
            method=CATALOGUE[name].make(m),
            backend=backend,
            **options,
        )
        given_gradients = iter(gradients)
        for _ in range(m + 3):
            for loss in optimizer.next_losses():
                with optimizer.record(loss):
                    for parameter, gradient in zip(parameters, next(given_gradients), strict=True):
                        parameter.grad = gradient.clone()
            optimizer.step()
        for block, view in zip(blocks, views, strict=True):
            assert_only_inside(block, view)
        ends.append([view.double() for view in views])
    for ours, theirs, before in zip(*ends, start, strict=True):
        allowed = 20 * torch.finfo(dtype).eps * (1 + before.double().abs()) + 1e-6
        assert ((ours - theirs).abs() <= allowed).all()


# What nobody should do


@given(m=st.integers(1, 5), n=st.integers(1, 40), seed=seeds, dtype=st.sampled_from(DTYPES))
def test_memory_that_may_overlap(strand, m, n, seed, dtype):
    """Rows and a result anywhere in one block: refused where they meet, with nothing written; else right."""
    FUZZED["memory that may overlap"] += 1
    rng = np.random.default_rng(seed)
    stride = int(rng.integers(0, 2 * n + 2))
    block = torch.from_numpy(rng.standard_normal(m * stride + 3 * n + 8)).to(dtype)
    grads = block[int(rng.integers(0, n + 4)) :].as_strided((m, n), (stride, 1), int(rng.integers(0, n + 4)))
    start = int(rng.integers(0, len(block) - n + 1))
    out = block[start : start + n]
    before, wanted = block.clone(), fc.combine(grads.clone(), backend="cpu")
    written = torch.zeros(len(block), dtype=torch.bool)
    written[start : start + n] = True
    first = grads.storage_offset()
    read = torch.zeros(len(block), dtype=torch.bool)
    for i in range(m):
        read[first + i * stride : first + i * stride + n] = True
    if (read & written).any():
        with pytest.raises(ValueError, match="out overlaps grads in memory"):
            fc.combine(grads, out=out, backend="cpu")
        assert torch.equal(block, before)
    else:
        fc.combine(grads, out=out, backend="cpu")
        assert torch.equal(out, wanted)
        assert torch.equal(block[~written], before[~written])


@fewer(20)
@given(seed=seeds, callers=st.integers(2, 6))
def test_calls_at_once(strand, seed, callers):
    """From threads of Python's, each with gradients, a method and a number of threads of its own."""
    FUZZED["calls at once"] += 1
    rng = np.random.default_rng(seed)
    problems = []
    for _ in range(callers):
        m, n = int(rng.integers(1, 6)), int(rng.choice([10, 1000, 70_000]))
        grads = torch.from_numpy(rng.standard_normal((m, n))).to(DTYPES[int(rng.integers(4))])
        problems.append((grads, CATALOGUE[str(rng.choice(["config", "upgrad", "mgda", "nashmtl"]))].make(m)))
    wanted = [fc.combine(grads, method) for grads, method in problems]
    together, failures = threading.Barrier(callers), []

    def call(index: int) -> None:
        grads, method = problems[index]
        method = type(method)() if not isinstance(method, fc.ConFIG) else method
        torch.set_num_threads(1 + index % 3)
        together.wait()
        for _ in range(3):
            failures.extend([] if torch.equal(fc.combine(grads, method), wanted[index]) else [index])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    assert not failures
