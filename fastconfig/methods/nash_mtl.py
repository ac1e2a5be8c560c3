"""Nash-MTL: the losses bargain over the update; each one's gain is the inverse of its weight.

    K a = w/a,  a > 0;   c = a, made shorter where |Σ a_i g_i| > max_norm

The solution minimises ½aᵀKa - Σ w_i log a_i, which is convex and self-concordant: a damped Newton method finds it to
rounding. |Σ a_i g_i|² = Σ w.

Source: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022 (arXiv 2202.01017), eq. 2 and algorithm 1; the
paper's own code approximates the solution by a sequence of convex programs.

Degenerate cases: opposed gradients (a pair: at a cosine under 1e-6 to the update) have no solution: zero.
Duplicates share what one of them would have. A zero gradient, for which 0 = 1/a, takes no part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import StatefulMethod, check_count, check_nonfinite, check_preferences
from fastconfig.methods.solvers import bargain
from fastconfig.validation import check_number


@reference_of("nash", only_preferred=True)
def _nash(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: the largest norm, 0 for none."""
    del operand
    x = bargain(problem.unit, problem.preferences, 1.0)
    if x is None:
        return np.zeros(problem.k)
    most, norm = parameters[0], np.sqrt(problem.preferences.sum())
    return x / problem.norms * (most / norm if 0 < most < norm else 1.0)


class NashMTL(StatefulMethod):
    """Nash-MTL: the Nash bargaining solution K a = 1/a, exactly.

    Args:
        weights: bargaining powers w, m finite numbers from 0 on, not all zero; None for 1 each.
        max_norm: the combined gradient is scaled down to this norm where it is longer; None for no bound. Unbounded,
            its norm is √Σw, whatever the gradients' scale.
        update_every: take a new solution only in every so many combinations, and keep the last one in between, as in
            the paper. It is no saving here: each step is solved, for a step that is not finite must leave no trace.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: max_norm is no number, or update_every no int.
        ValueError: max_norm not positive; update_every under 1; weights that are not that; an unknown nonfinite.

    Source: Navon et al., ICML 2022 (arXiv 2202.01017), eq. 2 and algorithm 1.
    """

    source = "Navon et al., ICML 2022, arXiv 2202.01017"

    def __init__(
        self,
        weights: Sequence[float] | Tensor | None = None,
        max_norm: float | None = 1.0,
        update_every: int = 1,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        self._every = check_count("update_every", update_every)
        self._most = 0.0 if max_norm is None else check_number("max_norm", max_norm, 0.0, ends=False)
        preferences = check_preferences(weights)
        most = self._most if self._every == 1 else 0.0
        super().__init__(
            GramianRule("nash", (most,), preferences, check_nonfinite(nonfinite)),
            weights=preferences,
            max_norm=self._most or None,
            update_every=self._every,
        )
        self._step = 0

    @property
    def is_fused(self) -> bool:
        """Where every combination solves."""
        return self._every == 1 and type(self).weights is NashMTL.weights

    def weights(self, gramian: Tensor) -> Tensor:
        """As every method's; in between two solutions, the last one's weights, bounded anew."""
        found = super().weights(gramian)
        if self._every == 1:
            return found
        kept = self._kept((len(found),), found.device)
        if kept is None:
            kept = self._begun(torch.full_like(found, torch.nan))  # NaN stands for "no solution yet"
        is_due = self._step % self._every == 0
        self._step += 1
        is_finite = torch.isfinite(found).all()
        kept.copy_(torch.where(is_finite & (~torch.isfinite(kept).all() | is_due), found, kept))
        present = torch.isfinite(gramian.diagonal())  # the others are dropped, or else ``found`` is not finite
        used = torch.where(present, kept, 0.0)
        if self._most:
            products = torch.where(present & present.unsqueeze(1), gramian.detach().double(), 0.0)
            used = used * (self._most / (used @ products @ used).clamp(min=0.0).sqrt()).clamp(max=1.0)
        return torch.where(is_finite, used, found)

    def state_dict(self) -> dict[str, object]:
        """The last solution, and how many combinations there have been."""
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """As every method's."""
        step = check_count("state_dict['step']", state_dict.get("step", 0), least=0)  # type: ignore[arg-type]
        super().load_state_dict(state_dict)
        self._step = step

    def reset(self) -> None:
        """As every method's: the next combination solves."""
        super().reset()
        self._step = 0
