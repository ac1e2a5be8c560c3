"""Vectors of gradients and parameters, slice selectors and the small helpers: parity, aliasing, bad input."""

import numpy as np
import pytest
import torch
from conflictfree import utils as upstream

from fastconfig.conflictfree import utils as ours


def trained_network(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    network(torch.randn(5, 3)).square().sum().backward()
    return network


def reach_only_the_trunk(network):
    network.zero_grad(set_to_none=True)
    network[0](torch.ones(3)).sum().backward()


def grads(network):
    return [parameter.grad for parameter in network.parameters()]


def shares_memory(view, whole):
    start = whole.data_ptr()
    return start <= view.data_ptr() < start + whole.numel() * whole.element_size()


@pytest.mark.parametrize("mode", ["raise", "zero", "skip"])
def test_gradient_vector_equals_upstream(mode):
    network = trained_network()
    assert torch.equal(ours.get_gradient_vector(network, mode), upstream.get_gradient_vector(network, mode))
    if mode != "raise":
        reach_only_the_trunk(network)
        assert torch.equal(ours.get_gradient_vector(network, mode), upstream.get_gradient_vector(network, mode))


def test_parameter_vector_equals_upstream_and_goes_back():
    network, other = trained_network(), trained_network(1)
    vector = ours.get_para_vector(network)
    assert torch.equal(vector, upstream.get_para_vector(network))
    assert not vector.requires_grad
    ours.apply_para_vector(other, vector)
    assert torch.equal(ours.get_para_vector(other), vector)
    assert all(shares_memory(parameter, vector) for parameter in other.parameters())


def test_a_single_parameter_is_seen_and_not_copied():
    network = torch.nn.Linear(3, 2, bias=False)
    network(torch.ones(3)).sum().backward()
    assert ours.get_para_vector(network).data_ptr() == network.weight.data_ptr()
    assert ours.get_gradient_vector(network).data_ptr() == network.weight.grad.data_ptr()
    two = trained_network()
    assert not shares_memory(two[0].weight, ours.get_para_vector(two))


@pytest.mark.parametrize("none_grad_mode", ["skip", "zero"])
@pytest.mark.parametrize("zero_grad_mode", ["skip", "pad_zero", "pad_value"])
@pytest.mark.parametrize("everything_reached", [True, False])
def test_applied_gradients_equal_upstreams(none_grad_mode, zero_grad_mode, everything_reached):
    applied = []
    for package in (ours, upstream):
        network = trained_network()
        if not everything_reached:
            reach_only_the_trunk(network)
        length = len(package.get_gradient_vector(network, none_grad_mode))
        package.apply_gradient_vector(network, torch.arange(float(length)), none_grad_mode, zero_grad_mode)
        applied.append(grads(network))
    for actual, expected in zip(*applied, strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or torch.equal(actual, expected)


def test_applied_gradients_are_views_and_stay_the_same_objects():
    network = trained_network()
    before, vector = grads(network), torch.arange(26.0)
    ours.apply_gradient_vector(network, vector)
    assert all(after is grad for after, grad in zip(grads(network), before, strict=True))
    assert all(shares_memory(grad, vector) for grad in grads(network))
    ours.apply_gradient_vector_para_based(network, vector)
    assert all(after is not grad for after, grad in zip(grads(network), before, strict=True))
    assert all(shares_memory(grad, vector) for grad in grads(network))


def test_para_based_needs_no_gradients():
    network, vector = trained_network(), torch.arange(26.0)
    network.zero_grad(set_to_none=True)
    ours.apply_gradient_vector_para_based(network, vector)
    assert torch.equal(ours.get_gradient_vector(network, "raise"), vector)


def test_mixed_dtypes_keep_their_own():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1).bfloat16())
    network[0](torch.ones(2)).sum().backward()
    network[1](torch.ones(2).bfloat16()).sum().backward()
    vector = ours.get_gradient_vector(network)
    ours.apply_gradient_vector(network, 2 * vector)
    assert [grad.dtype for grad in grads(network)] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert torch.equal(ours.get_gradient_vector(network), 2 * vector)


@pytest.mark.parametrize("name", ["apply_gradient_vector", "apply_gradient_vector_para_based", "apply_para_vector"])
@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (torch.ones(25), ValueError, "has 25 elements, but the network's parameters have 26"),
        (torch.ones(27), ValueError, "has 27 elements"),
        (torch.ones(2, 13), ValueError, r"shape \(n,\), got \(2, 13\)"),
        (torch.ones(26, device="meta"), ValueError, "is on meta but parameter 0 on cpu"),
        (None, TypeError, "must be a tensor, got NoneType"),
    ],
)
def test_vectors_that_do_not_fit_change_nothing(name, vector, error, message):
    network = trained_network()
    gradient, parameters = ours.get_gradient_vector(network), ours.get_para_vector(network)
    with pytest.raises(error, match=message):
        getattr(ours, name)(network, vector)
    assert torch.equal(ours.get_gradient_vector(network), gradient)
    assert torch.equal(ours.get_para_vector(network), parameters)


def test_bad_modes_and_missing_gradients():
    network = trained_network()
    with pytest.raises(ValueError, match="none_grad_mode must be one of 'raise', 'zero', 'skip', got 'pad'"):
        ours.get_gradient_vector(network, "pad")
    with pytest.raises(ValueError, match="none_grad_mode must be one of 'zero', 'skip', got 'raise'"):
        ours.apply_gradient_vector(network, torch.ones(26), "raise")
    with pytest.raises(ValueError, match="zero_grad_mode must be one of"):
        ours.apply_gradient_vector(network, torch.ones(26), "zero", "padding")
    reach_only_the_trunk(network)
    with pytest.raises(RuntimeError, match=r"parameter 2 of network, shape \(2, 4\), has .grad None"):
        ours.get_gradient_vector(network, "raise")
    network.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="no parameter of network has a gradient"):
        ours.get_gradient_vector(network)
    with pytest.raises(ValueError, match="network has no parameters"):
        ours.get_para_vector(torch.nn.Tanh())


def test_sparse_gradients_are_refused():
    network = torch.nn.Embedding(4, 2, sparse=True)
    network(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        ours.get_gradient_vector(network)


def test_small_helpers_equal_upstream():
    torch.manual_seed(0)
    first, second, rows = torch.randn(50), torch.randn(50), torch.randn(4, 50)
    torch.testing.assert_close(
        ours.get_cos_similarity(first, second), upstream.get_cos_similarity(first, second), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(ours.unit_vector(first), upstream.unit_vector(first), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.unit_vector(rows), upstream.unit_vector(rows), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.estimate_conflict(rows), upstream.estimate_conflict(rows), rtol=1e-5, atol=1e-6)
    units = [upstream.unit_vector(vector) for vector in (first, second, second - 0.1 * first, first - 0.2 * second)]
    coefficients = ours.transfer_coef_double(torch.tensor([1.0, 3.0]), *units)
    expected = upstream.transfer_coef_double(torch.tensor([1.0, 3.0]), *units)
    torch.testing.assert_close(coefficients[0], expected[0])
    assert coefficients[1] == expected[1] == 1


def test_zero_vectors_have_no_direction(capsys):
    zero, one = torch.zeros(3), torch.ones(3)
    assert ours.get_cos_similarity(zero, one) == 0
    assert torch.equal(ours.unit_vector(zero), zero)
    assert capsys.readouterr().out == ""
    ours.unit_vector(zero, warn_zero=True)
    assert "zero" in capsys.readouterr().out
    ours.unit_vector(one, warn_zero=True)
    assert capsys.readouterr().out == ""
    torch.testing.assert_close(ours.estimate_conflict(torch.stack([zero, one])), torch.tensor([0.0, 1.0]))
    assert ours.transfer_coef_double(torch.ones(2), one, one, zero, zero)[0] == 0


def test_unit_vectors_of_any_scale():
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(ours.unit_vector(torch.full((4,), scale)), torch.full((4,), 0.5))
        assert ours.get_cos_similarity(torch.full((4,), scale), torch.ones(4)) == 1


def test_has_zero():
    for elements in ([1, 2], [0, 1], [1.0, 0.0], [], [torch.tensor(0.0)], [torch.tensor(3)]):
        assert ours.has_zero(elements) is upstream.has_zero(elements)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ordered_selection_equals_upstream(n):
    selector, peer = ours.OrderedSliceSelector(), upstream.OrderedSliceSelector()
    for _ in range(8):
        assert selector.select(n, "abcde") == peer.select(n, "abcde")
        assert selector.start_index == peer.start_index


@pytest.mark.parametrize("n", [1, 2, 5])
def test_random_selection_equals_upstream(n):
    selector, peer = ours.RandomSliceSelector(), upstream.RandomSliceSelector()
    for seed in range(4):
        np.random.seed(seed)  # noqa: NPY002  (the generator under test)
        indexes, selected = selector.select(n, "abcde")
        np.random.seed(seed)  # noqa: NPY002  (the generator under test)
        expected = peer.select(n, "abcde")
        assert (indexes, selected) == (list(expected[0]), expected[1])


@pytest.mark.parametrize("selector", [ours.OrderedSliceSelector, ours.RandomSliceSelector])
def test_selecting_what_is_not_there(selector):
    for n in (4, -1):
        with pytest.raises(ValueError, match=f"n must be 0 to 3, the length of source_sequence, got {n}"):
            selector().select(n, [1, 2, 3])
    assert selector().select(0, [1, 2, 3]) == ([], [])
    assert selector().select(0, []) == ([], [])
