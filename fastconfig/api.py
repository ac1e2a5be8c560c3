"""combine() and gramian(): validate, pick a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.gradients.combination import combine_rows
from fastconfig.gradients.memory import fresh
from fastconfig.methods import DEFAULT_METHOD, Method, StreamingMethod, method_for_one_call
from fastconfig.ops import backend_for, is_traced
from fastconfig.validation import check_out, check_rows, complex_dtype_of


def combine(
    grads: Tensor | Sequence[Tensor],
    method: Method | StreamingMethod | str | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Combine the losses' gradients into one update, Σ c_i g_i with c from ``method``.

    Args:
        grads: (m, n) tensor, or a sequence of m vectors of shape (n,) that are then not stacked: one gradient a loss.
            float32, float64, bfloat16, float16 or complex (combined as its real view). m ≥ 1, n ≥ 0.
        method: the rule from the Gramian to the weights, or ``GradDrop``, or the name of one, in letters of either
            case, as ``fastconfig methods`` lists them; ``ConFIG()`` by default. One that remembers from call to call
            (``GradVac``, ``SDMGrad``, ``CRMOGM``) is to be made once.
        out: (n,) contiguous tensor of the rows' dtype and device to write to, apart from ``grads`` in memory
            and not requiring grad.
        backend: "auto", "cpu", "triton" or "reference"; by default FASTCONFIG_BACKEND, or "auto".

    Returns:
        (n,) tensor of the rows' dtype on their device; ``out`` where given. Not differentiable.

    Raises:
        TypeError, ValueError: bad input; the message names argument, value and remedy. Nothing has been written.
        FloatingPointError: a gradient is not finite and the method raises on it. Nothing has been written.
        RuntimeError: the named backend cannot run here.

    Inside ``torch.compile`` the gradients' part is one operator of the graph, and a method's ``weights`` is traced, so
    it must branch on no tensor's value. Bad input raises while tracing, but an overlapping ``out`` and a gradient that
    is not finite when the graph runs. A compiler that gives the operator other memory than an overlapping ``out``
    makes that harmless, and then nothing is raised.

    Source: ConFIG, arXiv 2408.11104, eq. 2 to 4, for the default method.

    Example:
        >>> import torch, fastconfig as fc
        >>> fc.combine(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.1588, 2.0706, 2.0706])
    """
    rows = check_rows(grads)
    if isinstance(method, str):
        method = method_for_one_call(method, rows.m)
    traced = is_traced(rows.matrix, rows.vectors, out)
    target = fresh(rows.n, rows.dtype, rows.device) if out is None else check_out(out, grads, rows, traced)
    method = DEFAULT_METHOD if method is None else method
    combine_rows(backend_for(rows.device, backend, traced), rows, method, target)
    if out is None:
        return target if complex_dtype_of(grads) is None else torch.view_as_complex(target.view(-1, 2))
    if not traced:
        torch.autograd.graph.increment_version(out)  # as any in-place write: autograd may have saved the old content
    elif target is not out:
        out.copy_(torch.view_as_complex(target.view(-1, 2)))
    return out


def gramian(grads: Tensor | Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The Gramian K of the losses' gradients, K_ij = g_i · g_j, accumulated in float64.

    Args:
        grads: as in ``combine``; of complex gradients the real part of the inner products is taken.
        backend: as in ``combine``.

    Returns:
        (m, m) float64 tensor on the gradients' device, symmetric to the bit.

    Raises:
        TypeError, ValueError: bad input; the message names argument, value and remedy.
        RuntimeError: the named backend cannot run here.
    """
    rows = check_rows(grads)
    return backend_for(rows.device, backend, is_traced(rows.matrix, rows.vectors)).gramian(rows)
