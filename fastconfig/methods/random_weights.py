"""Random loss weighting: c = softmax(z), z ~ N(0, 1) anew in every step, a baseline that is hard to beat.

Source: Lin et al., Reasonable Effectiveness of Random Weighting, TMLR 2022 (arXiv 2111.10603).

Degenerate cases: none. A zero gradient's weight is 0; the others keep what they drew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import StatefulMethod, check_generator, check_nonfinite, draw


class RandomWeights(StatefulMethod):
    """Random loss weighting: the softmax of m normal numbers, drawn in every combination.

    Args:
        generator: what they come from; None for torch's own on the gradients' device. One of another device works, and
            costs a copy of m numbers.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: generator is none.
        ValueError: an unknown nonfinite.

    Source: Lin et al., TMLR 2022 (arXiv 2111.10603), RLW with a normal distribution.
    """

    source = "Lin et al., TMLR 2022, arXiv 2111.10603 (RLW)"

    def __init__(self, generator: torch.Generator | None = None, nonfinite: NonFinite = "propagate") -> None:
        super().__init__(GramianRule("constant", (0.0,), None, check_nonfinite(nonfinite)))
        self.generator = check_generator(generator)

    def operand(self, m: int, device: torch.device) -> Tensor:
        """The weights (m,), drawn."""
        return draw((m,), device, self.generator, normal=True).softmax(dim=0)
