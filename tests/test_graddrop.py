"""GradDrop on every backend against an oracle in numpy, and what its draws are: Philox, the same bits everywhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torchjd.aggregation
from guarded import assert_close_in_units, poisoned, rows_in_poison
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastconfig as fc
from fastconfig.backends import BACKENDS, cpu, philox
from fastconfig.backends import triton as triton_backend
from fastconfig.conflictfree.grad_operator import ConFIG_update
from fastconfig.conflictfree.momentum_operator import PseudoMomentumOperator
from fastconfig.validation import check_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TIERS = cpu.tiers() if cpu.available() is None else []
KERNELS = ["triton"] if triton_backend.available() is None else []
DEVICES = {"triton": "cpu" if triton_backend.INTERPRETED else "cuda"}
SEED = 2**62 + 987_654_321_012
COLUMN = 2**34 - 2**20 - 1
"""No multiple of four, and counters pass 2^32 within a million columns."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["reference", *TIERS, *KERNELS])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation here: the reference, the CPU's on each tier, the GPU's or its interpreter."""
    if request.param in KERNELS:
        request.getfixturevalue("interpreter")
    if request.param not in TIERS:
        yield request.param
        return
    before = cpu.active_tier()
    cpu.use_tier(request.param)
    yield "cpu"
    cpu.use_tier(before)


def philox_oracle(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of (..., 4) counters, in 64-bit arithmetic of numpy."""
    words = [counter[..., i].astype(np.uint64) for i in range(4)]
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    for step in range(10):
        k0, k1 = (np.uint64((k + step * w) % 2**32) for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        a, b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [b >> high ^ words[1] ^ k0, b & low, a >> high ^ words[3] ^ k1, a & low]
    return np.stack(words, axis=-1)


def uniform_oracle(seed: int, first: int, count: int) -> np.ndarray:
    """The draws of columns, in float32, by the word and its complement as Triton takes them."""
    columns = np.arange(first, first + count, dtype=np.int64)
    counters = np.stack([columns // 4 % 2**32, columns // 4 >> 32, columns * 0, columns * 0], axis=-1)
    words = philox_oracle(counters, (seed % 2**32, seed >> 32))[np.arange(count), columns % 4]
    signed = words.astype(np.uint32).view(np.int32)
    return np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)


def oracle(grads: Tensor, leak: Tensor | None, uniform: np.ndarray) -> Tensor:
    """Algorithm 1, lines 10 to 15, as they are written, with P of positive over all magnitudes; float64."""
    rows = grads.to("cpu", torch.float64).numpy()
    positive = sum(np.maximum(row, 0.0) for row in rows)
    negative = sum(np.maximum(-row, 0.0) for row in rows)
    keeps_positive = positive > uniform.astype(np.float64) * (positive + negative)
    total = np.zeros(rows.shape[1])
    for i, row in enumerate(rows):
        share = 0.0 if leak is None else float(leak[i])
        kept = np.where(keeps_positive, row > 0, row < 0)
        total += (share + (1.0 - share) * kept) * row
    return torch.from_numpy(total)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype == torch.float64 else values.to(torch.float32).to(dtype)


def seeded(seed: int = 0, leak=None) -> fc.GradDrop:
    return fc.GradDrop(leak, torch.Generator().manual_seed(seed))


def dropped(kernel: str, grads: Tensor | list[Tensor], leak: Tensor | None, column: int = COLUMN) -> Tensor:
    """GradDrop by one implementation, into memory whose neighbours must stay."""
    rows, device = check_rows(grads), DEVICES.get(kernel, "cpu")
    block, out = poisoned(rows.n, rows.dtype, offset=rows.n % 3, device=device)
    leak = None if leak is None else leak.to(device)
    BACKENDS[kernel].graddrop(rows, leak, torch.tensor([SEED], device=device), column, out)
    assert (block[: 8 + rows.n % 3] == -1).all()
    assert (block[8 + rows.n % 3 + rows.n :] == -1).all()
    return out.cpu()


# Draws


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_oracle_gives_the_published_answers(counter, key, words):
    """The known answers of Random123, the reference implementation of Philox."""
    assert tuple(int(word) for word in philox_oracle(np.array(counter), key)) == words


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 3, 2**31 - 3, 2**34 - 5, 2**62 + 1])
def test_uniform_equals_the_oracle(seed, first):
    got = philox.uniform(torch.tensor([seed]), first, 1001)
    assert np.array_equal(got.numpy(), uniform_oracle(seed, first, 1001).astype(np.float64))


def test_uniform_is_in_the_unit_interval_and_even():
    draws = philox.uniform(torch.tensor([SEED]), 0, 1 << 20)
    assert 0.0 <= draws.min() < 1e-5
    assert 1.0 - 1e-5 < draws.max() < 1.0
    counts = torch.histc(draws, 64, 0.0, 1.0)
    expected = (1 << 20) / 64
    assert ((counts - expected).square() / expected).sum() < 63 + 5 * math.sqrt(2 * 63)  # χ² of 63 degrees


def test_no_word_is_rounded_to_one():
    """The largest magnitude there is, 2^31 - 1, whose float32 is 2^31."""
    assert np.float32(2**31 - 1) * np.float32(4.6566127342e-10) < 1


@pytest.mark.skipif(not KERNELS, reason="needs Triton")
def test_uniform_is_triton_s():
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def draw(out, seed, first, COUNT: tl.constexpr):  # noqa: N803
        i = tl.arange(0, COUNT)
        u0, u1, u2, u3 = tl.rand4x(tl.load(seed), first + i.to(tl.int64))
        tl.store(out + 4 * i, u0)
        tl.store(out + 4 * i + 1, u1)
        tl.store(out + 4 * i + 2, u2)
        tl.store(out + 4 * i + 3, u3)

    seed, out = torch.tensor([SEED], device=DEVICES["triton"]), torch.empty(256, device=DEVICES["triton"])
    draw[(1,)](out, seed, 2**33 - 20, COUNT=64)
    assert torch.equal(out.double(), philox.uniform(seed, 4 * (2**33 - 20), 256))


# Every implementation


def cases(kernel: str) -> list[tuple[int, int, str]]:
    """Numbers of losses, columns and layouts: tails of every vector, and for the interpreter, which is slow, fewer."""
    layouts = ["contiguous", "padded", "vectors", "aligned", "far"]
    if kernel == "triton":
        sizes = [(1, 1), (2, 0), (3, 1000), (3, 15), (4, 300), (5, 130), (8, 17), (9, 31)]
    else:
        sizes = [(m, n) for m in (1, 2, 3, 7, 8, 9, 16, 17, 40) for n in (0, 1, 15, 16, 17, 31, 511, 513, 1000)]
    return [(m, n, layouts[i % 5]) for i, (m, n) in enumerate(sizes)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_keeps_the_same_elements(kernel, dtype):
    """Without a leak the sums have one order everywhere, so that the answers are the same bits."""
    for m, n, layout in cases(kernel):
        grads = rows_in_poison(m, n, dtype, layout, seed=n, device=DEVICES.get(kernel, "cpu"))
        rows = torch.stack(list(grads)) if layout == "vectors" else grads
        wanted = oracle(rows, None, uniform_oracle(SEED, COLUMN, n))
        got = dropped(kernel, grads, None)
        if kernel == "triton" and dtype == torch.bfloat16:  # which the interpreter cuts instead of rounding it
            assert_close_in_units(got, rounded(wanted, dtype), dtype, torch.zeros(n))
        else:
            assert torch.equal(got, rounded(wanted, dtype)), (m, n, layout)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_leaks_alike(kernel, dtype):
    for m, n, layout in cases(kernel)[::2]:
        grads = rows_in_poison(m, n, dtype, layout, seed=n, device=DEVICES.get(kernel, "cpu"))
        rows = torch.stack(list(grads)) if layout == "vectors" else grads
        leak = torch.linspace(0.0, 1.0, m, dtype=torch.float64)
        wanted = rounded(oracle(rows, leak, uniform_oracle(SEED, COLUMN, n)), dtype)
        assert_close_in_units(dropped(kernel, grads, leak), wanted, dtype, rows.cpu().double().abs().sum(dim=0))


@pytest.mark.parametrize("column", [0, 2, 4, 2**31 - 2, COLUMN])
def test_parts_of_a_whole_draw_what_the_whole_does(kernel, column):
    grads = rows_in_poison(3, 200, torch.float32, "contiguous", device=DEVICES.get(kernel, "cpu"))
    whole = dropped(kernel, grads, None, column)
    parts = [dropped(kernel, grads[:, a:b].contiguous(), None, column + a) for a, b in ((0, 65), (65, 66), (66, 200))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter is numpy, which speaks of inf - inf
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("leaky", [False, True], ids=["masking", "leaky"])
def test_what_is_not_finite_makes_its_own_column_nan_alone(kernel, bad, leaky):
    grads = rows_in_poison(3, 100, torch.float32, "contiguous", device=DEVICES.get(kernel, "cpu"))
    leak = torch.tensor([0.0, 0.5, 1.0]).double() if leaky else None
    before = dropped(kernel, grads, leak)
    for column, row in ((0, 0), (37, 1), (99, 2)):
        grads[row, column] = bad
    after = dropped(kernel, grads, leak)
    assert after.isnan().nonzero().flatten().tolist() == [0, 37, 99]
    assert torch.equal(after[~after.isnan()], before[~after.isnan()])


def test_a_zero_row_has_no_influence(kernel):
    grads = rows_in_poison(3, 100, torch.float32, "contiguous", device=DEVICES.get(kernel, "cpu"))
    with_zero = torch.stack((grads[0], torch.zeros_like(grads[0]), grads[1], grads[2]))
    assert torch.equal(dropped(kernel, with_zero, None), dropped(kernel, grads, None))
    assert not dropped(kernel, torch.zeros_like(grads), None).any()


def test_columns_of_one_sign_pass_whole(kernel):
    """Whatever is drawn, 0 and the largest number included: P is exactly 1 and exactly 0."""
    columns = 1000 if kernel == "triton" else 1 << 18
    grads = rows_in_poison(2, columns, torch.float32, "contiguous", device=DEVICES.get(kernel, "cpu")).abs()
    for sign in (1.0, -1.0):
        wanted = sign * (grads[0].double() + grads[1].double()).float().cpu()
        assert torch.equal(dropped(kernel, sign * grads, None), wanted)


@pytest.mark.skipif(not TIERS, reason="needs the compiled core")
@pytest.mark.parametrize("m", [3, 9])
def test_same_bits_for_any_number_of_threads_and_stored_or_streamed(m):
    """From 8 MiB of output on stores pass the cache, where the output is aligned."""
    grads = rows_in_poison(m, 2_200_003, torch.float32, "padded")
    rows, results = check_rows(grads), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for offset in (0, 1):
            block, out = poisoned(rows.n, torch.float32, offset)
            cpu.graddrop(rows, None, torch.tensor([SEED]), COLUMN, out)
            assert (block[8 + offset + rows.n :] == -1).all()
            results.append(out)
    parts = torch.empty(rows.n)
    for first in range(0, rows.n, 1 << 20):
        some = check_rows(grads[:, first : first + (1 << 20)])
        BACKENDS["reference"].graddrop(
            some, None, torch.tensor([SEED]), COLUMN + first, parts[first : first + (1 << 20)]
        )
    assert all(torch.equal(result, parts) for result in results)


# The method


def test_it_does_what_torchjd_does_with_the_same_draws(backend, monkeypatch):
    grads = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for leak in (None, torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)):
        method = seeded(2, leak)
        draws = philox.uniform(torch.tensor([method.state_dict()["seed"]]), 0, 5000)
        monkeypatch.setattr(torch, "rand", lambda *_, draws=draws, **__: draws)
        theirs = torchjd.aggregation.GradDrop(leak=leak)(grads)
        monkeypatch.undo()
        torch.testing.assert_close(fc.combine(grads, method, backend=backend), theirs, rtol=1e-12, atol=1e-12)


def test_it_keeps_the_positive_part_as_often_as_p_says():
    """Over many draws the mean is P·positive - (1 - P)·negative, and nothing but these two is ever answered."""
    grads = torch.tensor([[3.0, 1.0, -0.5, 1.0], [-1.0, -1.0, -0.5, 1e-3], [0.5, -2.0, 0.25, 0.0]])
    method, steps = seeded(3), 4000
    answers = torch.stack([fc.combine(grads, method) for _ in range(steps)])
    positive, negative = grads.clamp(min=0.0).sum(dim=0), (-grads).clamp(min=0.0).sum(dim=0)
    assert ((answers == positive) | (answers == -negative)).all()
    purity = positive / (positive + negative)
    kept = (answers == positive).float().mean(dim=0)
    assert ((kept - purity).abs() <= 4 * (purity * (1 - purity) / steps).sqrt()).all()


def test_neighbours_and_steps_are_independent():
    grads = torch.tensor([[1.0], [-1.0]]).expand(2, 4096)
    method = seeded(4)
    signs = torch.stack([fc.combine(grads, method) for _ in range(64)])
    assert signs.abs().eq(1.0).all()
    limit = 5 / math.sqrt(signs.numel())
    for shift in (1, 2, 4):
        assert (signs[:, shift:] * signs[:, :-shift]).mean().abs() < limit
    assert (signs[1:] * signs[:-1]).mean().abs() < limit
    assert signs.mean().abs() < limit


def test_leaks_of_one_are_the_sum_and_a_number_is_for_every_loss(backend):
    grads = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fc.combine(grads, seeded(0, 1.0), backend=backend), grads.sum(dim=0))
    one, each = (fc.combine(grads, seeded(5, leak), backend=backend) for leak in (0.3, [0.3, 0.3, 0.3]))
    assert torch.equal(one, each)
    method = seeded(5, 0.3)
    for m in (1, 3, 2):  # a number fits any number of losses, one after the other
        assert fc.combine(grads[:m], method, backend=backend).shape == (1000,)


def test_one_loss_passes_whole(backend):
    grads = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fc.combine(grads, fc.GradDrop(), backend=backend), grads[0])


def test_seeded_runs_repeat_and_every_call_draws_anew():
    grads = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    first, second = seeded(7), seeded(7)
    runs = [[fc.combine(grads, method) for _ in range(3)] for method in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], fc.combine(grads, seeded(8)))
    torch.manual_seed(11)
    one = fc.GradDrop()
    torch.manual_seed(11)
    assert one.state_dict() == fc.GradDrop().state_dict()


def test_it_goes_on_from_a_state_dict_and_from_a_copy():
    grads = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    method = seeded(1)
    fc.combine(grads, method)
    state, twin, other = method.state_dict(), copy.deepcopy(method), seeded(2)
    other.load_state_dict(state)
    wanted = fc.combine(grads, method)
    assert torch.equal(fc.combine(grads, twin), wanted)
    assert torch.equal(fc.combine(grads, other), wanted)


def test_the_last_seed_is_followed_by_another():
    grads = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    method = fc.GradDrop()
    method.load_state_dict({"seed": 2**63 - 1})
    answers = [fc.combine(grads, method, backend=backend) for backend in ("reference", "cpu")]
    assert method.state_dict() == {"seed": -(2**63) + 1}
    method.load_state_dict({"seed": -(2**63)})
    assert torch.equal(fc.combine(grads, method, backend="reference"), answers[1])


def test_complex_gradients_are_their_real_view():
    grads = torch.randn(2, 50, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    real = fc.combine(torch.view_as_real(grads).flatten(1), seeded())
    assert torch.equal(torch.view_as_real(fc.combine(grads, seeded())).flatten(), real)


def test_the_buffer_s_record_has_the_gramian_and_no_weights():
    parameter = torch.nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    buffer = fc.GradientBuffer([parameter], num_losses=2)
    buffer.backward([parameter.square().sum(), -parameter.sum()])
    info = buffer.combine(seeded())
    assert torch.equal(parameter.grad, fc.combine(buffer.rows, seeded()))
    assert torch.equal(info.gramian, fc.gramian(buffer.rows))
    assert info.weights.isnan().all()
    assert info.rank == 2


def test_segments_go_on_counting():
    """Parameters of several dtypes draw as one vector of all."""
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=d)) for n, d in ((7, torch.float32), (6, torch.float64))]
    buffer = fc.GradientBuffer(parameters, num_losses=2)
    buffer.backward([sum(p.sum() for p in parameters), -sum(p.sum() for p in parameters)])
    info = buffer.combine(seeded())
    whole = fc.combine(torch.stack((torch.ones(13), -torch.ones(13))), seeded())
    assert torch.equal(torch.cat([p.grad.float() for p in parameters]), whole)
    assert torch.equal(info.gramian, torch.tensor([[13.0, -13.0], [-13.0, 13.0]]).double())


# What is traced


@pytest.mark.parametrize("leak", [None, 0.3, [0.0, 0.5, 1.0]], ids=["masking", "number", "numbers"])
@pytest.mark.parametrize("tracer", ["eager", "aot_eager"])
def test_a_compiled_call_draws_what_an_eager_one_does(tracer, leak):
    torch._dynamo.reset()
    grads = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    eager, traced = seeded(1, leak), seeded(1, leak)
    compiled = torch.compile(lambda grads: fc.combine(grads, traced), backend=tracer, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(grads), fc.combine(grads, eager))
    assert traced.state_dict() == eager.state_dict()
    torch._dynamo.reset()


def test_a_tracer_that_would_freeze_the_seed_is_refused():
    method = seeded()
    with pytest.raises(RuntimeError, match="seed would be a constant"):
        make_fx(lambda grads: fc.combine(grads, method))(torch.randn(2, 10))
    with pytest.raises(RuntimeError, match="seed would be a constant"):
        make_fx(lambda grads: fc.combine(grads, method), pre_dispatch=True)(torch.randn(2, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_is_what_its_schema_says(dtype):
    rows, out, seed = torch.randn(3, 20).to(dtype), torch.empty(20, dtype=dtype), torch.tensor([5])
    operator = torch.ops.fastconfig.graddrop
    torch.library.opcheck(operator.default, ([rows], None, seed, 3, out))
    torch.library.opcheck(operator.default, (list(rows), torch.ones(3).double(), seed, 3, out, "reference"))
    version = out._version
    operator([rows], None, seed, 0, out)
    assert out._version == version + 1


def test_the_operator_refuses_memory_that_a_kernel_would_misread():
    rows, out, seed = [torch.randn(3, 20)], torch.zeros(20), torch.tensor([5])
    for arguments in (
        (rows, torch.ones(3), seed, 0, out),
        (rows, torch.ones(2).double(), seed, 0, out),
        (rows, None, seed.int(), 0, out),
        (rows, None, torch.tensor(5), 0, out),
        (rows, None, seed, -1, out),
        (rows, None, seed, 0, out[:19]),
    ):
        with pytest.raises((TypeError, ValueError), match="must"):
            torch.ops.fastconfig.graddrop(*arguments)
    assert not out.any()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"leak": "half"}, TypeError, "leak must be None, a number or a vector"),
        ({"leak": True}, TypeError, "leak must be None, a number or a vector"),
        ({"leak": []}, TypeError, "leak must be None, a number or a vector"),
        ({"leak": [[0.5]]}, TypeError, "leak must be None, a number or a vector"),
        ({"leak": -0.1}, ValueError, r"leak must lie in \[0, 1\], got -0.1"),
        ({"leak": [0.5, 1.5]}, ValueError, r"leak must lie in \[0, 1\]"),
        ({"leak": math.nan}, ValueError, r"leak must lie in \[0, 1\]"),
    ],
)
def test_leaks_that_cannot_be(arguments, error, text):
    with pytest.raises(error, match=text):
        fc.GradDrop(**arguments)


def test_leaks_for_another_number_of_losses_write_nothing_and_draw_nothing():
    method, out = seeded(0, [0.1, 0.2]), torch.zeros(5)
    state = method.state_dict()
    with pytest.raises(ValueError, match="leak has 2 entries for 3 losses"):
        fc.combine(torch.randn(3, 5), method, out=out)
    assert not out.any()
    assert method.state_dict() == state


@pytest.mark.parametrize("state", [{}, {"seed": 1.5}, {"seed": True}, {"seed": 2**63}])
def test_states_without_a_seed(state):
    with pytest.raises(ValueError, match="state must hold a seed"):
        fc.GradDrop().load_state_dict(state)


@pytest.mark.parametrize(
    "use",
    [
        lambda method: fc.optim.MConFIG([torch.nn.Parameter(torch.ones(2))], lr=0.1, num_losses=2, method=method),
        lambda method: ConFIG_update(torch.randn(2, 5), weight_model=method),
        lambda method: PseudoMomentumOperator(2, gradient_operator=method),
    ],
    ids=["MConFIG", "weight_model", "gradient_operator"],
)
def test_it_is_refused_where_weights_are_needed(use: Callable[[fc.GradDrop], object]):
    with pytest.raises(TypeError, match=r"GradDrop\(\)"):
        use(fc.GradDrop())


def test_a_class_is_no_method():
    with pytest.raises(TypeError, match="method must have weights"):
        fc.combine(torch.randn(2, 5), fc.GradDrop)


def test_its_repr_says_how_it_was_made():
    assert [repr(fc.GradDrop(leak)) for leak in (None, 0.5, (0, 1))] == [
        "GradDrop()",
        "GradDrop(leak=0.5)",
        "GradDrop(leak=[0.0, 1.0])",
    ]
