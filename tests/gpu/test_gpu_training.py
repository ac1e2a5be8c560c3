"""Training on a device: CUDA graphs of a combination and of a whole step, GradScaler, torch.compile."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastconfig as fc

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def gradients(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def warmed_up(call: Callable[[], object], times: int = 3) -> None:
    """As PyTorch asks before a capture: a few runs on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # no autograd node of the warm-up's stream may live on into the capture
    torch.cuda.synchronize()


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    warmed_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize(("m", "n"), [(3, 1000), (3, 65_536), (17, 65_536), (64, 65_540)])
def test_a_captured_combination_follows_new_data(m: int, n: int) -> None:
    grads, out = gradients(m, n), torch.empty(n, device=DEVICE)
    graph = captured(lambda: fc.combine(grads, out=out))
    for seed in range(1, 4):
        grads.copy_(gradients(m, n, seed))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, fc.combine(grads))


@pytest.mark.parametrize("m", [3, 9])
def test_captured_vectors(m: int) -> None:
    rows, out = list(gradients(m, 65_536)), torch.empty(65_536, device=DEVICE)
    graph = captured(lambda: fc.combine(rows, out=out))
    for row, new in zip(rows, gradients(m, 65_536, seed=1), strict=True):
        row.copy_(new)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, fc.combine(rows))


def test_captured_direction_weights() -> None:
    grads, out = gradients(3, 65_536), torch.empty(65_536, device=DEVICE)
    method = fc.ConFIG(weights=[1.0, 2.0, 3.0])
    graph = captured(lambda: fc.combine(grads, method, out=out))
    grads.copy_(gradients(3, 65_536, seed=1))
    graph.replay()
    assert torch.equal(out, fc.combine(grads, method))


def test_a_replay_beside_eager_calls_and_another_graph() -> None:
    """Scratch memory is shared by no two of them: all overlap on the device."""
    n = 65_536
    problems = [(gradients(m, n, seed), torch.empty(n, device=DEVICE)) for seed, m in enumerate((3, 17, 3))]
    wanted = [fc.combine(grads) for grads, _ in problems]
    graphs = [captured(lambda grads=grads, out=out: fc.combine(grads, out=out)) for grads, out in problems[:2]]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            fc.combine(problems[2][0], out=problems[2][1])
    torch.cuda.synchronize()
    for (_, out), right in zip(problems, wanted, strict=True):
        assert torch.equal(out, right)


def test_two_combinations_in_one_graph() -> None:
    n = 65_536
    first, second = gradients(3, n), gradients(17, n)
    outs = torch.empty(2, n, device=DEVICE)

    def call() -> None:
        fc.combine(first, out=outs[0])
        fc.combine(second, out=outs[1])

    graph = captured(call)
    first.copy_(gradients(3, n, seed=5))
    second.copy_(gradients(17, n, seed=6))
    graph.replay()
    assert torch.equal(outs[0], fc.combine(first))
    assert torch.equal(outs[1], fc.combine(second))


class Step:
    """A training step of three losses over inputs that stay where they are; float64, so that noise cannot grow."""

    def __init__(self, model: nn.Module, optimizer: str, losses_as: str) -> None:
        self.model = model
        self.buffer = fc.GradientBuffer(model.parameters(), num_losses=3)
        self.optimizer = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
            "adam": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
        }[optimizer](model.parameters())
        self.losses_as = losses_as
        self.inputs = torch.zeros(32, 16, dtype=torch.float64, device=DEVICE)
        self.targets = torch.zeros(3, 32, 4, dtype=torch.float64, device=DEVICE)
        self.info: fc.Combination | None = None

    def load(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs.copy_(torch.randn(self.inputs.shape, generator=generator, dtype=torch.float64))
        self.targets.copy_(torch.randn(self.targets.shape, generator=generator, dtype=torch.float64))

    def loss(self, i: int, prediction: Tensor) -> Tensor:
        return (prediction - self.targets[i]).square().mean() * 10.0**i

    def __call__(self) -> None:
        if self.losses_as == "tensors":
            prediction = self.model(self.inputs)
            self.buffer.backward([self.loss(i, prediction) for i in range(3)])
        else:
            self.buffer.backward([lambda i=i: self.loss(i, self.model(self.inputs)) for i in range(3)])
        self.info = self.buffer.combine()
        self.optimizer.step()


@pytest.mark.filterwarnings("ignore")  # Adam(capturable=True) warns of the eager steps before the capture
@pytest.mark.parametrize("losses_as", ["tensors", "callables"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("width", [32, 256])  # one launch, and two
def test_a_captured_training_step_is_the_eager_one(width: int, optimizer: str, losses_as: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 4))
    model.to(DEVICE, torch.float64)
    eager, replayed = (Step(copy.deepcopy(model), optimizer, losses_as) for _ in range(2))
    for step in (eager, replayed):
        step.load(seed=0)
    for _ in range(3):
        eager()
    graph = captured(replayed)  # three eager steps, too; the capture itself changes nothing
    kept = replayed.info
    for seed in range(1, 6):
        for step in (eager, replayed):
            step.load(seed)
        eager()
        graph.replay()
        torch.testing.assert_close(replayed.buffer.rows, eager.buffer.rows, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(kept.weights, eager.info.weights, rtol=1e-8, atol=1e-10)
        for ours, theirs in zip(replayed.model.parameters(), eager.model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    first = next(iter(replayed.model.parameters()))
    assert first.grad.data_ptr() == replayed.buffer.grad.data_ptr()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_buffer_waits_for_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).to(DEVICE)
    buffer = fc.GradientBuffer(model.parameters(), num_losses=3)
    inputs = torch.randn(8, 16, device=DEVICE)

    def step() -> fc.Combination:
        prediction = model(inputs)
        buffer.backward([prediction.square().mean(), prediction.sin().sum(), prediction[:, 0].mean()])
        return buffer.combine()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        info = step()
        norms, cosines = info.norms, info.cosines
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norms.isfinite().all()
    assert cosines.isfinite().all()


def test_segments_of_two_dtypes() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 64), nn.Linear(64, 16).to(torch.bfloat16)]).to(DEVICE)
    buffer = fc.GradientBuffer(model.parameters(), num_losses=3)
    inputs = torch.randn(8, 16, device=DEVICE)
    prediction = model[1](model[0](inputs).tanh().to(torch.bfloat16)).float()
    buffer.backward([prediction.square().mean(), prediction.sin().sum(), prediction[:, 0].mean()])
    info = buffer.combine()
    rows = torch.cat([segment.rows.double() for segment in buffer.segments], dim=1)
    wanted = fc.combine(rows.cpu())
    got = torch.cat([segment.grad.double() for segment in buffer.segments]).cpu()
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    torch.testing.assert_close(info.gramian, rows @ rows.T)


class Amp:
    """Mixed precision as PyTorch's recipe has it, with the buffer between backward and the scaler."""

    def __init__(self, method: fc.ConFIG, told: bool = True) -> None:
        torch.manual_seed(0)
        self.told = told
        self.model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).to(DEVICE)
        self.buffer = fc.GradientBuffer(self.model.parameters(), num_losses=3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
        self.method = method

    def step(self, inputs: Tensor, spoil: float = 1.0) -> None:
        with torch.autocast(DEVICE, dtype=torch.float16):
            prediction = self.model(inputs)
        prediction = prediction.float()
        losses = [prediction.square().mean(), prediction.sin().sum() * spoil, prediction[:, 0].mean()]
        self.buffer.backward([self.scaler.scale(loss) for loss in losses])
        self.buffer.combine(self.method, scaler=self.scaler if self.told else None)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def values(self) -> Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in self.model.parameters()])


def test_a_grad_scaler_skips_a_step_that_overflowed() -> None:
    amp, inputs = Amp(fc.ConFIG()), torch.randn(8, 16, device=DEVICE)
    before = amp.values()
    amp.step(inputs, spoil=float("inf"))
    assert torch.equal(amp.values(), before)
    assert amp.scaler.get_scale() == 2.0**11
    amp.step(inputs)
    assert amp.scaler.get_scale() == 2.0**11
    assert amp.values().isfinite().all()
    change = (before - amp.values()) / 0.1
    wanted = fc.combine(amp.buffer.rows.double().cpu()) / 2.0**11  # the scale passes through the combination
    torch.testing.assert_close(change.double().cpu(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_scaler_that_is_told_hears_of_an_overflow_that_was_dropped() -> None:
    amp, inputs = Amp(fc.ConFIG(nonfinite="drop")), torch.randn(8, 16, device=DEVICE)
    before = amp.values()
    amp.step(inputs, spoil=float("inf"))
    assert torch.equal(amp.values(), before)
    assert amp.scaler.get_scale() == 2.0**11


def test_dropping_an_overflowed_loss_takes_the_step_without_it() -> None:
    """Where combine is not told of the scaler, which a warning asks for."""
    amp, inputs = Amp(fc.ConFIG(nonfinite="drop"), told=False), torch.randn(8, 16, device=DEVICE)
    before = amp.values()
    with pytest.warns(UserWarning, match="not told of the scaler"):
        amp.step(inputs, spoil=float("inf"))
    assert amp.scaler.get_scale() == 2.0**12
    assert amp.values().isfinite().all()
    assert not torch.equal(amp.values(), before)


@pytest.mark.filterwarnings("ignore")  # what the compiler itself warns of
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(grads: Tensor) -> Tensor:
        return fc.combine(grads * 2.0) + 1.0

    for n in (65_536, 98_304) if dynamic else (65_536,):
        grads = gradients(3, n)
        torch.testing.assert_close(compiled(grads), fc.combine(grads * 2.0) + 1.0)


@pytest.mark.filterwarnings("ignore")
def test_compiled_into_an_output() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def compiled(grads: Tensor, out: Tensor) -> None:
        fc.combine(grads, out=out)

    grads, out = gradients(3, 65_536), torch.full((65_536,), torch.nan, device=DEVICE)
    compiled(grads, out)
    assert torch.equal(out, fc.combine(grads))
