"""A thousand ranks: what they sum up, simulated in one process; what each holds and calls, by torch's fake group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from versions import FSDP2

import fastconfig as fc
from fastconfig.gradients.layout import ALIGNED, Region
from fastconfig.gradients.ranks import Ranks

WORLD = 1000
METHODS = (fc.ConFIG, fc.UPGrad, fc.NashMTL, fc.MGDA)


def shards_of(grads: torch.Tensor) -> list[torch.Tensor]:
    """Of uneven sizes, some empty."""
    return list(torch.tensor_split(grads, WORLD, dim=1))


@pytest.mark.parametrize("cosine", [0.0, 0.999, 1.0 - 1e-9])
@pytest.mark.parametrize("n", [777, 50_021])
def test_the_sum_of_a_thousand_gramians_decides_as_the_whole(n: int, cosine: float) -> None:
    """In any order of summation: it differs by rounding of float64, also where losses nearly agree."""
    generator = torch.Generator().manual_seed(n)
    common, own = torch.randn(1, n, generator=generator), torch.randn(4, n, generator=generator)
    grads = cosine**0.5 * common + (1 - cosine) ** 0.5 * own
    parts = torch.stack([fc.gramian(shard) for shard in shards_of(grads)])
    whole = fc.gramian(grads)
    for order in (torch.arange(WORLD), torch.randperm(WORLD, generator=generator)):
        summed = torch.zeros_like(whole)
        for part in parts[order]:
            summed += part
        norms = whole.diagonal().sqrt()
        assert ((summed - whole).abs() <= 1e-14 * norms.outer(norms)).all()
        error = 1e-13 / (1 - cosine)  # by the condition of the cosines
        for method in METHODS:
            wanted, got = (method().weights(gramian) for gramian in (whole, summed))
            torch.testing.assert_close(got, wanted, rtol=error, atol=error * float(wanted.abs().max()))


@pytest.mark.parametrize("columns", [0, 1, 63, 64, 1000, 123_457])
def test_every_column_of_copies_has_one_owner(columns: int) -> None:
    region = Region(tuple(range(3, 3 + WORLD)), 10, 10 + columns)
    shares = [region.share(rank) for rank in region.holders]
    owned = [column for first, last in shares for column in range(first, last)]
    assert owned == list(range(10, 10 + columns))
    assert all((first - 10) % ALIGNED == 0 for first, last in shares if first < last)


@pytest.fixture
def fake_world(monkeypatch: pytest.MonkeyPatch):
    """Rank 0 of a thousand, of which the others tell what it tells, and send nothing: memory is left as it is."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=WORLD)
    called: list[tuple[str, int]] = []
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value] * WORLD)

    def sum_of_equals(self: Ranks, numbers: torch.Tensor) -> None:
        numbers.mul_(WORLD)

    monkeypatch.setattr(Ranks, "sum", sum_of_equals)

    def noted(name: str) -> None:
        original = getattr(Ranks, name)

        def call(self: Ranks, *tensors: torch.Tensor) -> object:
            called.append((name, tensors[0].numel()))
            return original(self, *tensors)

        monkeypatch.setattr(Ranks, name, call)

    for name in ("sum", "broadcast", "start_exchange", "gather_shares"):
        noted(name)
    yield called
    dist.destroy_process_group()


def test_what_a_rank_of_a_thousand_holds_and_calls(fake_world: list[tuple[str, int]]) -> None:
    """Rows of m·n/W elements; an exchange and a roll call a loss, then K, then c, then the result."""
    model, m = nn.Linear(1000, 1000, bias=False), 4
    buf = fc.GradientBuffer(model, m, sync=dist.group.WORLD)
    n = 1_000_000
    (segment,) = buf.segments
    assert buf.rows.shape == (m, 1024)  # a thousandth, and what makes it begin at lines of 128 bytes
    assert buf.rows.numel() * WORLD < 1.03 * m * n
    fake_world.clear()
    out = model(torch.ones(2, 1000))
    buf.backward([out[:, i].square().mean() for i in range(m)])
    whole = 1024 * WORLD
    assert fake_world == [("start_exchange", whole), ("sum", 2 * WORLD + 1)] * m
    fake_world.clear()
    segment.rows.normal_()  # nothing has arrived
    buf.combine()
    told = m * m + 1 + 2 * m + WORLD  # K, a flag a parameter, two a loss, one a rank
    assert fake_world == [
        ("sum", 2 * WORLD + 1),
        ("sum", told),
        ("broadcast", m * m + m + 1),
        ("gather_shares", whole),
    ]


@FSDP2
def test_a_sharded_model_on_a_thousand_ranks_holds_a_thousandth(fake_world: list[tuple[str, int]]) -> None:
    from torch.distributed.fsdp import fully_shard

    model, m = nn.Linear(1000, 2000, bias=False), 3
    fully_shard(model)
    buf = fc.GradientBuffer(model, m)
    assert buf.rows.shape == (m, 2000)
    fake_world.clear()
    with buf.record(0):
        model.weight.grad = torch.ones_like(model.weight)
    buf.combine()
    assert fake_world == [("sum", m * m + 1 + 2 * m + WORLD), ("broadcast", m * m + m + 1)]
