"""What several benchmark files share."""

import pytest
import torch
from contenders import Shape


@pytest.fixture(scope="module")
def gradients():
    """The gradients of the current shape, drawn once."""
    kept = {}

    def of(shape: Shape) -> torch.Tensor:
        if shape not in kept:
            kept.clear()
            kept[shape] = shape.gradients()
        return kept[shape]

    return of
