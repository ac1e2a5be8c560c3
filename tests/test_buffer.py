"""GradientBuffer: autograd's own gradients in shared memory, and training as by hand. What it refuses: validation."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from oracle import as_numpy, assert_matches, config
from torch import nn

import fastconfig as fc
from fastconfig.gradients.memory import ROW_BYTES

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread", "way_of_landing")


class TwoHeads(nn.Module):
    """A shared body and two heads; head b is reached by the last loss only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 1)

    def forward(self, x):
        shared = self.body(x).tanh()
        return self.a(shared), self.b(shared)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x).tanh())


class Shapes(nn.Module):
    """Parameters of no dimension, of no element, complex, and looked up sparsely."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, 3))
        self.table = nn.Embedding(6, 4, sparse=True)

    def forward(self, x):
        rows = self.table(x[:, 0].abs().long() % 6)
        return (rows * self.scale + self.empty.sum()).tanh()


def conv() -> nn.Module:
    model = nn.Sequential(nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    return model.to(memory_format=torch.channels_last)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 4),
    "tied weights": (Tied, 4),
    "channels_last": (conv, 32),
    "odd shapes": (Shapes, 4),
    "transposed weight": (lambda: nn.Sequential(transposed(nn.Linear(4, 3)), nn.Tanh()), 4),
    "float64": (lambda: nn.Linear(4, 3).double(), 4),
    "bfloat16": (lambda: nn.Linear(4, 3).bfloat16(), 4),
}


def transposed(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    return layer


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    return model, 3 * torch.randn(5, inputs, dtype=next(model.parameters()).dtype)


def losses_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = model(x)
    return [y.square().mean(), (y - 1.0).abs().sum(), (y.flatten()[1:] * y.flatten()[:-1]).mean()]


def autograd_gradients(model: nn.Module, x: torch.Tensor) -> list[list[torch.Tensor | None]]:
    """For each loss, what a plain backward pass leaves in every ``.grad``."""
    gradients = []
    for i in range(3):
        plain = copy.deepcopy(model)
        losses_of(plain, x)[i].backward()
        gradients.append([p.grad.to_dense() if p.grad is not None else None for p in plain.parameters()])
    return gradients


def addresses(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())


# The rows


@pytest.mark.parametrize("way", ["tensors", "callables", "mixed", "record"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_autograds_gradients_bit_for_bit(name, way):
    model, x = build(name)
    expected = autograd_gradients(model, x)
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    for _ in range(2):  # the second round reuses the rows
        plain = copy.deepcopy(model).state_dict()
        if way == "record":
            for i in (2, 0, 1):
                with buf.record(i, accumulate=False):
                    losses_of(model, x)[i].backward()
        else:
            tensors, callables = losses_of(model, x), [lambda i=i: losses_of(model, x)[i] for i in range(3)]
            given = {"tensors": tensors, "callables": callables, "mixed": [tensors[0], callables[1], tensors[2]]}
            buf.backward(given[way], accumulate=False)
        model.load_state_dict(plain)  # batch norm counts its forward passes
        for i, gradients in enumerate(expected):
            views = buf.segments[0].views(buf.rows[i])
            for view, gradient, parameter in zip(views, gradients, model.parameters(), strict=True):
                assert view.shape == parameter.shape
                assert torch.equal(view, gradient)
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_shared_and_shaped_like_the_parameters(name, way_of_landing):
    model, x = build(name)
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    parameters = [parameter for parameter in model.parameters() if parameter.numel()]
    assert buf.rows.shape == (3, sum(parameter.numel() for parameter in parameters))
    assert buf.rows.stride(1) == 1
    assert buf.rows.stride(0) * buf.rows.element_size() % ROW_BYTES == 0
    for i in range(3):
        with buf.record(i):
            losses_of(model, x)[i].backward()
            for parameter in (p for p in parameters if way_of_landing == "hooked" and not p.grad.is_sparse):
                assert set(addresses(parameter.grad)) <= set(addresses(buf.rows[i]))
    buf.combine()
    seen: set[int] = set()
    for parameter in parameters:
        assert parameter.grad.stride() == parameter.stride()
        assert set(addresses(parameter.grad)) <= set(addresses(buf.grad))
        assert seen.isdisjoint(addresses(parameter.grad))
        seen |= set(addresses(parameter.grad))
    assert seen == set(addresses(buf.grad))
    buf.grad.fill_(3.0)
    assert all((parameter.grad == 3.0).all() for parameter in parameters)


def test_combination_is_that_of_the_rows():
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    for method in (None, fc.ConFIG([1.0, 2.0, 4.0], "harmonic")):
        buf.backward(losses_of(model, x))
        rows = buf.rows.clone()
        info = buf.combine(method)
        assert torch.equal(buf.grad, fc.combine(rows, method))
        assert torch.equal(info.gramian, fc.gramian(rows))
        torch.testing.assert_close((info.weights @ rows.double()).float(), buf.grad)
        torch.testing.assert_close(info.norms, rows.double().norm(dim=1))
        assert info.rank == 3
        assert torch.equal(buf.rows, rows)
        assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), buf.grad)


# The Gramian of parts


class Mixed(nn.Module):
    """Modules within modules, a parameter of the model's own, a tied one, a frozen one, and two dtypes in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.encode, self.norm = nn.Linear(4, 4), nn.LayerNorm(4).double()
        self.decode = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.encode.weight
        self.decode[0].bias.requires_grad_(False)

    def forward(self, x):
        y = self.norm(self.encode(x).tanh().double()).float()
        return self.tied(self.decode(y)) * self.scale


def owner(name: str) -> str:
    return name.rpartition(".")[0]


@pytest.mark.parametrize(
    ("by", "part_of"),
    [("module", owner), ("parameter", str), (lambda name: name.split(".")[0], lambda name: name.split(".")[0])],
    ids=["module", "parameter", "function"],
)
@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.named_parameters()], ids=["model", "pairs"])
def test_gramians_of_parts_are_those_of_their_parameters_and_add_up(given, by, part_of):
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(5, 4)
    buf = fc.GradientBuffer(given(model), num_losses=3)
    buf.backward(losses_of(model, x))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in named}
    for i in range(3):
        gradients = torch.autograd.grad(losses_of(model, x)[i], list(named.values()))
        for name, gradient in zip(named, gradients, strict=True):
            rows[name].append(gradient.flatten().double())
    expected: dict[str, torch.Tensor] = {}
    for name, row in rows.items():
        block = torch.stack(row)
        expected[part_of(name)] = expected.get(part_of(name), 0) + block @ block.T
    parts = buf.gramian(by=by)
    assert list(parts) == list(expected)
    for part, gramian in parts.items():
        torch.testing.assert_close(gramian, expected[part], rtol=1e-6, atol=1e-12)
        assert torch.equal(gramian, gramian.T)
    torch.testing.assert_close(sum(parts.values()), buf.gramian(), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(buf.gramian(), buf.combine().gramian, rtol=1e-14, atol=0.0)


def test_parts_are_read_in_one_pass_and_not_copied(monkeypatch):
    """Each column is read once and where it lies; a run of columns of one part by one call."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    buf = fc.GradientBuffer(model, num_losses=2)
    read, backend_for = [], fc.gradients.buffer.backend_for

    class Spy:
        def __init__(self, backend):
            self.backend = backend

        def gramian(self, rows):
            read.append(addresses(rows.matrix[0]))
            return self.backend.gramian(rows)

    monkeypatch.setattr(fc.gradients.buffer, "backend_for", lambda *arguments: Spy(backend_for(*arguments)))
    assert list(buf.gramian(by="module")) == ["0", "1"]
    assert len(read) == 2
    assert [*read[0], *read[1]] == list(addresses(buf.rows[0]))


def test_a_module_without_elements_has_a_gramian_of_zeros():
    model = nn.ModuleDict({"empty": nn.ParameterList([torch.zeros(0, 3)]), "full": nn.Linear(2, 2)})
    buf = fc.GradientBuffer(model, num_losses=2)
    with buf.record(0):
        model["full"](torch.ones(2)).sum().backward()
    parts = buf.gramian(by="module")
    assert torch.equal(parts["empty"], torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(parts["full"], buf.gramian())


def test_gramian_of_parts_refuses_what_it_cannot_tell():
    model, _ = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    assert not buf.gramian().any()
    with pytest.raises(ValueError, match=r"by='module'.*names.*GradientBuffer\(model, ...\)"):
        buf.gramian(by="module")
    named = fc.GradientBuffer(model, num_losses=3)
    with pytest.raises(ValueError, match=r"by must be 'module', 'parameter', a function.*got 'layer'"):
        named.gramian(by="layer")
    with pytest.raises(TypeError, match=r"by must return a str.*got 6 for parameter '0.bias'"):
        named.gramian(by=lambda name: name if name == "0.weight" else len(name))
    with named.record(0), pytest.raises(RuntimeError, match=r"gramian was called inside record\(0\)"):
        named.gramian()


def test_rows_never_recorded_and_zeroed_rows_constrain_nothing():
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    with buf.record(1):
        losses_of(model, x)[1].backward()
    info = buf.combine()
    torch.testing.assert_close(buf.grad, buf.rows[1])
    assert info.rank == 1
    assert info.weights[[0, 2]].tolist() == info.norms[[0, 2]].tolist() == [0.0, 0.0]
    buf.zero()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not buf.rows.any()


def test_combine_of_nothing_is_an_error():
    """Before any record, after zero, and where load_state_dict(assign=True) left the buffer with another model's."""
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    with pytest.raises(RuntimeError, match=r"nothing to combine.*new GradientBuffer"):
        buf.combine()
    buf.backward(losses_of(model, x))
    buf.combine()
    buf.zero()
    with pytest.raises(RuntimeError, match="nothing to combine"):
        buf.combine()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    buf.backward(losses_of(model, x))
    with pytest.raises(RuntimeError, match="nothing to combine"):
        buf.combine()


def test_repointing_grad_data_leaves_the_buffer_whole():
    """``p.grad.data = …`` is an old idiom for scaling gradients; the next step must not notice it."""
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    wanted = torch.cat([grad.flatten() for grad in autograd_gradients(model, x)[0]]) / 4
    with buf.record(0):
        losses_of(model, x)[0].backward()
        for parameter in model.parameters():
            parameter.grad.data = parameter.grad.data / 4
    torch.testing.assert_close(buf.rows[0], wanted)
    for _ in range(2):
        buf.backward(losses_of(model, x), accumulate=False)
        buf.combine()
        for parameter, view in zip(model.parameters(), buf.segments[0].views(buf.grad), strict=True):
            assert torch.equal(parameter.grad, view)
            assert parameter.grad.data_ptr() == view.data_ptr()
            parameter.grad.data = parameter.grad.data / 2
    torch.testing.assert_close(buf.rows[0], 4 * wanted)


def test_buffer_made_under_inference_mode_works():
    model, x = build("mlp")
    with torch.inference_mode():
        buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    buf.backward(losses_of(model, x))
    assert buf.combine().weights.all()


def test_uninitialised_parameters_are_refused():
    with pytest.raises(ValueError, match=r"parameters\[0\] is not initialised"):
        fc.GradientBuffer(nn.LazyLinear(2).parameters(), num_losses=2)


def test_combination_of_finite_and_dropped_gradients():
    gramian = torch.tensor([[4.0, 2.0, math.nan], [2.0, 9.0, math.nan], [math.nan] * 3], dtype=torch.float64)
    info = fc.Combination(gramian, torch.ones(3, dtype=torch.float64), 1e-12)
    assert info.rank == 2
    assert info.cosines.diagonal().tolist() == [1.0, 1.0, 0.0]
    assert info.cosines[0, 1] == 1 / 3


def test_micro_batches_add_up_inside_one_record():
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=1)
    plain = copy.deepcopy(model)
    with buf.record(0):
        for part in x.split(2):
            model(part).square().sum().backward()
    for part in x.split(2):
        plain(part).square().sum().backward()
    assert torch.equal(buf.rows[0], torch.cat([p.grad.flatten() for p in plain.parameters()]))


@pytest.mark.parametrize("backward_first", [False, True])
def test_zero_grad_inside_record_starts_the_row_anew(backward_first):
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=1)
    with buf.record(0):
        if backward_first:
            losses_of(model, x)[0].backward()
        model.zero_grad(set_to_none=True)
        model[0].bias.square().sum().backward()
    weight, bias, *rest = buf.segments[0].views(buf.rows[0])
    assert torch.equal(bias, 2 * model[0].bias)
    assert not weight.any()
    assert not any(view.any() for view in rest)
    buf.combine()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")  # what is tested
def test_backward_that_builds_a_graph_lands_in_the_row():
    model, x = build("mlp")
    expected = autograd_gradients(model, x)[0]
    buf = fc.GradientBuffer(model.parameters(), num_losses=2)
    with buf.record(0):
        losses_of(model, x)[0].backward(create_graph=True)
    assert torch.equal(buf.rows[0], torch.cat([gradient.flatten() for gradient in expected]))
    assert not buf.rows.requires_grad


def test_graph_is_retained_until_the_last_loss_and_longer_on_request():
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    losses = losses_of(model, x)
    buf.backward(losses, retain_graph=True)
    once = buf.rows.clone()
    buf.backward(losses, accumulate=False)
    assert torch.equal(buf.rows, once)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


def test_losses_of_one_element_may_have_dimensions():
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    buf.backward(losses_of(model, x))
    flat = buf.rows.clone()
    buf.backward(tuple(loss.reshape(1, 1) for loss in losses_of(model, x)), accumulate=False)
    assert torch.equal(buf.rows, flat)


# Which parameters


def test_parameters_no_loss_reaches_end_without_grad():
    model, x = TwoHeads(), torch.randn(5, 4)
    buf = fc.GradientBuffer(model.parameters(), num_losses=2)
    for b_takes_part in (False, True, False):
        model.b.weight.grad = torch.ones_like(model.b.weight)  # left over from elsewhere
        a, b = model(x)
        buf.backward([a.square().mean(), b.square().mean() if b_takes_part else a.abs().sum()])
        assert torch.equal(model.b.weight.grad, torch.ones_like(model.b.weight))
        buf.combine()
        assert (model.b.weight.grad is not None) == b_takes_part
        assert (model.b.bias.grad is not None) == b_takes_part
        assert model.a.weight.grad.any()


def test_task_heads_accumulate_as_usual():
    model, x = TwoHeads(), torch.randn(5, 4)
    plain = copy.deepcopy(model)
    buf = fc.GradientBuffer(model.body.parameters(), num_losses=2)
    for step in range(3):
        a, b = model(x)
        losses = [a.square().mean(), b.abs().mean()]
        if step == 1:  # said once, in the second step
            with pytest.warns(UserWarning, match=r"4 parameters outside the GradientBuffer.*zero_grad"):
                buf.backward(losses)
        else:
            buf.backward(losses)
        buf.combine()
        a, b = plain(x)
        (a.square().mean() + b.abs().mean()).backward()
    for head, expected in ((model.a, plain.a), (model.b, plain.b)):
        for ours, theirs in zip(head.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("given", ["tensors", "callables"])
def test_heads_whose_gradients_are_reset_are_no_concern(to_none, given):
    model, x = TwoHeads(), torch.randn(5, 4)
    buf = fc.GradientBuffer(model.body, num_losses=2)
    for _ in range(3):
        model.zero_grad(set_to_none=to_none)
        losses = [lambda: model(x)[0].square().mean(), lambda: model(x)[1].abs().mean()]
        buf.backward(losses if given == "callables" else [loss() for loss in losses])
        buf.combine()


@pytest.mark.parametrize("resets", [True, False])
def test_heads_that_gather_are_noticed_where_losses_are_recorded(resets, recwarn):
    """The optimizer's step tells of them."""
    model, x = TwoHeads(), torch.randn(5, 4)
    buf = fc.GradientBuffer(model.body, num_losses=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        if resets:
            optimizer.zero_grad()
        for i in range(2):
            with buf.record(i):
                model(x)[i].square().mean().backward()
        buf.combine()
        optimizer.step()
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (0 if resets else 1)
    assert resets or "4 parameters outside the GradientBuffer" in told[0]


def test_parameters_of_another_buffer_are_no_concern():
    """Two buffers, of trunk and heads, under one optimizer and without zero_grad, which buffers do not need."""
    model, x = TwoHeads(), torch.randn(5, 4)
    trunk, heads = (
        fc.GradientBuffer(model.body, 2),
        fc.GradientBuffer([*model.a.parameters(), *model.b.parameters()], 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for buf in (trunk, heads):
            a, b = model(x)
            buf.backward([a.square().mean(), b.abs().mean()])
            buf.combine()
        trunk.combine()  # what the other's backward passes left in the trunk is replaced
        optimizer.step()


def test_heads_that_gather_are_noticed_where_losses_are_callables_too():
    model, x = TwoHeads(), torch.randn(5, 4)
    buf = fc.GradientBuffer(model.body, num_losses=2)
    losses = [lambda: model(x)[0].square().mean(), lambda: model(x)[1].abs().mean()]
    buf.backward(losses)
    buf.combine()
    with pytest.warns(UserWarning, match="outside the GradientBuffer"):
        buf.backward(losses)


def test_a_reached_parameter_of_zero_gradient_keeps_a_grad():
    weight = nn.Parameter(torch.ones(3))
    buf = fc.GradientBuffer([weight], num_losses=1)
    buf.backward([(weight * 0.0).sum()])
    buf.combine()
    assert torch.equal(weight.grad, torch.zeros(3))


def test_clipping_one_losss_gradient_leaves_unreached_parameters_without_grad():
    model, x = TwoHeads(), torch.randn(5, 4)
    buf = fc.GradientBuffer(model.parameters(), num_losses=1)
    with buf.record(0):
        model(x)[0].square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(buf.rows[0].norm(), torch.tensor(1e-3), rtol=1e-3, atol=0.0)
    buf.combine()
    assert model.b.weight.grad is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_layers(when):
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3) if when == "after" else None
    model[0].requires_grad_(False)
    buf = buf or fc.GradientBuffer(model.parameters(), num_losses=3)
    buf.backward(losses_of(model, x))
    buf.combine()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.any()
    assert buf.rows.shape[1] == (21 if when == "before" else 51)


def test_a_parameter_given_twice_counts_once():
    model, x = build("tied weights")
    buf = fc.GradientBuffer([*model.encode.parameters(), *model.decode.parameters()], num_losses=3)
    assert buf.rows.shape == (3, 24)
    buf.backward(losses_of(model, x))
    expected = autograd_gradients(model, x)
    assert torch.equal(buf.rows[1], torch.cat([gradient.flatten() for gradient in expected[1]]))


def mixed_parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.float32)
    return [nn.Parameter(torch.randn(3, 2).to(dtype)) for dtype in dtypes]


def mixed_losses(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    values = [torch.view_as_real(p) if p.is_complex() else p for p in parameters]
    return [
        sum(value.double().square().sum() for value in values),
        sum((k + 1.0) * value.double().sin().sum() for k, value in enumerate(values)),
        values[0].sum() + values[3].sum(),
    ]


def test_several_dtypes_are_several_segments_of_one_problem():
    parameters = mixed_parameters()
    buf = fc.GradientBuffer(parameters, num_losses=3)
    assert [seg.dtype for seg in buf.segments] == [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    assert [tuple(seg.rows.shape) for seg in buf.segments] == [(3, 12), (3, 6), (3, 6), (3, 12)]
    buf.backward(mixed_losses(parameters))
    rows = [segment.rows.clone() for segment in buf.segments]
    info = buf.combine()
    torch.testing.assert_close(info.gramian, sum(fc.gramian(block) for block in rows))
    answer, start = config(as_numpy(torch.cat([block.double() for block in rows], dim=1))), 0
    for segment in buf.segments:
        columns = slice(start, start + segment.grad.numel())
        part = dataclasses.replace(answer, value=answer.value[columns], terms=answer.terms[columns])
        assert_matches(segment.grad, part)
        start = columns.stop
    assert start == len(answer.value)
    for parameter in parameters:
        assert parameter.grad.dtype == parameter.dtype
    for name in ("rows", "grad"):
        with pytest.raises(ValueError, match=rf"4 segments.*buffer.segments\[i\].{name}"):
            getattr(buf, name)
    assert "bfloat16" in repr(buf)


def test_complex_parameters_hold_what_autograd_gives_them():
    weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    expected = torch.autograd.grad((weight * (2 + 1j)).abs().square().sum(), weight)[0]
    buf = fc.GradientBuffer([weight], num_losses=1)
    buf.backward([(weight * (2 + 1j)).abs().square().sum()])
    buf.combine()
    torch.testing.assert_close(weight.grad, expected)
    assert weight.grad.data_ptr() == buf.grad.data_ptr()


# Training


def train_with_buffer(model, x, optimizer, steps, clip, zero_grad):
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    for _ in range(steps):
        buf.backward(losses_of(model, x))
        buf.combine()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        if zero_grad is not None:
            optimizer.zero_grad(set_to_none=zero_grad)


def train_by_hand(model, x, optimizer, steps, clip, zero_grad):
    parameters = list(model.parameters())
    for _ in range(steps):
        rows = []
        for loss in losses_of(model, x):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        combined = fc.combine(torch.stack(rows)).split([parameter.numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, combined, strict=True):
            parameter.grad = gradient.view_as(parameter).clone()
        if clip:
            nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("zero_grad", [None, True, False], ids=["no zero_grad", "to none", "to zero"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD], ids=["Adam", "SGD"])
def test_training_equals_training_by_hand(optimizer, zero_grad, clip):
    runs = []
    for train in (train_with_buffer, train_by_hand):
        model, x = build("mlp")
        train(model, x, optimizer(model.parameters(), lr=0.05), 12, clip, zero_grad)
        runs.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    start = nn.utils.parameters_to_vector(build("mlp")[0].parameters())
    assert (runs[1] - start).norm() > 0.01
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


def test_one_step_equals_a_step_by_hand_bit_for_bit():
    runs = []
    for train in (train_with_buffer, train_by_hand):
        model, x = build("mlp")
        train(model, x, torch.optim.SGD(model.parameters(), lr=0.1), 1, clip=True, zero_grad=None)
        runs.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*runs)


def test_trained_model_is_copied_and_pickled_without_the_buffer():
    model, x = build("mlp")
    buf = fc.GradientBuffer(model.parameters(), num_losses=3)
    buf.backward(losses_of(model, x))
    buf.combine()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
        assert all(p.grad is None or p.grad.data_ptr() not in addresses(buf.grad) for p in twin.parameters())


@pytest.mark.parametrize("given", ["module", "parameters", "pairs"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_made_with_its_model_is_over_the_copied_parameters(given, way):
    model, x = build("mlp")
    model[0].bias.requires_grad_(False)
    parameters = {"module": model, "parameters": model.parameters(), "pairs": model.named_parameters()}[given]
    buf = fc.GradientBuffer(parameters, num_losses=["a", "b", "c"])
    buf.backward(losses_of(model, x))
    info = buf.combine("gradvac")
    pair = (model, buf)
    twin, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.names == ("a", "b", "c")
    assert torch.equal(copied.rows, buf.rows)
    assert torch.equal(copied.combination.gramian, info.gramian)
    assert set(addresses(copied.rows)).isdisjoint(addresses(buf.rows))
    for _ in range(2):  # the copy goes on as the original does, the method's state included
        for network, buffer in ((model, buf), (twin, copied)):
            network.zero_grad()
            buffer.backward(losses_of(network, x))
            torch.manual_seed(1)  # GradVac draws an order
            buffer.combine("gradvac")
        grads = [[p.grad for p in network.parameters()] for network in (model, twin)]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert not torch.equal(twin[0].weight, model[0].weight)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_model_that_holds_its_buffer_is_copied_with_it(way):
    model, x = build("mlp")
    model.buf = fc.GradientBuffer(model, 3)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    for network in (model, twin):
        network.buf.backward(losses_of(network, x))
        network.buf.combine()
    assert torch.equal(twin.buf.grad, model.buf.grad)
    assert twin[0].weight.grad.data_ptr() == twin.buf.grad.data_ptr()
    twin[2] = nn.Linear(6, 3)
    twin.buf.backward(losses_of(twin, x))
    with pytest.raises(RuntimeError, match=r"'2.weight'.*was replaced"):
        twin.buf.combine()


def test_sparse_gradients_land_like_dense_ones():
    words = torch.tensor([0, 2, 2])
    rows = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=sparse)
        buf = fc.GradientBuffer(table.parameters(), num_losses=2)
        for i in range(2):
            with buf.record(i):
                ((i + 1) * table(words).square().sum()).backward()
                ((i + 1) * table(words[:1]).sum()).backward()  # accumulates
        rows.append(buf.rows.clone())
    assert rows[0].any()
    assert torch.equal(rows[0], rows[1])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")  # what is tested
def test_a_graph_of_the_gradient_is_not_kept_by_the_row():
    weight = nn.Parameter(torch.ones(3))
    buf = fc.GradientBuffer([weight], num_losses=1)
    with buf.record(0):
        weight.pow(3).sum().backward(create_graph=True)
    assert not buf.rows.requires_grad
    assert torch.equal(buf.rows[0], torch.full((3,), 3.0))


def test_backward_passes_after_recording_go_to_their_own_grad():
    weight = nn.Parameter(torch.ones(3))
    buf = fc.GradientBuffer([weight], num_losses=1)
    with buf.record(0):
        weight.sum().backward()
    (2 * weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert torch.equal(buf.rows[0], torch.ones(3))


def test_what_a_row_held_before_is_gone_where_a_loss_no_longer_reaches():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    buf = fc.GradientBuffer(weights, num_losses=1)
    with buf.record(0):
        sum(weights).sum().backward()
    with buf.record(0, accumulate=False):
        weights[1].sum().backward()
    assert buf.rows.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_two_buffers_do_not_record_the_same_parameter_at_once():
    shared, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    outer, inner = fc.GradientBuffer([shared], 1), fc.GradientBuffer([shared, other], 1)
    apart = fc.GradientBuffer([other], 1)
    with outer.record(0):
        (3 * shared).sum().backward()
        with pytest.raises(RuntimeError, match="backward was called while another buffer or optimizer over some"):
            inner.backward([(100 * shared).sum()])
        with apart.record(0):
            other.sum().backward()
    assert outer.rows.tolist() == [[3.0, 3.0]]
    assert apart.rows.tolist() == [[1.0, 1.0]]
    inner.backward([(100 * shared).sum()])
    assert inner.rows.tolist() == [[100.0, 100.0, 0.0, 0.0]]
