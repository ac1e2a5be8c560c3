"""What the backends read: m gradients of n elements, wherever they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WITHOUT_MEMORY = (
    "has no memory: its storage was emptied, as untyped_storage().resize_(0) does and a sharded model with what it "
    "gathered; use it while it is there"
)
"""Of a tensor that lies at address 0, whatever its shape says; PyTorch's own operations end the process there."""


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
        """Columns ``first`` to ``last`` - 1, where they lie."""
        matrix = None if self.matrix is None else self.matrix[:, first:last]
        vectors = tuple(vector[first:last] for vector in self.vectors)
        return self._replace(n=last - first, matrix=matrix, vectors=vectors)
