"""buf.backward(batched=): one vectorised pass, against a pass a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

M = 5


class Net(nn.Module):
    """Parameters of several kinds, with heads; one parameter is reached by two losses, one by none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(16, 6)
        self.wide = nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.some = nn.Parameter(torch.randn(6))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0))
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(M))
        self.x = torch.randn(3, 2, 4, 4)

    def losses(self) -> list[Tensor]:
        hidden = self.linear(self.convolution(self.x).flatten(1)).tanh() * self.frozen
        hidden = hidden + (hidden * self.wide).sin().float() + (hidden * self.turned).abs() + self.empty.sum()
        found = [
            head(hidden + self.some if i in (1, 3) else hidden).square().mean() for i, head in enumerate(self.heads)
        ]
        return [*found[:-1], found[-1].reshape(1)]


def pair(heads_inside: bool = True) -> tuple[tuple[Net, fc.GradientBuffer], tuple[Net, fc.GradientBuffer]]:
    nets = Net(), Net()
    inside = [[(n, p) for n, p in net.named_parameters() if heads_inside or "heads" not in n] for net in nets]
    ours, theirs = [(net, fc.GradientBuffer(some, M)) for net, some in zip(nets, inside, strict=True)]
    return ours, theirs


def assert_equal(ours: tuple[Net, fc.GradientBuffer], theirs: tuple[Net, fc.GradientBuffer]) -> None:
    for mine, other in zip(ours[1].segments, theirs[1].segments, strict=True):
        torch.testing.assert_close(mine.rows, other.rows, rtol=1e-5, atol=1e-7)
    info, wanted = (buf.combine(fc.UPGrad()) for _, buf in (ours, theirs))
    torch.testing.assert_close(info.weights, wanted.weights, rtol=1e-4, atol=1e-6)
    assert info.absent == wanted.absent
    for (name, mine), other in zip(ours[0].named_parameters(), theirs[0].parameters(), strict=True):
        assert (mine.grad is None) is (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("heads_inside", [True, False])
@pytest.mark.parametrize("batched", [True, 1, 2, 3, 5, 100])
def test_as_a_pass_a_loss(batched: bool | int, heads_inside: bool) -> None:
    ours, theirs = pair(heads_inside)
    for net in (ours[0], theirs[0]):
        for head in net.heads if not heads_inside else ():
            head.weight.grad = torch.ones_like(head.weight)  # heads outside gather, as after backward()
    ours[1].backward(ours[0].losses(), batched=batched)
    theirs[1].backward(theirs[0].losses())
    assert_equal(ours, theirs)


@pytest.mark.parametrize("batched", [True, 2])
@pytest.mark.parametrize("missing", [(0,), (2,), (1, 4), (0, 1, 2, 3)])
def test_absent_losses(missing: tuple[int, ...], batched: bool | int) -> None:
    ours, theirs = pair()
    for net, buf in (ours, theirs):
        buf.backward(net.losses())  # rows that hold something
        buf.combine()
        losses = {i: None if i in missing else loss for i, loss in enumerate(net.losses())}
        buf.backward(losses, **({"batched": batched} if net is ours[0] else {}))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("batched", [True, 2])
def test_micro_batches(batched: bool | int) -> None:
    ours, theirs = pair()
    for net, buf in (ours, theirs):
        options = {"batched": batched} if net is ours[0] else {}
        for k in range(3):
            losses: list[Tensor | None] = net.losses()
            losses[k] = None
            buf.backward(losses, accumulate=True, **options)
    assert_equal(ours, theirs)


def test_a_graph_is_kept_on_request() -> None:
    net, buf = pair(heads_inside=False)[0]
    losses = net.losses()
    buf.backward(losses, batched=2, retain_graph=True)
    before = [segment.rows.clone() for segment in buf.segments]
    buf.zero()
    net.heads.zero_grad()
    buf.backward(losses, batched=True, accumulate=False)
    for segment, rows in zip(buf.segments, before, strict=True):
        torch.testing.assert_close(segment.rows, rows)
    with pytest.raises(RuntimeError, match="second time"):
        buf.backward(losses, batched=True, accumulate=False)


def test_gradients_that_were_there_stay() -> None:
    net, buf = pair()[0]
    net.linear.weight.grad = kept = torch.ones_like(net.linear.weight)
    buf.backward(net.losses(), batched=True)
    assert net.linear.weight.grad is kept
    assert kept.eq(1).all()


class InPlace(torch.autograd.Function):
    """A backward pass that looks at values, which cannot be vectorised."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad if float(grad.sum()) > 0 else -grad


def test_what_cannot_be_vectorised_says_so_and_leaves_no_row_half_written() -> None:
    net, buf = pair()[0]
    losses = net.losses()
    with pytest.raises(RuntimeError, match=r"5 losses could not be .* one batched pass: .*Leave batched out"):
        buf.backward([InPlace.apply(loss) for loss in losses], batched=True)
    assert not any(segment.rows.any() for segment in buf.segments)
    with pytest.raises(RuntimeError, match="nothing to combine"):
        buf.combine()
    buf.backward(net.losses())  # as if nothing had been


@pytest.mark.parametrize(
    ("batched", "change", "error", "message"),
    [
        (0, None, ValueError, "batched must be at least 1, or None"),
        (-2, None, ValueError, "got -2"),
        (2.0, None, TypeError, "batched must be True, a number of losses or None, got 2.0"),
        ("all", None, TypeError, "got 'all'"),
        (True, lambda loss: lambda: loss, ValueError, r"losses\[0\] must be a tensor with batched=True"),
    ],
)
def test_bad_input(batched: object, change: Callable | None, error: type[Exception], message: str) -> None:
    net, buf = pair()[0]
    buf.backward(net.losses())
    before = [segment.rows.clone() for segment in buf.segments]
    losses = net.losses()
    losses[0] = losses[0] if change is None else change(losses[0])
    with pytest.raises(error, match=message):
        buf.backward(losses, batched=batched)
    assert all(map(torch.equal, (segment.rows for segment in buf.segments), before))


def test_false_and_none_are_a_pass_a_loss() -> None:
    net, buf = pair()[0]
    other = copy.deepcopy(net)
    for off in (None, False):
        buf.backward([lambda i=i: net.losses()[i] for i in range(M)], batched=off)
        buf.combine()
    assert other.linear.weight.grad is None
    assert net.linear.weight.grad is not None


def test_layers_whose_backward_pass_is_known_to_vectorise() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    norm, table = nn.BatchNorm1d(4), nn.Embedding(5, 8)
    parts = nn.ModuleList([layer, norm, table])
    buf, other = (fc.GradientBuffer(parts, 3) for _ in range(2))
    outputs = norm(layer(table(torch.tensor([[0, 1, 2, 2], [4, 3, 2, 0]]))))
    losses = [outputs.square().mean(), outputs[0].exp().mean(), outputs.amax(dim=2).sum()]
    buf.backward(losses, batched=True, retain_graph=True)
    other.backward(losses)
    torch.testing.assert_close(buf.rows, other.rows, rtol=1e-4, atol=1e-6)
