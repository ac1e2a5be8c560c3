"""Loss recorders: parity with conflictfree where it runs, the evident formula where it does not."""

import numpy as np
import pytest
import torch
from conflictfree.loss_recorder import LatestLossRecorder as UpstreamLatest

from fastconfig.conflictfree.loss_recorder import LatestLossRecorder, LossRecorder, MomentumLossRecorder


def test_latest_equals_upstream():
    recorder, peer = LatestLossRecorder(3), UpstreamLatest(3)
    for indexes, losses in [(1, 0.5), ([2, 0], [3.0, 4.0]), ([1], [7.0])]:
        assert recorder.record_loss(indexes, losses) == peer.record_loss(indexes, losses)
    assert recorder.record_all_losses([1.0, 2.0, 3.0]) == peer.record_all_losses([1.0, 2.0, 3.0])


def test_latest_returns_its_own_list_and_keeps_the_losses_themselves():
    recorder = LatestLossRecorder(2)
    loss = torch.tensor(2.0, requires_grad=True)
    recorded = recorder.record_loss([1], [loss])
    assert recorded is recorder.current_losses
    assert recorded[1] is loss
    assert recorder.record_loss(0, 1.0) is recorded


@pytest.mark.parametrize("recorder", [LatestLossRecorder, MomentumLossRecorder])
@pytest.mark.parametrize(
    ("indexes", "losses"),
    [
        ([0, 2], [1.0, 2.0]),
        (np.array([0, 2]), [1.0, 2.0]),
        ((0, -1), (1.0, 2.0)),
        (torch.tensor([0, 2]), torch.tensor([1.0, 2.0])),
        (range(0, 3, 2), [torch.tensor(1.0), torch.tensor(2.0)]),
    ],
)
def test_indexes_and_losses_in_any_container(recorder, indexes, losses):
    assert [float(loss) for loss in recorder(3).record_loss(indexes, losses)] == pytest.approx([1.0, 0.0, 2.0])


def test_momentum_is_the_unbiased_moving_average():
    recorder, betas = MomentumLossRecorder(2, betas=[0.5, 0.9]), (0.5, 0.9)
    history = {0: [3.0, 1.0, 4.0], 1: [2.0]}
    recorder.record_all_losses([3.0, 2.0])
    recorder.record_loss(0, 1.0)
    recorded = recorder.record_loss([0], torch.tensor([4.0]))
    for i, losses in history.items():
        ages = [betas[i] ** age for age in reversed(range(len(losses)))]
        average = sum(age * loss for age, loss in zip(ages, losses, strict=True)) / sum(ages)
        assert float(recorded[i]) == pytest.approx(average)
    assert recorder.t == [3, 1]
    assert recorded is recorder.current_losses


@pytest.mark.parametrize("recorder", [LatestLossRecorder, MomentumLossRecorder])
@pytest.mark.parametrize(
    ("indexes", "losses", "error", "message"),
    [
        (3, 1.0, IndexError, "losses_indexes must lie in 0 to 2, got 3"),
        ([0, 1], [1.0], ValueError, "losses must hold one entry for each index"),
        ([0, 1], 1.0, ValueError, "losses must hold one entry for each index"),
        ("first", 1.0, TypeError, "losses_indexes must be an int"),
        (1.0, 1.0, TypeError, "losses_indexes must be an int"),
    ],
)
def test_bad_records_change_nothing(recorder, indexes, losses, error, message):
    recorder = recorder(3)
    with pytest.raises(error, match=message):
        recorder.record_loss(indexes, losses)
    assert recorder.current_losses == [0.0, 0.0, 0.0]
    assert getattr(recorder, "t", [0, 0, 0]) == [0, 0, 0]


def test_bad_construction():
    with pytest.raises(ValueError, match="num_losses must be at least 1"):
        LatestLossRecorder(0)
    with pytest.raises(TypeError, match="num_losses must be an int"):
        LatestLossRecorder([1, 2])
    with pytest.raises(ValueError, match="betas must hold 2 numbers"):
        MomentumLossRecorder(2, [0.9])
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\)"):
        MomentumLossRecorder(2, [0.9, 1.0])
    with pytest.raises(ValueError, match="all 2 losses"):
        LatestLossRecorder(2).record_all_losses([1.0])
    with pytest.raises(NotImplementedError, match="record_loss"):
        LossRecorder(2).record_all_losses([1.0, 2.0])


def test_user_recorders_can_use_the_preprocessing():
    class Largest(LossRecorder):
        def record_loss(self, losses_indexes, losses):
            for index, loss in zip(*self._preprocess_losses(losses_indexes, losses), strict=True):
                self.current_losses[index] = max(self.current_losses[index], loss)
            return self.current_losses

    recorder = Largest(2)
    recorder.record_loss(1, 4.0)
    assert recorder.record_loss(1, 3.0) == [0.0, 4.0]
