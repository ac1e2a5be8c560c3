"""What fastconfig is compared with: PyTorch's own operations, and the other libraries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpubench.results import Run


def plain_torch(grads: Tensor) -> Tensor:
    """The best few lines of PyTorch: Gramian, solve without a check, which would wait, and combination."""
    gramian = (grads @ grads.T).float()
    inverse = gramian.diagonal().rsqrt()
    ones = torch.ones_like(inverse)
    solution = torch.linalg.solve_ex(gramian * inverse * inverse.unsqueeze(1), ones)[0]
    coefficients = solution * inverse / (solution @ ones).sqrt()
    return (coefficients * (gramian @ coefficients).sum()).to(grads.dtype) @ grads


def slow_contenders(run: Run) -> dict[str, Callable[[Tensor], Tensor]]:
    """The other libraries that are installed."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    try:
        from conflictfree.grad_operator import ConFIG_update

        found["conflictfree"] = ConFIG_update
        found["conflictfree pinv"] = lambda grads: ConFIG_update(grads, use_least_square=False)
    except ImportError as error:
        run.skip("conflictfree", str(error))
    try:
        from torchjd.aggregation import ConFIG

        found["torchjd"] = ConFIG()
    except ImportError as error:
        run.skip("torchjd", str(error))
    return found
