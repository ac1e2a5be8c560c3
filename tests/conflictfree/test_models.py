"""Weight and length models on their own, as code that calls them directly sees them."""

import pytest
import torch
from conflictfree import length_model as upstream
from conflictfree.weight_model import EqualWeight as UpstreamEqualWeight

from fastconfig.conflictfree import length_model as ours
from fastconfig.conflictfree.weight_model import EqualWeight, WeightModel

MODELS = [
    ("ProjectionLength", ()),
    ("TrackMinimum", ()),
    ("TrackMaximum", ()),
    ("TrackHarmonicAverage", ()),
    ("TrackArithmeticAverage", ()),
    ("TrackGeometricAverage", ()),
    ("TrackSpecific", (2,)),
]


def gradients_and_target():
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(4, 30, generator=generator) * torch.tensor([[0.1], [1.0], [3.0], [10.0]])
    return grads, grads.sum(dim=0)


@pytest.mark.parametrize(("name", "arguments"), MODELS)
def test_get_length_equals_upstream(name, arguments):
    grads, target = gradients_and_target()
    model, peer = getattr(ours, name)(*arguments), getattr(upstream, name)(*arguments)
    expected = peer.get_length(target_vector=target, gradients=grads)
    for length in (
        model.get_length(target_vector=target, gradients=grads),
        model.get_length(unit_target_vector=target / target.norm(), gradients=grads),
        model.get_length(target, target / target.norm(), list(grads), [1.0]),
    ):
        torch.testing.assert_close(length, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "arguments"), MODELS)
def test_rescale_length_of_every_dtype(name, arguments, dtype):
    grads, target = (tensor.to(dtype) for tensor in gradients_and_target())
    rescaled = getattr(ours, name)(*arguments).rescale_length(target, grads)
    expected = getattr(upstream, name)(*arguments).rescale_length(target.double(), grads.double())
    assert rescaled.dtype == dtype
    assert rescaled.data_ptr() != target.data_ptr()
    assert (rescaled.double() - expected).norm() <= max(1e-6, 2 * torch.finfo(dtype).eps) * expected.norm()


def test_rescale_length_calls_get_length_as_upstream_does():
    class Recording(ours.LengthModel):
        def get_length(self, target_vector=None, unit_target_vector=None, gradients=None, losses=None):
            self.told = (target_vector, unit_target_vector, gradients, losses)
            return 5.0

    grads, target = gradients_and_target()
    model, losses = Recording(), [1.0, 2.0]
    rescaled = model.rescale_length(target, grads, losses)
    assert model.told[0] is target
    assert model.told[2] is grads
    assert model.told[3] is losses
    torch.testing.assert_close(model.told[1], target / target.norm())
    torch.testing.assert_close(rescaled.norm(), torch.tensor(5.0))


def test_user_tracks_build_on_the_private_base_as_before():
    class Second(ours._FlexibleTrackProjectionLength):
        def _tracked_value(self, grad_norms):
            return grad_norms[1]

    grads, target = gradients_and_target()
    expected = upstream.TrackSpecific(1).get_length(target_vector=target, gradients=grads)
    torch.testing.assert_close(Second().get_length(target_vector=target, gradients=grads), expected)
    with pytest.raises(NotImplementedError, match="_tracked_value"):
        ours._FlexibleTrackProjectionLength().get_length(target_vector=target, gradients=grads)


def test_length_models_name_what_is_missing():
    grads, target = gradients_and_target()
    with pytest.raises(ValueError, match="gradients must be"):
        ours.ProjectionLength().get_length(target_vector=target)
    with pytest.raises(ValueError, match="target_vector and unit_target_vector are both None"):
        ours.TrackMinimum().get_length(gradients=grads)
    with pytest.raises(ValueError, match="tracks a loss that does not exist"):
        ours.TrackSpecific(4).get_length(target_vector=target, gradients=grads)
    with pytest.raises(TypeError, match="integer"):
        ours.TrackSpecific("first")
    with pytest.raises(NotImplementedError, match="get_length"):
        ours.LengthModel().rescale_length(target, grads)


def test_the_tracked_loss_may_be_changed_later():
    grads, target = gradients_and_target()
    model = ours.TrackSpecific(0)
    model.track_id = 3
    expected = upstream.TrackSpecific(3).get_length(target_vector=target, gradients=grads)
    torch.testing.assert_close(model.get_length(target_vector=target, gradients=grads), expected)


def test_equal_weight_equals_upstream():
    grads, _ = gradients_and_target()
    for device in (None, "cpu", torch.device("cpu")):
        weights = EqualWeight().get_weights(grads, None, device)
        expected = UpstreamEqualWeight().get_weights(grads, None, device)
        assert torch.equal(weights, expected)
        assert weights.dtype == expected.dtype


def test_weight_models_name_what_is_missing():
    with pytest.raises(ValueError, match="gradients must be"):
        EqualWeight().get_weights(None)
    with pytest.raises(NotImplementedError, match="get_weights"):
        WeightModel().get_weights()
