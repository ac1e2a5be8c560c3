"""fc.torchjd: methods as torchjd's weightings and aggregators, in its autogram engine and its autojac, step by step."""

from __future__ import annotations

import doctest
import math
import sys

import pytest
import torch
from torch import nn
from torchjd.aggregation import GramianWeightedAggregator, Weighting
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad

import fastconfig as fc

METHODS = {
    "config": fc.ConFIG,
    "weighted config": lambda: fc.ConFIG([1.0, 2.0, 0.5, 1.0], length="harmonic"),
    "mgda": fc.MGDA,
    "upgrad": fc.UPGrad,
    "gradvac": lambda: fc.GradVac(0.5, torch.Generator().manual_seed(0)),
    "crmogm": lambda: fc.CRMOGM(fc.NashMTL()),
}
STATEFUL = ("gradvac", "crmogm")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def losses_of(model: nn.Module, step: int) -> torch.Tensor:
    """(4,) one loss an output."""
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return (model(inputs) - torch.tensor([0.0, 1.0, -1.0, 2.0])).square().mean(dim=0)


def descended(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def steps_of_the_buffer(method: fc.Method, count: int = 4) -> list[torch.Tensor]:
    """The parameters after so many steps."""
    model = network()
    buf = fc.GradientBuffer(model.parameters(), num_losses=4)
    for step in range(count):
        buf.backward(list(losses_of(model, step)))
        buf.combine(method)
        descended(model)
    return [parameter.detach() for parameter in model.parameters()]


def assert_same(model: nn.Module, wanted: list[torch.Tensor]) -> None:
    for ours, theirs in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_weighting_in_the_autogram_engine(name):
    model, weighting = network(), fc.torchjd.weighting(METHODS[name]())
    assert isinstance(weighting, Weighting)
    engine = Engine(model, batch_dim=None)
    for step in range(4):
        losses = losses_of(model, step)
        weights = weighting(engine.compute_gramian(losses))
        assert (weights.shape, weights.dtype, weights.requires_grad) == ((4,), torch.float32, False)
        losses.backward(weights)
        descended(model)
    assert_same(model, steps_of_the_buffer(METHODS[name]()))


@pytest.mark.parametrize("optimised", [False, True], ids=["matrix", "Gramians"])
@pytest.mark.parametrize("name", METHODS)
def test_aggregator_in_autojac(name, optimised):
    model, aggregator = network(), fc.torchjd.aggregator(METHODS[name]())
    assert isinstance(aggregator, GramianWeightedAggregator)
    for step in range(4):
        backward(list(losses_of(model, step)))
        jacobian = torch.cat([parameter.jac.flatten(1) for parameter in model.parameters()], dim=1)
        weights = jac_to_grad(model.parameters(), aggregator, optimize_gramian_computation=optimised)
        combined = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        torch.testing.assert_close(combined, weights.float() @ jacobian)
        descended(model)
    assert_same(model, steps_of_the_buffer(METHODS[name]()))


def test_hooks_on_the_weightings_change_the_aggregation():
    for place in ("weighting", "gramian_weighting"):
        aggregator = fc.torchjd.aggregator(fc.Sum())
        getattr(aggregator, place).register_forward_hook(lambda module, inputs, weights: 2 * weights)
        torch.testing.assert_close(aggregator(torch.eye(3)), torch.full((3,), 2.0))
    aggregator.weighting.register_forward_hook(lambda module, inputs, weights: weights[:1])
    with pytest.raises(ValueError, match=r"must return one weight a loss, shape \(3,\), got \(1,\)"):
        aggregator(torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_aggregator_is_combine(dtype):
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    for name in ("config", "mgda", "upgrad"):
        found = fc.torchjd.aggregator(METHODS[name]())(rows.requires_grad_())
        assert torch.equal(found, fc.combine(rows, METHODS[name]()))
        assert not found.requires_grad


def test_a_row_without_weight_is_not_read():
    rows = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [0.0, 1.0]])
    aggregator = fc.torchjd.aggregator(fc.UPGrad(nonfinite="drop"))
    torch.testing.assert_close(aggregator(rows), fc.combine(rows[[0, 2]], fc.UPGrad()))


@pytest.mark.parametrize("make", [fc.torchjd.weighting, fc.torchjd.aggregator])
@pytest.mark.parametrize("name", METHODS)
def test_a_methods_state_is_part_of_the_modules(name, make):
    stats = [torch.randn(4, 9, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    if make is fc.torchjd.weighting:
        stats = [rows @ rows.T for rows in stats]
    whole, first, resumed = (make(METHODS[name]()) for _ in range(3))
    wanted = [whole(stat) for stat in stats]
    for stat in stats[:3]:
        first(stat)
    resumed.load_state_dict(first.state_dict())
    for stat, answer in zip(stats[3:], wanted[3:], strict=True):
        assert torch.equal(resumed(stat), answer)
    if name in STATEFUL:
        fresh = make(METHODS[name]())
        assert not all(torch.equal(fresh(stat), answer) for stat, answer in zip(stats[3:], wanted[3:], strict=True))


class Module(nn.Module):
    """A user's method with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def weights(self, gramian):
        return self.scale * torch.ones_like(gramian[0])


def test_a_users_module_is_a_method():
    weighting = fc.torchjd.weighting(Module())
    weights = weighting(torch.eye(3))
    assert torch.equal(weights, torch.full((3,), 2.0))
    assert not weights.requires_grad
    assert "method.scale" in weighting.state_dict()
    torch.testing.assert_close(fc.torchjd.aggregator(Module())(torch.eye(3)), torch.full((3,), 2.0))


def test_bad_methods_are_refused():
    for make in (fc.torchjd.weighting, fc.torchjd.aggregator):
        with pytest.raises(TypeError, match=r"method must have weights\(gramian\) -> \(m,\), got <class"):
            make(fc.MGDA)
        with pytest.raises(ValueError, match="weights has 2 entries for 3 losses"):
            make(fc.UPGrad([1.0, 2.0]))(torch.eye(3))

    class Short:
        def weights(self, gramian):
            return gramian[0, :1]

    with pytest.raises(ValueError, match=r"Short.weights must return one weight a loss, shape \(3,\)"):
        fc.torchjd.weighting(Short())(torch.eye(3))


def test_reprs_name_the_method():
    assert repr(fc.torchjd.weighting()).startswith("weighting(ConFIG(")
    assert repr(fc.torchjd.aggregator(fc.MGDA())) == "aggregator(MGDA())"


def test_without_torchjd_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    fc.torchjd._classes.cache_clear()
    try:
        for make in (fc.torchjd.weighting, fc.torchjd.aggregator):
            with pytest.raises(ImportError, match=r"needs torchjd: pip install torchjd$"):
                make(fc.MGDA())
    finally:
        fc.torchjd._classes.cache_clear()


def test_examples_of_the_documentation():
    examples = doctest.DocTestFinder().find(fc.torchjd)
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) >= 4
    assert not sum(result.failed for result in results)
