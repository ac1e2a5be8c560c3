"""MConFIG inside what surrounds a training loop: DistributedDataParallel, torch.compile, the backend for a GPU."""

import os

import pytest
import torch
from torch import nn

import fastconfig as fc

STEPS = 12


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def inputs():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, x):
    for _ in range(STEPS):
        loss = optimizer.next_loss()
        with optimizer.record(loss):
            model(x)[:, loss].square().mean().backward()
        optimizer.step()


def _train_in_parallel(rank, folder, as_bucket_view):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = network()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_bucket_view)
    optimizer = fc.optim.MConFIG(parallel, lr=1e-2, num_losses=2)
    train(parallel, optimizer, inputs()[4 * rank : 4 * rank + 4])
    torch.save([parameter.detach() for parameter in model.parameters()], f"{folder}/{rank}.pt")
    os._exit(0)  # past gloo's threads, whose end aborts the process now and then, with any optimizer


@pytest.mark.parametrize("as_bucket_view", [False, True])
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_train_as_one_on_the_whole_batch(tmp_path, as_bucket_view):
    torch.multiprocessing.spawn(_train_in_parallel, args=(str(tmp_path), as_bucket_view), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(map(torch.equal, one, other))
    alone = network()
    train(alone, fc.optim.MConFIG(alone.parameters(), lr=1e-2, num_losses=2), inputs())
    for parameter, expected in zip(one, alone.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin:UserWarning")  # `record` stays outside
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.usefixtures("one_thread")
def test_a_compiled_training_step_takes_the_same_steps():
    x = inputs()

    def step(model, optimizer, loss):
        with optimizer.record(loss):
            model(x)[:, loss].square().mean().backward()
        optimizer.step()

    models = [network(), network()]
    for model, function in zip(models, (step, torch.compile(step, backend="eager")), strict=True):
        optimizer = fc.optim.MConFIG(model.parameters(), lr=1e-2, num_losses=2)
        for i in range(STEPS):
            function(model, optimizer, i % 2)
    for eager, compiled in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(eager, compiled)


class Mean:
    def weights(self, gramian):
        return gramian.new_full((len(gramian),), 1 / len(gramian))


@pytest.mark.usefixtures("interpreter", "one_thread")
@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU Triton's interpreter takes the CPU's tensors")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"losses_per_step": 2, "weight_decay": 0.1, "maximize": True},
        {"method": Mean()},
        {"method": fc.ConFIG(nonfinite="raise")},
        {"max_norm": 0.1, "max_update_norm": 1.0},
        {"state_dtype": torch.float64},
        {"lr": torch.tensor(1e-2)},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_the_kernels_for_a_gpu_train_as_the_reference_does(options):
    pytest.importorskip("triton")
    models = [network(), network()]
    for model, backend in zip(models, ("reference", "triton"), strict=True):
        optimizer = fc.optim.MConFIG(model.parameters(), **{"lr": 1e-2, "num_losses": 2, "backend": backend} | options)
        for _ in range(STEPS):
            for loss in optimizer.next_losses():
                with optimizer.record(loss):
                    model(inputs())[:, loss].square().mean().backward()
            optimizer.step()
    for by_reference, by_kernels in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(by_kernels, by_reference, rtol=1e-5, atol=1e-6)
