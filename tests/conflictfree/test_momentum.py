"""Momentum operators: 200 steps beside conflictfree, a corrected transcription where it cannot run, bad input."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conflictfree import grad_operator as upstream_operators
from conflictfree import loss_recorder as upstream_recorders
from conflictfree import momentum_operator as upstream

from fastconfig.conflictfree.grad_operator import ConFIG_update, ConFIGOperator, GradientOperator, PCGradOperator
from fastconfig.conflictfree.loss_recorder import LatestLossRecorder, MomentumLossRecorder
from fastconfig.conflictfree.momentum_operator import (
    MomentumOperator,
    PseudoMomentumOperator,
    SeparateMomentumOperator,
)
from fastconfig.conflictfree.utils import OrderedSliceSelector, RandomSliceSelector
from fastconfig.conflictfree.weight_model import WeightModel

M, N = 3, 40

pytestmark = pytest.mark.usefixtures("one_thread")


def gradient_stream(steps, dtype=torch.float32):
    """(steps, M, N): noisy gradients around three conflicting means of different scale."""
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(M, N, generator=generator, dtype=torch.float64) * torch.tensor([[0.3], [1.0], [5.0]])
    noise = torch.randn(steps, M, N, generator=generator, dtype=torch.float64)
    return (means + 0.5 * means.norm(dim=1, keepdim=True) / N**0.5 * noise).to(dtype)


def selected_steps(selector, count, stream):
    """For each step the indexes drawn and the gradients with them, the way a training loop passes them."""
    for rows in stream:
        indexes, chosen = selector.select(count, list(rows))
        yield indexes, [chosen] if count == 1 else chosen


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("selector", [OrderedSliceSelector, RandomSliceSelector])
def test_pseudo_equals_upstream_over_200_steps(selector, count):
    np.random.seed(0)  # noqa: NPY002  (the selectors draw from it)
    ours, peer = PseudoMomentumOperator(M), upstream.PseudoMomentumOperator(M)
    for indexes, grads in selected_steps(selector(), count, gradient_stream(200)):
        expected = peer.calculate_gradient(indexes, grads)
        assert relative_error(ours.calculate_gradient(indexes, grads), expected) <= 1e-5
    assert ours.t == peer.t
    assert ours.t_grads == peer.t_grads
    for attribute in ("s", "fake_m"):
        assert relative_error(getattr(ours, attribute), getattr(peer, attribute)) <= 1e-4


def test_pseudo_takes_the_same_constants_and_operator_as_upstream():
    ours = PseudoMomentumOperator(M, 0.5, 0.9, PCGradOperator())
    peer = upstream.PseudoMomentumOperator(M, 0.5, 0.9, upstream_operators.PCGradOperator())
    for indexes, grads in selected_steps(OrderedSliceSelector(), 2, gradient_stream(50)):
        expected = peer.calculate_gradient(indexes, grads)
        assert relative_error(ours.calculate_gradient(indexes, grads), expected) <= 1e-5


class OwnPCGrad(PCGradOperator):
    """The same update, but of a class that might do anything."""


class UpstreamOwnPCGrad(upstream_operators.PCGradOperator):
    pass


def test_operators_take_over_from_each_other_in_the_middle():
    ours, peer = PseudoMomentumOperator(M), upstream.PseudoMomentumOperator(M)
    pairs = [
        (ConFIGOperator(), upstream_operators.ConFIGOperator()),
        (OwnPCGrad(), UpstreamOwnPCGrad()),
        (OwnPCGrad(), UpstreamOwnPCGrad()),
        (PCGradOperator(), upstream_operators.PCGradOperator()),
        (ConFIGOperator(), upstream_operators.ConFIGOperator()),
    ]
    for step, (indexes, grads) in enumerate(selected_steps(OrderedSliceSelector(), 2, gradient_stream(50))):
        ours.gradient_operator, peer.gradient_operator = pairs[step // 10]
        expected = peer.calculate_gradient(indexes, grads)
        assert relative_error(ours.calculate_gradient(indexes, grads), expected) <= 1e-5
        if step > 1:
            assert relative_error(ours.fake_m, peer.fake_m) <= 1e-5


def test_known_operators_are_not_called(monkeypatch):
    def calculate_gradient(self, grads, losses=None):
        raise AssertionError("the averages were combined outside the kernels")

    for operator in (ConFIGOperator, PCGradOperator):
        monkeypatch.setattr(operator, "calculate_gradient", calculate_gradient)
        made = PseudoMomentumOperator(M, gradient_operator=operator())
        made.calculate_gradient([0, 1, 2], gradient_stream(1)[0])
        assert made.t == 1


@pytest.mark.parametrize("operator", [ConFIGOperator, OwnPCGrad])
def test_pseudo_goes_on_from_what_another_had(operator):
    stream = list(selected_steps(OrderedSliceSelector(), 1, gradient_stream(40)))
    whole, first = (PseudoMomentumOperator(M, gradient_operator=operator()) for _ in range(2))
    for indexes, grads in stream[:20]:
        whole.calculate_gradient(indexes, grads)
        first.calculate_gradient(indexes, grads)
    second = PseudoMomentumOperator(M, gradient_operator=operator())
    for name in ("m", "s", "fake_m", "t", "t_grads"):
        setattr(second, name, getattr(first, name))
    copies = [second, pickle.loads(pickle.dumps(first)), copy.deepcopy(first)]
    for indexes, grads in stream[20:]:
        expected = whole.calculate_gradient(indexes, grads)
        for other in copies:
            assert relative_error(other.calculate_gradient(indexes, grads), expected) <= 1e-6


@pytest.mark.parametrize("operator", [ConFIGOperator, OwnPCGrad])
def test_separate_goes_on_from_what_another_had(operator):
    stream = list(selected_steps(OrderedSliceSelector(), 1, gradient_stream(40)))
    whole, first = (SeparateMomentumOperator(M, gradient_operator=operator()) for _ in range(2))
    for indexes, grads in stream[:20]:
        whole.calculate_gradient(indexes, grads)
        first.calculate_gradient(indexes, grads)
    second = SeparateMomentumOperator(M, gradient_operator=operator())
    for name in ("m", "s", "t_grads"):
        setattr(second, name, getattr(first, name))
    copies = [second, pickle.loads(pickle.dumps(first)), copy.deepcopy(first)]
    for indexes, grads in stream[20:]:
        expected = whole.calculate_gradient(indexes, grads)
        for other in copies:
            assert torch.equal(other.calculate_gradient(indexes, grads), expected)


def test_separate_hands_a_users_operator_rows_of_its_own():
    class Spoiling(GradientOperator):
        def calculate_gradient(self, grads, losses=None):
            combined = ConFIG_update(grads)
            grads.fill_(math.nan)
            return combined

    spoiled, plain = SeparateMomentumOperator(M, gradient_operator=Spoiling()), SeparateMomentumOperator(M)
    for indexes, grads in selected_steps(OrderedSliceSelector(), 1, gradient_stream(10)):
        assert torch.equal(spoiled.calculate_gradient(indexes, grads), plain.calculate_gradient(indexes, grads))


def test_pseudo_takes_a_loss_twice_in_one_call_as_upstream_does():
    ours, peer = PseudoMomentumOperator(M), upstream.PseudoMomentumOperator(M)
    for rows in gradient_stream(10):
        for indexes in ([0, 1, 2], [1, 1]):
            expected = peer.calculate_gradient(indexes, list(rows[: len(indexes)]))
            assert relative_error(ours.calculate_gradient(indexes, rows[: len(indexes)]), expected) <= 1e-5
    assert ours.t_grads == peer.t_grads == [10, 30, 10]


@pytest.mark.parametrize("operator", [ConFIGOperator, OwnPCGrad])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_pseudo_answers_nan_for_a_gradient_that_is_not_finite_and_forgets_it(operator, bad):
    ours, other = (PseudoMomentumOperator(M, gradient_operator=operator()) for _ in range(2))
    stream = gradient_stream(20)
    for step, rows in enumerate(stream):
        if step in (0, 7):
            broken = rows[1].clone()
            broken[3] = bad
            assert ours.calculate_gradient(1, broken).isnan().all()
        assert torch.equal(ours.calculate_gradient([0, 1, 2], rows), other.calculate_gradient([0, 1, 2], rows))
    assert ours.t_grads == other.t_grads


def test_pseudo_refuses_averages_that_do_not_fit():
    made = PseudoMomentumOperator(M)
    made.calculate_gradient([0, 1, 2], gradient_stream(1)[0])
    before = made.m
    with pytest.raises(ValueError, match="m must hold one entry for each index"):
        made.m = before[:2]
    with pytest.raises(ValueError, match=f"have {N + 1} elements, but had {N} before"):
        made.s = torch.ones(N + 1)
    with pytest.raises(ValueError, match="t_grads must hold one entry for each index"):
        made.t_grads = [1]
    assert all(torch.equal(average, old) for average, old in zip(made.m, before, strict=True))


def test_nothing_moves_until_every_loss_has_had_a_gradient():
    for operator in (PseudoMomentumOperator(M), SeparateMomentumOperator(M)):
        rows = gradient_stream(1)[0]
        assert torch.equal(operator.calculate_gradient(0, rows[0]), torch.zeros(N))
        assert torch.equal(operator.calculate_gradient([0, 1], rows[:2]), torch.zeros(N))
        assert not operator.all_initialized
        assert operator.calculate_gradient(2, rows[2]).norm() > 0
        assert operator.all_initialized


class CorrectedSeparate:
    """What conflictfree's SeparateMomentumOperator says, made to run: beta for betas, num_vectors for its len."""

    def __init__(self, beta_1, beta_2):
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.m = [torch.zeros(N) for _ in range(M)]
        self.s = [torch.zeros(N) for _ in range(M)]
        self.t = [0] * M

    def calculate_gradient(self, indexes, grads):
        for i, grad in zip(indexes, grads, strict=True):
            self.t[i] += 1
            self.m[i] = self.beta_1 * self.m[i] + (1 - self.beta_1) * grad
            self.s[i] = self.beta_2 * self.s[i] + (1 - self.beta_2) * grad**2
        if 0 in self.t:
            return torch.zeros(N)
        first = torch.stack([self.m[i] / (1 - self.beta_1 ** self.t[i]) for i in range(M)])
        second = torch.stack([self.s[i] / (1 - self.beta_2 ** self.t[i]) for i in range(M)])
        # By pinv: the rows start as signs, and lstsq fails on dependent leading columns (see test_upstream_defects).
        peer = upstream_operators.ConFIGOperator(use_least_square=False)
        return peer.calculate_gradient(first / (second.sqrt() + 1e-8))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("selector", [OrderedSliceSelector, RandomSliceSelector])
def test_separate_equals_the_corrected_transcription(selector, count):
    np.random.seed(1)  # noqa: NPY002  (the selectors draw from it)
    ours, expected = SeparateMomentumOperator(M, 0.8, 0.99), CorrectedSeparate(0.8, 0.99)
    for indexes, grads in selected_steps(selector(), count, gradient_stream(200)):
        wanted = expected.calculate_gradient(indexes, grads)
        assert relative_error(ours.calculate_gradient(indexes, grads), wanted) <= 1e-5


class LossWeights(WeightModel):
    def get_weights(self, gradients=None, losses=None, device=None):
        return torch.tensor([float(loss) for loss in losses])


def test_recorded_losses_reach_the_models_as_upstreams_do():
    ours = PseudoMomentumOperator(
        M, gradient_operator=ConFIGOperator(LossWeights()), loss_recorder=LatestLossRecorder(M)
    )
    peer = upstream.PseudoMomentumOperator(
        M,
        gradient_operator=upstream_operators.ConFIGOperator(LossWeights()),
        loss_recorder=upstream_recorders.LatestLossRecorder(M),
    )
    for step, (indexes, grads) in enumerate(selected_steps(OrderedSliceSelector(), 2, gradient_stream(30))):
        losses = [1.0 + (step * i) % 5 for i in indexes]
        expected = peer.calculate_gradient(indexes, grads, losses)
        assert relative_error(ours.calculate_gradient(indexes, grads, losses), expected) <= 1e-5


@pytest.mark.parametrize("operator", [PseudoMomentumOperator, SeparateMomentumOperator])
def test_losses_of_every_kind(operator):
    class FirstLoss(GradientOperator):
        def calculate_gradient(self, grads, losses=None):
            return grads[0] * 0 + float(losses[0])

    rows = gradient_stream(1)[0]
    made = operator(M, gradient_operator=FirstLoss(), loss_recorder=MomentumLossRecorder(M))
    made.calculate_gradient([0, 1, 2], rows, torch.tensor([4.0, 5.0, 6.0]))
    made.calculate_gradient(1, rows[1], torch.tensor(5.0))
    made.calculate_gradient(2, rows[2], 6.0)
    made.calculate_gradient([0], [rows[0]], [torch.tensor(4.0, requires_grad=True)])
    assert made.loss_recorder.current_losses == pytest.approx([4.0, 5.0, 6.0])
    assert not made.loss_recorder.current_losses[0].requires_grad


@pytest.mark.parametrize("operator", [PseudoMomentumOperator, SeparateMomentumOperator])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(operator, dtype):
    exact, other = operator(M), operator(M)
    for rows in gradient_stream(30, dtype):
        expected = exact.calculate_gradient([0, 1, 2], rows.double())
        update = other.calculate_gradient([0, 1, 2], rows)
        assert update.dtype == dtype
        assert relative_error(update.double(), expected) <= max(1e-12, 4 * torch.finfo(dtype).eps)
    assert other.m[0].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("operator", [PseudoMomentumOperator, SeparateMomentumOperator])
def test_neither_gradients_nor_results_are_aliased(operator):
    made, rows = operator(1), gradient_stream(2)[:, 0].clone()
    kept = rows.clone()
    first = made.calculate_gradient(0, rows[0])
    copy = first.clone()
    made.calculate_gradient(0, rows[1].requires_grad_())
    assert torch.equal(rows.detach(), kept)
    assert torch.equal(first, copy)
    assert not first.requires_grad


def test_a_network_is_updated():
    torch.manual_seed(0)
    network, inputs = torch.nn.Linear(3, 2), torch.randn(4, 3)
    operator = PseudoMomentumOperator(2)
    for index in (0, 1):
        network.zero_grad()
        network(inputs)[:, index].square().mean().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        operator.update_gradient(network, index, gradient)
    update = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    # After one update the second moment is that of the update itself: what remains is its sign.
    torch.testing.assert_close(update, torch.ones(8).copysign(update))


def test_operators_do_not_share_the_default_operator():
    first, second = PseudoMomentumOperator(2), PseudoMomentumOperator(2)
    assert type(first.gradient_operator) is ConFIGOperator
    assert first.gradient_operator is not second.gradient_operator
    assert first.gradient_operator is not MomentumOperator(2).gradient_operator


def test_the_operator_combines_a_stack_of_unbiased_averages():
    class Recording(GradientOperator):
        def calculate_gradient(self, grads, losses=None):
            self.grads = grads
            return ConFIG_update(grads)

    operator = PseudoMomentumOperator(M, gradient_operator=Recording())
    rows = gradient_stream(1)[0]
    operator.calculate_gradient([2, 0, 1], rows)
    torch.testing.assert_close(operator.gradient_operator.grads, rows[[1, 2, 0]])


@pytest.mark.parametrize("operator", [PseudoMomentumOperator, SeparateMomentumOperator])
@pytest.mark.parametrize(
    ("indexes", "grads", "losses", "error", "message"),
    [
        (3, torch.ones(N), None, IndexError, "indexes must lie in 0 to 2, got 3"),
        ("0", torch.ones(N), None, TypeError, "indexes must be an int"),
        ([0, 1], torch.ones(N), None, ValueError, "grads must hold one entry for each index"),
        ([0, 1], [torch.ones(N)], None, ValueError, "grads must hold one entry for each index"),
        (0, torch.ones(N + 1), None, ValueError, f"have {N + 1} elements, but had {N} before"),
        (0, torch.ones(N, device="meta"), None, ValueError, "are on meta, but were on cpu before"),
        (0, torch.ones(N, dtype=torch.int64), None, TypeError, "int64"),
        (0, torch.ones(N, dtype=torch.complex64), None, TypeError, "grads must be real"),
        (0, torch.ones(N), 1.0, ValueError, "no loss_recorder"),
    ],
)
def test_bad_input_changes_nothing(operator, indexes, grads, losses, error, message):
    made = operator(M)
    made.calculate_gradient([0, 1], torch.ones(2, N))
    before = [average.clone() for average in made.m]
    with pytest.raises(error, match=message):
        made.calculate_gradient(indexes, grads, losses)
    assert made.t_grads == [1, 1, 0]
    assert all(torch.equal(average, old) for average, old in zip(made.m, before, strict=True))


def test_a_wrong_number_of_losses_is_not_recorded():
    made = PseudoMomentumOperator(M, loss_recorder=LatestLossRecorder(M))
    with pytest.raises(ValueError, match="losses must hold one entry"):
        made.calculate_gradient([0, 1], torch.ones(2, N), [1.0])
    assert made.loss_recorder.current_losses == [0.0, 0.0, 0.0]
    assert made.m is None


def test_bad_construction():
    with pytest.raises(ValueError, match="num_vectors must be at least 1"):
        PseudoMomentumOperator(0)
    with pytest.raises(TypeError, match="num_vectors must be an int"):
        SeparateMomentumOperator([0, 1])
    with pytest.raises(ValueError, match=r"beta_1 must lie in \[0, 1\), got 1.0"):
        PseudoMomentumOperator(2, beta_1=1.0)
    with pytest.raises(ValueError, match=r"beta_2 must lie in \[0, 1\)"):
        SeparateMomentumOperator(2, beta_2=-0.1)
    with pytest.raises(NotImplementedError, match="calculate_gradient"):
        MomentumOperator(2).update_gradient(torch.nn.Linear(1, 1), 0, torch.ones(2))
