"""Methods for torchjd: its ``Weighting`` of Gramians, as its autogram engine makes, its ``Aggregator`` of Jacobians.

With autogram the Jacobian is never built, and ConFIG, which torchjd itself has only on the Jacobian, works there, too.
Needs torchjd (``pip install torchjd``), which is imported at the first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastconfig.api import gramian
from fastconfig.gradients.combination import weights_of
from fastconfig.methods import DEFAULT_METHOD, Method, Stateful, check_weights_of
from fastconfig.ops import backend_for, is_traced
from fastconfig.validation import check_method_weights, check_rows

if TYPE_CHECKING:
    from torchjd.aggregation import GramianWeightedAggregator, Weighting

__all__ = ["aggregator", "weighting"]


def weighting(method: Method | None = None) -> Weighting[Tensor]:
    """A method as torchjd's ``Weighting`` of a Gramian.

    Args:
        method: the rule from the Gramian to the weights; ``ConFIG()`` by default.

    Returns:
        A ``torchjd.aggregation.Weighting`` (an ``nn.Module``): called with an (m, m) Gramian of any float dtype it
        returns (m,) weights of that dtype. A method's state is part of its ``state_dict``.

    Raises:
        ImportError: torchjd is not installed.
        TypeError: method has no ``weights``.

    Example:
        >>> import torch, fastconfig as fc
        >>> fc.torchjd.weighting(fc.MGDA())(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
        tensor([0.6000, 0.4000])
    """
    return _classes()[0](DEFAULT_METHOD if method is None else check_weights_of(method))


def aggregator(method: Method | None = None) -> GramianWeightedAggregator:
    """A method as torchjd's ``Aggregator`` of a Jacobian: what ``fc.combine`` does, on an (m, n) matrix.

    Args:
        method: the rule from the Gramian to the weights; ``ConFIG()`` by default.

    Returns:
        A ``torchjd.aggregation.GramianWeightedAggregator`` (an ``nn.Module``), so that ``torchjd.autojac`` may
        accumulate the Gramian instead of the whole Jacobian: then in the Jacobian's dtype, as torchjd does it; else in
        float64, as everywhere here. Hooks on its weightings run. Not differentiable.

    Raises:
        ImportError: torchjd is not installed.
        TypeError: method has no ``weights``.

    Example:
        >>> import torch, fastconfig as fc
        >>> fc.torchjd.aggregator(fc.ConFIG())(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.1588, 2.0706, 2.0706])
    """
    return _classes()[1](DEFAULT_METHOD if method is None else check_weights_of(method))


@lru_cache(maxsize=1)
def _classes() -> tuple[Callable[[Method], Weighting[Tensor]], Callable[[Method], GramianWeightedAggregator]]:
    """The two classes, made when torchjd is first needed: their bases are torchjd's."""
    try:
        from torchjd.aggregation import GramianWeightedAggregator, Weighting
    except ImportError as error:
        raise ImportError("fc.torchjd needs torchjd: pip install torchjd") from error

    class MethodWeighting(Weighting[Tensor]):
        """A method of fastconfig on torchjd's Gramians."""

        def __init__(self, method: Method) -> None:
            super().__init__()
            self.method = method

        def forward(self, gramian: Tensor, /) -> Tensor:
            k = gramian.detach().double()
            return check_method_weights(weights_of(self.method, k), k, self.method).to(gramian.dtype)

        def get_extra_state(self) -> dict[str, object]:
            return self.method.state_dict() if isinstance(self.method, Stateful) else {}

        def set_extra_state(self, state: dict[str, object]) -> None:
            if isinstance(self.method, Stateful):
                self.method.load_state_dict(state)

        def __repr__(self) -> str:
            return f"weighting({self.method!r})"

    class MethodAggregator(GramianWeightedAggregator):
        """A method of fastconfig on torchjd's Jacobians."""

        def __init__(self, method: Method) -> None:
            super().__init__(MethodWeighting(method))
            self.weighting = self.gramian_weighting << gramian  # type: ignore[arg-type]  # ours, of float64

        def forward(self, matrix: Tensor, /) -> Tensor:
            matrix = matrix.detach()
            # Called as torchjd calls it: autojac reads the weights by a hook, and other hooks may change them.
            weights = check_method_weights(self.weighting(matrix), matrix, self.weighting)
            rows = check_rows(matrix)
            out = torch.empty(rows.n, dtype=rows.dtype, device=rows.device)
            backend_for(rows.device, None, is_traced(rows.matrix)).apply(rows, weights, out)
            return out

        def __repr__(self) -> str:
            return f"aggregator({self.gramian_weighting.method!r})"

    return MethodWeighting, MethodAggregator
