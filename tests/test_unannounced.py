"""Gradients that no hook of autograd announced: what counts is what ``.grad`` holds when a recorded block ends."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastconfig as fc
from fastconfig.gradients import landing

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread", "way_of_landing")


def rows_and_grads(buf, model):
    info = buf.combine()
    flat = torch.cat(
        [torch.zeros(p.shape).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    return info, flat


def test_a_gradient_assigned_by_hand_is_combined():
    x, model = torch.randn(4, 3), nn.Linear(3, 2)
    buf = fc.GradientBuffer(model, 2)
    for i in range(2):
        with buf.record(i):
            model(x)[:, i].mean().backward(inputs=[model.bias])
            model.weight.grad = torch.autograd.grad(model(x)[:, i].mean(), model.weight)[0]
    info, flat = rows_and_grads(buf, model)
    assert model.weight.grad is not None
    assert torch.equal(flat, buf.grad)
    torch.testing.assert_close(buf.grad, fc.combine(buf.rows))
    torch.testing.assert_close(info.gramian, fc.gramian(buf.rows))
    assert buf.rows[:, : model.weight.numel()].any(dim=1).all()


def test_the_functional_style_with_gradients_assigned():
    x, model = torch.randn(4, 3), nn.Linear(3, 2)
    buf = fc.GradientBuffer(model, 2)
    parameters = dict(model.named_parameters())
    for i in range(2):
        gradients = torch.func.grad(lambda p, i=i: torch.func.functional_call(model, p, (x,))[:, i].mean())(parameters)
        with buf.record(i):
            for name, parameter in parameters.items():
                parameter.grad = gradients[name].detach()
    plain = fc.GradientBuffer(twin := copy.deepcopy(model), 2)
    plain.backward([twin(x)[:, i].mean() for i in range(2)])
    torch.testing.assert_close(buf.rows, plain.rows)
    buf.combine()
    plain.combine()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_optimizer_takes_a_gradient_assigned_by_hand():
    by_hand, by_autograd = nn.Linear(3, 2), nn.Linear(3, 2)
    by_autograd.load_state_dict(by_hand.state_dict())
    x = torch.randn(4, 3)
    optimizers = [fc.optim.MConFIG(model, lr=0.1, num_losses=2) for model in (by_hand, by_autograd)]
    for step in range(6):
        i = step % 2
        with optimizers[0].record(i):
            for parameter in by_hand.parameters():
                parameter.grad = torch.autograd.grad(by_hand(x)[:, i].square().mean(), parameter)[0]
        with optimizers[1].record(i):
            by_autograd(x)[:, i].square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(by_hand.parameters(), by_autograd.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_taken_away_inside_the_block_is_not_there():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    buf = fc.GradientBuffer(weights, 1)
    with buf.record(0):
        sum(weights).sum().backward()
        weights[0].grad = None
    buf.combine()
    assert weights[0].grad is None
    assert buf.rows.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_loading_a_state_dict_by_swapping_tensors():
    """The parameters stay where they are in memory and lose their hooks."""
    x, model = torch.randn(4, 3), nn.Linear(3, 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buf = fc.GradientBuffer(model, 2)
    optimized = copy.deepcopy(model)
    optimizer = fc.optim.MConFIG(optimized, lr=0.1, num_losses=2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state)
        optimized.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = [parameter.detach().clone() for parameter in optimized.parameters()]
    buf.backward([model(x)[:, i].mean() for i in range(2)])
    info, flat = rows_and_grads(buf, model)
    assert torch.equal(flat, buf.grad)
    assert info.rank == 2
    for i in range(2):
        with optimizer.record(i):
            optimized(x)[:, i].mean().backward()
        optimizer.step()
    assert not any(map(torch.equal, optimized.parameters(), before))


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch gives a gradient its parameter's dtype"
)
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_gradients_of_a_dtype_of_their_own(dtype):
    model = nn.Linear(3, 2).bfloat16()
    for parameter in model.parameters():
        parameter.grad_dtype = dtype
    buf = fc.GradientBuffer(model, 2)
    assert buf.rows.dtype == torch.float32
    wanted = torch.randn(2, 8)
    for i in range(2):
        with buf.record(i):
            for parameter, gradient in zip(model.parameters(), wanted[i].split([6, 2]), strict=True):
                parameter.grad = gradient.view_as(parameter).clone()
    assert torch.equal(buf.rows, wanted)  # nothing was rounded to bfloat16
    buf.combine()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(buf.grad, fc.combine(wanted))


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch gives a gradient its parameter's dtype"
)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["wider", "narrower"],
)
def test_an_optimizer_over_gradients_of_a_dtype_of_their_own(backend, dtype, grad_dtype):
    """As over the wider of both dtypes, the parameters rounded once a step."""
    ours, wide = (nn.Linear(3, 2).to(kind) for kind in (dtype, torch.float32))
    for parameter in ours.parameters():
        parameter.grad_dtype = grad_dtype
    optimizers = [fc.optim.MConFIG(model, lr=0.1, num_losses=2, backend=backend) for model in (ours, wide)]
    for step in range(6):
        with torch.no_grad():  # one step at a time, from the same parameters
            for narrow, parameter in zip(ours.parameters(), wide.parameters(), strict=True):
                parameter.copy_(narrow)
        for model, optimizer in zip((ours, wide), optimizers, strict=True):
            torch.manual_seed(step)
            with optimizer.record(step % 2):
                for parameter in model.parameters():
                    parameter.grad = (
                        torch.randn(parameter.shape).bfloat16().to(grad_dtype if model is ours else torch.float32)
                    )
            optimizer.step()
        for narrow, parameter in zip(ours.parameters(), wide.parameters(), strict=True):
            assert torch.equal(narrow, parameter.to(dtype))
    assert not torch.equal(wide.weight, torch.zeros_like(wide.weight))


class Heads(nn.Module):
    """A trunk, and one head that each rank leaves to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, x, head):
        return self.heads[head](self.trunk(x).tanh()).square().mean()


def train_on_a_rank(rank: int, folder: str, hooked_bytes: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    landing.HOOKED_BYTES = hooked_bytes
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(2, 5, 3)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    buf = fc.GradientBuffer(parallel, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        for i in range(2):
            with buf.record(i):
                parallel((i + 1) * x[rank], rank).backward()  # each rank has one head, the reducer brings the other's
        buf.combine()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    # Both are done before either leaves, which would break the other's connections; and both leave at once, for now and
    # then taking down gloo's threads in order aborts the process.
    store.set(f"done {rank}", "")
    store.wait([f"done {i}" for i in range(2)])
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_ranks_that_use_other_heads_stay_equal(tmp_path):
    """DistributedDataParallel brings the gradient of a head that only the other rank used, without a hook."""
    torch.multiprocessing.spawn(train_on_a_rank, (str(tmp_path), landing.HOOKED_BYTES), nprocs=2)
    trained = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(2, 5, 3)
    buf, optimizer = fc.GradientBuffer(model, 2), torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        buf.backward([sum(model((i + 1) * x[rank], rank) for rank in range(2)) / 2 for i in range(2)])
        buf.combine()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(trained[0][name], trained[1][name])
        torch.testing.assert_close(trained[0][name], value)
