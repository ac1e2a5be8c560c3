"""fc.backward: losses combined at the features, against what a loop over detached features does by hand."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torchjd.autojac
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastconfig as fc

pytestmark = pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # PyTorch 2.4's checkpoints

SAMPLES, INPUTS, WIDTH = 6, 4, 5


class Net(nn.Module):
    """A trunk of two levels, and heads on the second, or on both."""

    def __init__(self, heads: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower = nn.Linear(INPUTS, WIDTH, dtype=dtype)
        self.upper = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1, dtype=dtype) for _ in range(heads))
        self.x = torch.randn(SAMPLES, INPUTS, dtype=dtype)
        self.targets = torch.randn(heads, SAMPLES, dtype=dtype)

    def levels(self) -> tuple[Tensor, Tensor]:
        first = self.lower(self.x).tanh()
        return first, self.upper(first).tanh()

    def trunk(self) -> Tensor:
        return self.levels()[1]

    def loss(self, i: int, z: Tensor) -> Tensor:
        return (self.heads[i](z).squeeze(1) - self.targets[i]).square().mean()

    def losses(self, z: Tensor) -> list[Tensor]:
        return [self.loss(i, z) for i in range(len(self.heads))]

    def grads(self) -> dict[str, Tensor | None]:
        found = {name: parameter.grad for name, parameter in self.named_parameters()}
        self.zero_grad()
        return found


def by_hand(
    net: nn.Module,
    features: Sequence[Tensor],
    losses: Callable[[list[Tensor]], list[Tensor]],
    method: object = None,
) -> None:
    """The same with features that are cut off: m backward passes to them, and one of their combination behind them."""
    leaves = [feature.detach().requires_grad_() for feature in features]
    rows = []
    for loss in losses(leaves):
        for leaf in leaves:
            leaf.grad = None
        loss.backward(retain_graph=True)
        rows.append(torch.cat([(torch.zeros_like(f) if f.grad is None else f.grad).flatten() for f in leaves]))
    parts = fc.combine(torch.stack(rows), method).split([leaf.numel() for leaf in leaves])
    torch.autograd.backward(features, [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def assert_same(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None], **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        if grad is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], grad, **(tolerance or {"rtol": 1e-12, "atol": 1e-14}), msg=name)


@pytest.mark.parametrize("method", ["config", "mgda", "upgrad", "pcgrad", "sum"])
def test_as_by_hand(method: str) -> None:
    net = Net()
    z = net.trunk()
    torch.manual_seed(1)
    info = fc.backward(net.losses(z), features=z, method=method)
    got = net.grads()
    torch.manual_seed(1)
    by_hand(net, [net.trunk()], lambda z: net.losses(z[0]), method)
    assert_same(got, net.grads())
    assert info.weights.shape == (3,)
    assert info.names == ("0", "1", "2")


def test_config_has_the_same_cosine_with_every_loss_at_the_features() -> None:
    net = Net()
    z = net.trunk()
    rows = [torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in net.losses(z)]
    z.retain_grad()
    info = fc.backward(net.losses(z), features=z)
    cosines = [torch.cosine_similarity(z.grad.flatten(), row, dim=0) for row in rows]
    torch.testing.assert_close(torch.stack(cosines), cosines[0].expand(3))
    assert cosines[0] > 0
    torch.testing.assert_close(info.norms, torch.stack([row.norm() for row in rows]))


def test_the_sum_is_plain_backpropagation() -> None:
    net = Net()
    z = net.trunk()
    fc.backward(net.losses(z), features=z, method=fc.Sum())
    got = net.grads()
    sum(net.losses(net.trunk())).backward()
    assert_same(got, net.grads())


def test_heads_get_what_torchjd_gives_them() -> None:
    net = Net()
    z = net.trunk()
    fc.backward(net.losses(z), features=z)
    got = net.grads()
    z = net.trunk()
    torchjd.autojac.mtl_backward(net.losses(z), z, parallel_chunk_size=1)
    wanted = net.grads()
    heads = [name for name in wanted if name.startswith("heads")]
    assert_same({name: got[name] for name in heads}, {name: wanted[name] for name in heads})


def test_gradients_accumulate() -> None:
    net = Net()
    for _ in range(2):
        z = net.trunk()
        fc.backward(net.losses(z), features=z)
    twice = net.grads()
    z = net.trunk()
    fc.backward(net.losses(z), features=z)
    assert_same(twice, {name: 2 * grad for name, grad in net.grads().items()})


def test_a_graph_is_kept_on_request() -> None:
    net = Net()
    z = net.trunk()
    losses = net.losses(z)
    fc.backward(losses, features=z, retain_graph=True)
    first = net.grads()
    fc.backward(losses, features=z)
    assert_same(first, net.grads())
    with pytest.raises(RuntimeError, match="second time"):
        fc.backward(losses, features=z)


def test_callables_and_names_and_absent_losses() -> None:
    net = Net()
    z = net.trunk()
    info = fc.backward({"a": lambda: net.loss(0, z), "b": None, "c": net.loss(2, z)}, features=z)
    got = net.grads()
    assert got.pop("heads.1.weight") is got.pop("heads.1.bias") is None
    assert info.names == ("a", "b", "c")
    assert info.absent == (1,)
    assert float(info.weights[1]) == 0
    by_hand(net, [net.trunk()], lambda z: [net.loss(0, z[0]), net.loss(2, z[0])])
    wanted = net.grads()
    assert_same(got, {name: grad for name, grad in wanted.items() if "heads.1" not in name})


def test_losses_that_share_a_head() -> None:
    net = Net()
    net.shared = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def losses(z: Tensor) -> list[Tensor]:
        hidden = net.shared(z).sigmoid()
        return [net.loss(0, hidden), net.loss(1, z), net.loss(2, hidden)]

    z = net.trunk()
    fc.backward(losses(z), features=z)
    got = net.grads()
    by_hand(net, [net.trunk()], lambda z: losses(z[0]))
    assert_same(got, net.grads())


def test_a_loss_without_a_head_and_one_beside_the_features() -> None:
    """A penalty on a head's weights constrains nothing at the features, and the head gets its gradient."""
    net = Net()

    def losses(z: Tensor) -> list[Tensor]:
        return [z.square().sum(), net.loss(1, z), net.heads[2].weight.square().sum()]

    z = net.trunk()
    info = fc.backward(losses(z), features=z)
    got = net.grads()
    assert info.norms[2] == 0
    by_hand(net, [net.trunk()], lambda z: losses(z[0]))
    assert_same(got, net.grads())


# Several features


def of_levels(net: Net, levels: Sequence[Tensor]) -> list[Tensor]:
    first, second = levels
    return [net.loss(0, first) + net.loss(0, second), net.loss(1, second), net.loss(2, first * second)]


@pytest.mark.parametrize("kind", ["own nodes", "checkpointed", "custom"])
def test_a_feature_may_be_computed_from_another(kind: str) -> None:
    """The levels of an encoder: what goes through the second to the first is carried on once, with the combination."""
    net = Net()

    def levels() -> list[Tensor]:
        first, second = net.levels()
        if kind == "checkpointed":
            second = checkpoint(lambda z: net.upper(z).tanh(), first, use_reentrant=False)
        return [first, Doubled.apply(second)] if kind == "custom" else [first, second]

    features = levels()
    fc.backward(of_levels(net, features), features=features)
    got = net.grads()
    by_hand(net, levels(), lambda z: of_levels(net, z))
    assert_same(got, net.grads())


def test_outputs_of_one_node() -> None:
    net = Net()

    def losses(parts: Sequence[Tensor]) -> list[Tensor]:
        left, right = parts
        return [left.square().mean(), (left * 2).sin().sum() + right.sum(), right.cos().mean()]

    parts = net.trunk().split([2, 3], dim=1)
    fc.backward(losses(parts), features=parts)
    got = net.grads()
    by_hand(net, net.trunk().split([2, 3], dim=1), losses)
    assert_same(got, net.grads())


def test_one_output_of_a_node_that_others_go_around() -> None:
    net = Net()
    left, right = net.trunk().split([2, 3], dim=1)
    losses = [left.square().mean(), left.sum() + right.square().sum()]
    with pytest.raises(ValueError, match="reached by a loss around them"):
        fc.backward(losses, features=left)
    fc.backward(losses, features=left, method="sum", bypass="sum")
    got = net.grads()
    left, right = net.trunk().split([2, 3], dim=1)
    (left.square().mean() + left.sum() + right.square().sum()).backward()
    assert_same(got, net.grads())


def test_features_of_several_dtypes_and_shapes() -> None:
    net = Net()

    def features() -> list[Tensor]:
        first, second = net.levels()
        return [first.float().view(2, 3, WIDTH), torch.complex(second, first), second.sum(), second[:0]]

    def losses(z: Sequence[Tensor]) -> list[Tensor]:
        return [z[0].square().mean() + z[2], (z[1].abs() * z[2]).mean() + z[3].sum(), z[1].real.sin().sum()]

    given = features()
    info = fc.backward(losses(given), features=given)
    got = net.grads()
    given = features()
    leaves = [feature.detach().requires_grad_() for feature in given]
    rows = [torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True) for loss in losses(leaves)]
    rows = [[torch.zeros_like(z) if g is None else g for g, z in zip(row, leaves, strict=True)] for row in rows]
    flat = [
        torch.cat([(torch.view_as_real(g) if g.is_complex() else g).double().flatten() for g in row]) for row in rows
    ]
    torch.testing.assert_close(info.gramian, fc.gramian(flat))
    weights = fc.ConFIG().weights(info.gramian)
    combined = [sum(w * row[i] for w, row in zip(weights.tolist(), rows, strict=True)) for i in range(4)]
    torch.autograd.backward(given, combined)
    assert_same(got, net.grads(), rtol=1e-6, atol=1e-7)


def test_a_feature_that_no_loss_reaches_is_left_alone() -> None:
    net = Net()
    aside = nn.Linear(INPUTS, WIDTH, dtype=torch.float64)
    z = net.trunk()
    fc.backward(net.losses(z), features=[aside(net.x), z])
    got = net.grads()
    assert aside.weight.grad is None
    by_hand(net, [net.trunk()], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


def test_losses_that_reach_different_features() -> None:
    net = Net()

    def losses(z: Sequence[Tensor]) -> list[Tensor]:
        return [net.loss(0, z[0]), net.loss(1, z[1])]

    def features() -> list[Tensor]:
        return [net.lower(net.x).tanh(), net.lower(net.x).cos()]

    given = features()
    info = fc.backward(losses(given), features=given)
    got = net.grads()
    assert info.cosines[0, 1] == 0
    by_hand(net, features(), losses)
    assert_same(got, net.grads())


def test_detached_features_get_the_combination() -> None:
    net = Net()
    z = net.trunk()
    detached = z.detach().requires_grad_()
    before = torch.ones_like(detached)
    detached.grad = before
    fc.backward(net.losses(detached), features=detached)
    assert net.lower.weight.grad is None
    z.backward(detached.grad - 1)
    got = net.grads()
    by_hand(net, [net.trunk()], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


# What lies around the features


def test_tied_weights_are_told_and_summed_on_request() -> None:
    net = Net()

    def losses(z: Tensor) -> list[Tensor]:
        return [net.loss(0, z), (z @ net.upper.weight).square().mean(), (z @ net.upper.weight).sin().sum()]

    z = net.trunk()
    with pytest.raises(ValueError, match=r"1 tensors .* shape \(5, 5\), .*tied weights.*bypass='sum'"):
        fc.backward(losses(z), features=z)
    assert all(grad is None for grad in net.grads().values())
    fc.backward(losses(z), features=z, bypass="sum")
    got = net.grads()
    by_hand(net, [net.trunk()], lambda z: losses(z[0]))
    assert_same(got, net.grads())


def test_tied_weights_behind_a_compiled_or_custom_node() -> None:
    """Which computes all it has, whatever is asked of it: nothing of that may arrive."""
    net = Net()

    def losses(z: Tensor) -> list[Tensor]:
        return [net.loss(0, z), (z @ net.upper.weight).square().mean()]

    def trunk() -> Tensor:
        return Doubled.apply(net.trunk())

    z = trunk()
    fc.backward([lambda: net.loss(0, z), lambda: losses(z)[1]], features=z, bypass="sum")
    got = net.grads()
    by_hand(net, [trunk()], lambda z: losses(z[0]))
    assert_same(got, net.grads())


def test_a_derivative_by_the_input_goes_around() -> None:
    net = Net()
    net.x.requires_grad_()
    z = net.trunk()
    out = net.heads[0](z)
    (slope,) = torch.autograd.grad(out.sum(), net.x, create_graph=True)
    with pytest.raises(ValueError, match="a derivative by the input"):
        fc.backward([net.loss(1, z), slope.square().mean()], features=z)


def test_heads_of_other_features_than_those_given() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"reached by no loss.*the very tensors"):
        fc.backward(net.losses(net.trunk().detach()), features=net.trunk())
    z = net.trunk()
    with pytest.raises(ValueError, match="other tensors than these"):
        fc.backward([net.loss(0, z), net.loss(1, net.trunk())], features=z)
    with pytest.raises(ValueError, match="reached by no loss"):
        fc.backward([lambda: net.loss(0, z.detach())], features=z)


# What features are made of


class Doubled(torch.autograd.Function):
    """A node of a user's, which counts how often it runs backward."""

    passes = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        Doubled.passes += 1
        return 2 * grad


def test_a_custom_node_behind_the_features_runs_once() -> None:
    net = Net()
    z = Doubled.apply(net.trunk())
    Doubled.passes = 0
    fc.backward(net.losses(z), features=z)
    assert Doubled.passes == 1
    got = net.grads()
    by_hand(net, [Doubled.apply(net.trunk())], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


@pytest.mark.parametrize("last", ["linear", "tanh", "dropout", "max_pool", "layer_norm", "index", "in-place", "view"])
def test_pytorch_s_nodes_compute_nothing_for_a_loss(last: str) -> None:
    """What they saved is there for the combination, though autograd frees the node that it has run."""
    net = Net()

    def trunk() -> Tensor:
        torch.manual_seed(3)
        z = net.trunk()
        return {
            "linear": lambda: net.upper(z),
            "tanh": lambda: z.tanh(),
            "dropout": lambda: nn.functional.dropout(z, 0.3),
            "max_pool": lambda: nn.functional.max_pool1d(z.unsqueeze(0), 3, 1, 1).squeeze(0),
            "layer_norm": lambda: nn.functional.layer_norm(z, (WIDTH,)),
            "index": lambda: z[:, torch.tensor([4, 3, 2, 1, 0])],
            "in-place": lambda: z.mul(3).add_(1).relu_(),
            "view": lambda: z.t().contiguous().t(),
        }[last]()

    z = trunk()
    fc.backward(net.losses(z), features=z)
    got = net.grads()
    by_hand(net, [trunk()], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


def test_hooks_of_features_and_leaves_are_called_as_after_backward() -> None:
    net = Net()
    calls: list[str] = []
    net.heads[0].weight.register_hook(lambda grad: calls.append("head") or 2 * grad)
    net.heads[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    net.lower.weight.register_hook(lambda grad: calls.append("trunk"))
    z = net.trunk()
    removed = z.register_hook(lambda grad: calls.append("removed"))
    z.register_hook(lambda grad: calls.append("features") or 3 * grad)
    removed.remove()
    fc.backward(net.losses(z), features=z)
    assert calls == ["head", "accumulated", "features", "trunk"]
    got = net.grads()
    calls.clear()
    features = net.trunk()
    features.register_hook(lambda grad: 3 * grad)
    by_hand(net, [features], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


@pytest.mark.parametrize("custom", [False, True])
def test_a_leaf_accumulates_once(custom: bool) -> None:
    """Whether losses share its layer, or what that has computed, as DistributedDataParallel wants it."""
    net = Net(heads=4)
    calls: list[str] = []
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    z = Doubled.apply(net.trunk()) if custom else net.trunk()
    hidden = net.heads[3](z) * z
    losses = [net.loss(0, hidden), net.loss(1, hidden), net.loss(2, z), net.loss(2, net.heads[3](z) + z)]
    fc.backward(losses, features=z)
    assert sorted(calls) == sorted(name for name, _ in net.named_parameters())


class Saved:
    """Stands for a tensor that a node has saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("share", [False, True])
def test_what_large_heads_have_saved_is_freed_at_once(share: bool) -> None:
    """As by ``backward()``, though the losses are still there."""
    saved: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        kept = Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    trunk, heads = nn.Linear(4, 64), [nn.Linear(64, 2048) for _ in range(2)]
    z = trunk(torch.randn(64, 4)).tanh()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        losses = [head(z).sigmoid().mean() for head in heads]
        losses = [(losses[0] * losses[1]).sin(), losses[1].cos()] if share else losses
    assert saved
    fc.backward(losses, features=z)
    assert all(reference() is None for reference in saved)
    assert len(losses) == 2


def test_hooks_rest_only_while_losses_are_backpropagated() -> None:
    net = Net()
    z = net.trunk()
    calls: list[Tensor] = []
    handle = z.register_hook(calls.append)

    def fails() -> Tensor:
        raise KeyError("no labels")

    with pytest.raises(KeyError):
        fc.backward([lambda: net.loss(0, z), fails], features=z)
    assert calls == []
    z.sum().backward(retain_graph=True)
    assert len(calls) == 1
    handle.remove()
    z.sum().backward()
    assert len(calls) == 1


def test_gradients_of_features_are_left_to_the_user() -> None:
    """``retain_grad`` gives the combination, as after ``backward()``; without it there is nothing."""
    net = Net()
    z = net.trunk()
    rows = [torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in net.losses(z)]
    z.retain_grad()
    z.sum().backward(retain_graph=True)
    fc.backward(net.losses(z), features=z)
    torch.testing.assert_close(z.grad, 1 + fc.combine(torch.stack(rows)).view(z.shape))
    z = net.trunk()
    fc.backward(net.losses(z), features=z)
    with pytest.warns(UserWarning, match="not a leaf"):
        assert z.grad is None


def test_modules_with_backward_hooks() -> None:
    """They wrap what a module returns in a node of their own."""
    net = Net()
    calls: list[str] = []
    net.upper.register_full_backward_hook(lambda *_: calls.append("upper"))
    z = net.upper(net.lower(net.x))
    fc.backward(net.losses(z), features=z)
    assert calls == ["upper"]
    got = net.grads()
    by_hand(net, [net.upper(net.lower(net.x))], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_trunk(reentrant: bool) -> None:
    net = Net()
    net.x.requires_grad_()

    def trunk() -> Tensor:
        return checkpoint(lambda x: net.upper(net.lower(x).tanh()), net.x, use_reentrant=reentrant)

    z = trunk()
    fc.backward(net.losses(z), features=z)
    got = net.grads()
    by_hand(net, [trunk()], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


def test_checkpointed_heads() -> None:
    net = Net()
    z = net.trunk()
    fc.backward([checkpoint(net.loss, i, z, use_reentrant=False) for i in range(3)], features=z)
    got = net.grads()
    by_hand(net, [net.trunk()], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


def test_heads_in_reentrant_checkpoints_are_refused_by_pytorch() -> None:
    net = Net()
    z = net.trunk()
    losses = [checkpoint(net.loss, i, z, use_reentrant=True) for i in range(3)]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fc.backward(losses, features=z)


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler(dtype: torch.dtype) -> None:
    """The weights are the true gradients', ``.grad`` is as much larger as the losses are."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = {}
    for name, used in (("scaled", scaler), ("plain", None)):
        net = Net(dtype=torch.float32)
        with torch.autocast("cpu", dtype):
            z = net.trunk()
            losses = net.losses(z)
        losses = losses if used is None else scaler.scale(losses)
        info = fc.backward(losses, features=z, method=fc.NashMTL(), scaler=used)
        found[name] = info, net.grads()
    torch.testing.assert_close(found["scaled"][0].weights, found["plain"][0].weights, rtol=1e-2, atol=0.0)
    scaled = {name: grad / 1024 for name, grad in found["scaled"][1].items()}
    assert_same(scaled, found["plain"][1], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_a_scaler_finds_an_overflow(nonfinite: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD([*net.lower.parameters(), *net.upper.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    z = net.trunk()
    losses = scaler.scale(net.losses(z))
    losses[1] = losses[1] * torch.inf
    before = net.lower.weight.clone()
    fc.backward(losses, features=z, method=fc.ConFIG(nonfinite=nonfinite), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert torch.equal(net.lower.weight, before)


def test_a_loss_that_is_not_finite_is_named() -> None:
    net = Net()
    z = net.trunk()
    losses = net.losses(z)
    with pytest.raises(FloatingPointError, match="'b'"):
        fc.backward(
            {"a": losses[0], "b": losses[1] * torch.nan, "c": losses[2]},
            features=z,
            method=fc.ConFIG(nonfinite="raise"),
        )
    assert net.lower.weight.grad is None


# Bad input


def test_bad_input_is_named_before_anything_is_written() -> None:
    net = Net()
    z = net.trunk()
    losses = net.losses(z)
    wrong: list[tuple[type[Exception], str, dict]] = [
        (TypeError, "losses must be a sequence", {"losses": losses[0]}),
        (TypeError, "losses must be a sequence", {"losses": 3}),
        (ValueError, "losses must hold at least one loss", {"losses": []}),
        (ValueError, "losses must hold at least one loss", {"losses": {}}),
        (TypeError, "losses must be a dict by name, got the key 0", {"losses": {0: losses[0]}}),
        (ValueError, "every loss is None", {"losses": [None, None]}),
        (ValueError, r"losses\[0\] must have one element", {"losses": [z]}),
        (ValueError, r"losses\[1\] does not require grad", {"losses": [losses[0], torch.tensor(1.0)]}),
        (TypeError, r"losses\[0\] must be a tensor", {"losses": ["a"]}),
        (ValueError, "at least one tensor", {"features": []}),
        (TypeError, "features must be a tensor or a sequence", {"features": 3}),
        (TypeError, r"features\[1\] must be a tensor, got int", {"features": [z, 3]}),
        (ValueError, r"features\[1\] is features\[0\]", {"features": [z, z]}),
        (ValueError, "features does not require grad.*requires_grad_", {"features": z.detach()}),
        (TypeError, "float32", {"features": torch.ones(3, dtype=torch.int64)}),
        (ValueError, "bypass must be 'error' or 'sum', got 'add'", {"bypass": "add"}),
        (ValueError, "sync must be", {"sync": "all"}),
        (TypeError, "method must have weights", {"method": 3}),
        (TypeError, "method must have weights", {"method": fc.MGDA}),
        (ValueError, "remembers", {"method": "gradvac"}),
        (ValueError, "2", {"method": fc.ConFIG(weights=[1.0, 2.0])}),
        (ValueError, "2", {"method": fc.UPGrad(weights=[1.0, 2.0])}),
    ]
    for kind, words, arguments in wrong:
        with pytest.raises(kind, match=words):
            fc.backward(**{"losses": losses, "features": z, **arguments})
        assert all(grad is None for grad in net.grads().values()), words
    fc.backward(losses, features=z)  # nothing was used up


def test_one_loss_and_a_user_s_method() -> None:
    class Half:
        def weights(self, gramian: Tensor) -> Tensor:
            return torch.full((len(gramian),), 0.5)

    net = Net()
    z = net.trunk()
    fc.backward([net.loss(0, z)], features=z, method=Half())
    got = net.grads()
    (0.5 * net.loss(0, net.trunk())).backward()
    wanted = net.grads()
    for name in ("lower.weight", "upper.bias"):
        torch.testing.assert_close(got[name], wanted[name])
    torch.testing.assert_close(got["heads.0.weight"], 2 * wanted["heads.0.weight"])


def test_a_streaming_method_draws_as_over_joined_columns() -> None:
    net = Net()
    features = net.levels()
    torch.manual_seed(5)
    fc.backward(of_levels(net, features), features=features, method=fc.GradDrop())
    got = net.grads()
    torch.manual_seed(5)
    by_hand(net, net.levels(), lambda z: of_levels(net, z), fc.GradDrop())
    assert_same(got, net.grads())


def test_a_monitor_records_it_by_names() -> None:
    net = Net()
    monitor = fc.ConflictMonitor(["a", "b", "c"])
    for _ in range(3):
        z = net.trunk()
        info = fc.backward(dict(zip("abc", net.losses(z), strict=True)), features=z)
        monitor.record(info)
    assert monitor.history.names == ("a", "b", "c")
    assert monitor.history.cosines.shape == (3, 3)
    with pytest.raises(RuntimeError, match="made of names"):
        monitor.step()
    with pytest.raises(TypeError, match="GradientBuffer"):
        monitor.by_module()


def test_a_compiled_trunk_and_compiled_heads() -> None:
    net = Net()
    trunk = torch.compile(lambda x: net.upper(net.lower(x).tanh()).tanh(), backend="aot_eager")
    heads = [torch.compile(net.loss, backend="aot_eager") for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own making
        z = trunk(net.x)
        losses = [head(i, z) for i, head in enumerate(heads)]
    fc.backward(losses, features=z)
    got = net.grads()
    by_hand(net, [net.trunk()], lambda z: net.losses(z[0]))
    assert_same(got, net.grads())


def test_rows_are_freed_before_the_trunk_is_run() -> None:
    net = Net()
    rows: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    z = net.trunk()
    losses = []
    for i in range(3):
        hidden = z.mul(1.0 + i)
        hidden.grad_fn.register_hook(lambda grads, _: rows.append(weakref.ref(grads[0])))
        losses.append(net.loss(i, hidden))
    z.register_hook(lambda grad: alive.append(sum(row() is not None for row in rows)))
    fc.backward(losses, features=z)
    assert len(rows) == 3
    assert alive == [0]


def test_a_compiled_step() -> None:
    """What is compiled before the call is one node by a backend of AOTAutograd: trunk and heads are compiled apart."""
    net = Net()

    def step() -> Tensor:
        z = net.trunk()
        info = fc.backward(net.losses(z), features=z, method="mgda")
        return info.weights * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own making
        weights = torch.compile(step, backend="eager")()
        got = net.grads()
        with pytest.raises(ValueError, match="trunk and heads apart"):
            torch.compile(step, backend="aot_eager")()
    net.zero_grad()
    torch.testing.assert_close(weights, step())
    assert_same(got, net.grads())
