"""CR-MOGM: another method's weights, smoothed over the steps.

    c_t = α c_{t-1} + (1 - α) ĉ_t,   c_1 = ĉ_1

Source: Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, NeurIPS 2022,
algorithm 1.

Degenerate cases: those of the smoothed method. A step whose weights are not finite answers so and is not remembered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastconfig.methods.base import Method, Stateful, check_gramian, check_weights_of
from fastconfig.validation import check_method_weights, check_number


class CRMOGM(Stateful):
    """A moving average of another method's weights, which makes stochastic multi-objective steps converge.

    Args:
        method: whose weights are smoothed.
        alpha: α in [0, 1], how much of the former weights is kept.

    Raises:
        TypeError: method has no ``weights``; alpha is no number.
        ValueError: alpha outside [0, 1].

    Source: Zhou et al., NeurIPS 2022, algorithm 1.
    """

    source = "Zhou et al., NeurIPS 2022, CR-MOGM"

    def __init__(self, method: Method, alpha: float = 0.9) -> None:
        self.method = check_weights_of(method)
        self.alpha = check_number("alpha", alpha, 0.0, 1.0)

    def weights(self, gramian: Tensor) -> Tensor:
        """The smoothed coefficients c, (m,) float64, for a Gramian (m, m).

        Raises:
            TypeError, ValueError: the Gramian is not square, or of another number of losses than before; the smoothed
                method answers no vector of weights. And what that method raises.
        """
        check_gramian(gramian)
        m = len(gramian)
        kept = self._kept((m,), gramian.device)
        found = check_method_weights(self.method.weights(gramian), gramian, self.method)
        if kept is None:
            # A first step that is not finite begins nothing: NaN stands for "not begun".
            kept = self._begun(torch.full_like(found, torch.nan))
        begun = torch.isfinite(kept).all()
        smoothed = torch.where(begun, self.alpha * kept + (1.0 - self.alpha) * found, found)
        kept.copy_(torch.where(torch.isfinite(found).all(), smoothed, kept))  # in place, as a captured graph needs it
        return smoothed

    def state_dict(self) -> dict[str, object]:
        """The smoothed weights, and the state of the smoothed method where it has one."""
        own = super().state_dict()
        return {**own, "method": self.method.state_dict() if isinstance(self.method, Stateful) else None}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """As every method's."""
        super().load_state_dict(state_dict)
        inner = state_dict["method"]
        if isinstance(self.method, Stateful) and isinstance(inner, dict):
            self.method.load_state_dict(inner)

    def reset(self) -> None:
        """As every method's; the smoothed method is reset, too."""
        super().reset()
        if isinstance(self.method, Stateful):
            self.method.reset()

    def __repr__(self) -> str:
        return f"CRMOGM({self.method!r}, alpha={self.alpha})"
