"""GradDrop on a device: the reference's draws, without waiting, anew in every replay of a graph."""

from __future__ import annotations

import pytest
import torch

import fastconfig as fc

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]


def gradients(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m)).cuda()


def seeded(leak: float | None = None) -> fc.GradDrop:
    return fc.GradDrop(leak, torch.Generator().manual_seed(7))


@pytest.mark.parametrize("leak", [None, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(3, 5001), (8, 4096), (40, 777)])
def test_masks_what_the_reference_masks(m, n, dtype, leak):
    grads = gradients(m, n).to(dtype)
    ours, theirs = seeded(leak), seeded(leak)
    for _ in range(2):
        got = fc.combine(grads, ours).cpu()
        wanted = fc.combine(grads.cpu(), theirs, backend="reference")
        torch.testing.assert_close(got, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_nothing_waits():
    grads, method = gradients(3, 100_000), seeded()
    out = torch.empty_like(grads[0])
    fc.combine(grads, method, out=out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fc.combine(grads, method, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_replay_of_a_graph_draws_anew():
    grads, method, eager = gradients(3, 5000), seeded(), seeded()
    out = torch.empty_like(grads[0])
    wanted = [fc.combine(grads, eager) for _ in range(3)]
    fc.combine(grads, method, out=out)
    assert torch.equal(out, wanted[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fc.combine(grads, method, out=out)
    for expected in wanted[1:]:
        graph.replay()
        assert torch.equal(out, expected)
    assert not torch.equal(wanted[1], wanted[2])
