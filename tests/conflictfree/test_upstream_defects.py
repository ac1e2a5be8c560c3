"""Each defect of conflictfree 0.1.8 that is not reproduced: where it can be shown, the test first shows it."""

import numpy as np
import pytest
import torch
from conflictfree import grad_operator as upstream
from conflictfree import length_model as upstream_lengths
from conflictfree import loss_recorder as upstream_recorders
from conflictfree import momentum_operator as upstream_momentum
from conflictfree import utils as upstream_utils

from fastconfig.conflictfree import grad_operator as ours
from fastconfig.conflictfree import utils
from fastconfig.conflictfree.loss_recorder import LatestLossRecorder, MomentumLossRecorder
from fastconfig.conflictfree.momentum_operator import PseudoMomentumOperator, SeparateMomentumOperator

TRACKS = ["TrackMinimum", "TrackMaximum", "TrackHarmonicAverage", "TrackArithmeticAverage", "TrackGeometricAverage"]


def collected(network, losses, mode, package=utils):
    grads = []
    for loss in losses:
        network.zero_grad(set_to_none=True)
        loss().backward()
        grads.append(package.get_gradient_vector(network, mode))
    return grads


def test_update_gradient_shifted_slices_where_a_grad_is_none(two_heads):
    network, losses = two_heads
    vectors = collected(network, losses, "zero")
    update = ours.ConFIG_update(vectors)
    assert network["first"].weight.grad is None  # the last loss did not reach it
    upstream.ConFIGOperator().update_gradient(network, vectors)
    assert not torch.allclose(network["second"].bias.grad, update[-5:], rtol=1e-4)

    collected(network, losses, "zero")
    ours.ConFIGOperator().update_gradient(network, vectors)
    assert torch.equal(utils.get_gradient_vector(network, "raise"), update)
    assert torch.equal(network["second"].bias.grad, update[-5:])


def test_apply_gradient_vector_shifted_slices_where_a_grad_is_none(two_heads):
    network, losses = two_heads
    collected(network, losses, "zero")
    vector = torch.arange(float(len(utils.get_para_vector(network))))
    upstream_utils.apply_gradient_vector(network, vector)
    assert network["second"].bias.grad[-1] != vector[-1]
    collected(network, losses, "zero")
    utils.apply_gradient_vector(network, vector)
    assert torch.equal(utils.get_gradient_vector(network, "raise"), vector)
    collected(network, losses, "zero")
    utils.apply_gradient_vector(network, vector, zero_grad_mode="skip")
    assert network["first"].weight.grad is None
    assert torch.equal(network["second"].bias.grad, vector[-5:])


def test_apply_gradient_vector_did_nothing_after_zero_grad():
    network, vector = torch.nn.Linear(2, 1), torch.arange(3.0)
    upstream_utils.apply_gradient_vector(network, vector)
    assert network.weight.grad is None
    utils.apply_gradient_vector(network, vector)
    assert torch.equal(utils.get_gradient_vector(network, "raise"), vector)


def test_momentum_shifted_slices_where_a_grad_is_none(two_heads):
    network, losses = two_heads
    operator = PseudoMomentumOperator(2)
    vectors = collected(network, losses, "zero")
    operator.calculate_gradient(0, vectors[0])
    operator.update_gradient(network, 1, vectors[1])
    update = utils.get_gradient_vector(network, "raise")
    torch.testing.assert_close(update, torch.ones_like(update).copysign(update), rtol=1e-3, atol=0)


def test_two_losses_of_which_one_gradient_is_zero():
    grad, zero = torch.tensor([3.0, 4.0, 0.0]), torch.zeros(3)
    assert upstream.ConFIGOperator().calculate_gradient([grad, zero]).isnan().any()
    torch.testing.assert_close(ours.ConFIGOperator().calculate_gradient([grad, zero]), grad)
    torch.testing.assert_close(ours.ConFIG_update_double(zero, grad), grad)
    assert torch.equal(ours.ConFIG_update_double(zero, zero), zero)


def test_two_losses_with_equal_or_parallel_gradients():
    torch.manual_seed(0)
    grad = torch.randn(100)
    for factor in (1.0, 2.0):
        lost = upstream.ConFIG_update_double(grad, factor * grad)
        assert not torch.allclose(lost, (1 + factor) * grad, rtol=1e-3)
        kept = ours.ConFIG_update_double(grad, factor * grad)
        torch.testing.assert_close(kept, (1 + factor) * grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5, 1e-6])
def test_two_losses_with_nearly_parallel_gradients(distance):
    torch.manual_seed(0)
    first = torch.randn(100_000)
    second = first + distance * torch.randn(100_000)
    update = ours.ConFIG_update_double(first, second)
    torch.testing.assert_close(update.norm(), first.norm() + second.norm(), rtol=1e-4, atol=0)
    cosines = [utils.get_cos_similarity(update, grad).item() for grad in (first, second)]
    assert cosines[0] == pytest.approx(cosines[1], rel=1e-5)


def test_two_losses_with_opposed_gradients():
    torch.manual_seed(0)
    grad = torch.randn(100)
    assert torch.equal(ours.ConFIG_update_double(grad, -grad), torch.zeros(100))
    assert torch.equal(ours.ConFIG_update_double(grad, -3 * grad), torch.zeros(100))


@pytest.mark.parametrize("operator", [ours.ConFIGOperator(), ours.ConFIGOperator(use_least_square=False)])
def test_dependent_leading_columns(operator):
    # torch.linalg.lstsq leaves LAPACK's pivots uninitialised (pytorch issue 187411): where the first m columns are
    # dependent, as with a dead unit in the first layer, upstream's default returns conflicting directions most times.
    torch.manual_seed(0)
    grads = torch.randn(3, 1000)
    grads[:, 1] = 0.0
    wanted = upstream.ConFIG_update(grads, use_least_square=False)
    torch.testing.assert_close(operator.calculate_gradient(grads), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [3, 5])
def test_more_than_two_losses_in_float64_or_bfloat16(dtype, m):
    torch.manual_seed(0)
    grads = torch.randn(m, 60).to(dtype)
    with pytest.raises(RuntimeError, match=r"dtype|type|implemented"):
        upstream.ConFIGOperator().calculate_gradient(grads)
    update = ours.ConFIGOperator().calculate_gradient(grads)
    assert update.dtype == dtype
    exact = torch.linalg.pinv(grads.double() / grads.double().norm(dim=1, keepdim=True)) @ torch.ones(m).double()
    exact = exact / exact.norm()
    exact = exact * (grads.double() @ exact).sum()
    assert (update.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm() + 1e-12


def test_separate_momentum_could_not_be_made():
    with pytest.raises(TypeError, match="len"):
        upstream_momentum.SeparateMomentumOperator(2)
    operator = SeparateMomentumOperator(2)
    operator.calculate_gradient(0, torch.tensor([1.0, 0.0]))
    update = operator.calculate_gradient(1, torch.tensor([0.0, -2.0]))
    torch.testing.assert_close(update, torch.tensor([1.0, -1.0]))


def test_momentum_loss_recorder_could_not_record():
    with pytest.raises(TypeError, match="multiply"):
        upstream_recorders.MomentumLossRecorder(2).record_loss(0, 1.0)
    recorder = MomentumLossRecorder(2, betas=0.5)
    recorder.record_loss(0, 1.0)
    assert recorder.record_loss(0, 4.0) == pytest.approx([3.0, 0.0])


def test_latest_loss_recorder_rejected_tensors_without_dimension():
    with pytest.raises(IndexError, match="0-dim"):
        upstream_recorders.LatestLossRecorder(2).record_loss(0, torch.tensor(1.5))
    assert LatestLossRecorder(2).record_loss(0, torch.tensor(1.5)) == [1.5, 0.0]


def test_a_stacked_tensor_crashed_momentum():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with pytest.raises((IndexError, RuntimeError)):
        upstream_momentum.PseudoMomentumOperator(2).calculate_gradient([0, 1], rows)
    stacked = PseudoMomentumOperator(2).calculate_gradient([0, 1], rows)
    assert torch.equal(stacked, PseudoMomentumOperator(2).calculate_gradient([0, 1], list(rows)))
    assert torch.equal(stacked, torch.tensor([1.0, 1.0, 0.0]))


def test_random_selection_returned_an_array_that_momentum_could_not_take():
    grads = [torch.ones(3), torch.arange(3.0), -torch.ones(3)]
    assert isinstance(upstream_utils.RandomSliceSelector().select(2, grads)[0], np.ndarray)
    indexes, chosen = utils.RandomSliceSelector().select(2, grads)
    assert type(indexes) is list
    assert all(type(index) is int for index in indexes)
    operator = PseudoMomentumOperator(3)
    operator.calculate_gradient(indexes, chosen)
    assert [operator.t_grads[i] for i in indexes] == [1, 1]
    # An array that comes from elsewhere is taken, too.
    operator.calculate_gradient(np.array(indexes), chosen)
    assert [operator.t_grads[i] for i in indexes] == [2, 2]


def channels_last_network():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Conv2d(3, 2, 2)).to(
        memory_format=torch.channels_last
    )
    network(torch.randn(1, 2, 5, 5).to(memory_format=torch.channels_last)).square().sum().backward()
    assert not network[0].weight.grad.is_contiguous()
    return network


def test_channels_last_gradients_failed():
    network = channels_last_network()
    with pytest.raises(RuntimeError, match="view"):
        upstream_utils.get_gradient_vector(network)
    vector = utils.get_gradient_vector(network)
    assert torch.equal(vector[:24].view(3, 2, 2, 2), network[0].weight.grad)
    utils.apply_gradient_vector(network, 2 * vector)
    assert torch.equal(utils.get_gradient_vector(network), 2 * vector)
    assert network[0].weight.grad.stride() == network[0].weight.stride()


def test_channels_last_parameters_failed():
    network = channels_last_network()
    with pytest.raises(RuntimeError, match="view"):
        upstream_utils.get_para_vector(network)
    strides = network[0].weight.stride()
    vector = utils.get_para_vector(network)
    assert torch.equal(vector[:24].view(3, 2, 2, 2), network[0].weight)
    utils.apply_para_vector(network, 2 * vector)
    assert torch.equal(utils.get_para_vector(network), 2 * vector)
    assert network[0].weight.stride() == strides


@pytest.mark.parametrize("name", TRACKS)
def test_track_models_gave_nan_on_a_zero_row(name):
    torch.manual_seed(0)
    rows = torch.randn(2, 30)
    with_zero = torch.cat([rows, torch.zeros(1, 30)])
    peer, model = getattr(upstream_lengths, name)(), getattr(ours, name)()
    target = rows.sum(dim=0)
    assert peer.get_length(target_vector=target, gradients=with_zero).isnan()
    length = model.get_length(target_vector=target, gradients=with_zero)
    torch.testing.assert_close(length, peer.get_length(target_vector=target, gradients=rows))
    assert upstream.ConFIG_update(with_zero, length_model=peer).isnan().any()
    expected = upstream.ConFIG_update(rows, length_model=peer)
    torch.testing.assert_close(ours.ConFIG_update(with_zero, length_model=model), expected, rtol=1e-4, atol=1e-5)


def test_tracking_another_row_gave_nan_on_a_zero_row():
    rows = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert upstream.ConFIG_update(rows, length_model=upstream_lengths.TrackSpecific(0)).isnan().any()
    update = ours.ConFIG_update(rows, length_model=ours.TrackSpecific(0))
    expected = upstream.ConFIG_update(rows[[0, 2]], length_model=upstream_lengths.TrackSpecific(0))
    torch.testing.assert_close(update, expected)
    assert torch.equal(ours.ConFIG_update(rows, length_model=ours.TrackSpecific(1)), torch.zeros(2))


def test_the_geometric_mean_underflowed():
    torch.manual_seed(0)
    rows = 1e-3 * torch.nn.functional.normalize(torch.randn(40, 300))
    assert not upstream.ConFIG_update(rows, length_model=upstream_lengths.TrackGeometricAverage()).any()
    update = ours.ConFIG_update(rows, length_model=ours.TrackGeometricAverage())
    expected = upstream.ConFIG_update(rows, length_model=upstream_lengths.TrackArithmeticAverage())
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-8)
    alone = ours.TrackGeometricAverage().get_length(target_vector=rows[0], gradients=rows[:1].expand(40, 300))
    assert alone.item() == pytest.approx(40 * 1e-3, rel=1e-5)


def test_imtlg_of_one_loss():
    grad = torch.tensor([[1.0, -2.0, 3.0]])
    with pytest.raises(RuntimeError, match="non-empty"):
        upstream.IMTLGOperator().calculate_gradient(grad)
    torch.testing.assert_close(ours.IMTLGOperator().calculate_gradient(grad), grad[0])


def frozen_network():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    network[0].requires_grad_(False)
    network(torch.ones(2)).sum().backward()
    return network


def test_frozen_parameters_received_gradients():
    vector = torch.arange(9.0)
    network = frozen_network()
    upstream_utils.apply_gradient_vector(network, vector, none_grad_mode="zero")
    assert network[0].weight.grad is not None
    for apply in (
        lambda network: utils.apply_gradient_vector(network, vector, none_grad_mode="zero"),
        lambda network: utils.apply_gradient_vector(network, vector, "zero", "pad_zero"),
        lambda network: utils.apply_gradient_vector_para_based(network, vector),
        lambda network: ours.GradientOperator.update_gradient(Constant(vector), network, []),
    ):
        network = frozen_network()
        apply(network)
        assert network[0].weight.grad is None
        assert network[0].bias.grad is None
        assert network[1].weight.grad.tolist() == [[6.0, 7.0]]
        assert network[1].bias.grad.tolist() == [8.0]


class Constant(ours.GradientOperator):
    def __init__(self, update):
        super().__init__()
        self.update = update

    def calculate_gradient(self, grads, losses=None):
        return self.update


def test_all_momentum_operators_shared_one_operator():
    peers = [upstream_momentum.PseudoMomentumOperator(2) for _ in range(2)]
    assert peers[0].gradient_operator is peers[1].gradient_operator
    operators = [PseudoMomentumOperator(2), PseudoMomentumOperator(2), SeparateMomentumOperator(2)]
    operators[0].gradient_operator.length_model = ours.TrackMinimum()
    for operator in operators[1:]:
        assert type(operator.gradient_operator.length_model) is ours.ProjectionLength


def test_user_weight_models_without_device_failed():
    class Plain(ours.WeightModel):
        def get_weights(self, gradients=None, losses=None):
            return torch.ones(len(gradients))

    grads = torch.eye(3)
    with pytest.raises(TypeError, match="device"):
        upstream.ConFIG_update(grads, Plain())
    torch.testing.assert_close(ours.ConFIG_update(grads, Plain()), torch.ones(3))
