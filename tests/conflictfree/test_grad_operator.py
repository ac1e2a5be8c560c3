"""ConFIG, PCGrad and IMTL-G operators: parity with conflictfree, user models, the fast path, bad input."""

import pytest
import torch
from conflictfree import grad_operator as upstream

import fastconfig as fc
from fastconfig.conflictfree import grad_operator as ours
from fastconfig.conflictfree.grad_operator import ConFIG_update, ConFIGOperator, GradientOperator
from fastconfig.conflictfree.length_model import LengthModel, ProjectionLength, TrackMinimum, TrackSpecific
from fastconfig.conflictfree.weight_model import EqualWeight, WeightModel

LENGTHS = [
    ("ProjectionLength", ()),
    ("TrackMinimum", ()),
    ("TrackMaximum", ()),
    ("TrackHarmonicAverage", ()),
    ("TrackArithmeticAverage", ()),
    ("TrackGeometricAverage", ()),
    ("TrackSpecific", (1,)),
    ("TrackSpecific", (-1,)),
]


def gradients(m, n, seed=0):
    """Rows that conflict, of norms from 1/m to m."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, n, generator=generator) - 0.3 * torch.randn(1, n, generator=generator)
    return rows * torch.linspace(1 / m, m, m).unsqueeze(1)


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


class Graded(WeightModel):
    """Weights 1, 2, ..., m; the base class's signature."""

    def get_weights(self, gradients=None, losses=None):
        return torch.arange(1.0, len(gradients) + 1)


class GradedOnDevice(Graded):
    """The same, with upstream's third parameter."""

    def get_weights(self, gradients=None, losses=None, device=None):
        self.device = device
        return super().get_weights(gradients, losses).to(device)


class Keywords(WeightModel):
    def get_weights(self, **keywords):
        self.keywords = keywords
        return torch.ones(len(keywords["gradients"]))


class TargetLength(LengthModel):
    """Depends on everything a length model is told."""

    def get_length(self, target_vector=None, unit_target_vector=None, gradients=None, losses=None):
        return target_vector.norm() + unit_target_vector.abs().sum() + gradients.abs().max() + sum(losses)


class UnitLength(LengthModel):
    def rescale_length(self, target_vector, gradients=None, losses=None):
        return target_vector / target_vector.norm()


def test_published_value():
    grads = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    expected = torch.tensor([0.1588, 2.0706, 2.0706])
    for update in (
        ConFIG_update(grads),
        ours.ConFIG_update_double(*grads),
        ConFIGOperator().calculate_gradient(list(grads)),
    ):
        torch.testing.assert_close(update, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_least_square", [True, False])
@pytest.mark.parametrize(("m", "n"), [(1, 7), (2, 3), (2, 100_000), (3, 3), (3, 1000), (5, 100_000), (9, 40)])
def test_config_equals_upstream(m, n, use_least_square):
    grads = gradients(m, n)
    expected = upstream.ConFIG_update(grads, use_least_square=use_least_square)
    assert_close(ConFIG_update(grads, use_least_square=use_least_square), expected)
    assert_close(ConFIG_update(list(grads)), expected)
    operator = ConFIGOperator(use_least_square=use_least_square, allow_simplified_model=False)
    assert_close(operator.calculate_gradient(grads), expected)


@pytest.mark.parametrize(("name", "arguments"), LENGTHS)
@pytest.mark.parametrize("m", [2, 4])
def test_every_length_equals_upstream(name, arguments, m):
    grads = gradients(m, 500)
    model, peer = getattr(ours, name)(*arguments), getattr(upstream, name)(*arguments)
    assert_close(
        ConFIGOperator(length_model=model).calculate_gradient(grads),
        upstream.ConFIGOperator(length_model=peer).calculate_gradient(grads),
    )
    assert_close(
        ConFIG_update(grads, Graded(), model), upstream.ConFIG_update(grads, GradedOnDevice(), peer, losses=None)
    )


def test_two_losses_equal_upstreams_shortcut():
    grads = gradients(2, 300)
    assert_close(ours.ConFIG_update_double(*grads), upstream.ConFIG_update_double(*grads))
    weighted = upstream.ConFIG_update_double(*grads, weight_model=GradedOnDevice())
    assert_close(ours.ConFIG_update_double(*grads, weight_model=Graded()), weighted)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_pcgrad_equals_upstream(m):
    for seed in range(5):
        grads = gradients(m, 20, seed) + 0.5  # short vectors, so that the order of projections matters
        expected = upstream.PCGradOperator().calculate_gradient(grads)
        assert_close(ours.PCGradOperator().calculate_gradient(grads), expected)
        assert_close(ours.PCGradOperator().calculate_gradient(list(grads)), expected)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_imtlg_equals_upstream(m):
    grads = gradients(m, 2000)
    expected = upstream.IMTLGOperator().calculate_gradient(grads)
    update = ours.IMTLGOperator().calculate_gradient(list(grads))
    assert_close(update, expected)
    projections = (grads @ update) / grads.norm(dim=1)
    assert_close(projections, projections.mean().expand(m))


@pytest.mark.parametrize("operator", [ConFIGOperator, ours.PCGradOperator, ours.IMTLGOperator])
def test_nonfinite_gradients_make_the_update_nan(operator):
    grads = gradients(3, 10)
    grads[1, 4] = torch.inf
    assert operator().calculate_gradient(grads).isnan().all()


@pytest.mark.parametrize("operator", [ConFIGOperator, ours.PCGradOperator, ours.IMTLGOperator])
def test_a_zero_gradient_changes_nothing(operator):
    grads = gradients(3, 10)
    with_zero = torch.cat([grads[:1], torch.zeros(1, 10), grads[1:]])
    assert_close(operator().calculate_gradient(with_zero), operator().calculate_gradient(grads))


def test_built_in_models_hand_the_gradients_on_in_one_call(monkeypatch):
    calls = []

    def recorded(grads, method):
        calls.append((grads, method))
        return fc.combine(grads, method)

    monkeypatch.setattr(ours, "combine", recorded)
    vectors = list(gradients(3, 10))
    for _ in range(2):
        ConFIGOperator(length_model=TrackSpecific(2)).calculate_gradient(vectors)
        ConFIG_update(vectors, EqualWeight(), ProjectionLength())
    assert all(grads is vectors for grads, _ in calls)
    assert [method.rule.length for _, method in calls] == [2, "projection"] * 2
    assert calls[0][1] is calls[2][1]  # validated once, not at every update
    assert calls[1][1] is calls[3][1]


@pytest.mark.parametrize("model", [Graded(), GradedOnDevice()])
def test_user_weights_with_and_without_device(model):
    vectors = list(gradients(3, 50))
    update = ConFIG_update(vectors, weight_model=model)
    cosines = torch.stack([row @ update / row.norm() for row in vectors])
    assert_close(cosines / cosines[0], torch.tensor([1.0, 2.0, 3.0]))
    assert getattr(model, "device", torch.device("cpu")) == torch.device("cpu")


def test_user_models_are_told_the_stacked_gradients_and_the_losses():
    vectors = [row.requires_grad_() for row in gradients(3, 50)]
    model = Keywords()
    ConFIG_update(vectors, weight_model=model, losses=[1.0, 2.0, 3.0])
    assert set(model.keywords) == {"gradients", "losses", "device"}
    assert torch.equal(model.keywords["gradients"], torch.stack(vectors))
    assert not model.keywords["gradients"].requires_grad
    assert model.keywords["losses"] == [1.0, 2.0, 3.0]
    matrix = gradients(3, 50)
    ConFIG_update(matrix, weight_model=model)
    assert model.keywords["gradients"] is matrix


def test_user_length_gets_what_upstream_gives_it():
    grads, losses = gradients(3, 50), [0.5, 0.25, 0.25]
    expected = upstream.ConFIG_update(grads, length_model=TargetLength(), losses=losses)
    assert_close(ConFIG_update(grads, length_model=TargetLength(), losses=losses), expected)
    both = ConFIG_update(list(grads), Graded(), TargetLength(), losses=losses)
    assert_close(both, upstream.ConFIG_update(grads, GradedOnDevice(), TargetLength(), losses=losses))


def test_user_rescaling_is_honoured():
    update = ConFIG_update(gradients(3, 50), length_model=UnitLength())
    assert_close(update, upstream.ConFIG_update(gradients(3, 50), length_model=UnitLength()))


def test_overridden_built_ins_are_honoured():
    class Median(TrackMinimum):
        def _tracked_value(self, grad_norms):
            return grad_norms.median()

    class Longer(ProjectionLength):
        def get_length(self, *arguments, **keywords):
            return 3 * super().get_length(*arguments, **keywords)

    class OnlyFirst(EqualWeight):
        def get_weights(self, gradients, losses=None, device=None):
            return super().get_weights(gradients, losses, device) * torch.tensor([1.0, 0.0, 0.0])

    grads = gradients(3, 50)
    plain = ConFIG_update(grads)
    assert_close(ConFIG_update(grads, length_model=Median()), ConFIG_update(grads, length_model=TrackSpecific(1)))
    assert_close(ConFIG_update(grads, length_model=Longer()), 3 * plain)
    first_only = ConFIG_update(grads, weight_model=OnlyFirst())
    assert_close(grads @ first_only, torch.tensor([(grads[0] @ first_only).item(), 0.0, 0.0]))


def test_models_may_be_reassigned():
    grads, operator = gradients(3, 50), ConFIGOperator()
    plain = operator.calculate_gradient(grads)
    operator.length_model = TrackMinimum()
    assert_close(operator.calculate_gradient(grads), ConFIG_update(grads, length_model=TrackMinimum()))
    operator.length_model, operator.weight_model = ProjectionLength(), Graded()
    assert_close(operator.calculate_gradient(grads), ConFIG_update(grads, weight_model=Graded()))
    operator.weight_model = EqualWeight()
    assert torch.equal(operator.calculate_gradient(grads), plain)


def test_operators_do_not_share_default_models():
    first, second = ConFIGOperator(), ConFIGOperator()
    assert type(first.weight_model) is EqualWeight
    assert type(first.length_model) is ProjectionLength
    assert first.weight_model is not second.weight_model
    assert first.length_model is not second.length_model


def test_user_operators_can_update_a_network():
    class Sum(GradientOperator):
        def calculate_gradient(self, grads, losses=None):
            return torch.stack(grads).sum(dim=0) * sum(losses)

    network = torch.nn.Linear(2, 1)
    network(torch.ones(2)).backward()
    Sum().update_gradient(network, [torch.arange(3.0), torch.ones(3)], losses=[1.0, 1.0])
    assert network.weight.grad.tolist() == [[2.0, 4.0]]
    assert network.bias.grad.tolist() == [6.0]
    with pytest.raises(NotImplementedError, match="calculate_gradient"):
        GradientOperator().update_gradient(network, [torch.ones(3)])


def test_weights_of_overflown_gradients_give_nan_and_no_error():
    class InverseNorm(WeightModel):
        def get_weights(self, gradients=None, losses=None):
            return 1 / gradients.norm(dim=1) * gradients.norm(dim=1).max()

    grads = gradients(3, 10)
    grads[0, 0] = torch.inf
    assert ConFIG_update(grads, weight_model=InverseNorm()).isnan().all()


@pytest.mark.parametrize("operator", [ConFIGOperator, ours.PCGradOperator, ours.IMTLGOperator])
@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([], ValueError, "at least one vector"),
        ([torch.ones(3), torch.ones(2)], ValueError, r"grads\[1\] has 2 elements"),
        ([torch.ones(3), None], TypeError, r"grads\[1\] must be a tensor"),
        (torch.ones(3), ValueError, r"shape \(m, n\)"),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, "int32"),
    ],
)
def test_bad_gradients(operator, grads, error, message):
    network = torch.nn.Linear(2, 1)
    network(torch.ones(2)).backward()
    before = [parameter.grad for parameter in network.parameters()]
    with pytest.raises(error, match=message):
        operator().update_gradient(network, grads)
    assert [parameter.grad for parameter in network.parameters()] == before
    assert network.weight.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(2), ValueError, "2 entries for 3 losses"),
        (torch.tensor([1.0, torch.nan, 1.0]), ValueError, "finite"),
        (torch.zeros(3), ValueError, "all be zero"),
        (torch.ones(3, 1), ValueError, "vector"),
        (None, TypeError, r"Fixed.get_weights must return a tensor of shape \(3,\), got None"),
    ],
)
def test_bad_weights(weights, error, message):
    class Fixed(WeightModel):
        def get_weights(self, gradients=None, losses=None):
            return weights

    with pytest.raises(error, match=message):
        ConFIG_update(gradients(3, 10), weight_model=Fixed())
    with pytest.raises(error, match=message):
        ConFIG_update(list(gradients(3, 10)), weight_model=Fixed(), length_model=UnitLength())


def test_tracking_a_loss_that_does_not_exist():
    with pytest.raises(ValueError, match="tracks a loss that does not exist"):
        ConFIG_update(gradients(3, 10), length_model=TrackSpecific(3))
