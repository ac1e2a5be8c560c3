"""buf.combine(by=): each part of a model by its own Gramian, against a combination of each part alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastconfig as fc
from fastconfig.backends import cpu

pytestmark = pytest.mark.usefixtures("poisoned_memory")

M = 3
NAMES = ["a", "b", "c"]


def mixed(kind: str) -> nn.Module:
    """Of one dtype, or of two in turns, so that a part is of several segments; or with a parameter that is shared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    if kind == "two dtypes":
        for layer in (model[0], model[2], model[4]):
            layer.bias = nn.Parameter(layer.bias.detach().double())
    if kind == "complex":
        model[2].weight = nn.Parameter(torch.randn(6, 7, dtype=torch.complex64))
    if kind == "tied":
        model.extra = nn.Linear(5, 7)
        model.extra.weight = model[0].weight
        model.empty = nn.Parameter(torch.ones(0))
    return model


def filled(model: nn.Module, names: object = M) -> fc.GradientBuffer:
    """A buffer with random rows; the first parameter is reached by one loss alone, the last by none."""
    buf = fc.GradientBuffer(model, names)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for i in range(M):
        with buf.record(i):
            for k, parameter in enumerate(parameters[:-1]):
                if k or i == 1:
                    shape, scale = parameter.shape, 10.0**i
                    grad = scale * torch.randn(shape, generator=generator, dtype=parameter.dtype)
                    parameter.grad = grad if i else grad + torch.ones_like(grad)
    return buf


def top(name: str) -> str:
    return name.split(".")[0]


def odd_and_even(name: str) -> str:
    """Parts of columns that are no neighbours."""
    return "weights" if name.endswith("weight") else "others"


def parts_of(model: nn.Module, by: object) -> dict[str, list[str]]:
    name_of = {"module": lambda name: name.rpartition(".")[0], "parameter": str}.get(by, by)
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(name_of(name), []).append(name)
    return parts


def rows_of(buf: fc.GradientBuffer, model: nn.Module, names: list[str]) -> Tensor:
    """(m, n_part) float64, complex as two columns an element."""
    known = dict(model.named_parameters())
    rows = []
    for segment in buf.segments:
        for parameter, start in zip(segment.parameters, segment.starts, strict=True):
            if any(parameter is known[name] for name in names):
                count = parameter.numel() * (2 if parameter.is_complex() else 1)
                rows.append(segment.rows[:, start : start + count].double())
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("by", ["module", "parameter", top, odd_and_even, lambda name: "all"])
@pytest.mark.parametrize("kind", ["one dtype", "two dtypes", "complex", "tied"])
@pytest.mark.parametrize(
    "method", [None, fc.MGDA(), "upgrad", fc.UPGrad(nonfinite="raise"), fc.Sum(), fc.ConFIG(length="harmonic")], ids=str
)
def test_each_part_is_combined_alone(kind: str, by: object, method: object) -> None:
    model = mixed(kind)
    buf = filled(model)
    info = buf.combine(method, by=by)
    expected = parts_of(model, by)
    assert list(info.parts) == list(expected)
    one = fc.UPGrad() if method == "upgrad" else method or fc.ConFIG()
    flat = {name: p.grad for name, p in model.named_parameters()}
    for part, names in expected.items():
        rows = rows_of(buf, model, names)
        torch.testing.assert_close(info.parts[part].gramian, rows @ rows.T, rtol=1e-12, atol=1e-12)
        weights = one.weights(info.parts[part].gramian)
        torch.testing.assert_close(info.parts[part].weights, weights, rtol=1e-9, atol=1e-12)
        combined = [flat[name] for name in names if flat[name] is not None]
        got = torch.cat(
            [torch.view_as_real(g).flatten().double() if g.is_complex() else g.flatten().double() for g in combined]
            or [torch.zeros(0, dtype=torch.float64)]
        )
        torch.testing.assert_close(got.norm(), (weights @ rows).norm(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(info.gramian, sum(part.gramian for part in info.parts.values()))
    assert info.weights.isnan().all()
    assert list(model.parameters())[-1].grad is None


def test_one_part_is_the_whole() -> None:
    model = mixed("one dtype")
    buf = filled(model)
    whole = buf.combine()
    before = buf.grad.clone()
    info = buf.combine(by=lambda name: "all", stale="use")
    torch.testing.assert_close(info.parts["all"].weights, whole.weights, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(buf.grad, before, rtol=1e-6, atol=0.0)
    assert whole.parts == {}


def test_no_part_conflicts_with_a_loss() -> None:
    model = mixed("one dtype")
    buf = filled(model)
    buf.combine(by="parameter")
    for segment in buf.segments:
        for parameter, start in zip(segment.parameters[1:-1], segment.starts[1:-1], strict=True):
            run = slice(start, start + parameter.numel())
            cosines = torch.cosine_similarity(segment.rows[:, run], segment.grad[run].unsqueeze(0))
            torch.testing.assert_close(cosines, cosines[0].expand(M), rtol=1e-4, atol=1e-5)
            assert cosines[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tier", cpu.tiers() if cpu.available() is None else [])
def test_the_core_gives_what_a_call_a_part_does_for_any_number_of_threads(tier: str, dtype: torch.dtype) -> None:
    """Parts of 0 to 60,000 columns beside each other, by methods of their own; what is not in a part stays."""
    active, threads = cpu.active_tier(), torch.get_num_threads()
    sizes = [0, 1, 15, 16, 17, 31, 1000, 60_000, 3, 40_000, 1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, sum(sizes) + 5, generator=generator).to(dtype)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    columns = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    methods = [[fc.ConFIG(), fc.UPGrad(), fc.MGDA()][i % 3] for i in range(len(sizes))]
    described = fc.GradientBuffer([nn.Parameter(torch.ones(rows.shape[1], dtype=dtype))], 4).segments[0].description
    described = described._replace(matrix=rows, n=rows.shape[1], dtype=dtype)
    found = []
    try:
        cpu.use_tier(tier)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = torch.full((rows.shape[1],), torch.nan, dtype=dtype)
            gramians, weights = (
                torch.full(shape, torch.nan).double() for shape in ((len(sizes), 4, 4), (len(sizes), 4))
            )
            cpu.combine_parts(described, columns, [(method.rule, None) for method in methods], out, gramians, weights)
            found.append((out, gramians, weights))
            assert out[-5:].isnan().all()
        alone = [
            fc.combine(rows[:, first:last], method) for (first, last), method in zip(columns, methods, strict=True)
        ]
    finally:
        cpu.use_tier(active)
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found[0], other, strict=True))
    out, gramians, weights = found[0]
    for (first, last), own, gramian in zip(columns, alone, gramians, strict=True):
        exact = rows[:, first:last].double() @ rows[:, first:last].double().T
        torch.testing.assert_close(gramian, exact, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out[first:last], own, rtol=4 * torch.finfo(dtype).eps, atol=1e-9)
    assert weights.isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_method_a_part_and_one_that_remembers(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        models = [mixed("one dtype") for _ in range(3)]
        bufs = [filled(model) for model in models]
        own = {"0": fc.CRMOGM(fc.MGDA()), "2": fc.Sum(), "4": fc.SDMGrad()}
        alone = {part: copy.deepcopy(method) for part, method in own.items()}
        for _ in range(3):
            info = bufs[0].combine(own, by=top, stale="use")
            named = bufs[1].combine("sdmgrad", by=lambda name: name.split(".")[0], stale="use")  # another each time
        for part, gramian in bufs[2].gramian(by=top).items():
            for _ in range(3):
                weights = alone[part].weights(gramian)
            torch.testing.assert_close(info.parts[part].weights, weights, rtol=1e-5, atol=1e-9)
            followed = fc.SDMGrad()
            for _ in range(3):
                weights = followed.weights(gramian)
            torch.testing.assert_close(named.parts[part].weights, weights, rtol=1e-5, atol=1e-9)
    finally:
        torch.set_num_threads(before)


def test_a_user_s_method_and_one_that_draws() -> None:
    class First:
        def weights(self, gramian: Tensor) -> Tensor:
            return torch.eye(len(gramian))[0]

    model = mixed("one dtype")
    buf = filled(model)
    buf.combine(First(), by="module")
    torch.testing.assert_close(buf.grad, buf.rows[0])
    torch.manual_seed(3)
    info = buf.combine(fc.PCGrad(), by="module", stale="use")
    torch.manual_seed(3)
    method = fc.PCGrad()
    for part in info.parts.values():
        torch.testing.assert_close(part.weights, method.weights(part.gramian))


def test_a_row_that_is_not_finite() -> None:
    """In the parts where it is not; a method that raises names the loss and writes nothing."""
    model = mixed("one dtype")
    buf = filled(model, NAMES)
    buf.rows[1, -20:-10] = torch.nan
    info = buf.combine(by=top)
    assert [name for name, part in info.parts.items() if part.weights.isnan().any()] == ["4"]
    dropped = buf.combine(fc.ConFIG(nonfinite="drop"), by=top, stale="use")
    assert dropped.parts["4"].weights[1] == 0
    before = buf.grad.clone()
    with pytest.raises(FloatingPointError, match="'b'"):
        buf.combine(fc.UPGrad(nonfinite="raise"), by=top, stale="use")
    assert torch.equal(buf.grad, before)


def test_a_scaler() -> None:
    plain, scaled = mixed("one dtype"), mixed("one dtype")
    bufs = [filled(plain), filled(scaled)]
    bufs[1].rows.mul_(256)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    infos = [bufs[0].combine(fc.NashMTL(), by=top), bufs[1].combine(fc.NashMTL(), by=top, scaler=scaler)]
    for ours, theirs in zip(infos[0].parts.values(), infos[1].parts.values(), strict=True):
        torch.testing.assert_close(ours.weights, theirs.weights)
    torch.testing.assert_close(bufs[0].grad * 256, bufs[1].grad)
    bufs[1].rows[0, 0] = torch.inf
    bufs[1].combine(fc.ConFIG(nonfinite="drop"), by=top, scaler=scaler, stale="use")
    assert bufs[1].grad.isnan().any()


def test_a_monitor_and_a_record() -> None:
    model = mixed("one dtype")
    buf = filled(model, NAMES)
    with fc.ConflictMonitor(buf) as monitor:
        info = buf.combine(by=top)
        monitor.step()
    assert monitor.history.cosines.shape == (1, 3)
    assert list(info.parts["2"].names) == NAMES
    assert "nan" in repr(info)
    assert repr(info.parts["0"]).startswith("Combination(losses=['a', 'b', 'c'], weights=[")


def test_parameters_that_come_later_have_a_part() -> None:
    model = mixed("one dtype")
    model[4].requires_grad_(False)
    buf = filled(model)
    assert list(buf.combine(by="module").parts) == ["0", "2"]
    model[4].requires_grad_(True)
    buf.refresh()
    assert list(buf.combine(by="module", stale="use").parts) == ["0", "2", "4"]


def test_inside_a_compiled_function() -> None:
    model = mixed("one dtype")
    buf = filled(model)
    wanted = buf.combine(by=top).parts["2"].weights
    assert torch.equal(
        torch.compile(lambda: buf.combine(by=top, stale="use"), backend="eager")().parts["2"].weights, wanted
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "layer"}, ValueError, "by must be 'module'"),
        ({"by": lambda name: 3}, TypeError, "by must return a str"),
        ({"by": top, "method": fc.GradDrop()}, TypeError, "GradDrop.*treats every parameter by itself"),
        ({"by": top, "method": "graddrop"}, TypeError, "treats every parameter by itself"),
        ({"by": top, "method": fc.GradVac()}, ValueError, "remembers from step to step.*3 parts.*give its name"),
        ({"by": top, "method": {"0": None}}, ValueError, "lacks '2', '4'"),
        ({"by": top, "method": {"0": None, "2": None, "4": None, "6": None}}, ValueError, "method names '6'"),
        ({"method": {"0": None}}, TypeError, "say by="),
        ({"by": top, "method": fc.UPGrad(weights=[1.0, 2.0])}, ValueError, "2"),
        ({"by": top, "method": "config2"}, ValueError, "got 'config2'"),
        ({"by": top, "stale": "never"}, ValueError, "stale must be"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:
    buf = filled(mixed("one dtype"))
    before = buf.grad.clone()
    with pytest.raises(error, match=message):
        buf.combine(**options)
    assert torch.equal(buf.grad, before)


def test_a_buffer_without_names() -> None:
    model = nn.Linear(2, 2)
    buf = fc.GradientBuffer(model.parameters(), 2)
    buf.backward([p.sum() for p in model.parameters()])
    with pytest.raises(ValueError, match="needs the parameters' names"):
        buf.combine(by="module")


def test_parametrized_layers_go_by_their_names() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    buf = fc.GradientBuffer(model, 2)
    out = model(torch.randn(4, 3))
    buf.backward([out[:, 0].square().mean(), out[:, 1].square().mean()])
    assert list(buf.combine(by="module").parts) == ["", "parametrizations.weight"]
