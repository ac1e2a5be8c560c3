"""Weight models: the direction weights ŵ of ConFIG, ``conflictfree.weight_model``."""

from __future__ import annotations

from typing import Optional, Sequence, Union  # noqa: UP035  (users import these names from here)

import torch
from torch import Tensor

__all__ = ["EqualWeight", "Optional", "Sequence", "Union", "WeightModel", "torch"]


class WeightModel:
    """Base class of weight models: a subclass says in ``get_weights`` how much of each cosine an update should have."""

    def __init__(self) -> None:
        pass

    def get_weights(self, gradients: Tensor | None = None, losses: Sequence[float | Tensor] | None = None) -> Tensor:
        """The direction weights ŵ (ConFIG, arXiv 2408.11104, eq. 2).

        Called with keywords, without gradient tracking. A subclass may take a third one, ``device``, and then gets the
        gradients' device; one that follows this signature is called without it. (conflictfree always passes ``device``
        and so fails with such a subclass.)

        Args:
            gradients: (m, n) tensor, one row a loss.
            losses: what the caller passed along, or None.

        Returns:
            (m,) tensor of any floating-point dtype.

        Raises:
            NotImplementedError: always, in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement get_weights(gradients, losses) -> (m,) tensor")


class EqualWeight(WeightModel):
    """The same weight for every loss: the update has the same cosine with every gradient."""

    def get_weights(  # type: ignore[override]  # upstream's own signature: gradients is required here
        self,
        gradients: Tensor,
        losses: Sequence[float | Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Ones.

        Args:
            gradients: (m, n) tensor, one row a loss.
            losses: not used.
            device: where the weights are to be; the gradients' device by default.

        Returns:
            (m,) tensor of ones in the gradients' (real) dtype. (conflictfree: always float32, which its float64 and
            bfloat16 updates then fail on.)

        Raises:
            ValueError: gradients is None. (conflictfree: AssertionError.)
        """
        if gradients is None:
            raise ValueError("gradients must be the (m, n) tensor of gradients, got None: EqualWeight counts its rows")
        return torch.ones(len(gradients), dtype=gradients.dtype.to_real(), device=device or gradients.device)
