"""Every usage pattern of conflictfree's README and docstrings, made to run: the losses fall, and stay conflict-free.

Upstream's texts have slips (torch.Adam, num_vector, a list passed to ConFIG_update_double); they are put right here.
"""

import doctest

import pytest
import torch

import fastconfig.conflictfree as drop_in
from fastconfig.conflictfree import grad_operator, momentum_operator
from fastconfig.conflictfree.grad_operator import (
    ConFIG_update,
    ConFIG_update_double,
    ConFIGOperator,
    IMTLGOperator,
    PCGradOperator,
)
from fastconfig.conflictfree.length_model import TrackMinimum
from fastconfig.conflictfree.loss_recorder import LatestLossRecorder
from fastconfig.conflictfree.momentum_operator import PseudoMomentumOperator, SeparateMomentumOperator
from fastconfig.conflictfree.utils import (
    OrderedSliceSelector,
    RandomSliceSelector,
    apply_gradient_vector,
    estimate_conflict,
    get_gradient_vector,
)
from fastconfig.conflictfree.weight_model import EqualWeight

STEPS = 60

pytestmark = pytest.mark.usefixtures("one_thread")


class Training:
    """A small network and losses that pull it towards different targets."""

    def __init__(self, num_losses):
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        self.dataset = [torch.randn(32, 2) for _ in range(STEPS)]
        self.loss_fns = [self._loss(i) for i in range(num_losses)]
        self.before = self.losses()

    def _loss(self, index):
        return lambda inputs: (self.network(inputs)[:, index % 3] - torch.sin(inputs[:, 0] + index)).square().mean()

    def losses(self):
        with torch.no_grad():
            return [loss_fn(torch.cat(self.dataset)).item() for loss_fn in self.loss_fns]

    def assert_learnt(self):
        for before, after in zip(self.before, self.losses(), strict=True):
            assert after < 0.6 * before


@pytest.mark.parametrize("num_losses", [2, 3])
def test_readme_without_and_with_config(num_losses):
    training = Training(num_losses)
    network = training.network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for input_i in training.dataset:
        grads = []
        for loss_fn in training.loss_fns:
            optimizer.zero_grad()
            loss_i = loss_fn(input_i)
            loss_i.backward()
            grads.append(get_gradient_vector(network))  # get loss-specific gradient
        g_config = ConFIG_update(grads)  # calculate the conflict-free direction
        apply_gradient_vector(network, g_config)  # set the conflict-free direction to the network
        assert torch.equal(get_gradient_vector(network), g_config)
        assert all(grad @ g_config > 0 for grad in grads)
        optimizer.step()
    training.assert_learnt()


def test_docstring_of_the_two_loss_update():
    training = Training(2)
    network = training.network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for input_i in training.dataset:
        grads = []
        for loss_fn in training.loss_fns:
            optimizer.zero_grad()
            loss_fn(input_i).backward()
            grads.append(get_gradient_vector(network))
        apply_gradient_vector(network, ConFIG_update_double(*grads))
        optimizer.step()
    training.assert_learnt()


@pytest.mark.parametrize(
    "operator",
    [
        ConFIGOperator(),
        ConFIGOperator(weight_model=EqualWeight(), length_model=TrackMinimum()),
        PCGradOperator(),
        IMTLGOperator(),
    ],
)
@pytest.mark.parametrize("in_one_call", [True, False])
def test_docstring_of_the_operators(operator, in_one_call):
    training = Training(3)
    network = training.network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for input_i in training.dataset:
        grads = []
        for loss_fn in training.loss_fns:
            optimizer.zero_grad()
            loss_i = loss_fn(input_i)
            loss_i.backward()
            grads.append(get_gradient_vector(network))
        if in_one_call:
            operator.update_gradient(network, grads)
        else:
            g_config = operator.calculate_gradient(grads)
            apply_gradient_vector(network, g_config)
        optimizer.step()
    training.assert_learnt()


@pytest.mark.parametrize("operator_type", [PseudoMomentumOperator, SeparateMomentumOperator])
@pytest.mark.parametrize("in_one_call", [True, False])
def test_docstring_of_the_momentum_operator(operator_type, in_one_call):
    training = Training(3)
    network, loss_fns = training.network, training.loss_fns
    optimizer = torch.optim.SGD(network.parameters(), lr=5e-3)
    operator = operator_type(num_vectors=len(loss_fns))
    for global_step, input_i in enumerate(4 * training.dataset):
        optimizer.zero_grad()
        index = global_step % len(loss_fns)
        loss = loss_fns[index](input_i)
        loss.backward()
        if in_one_call:
            operator.update_gradient(network, index, get_gradient_vector(network))
        else:
            g_config = operator.calculate_gradient(index, get_gradient_vector(network))
            apply_gradient_vector(network, g_config)
        optimizer.step()
    training.assert_learnt()


@pytest.mark.parametrize("selector_type", [OrderedSliceSelector, RandomSliceSelector])
def test_several_losses_a_step_by_a_selector_with_a_loss_recorder(selector_type):
    training = Training(3)
    network = training.network
    optimizer = torch.optim.SGD(network.parameters(), lr=5e-3)
    recorder = LatestLossRecorder(3)
    operator = PseudoMomentumOperator(num_vectors=3, loss_recorder=recorder)
    selector = selector_type()
    for input_i in 3 * training.dataset:
        grads, losses = [], []
        indexes, loss_fns = selector.select(2, training.loss_fns)
        for loss_fn in loss_fns:
            optimizer.zero_grad()
            loss = loss_fn(input_i)
            loss.backward()
            losses.append(loss)
            grads.append(get_gradient_vector(network))
        operator.update_gradient(network, indexes, grads, losses)
        optimizer.step()
        assert all(recorder.current_losses[i] is loss for i, loss in zip(indexes, losses, strict=True))
    training.assert_learnt()


def test_measuring_the_conflict_before_and_after():
    grads = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    assert estimate_conflict(grads).min() < 0
    assert (grads @ ConFIG_update(grads)).min() > 0


@pytest.mark.parametrize("module", [drop_in, grad_operator, momentum_operator])
def test_our_own_examples(module):
    assert doctest.testmod(module).failed == 0


def test_our_own_examples_are_found():
    assert doctest.testmod(grad_operator).attempted >= 3
    assert doctest.testmod(momentum_operator).attempted >= 4
