"""What a method is: a rule from the losses' Gramian to the weights of their combination."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Method(Protocol):
    """A small object that turns a Gramian into coefficients. Any object with this method is one.

    ``fc.combine`` computes ``K = G Gᵀ``, asks the method for ``c``, and returns ``c G``: the method never sees the n
    parameters, so a new one is m×m code alone.
    """

    def weights(self, gramian: Tensor, /) -> Tensor:
        """The coefficients c of the combination Σ c_i g_i.

        Args:
            gramian: (m, m) float64, K_ij = g_i · g_j, on the gradients' device. It must not be modified.

        Returns:
            (m,) floating-point tensor on the same device. A row of weight 0 is not read.
        """
        ...
