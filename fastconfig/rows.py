"""What the backends read: m gradients of n elements, wherever they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """m gradient vectors of n elements, in the form the backends read.

    Either one ``matrix`` (m, n) whose rows are contiguous, any distance apart, or ``vectors``, m contiguous (n,)
    tensors that lie anywhere. Complex input stands here as its real view, twice as long.
    """

    m: int
    n: int
    dtype: torch.dtype
    device: torch.device
    matrix: Tensor | None
    vectors: tuple[Tensor, ...]

    def columns(self, first: int, last: int) -> Rows:
        """Columns ``first`` to ``last`` - 1 of a matrix, where they lie."""
        assert self.matrix is not None
        return self._replace(n=last - first, matrix=self.matrix[:, first:last])
