"""What the public functions accept: every check runs before anything is written, and names argument, value, remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastconfig.backends.rows import Rows

FLOAT_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
REAL_OF_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def check_rows(grads: Tensor | Sequence[Tensor]) -> Rows:
    """Validate ``grads`` and describe its rows without copying them (unless a row is strided within itself).

    Args:
        grads: (m, n) tensor, or a sequence of m vectors of shape (n,), of one floating-point dtype on one device.

    Raises:
        TypeError: not tensors; an integer, boolean, sparse or quantised tensor; rows of several dtypes.
        ValueError: no row; a wrong number of dimensions; rows of several lengths or devices.
    """
    if isinstance(grads, Tensor):
        return _rows_of_matrix(grads)
    if isinstance(grads, (str, bytes)) or not isinstance(grads, Sequence):
        raise TypeError(
            f"grads must be an (m, n) tensor or a sequence of m vectors, got {type(grads).__name__}; "
            "collect the losses' gradients in a list or stack them"
        )
    return _rows_of_vectors(grads)


def _rows_of_matrix(grads: Tensor) -> Rows:
    _check_kind(grads, "grads")
    if grads.dim() != 2:
        raise ValueError(
            f"grads must have shape (m, n), one row a loss, got {tuple(grads.shape)}; "
            "flatten each loss's gradient to a vector and stack them"
        )
    matrix = _plain(grads, is_dynamo_compiling())
    m, n = matrix.shape
    if m == 0:
        raise ValueError(f"grads must hold at least one row, got shape {tuple(grads.shape)}; pass one row a loss")
    if n > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return Rows(m, n, matrix.dtype, matrix.device, matrix, ())


def _rows_of_vectors(grads: Sequence[Tensor]) -> Rows:
    if len(grads) == 0:
        raise ValueError("grads must hold at least one vector, got an empty sequence; pass one vector a loss")
    first = grads[0]
    _check_row(first, first, 0)
    shape, dtype, device = first.shape, first.dtype, first.device
    compiling = is_dynamo_compiling()
    vectors = []
    for i, row in enumerate(grads):
        # What is like the checked first row needs no check of its own: this runs in front of calls of microseconds.
        alike = isinstance(row, Tensor) and row.layout is torch.strided and row.shape == shape
        if not (alike and row.dtype == dtype and row.device == device):
            _check_row(row, first, i)
        vectors.append(_plain(row, compiling).contiguous())
    plain = vectors[0]
    return Rows(len(vectors), plain.shape[0], plain.dtype, device, None, tuple(vectors))


def _check_row(row: Tensor, first: Tensor, index: int) -> None:
    """Check one row given by itself against the first one."""
    name = f"grads[{index}]"
    if not isinstance(row, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(row).__name__}; convert it with torch.as_tensor")
    _check_kind(row, name)
    if row.dim() != 1:
        raise ValueError(f"{name} must be a vector of shape (n,), got {tuple(row.shape)}; flatten it first")
    if row.dtype != first.dtype:
        raise TypeError(f"{name} has dtype {row.dtype} but grads[0] has {first.dtype}; bring all rows to one dtype")
    if row.device != first.device:
        raise ValueError(f"{name} is on {row.device} but grads[0] is on {first.device}; move all rows to one device")
    if len(row) != len(first):
        raise ValueError(
            f"{name} has {len(row)} elements but grads[0] has {len(first)}; "
            "every loss needs its gradient over the same parameters"
        )


def _check_kind(tensor: Tensor, name: str) -> None:
    """Raise TypeError for a tensor that is no dense floating-point or complex one."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; call .to_dense() first")
    if tensor.dtype in FLOAT_DTYPES or tensor.dtype in REAL_OF_COMPLEX:
        return
    if tensor.is_quantized:
        raise TypeError(f"{name} must not be quantised, got {tensor.dtype}; call .dequantize() first")
    raise TypeError(
        f"{name} must be float32, float64, bfloat16, float16 or complex, got {tensor.dtype}; convert it with .to()"
    )


def _plain(tensor: Tensor, compiling: bool) -> Tensor:
    """A checked tensor whose memory is what it shows: complex as its real view, no negation left for the reader."""
    if tensor.dtype in REAL_OF_COMPLEX:
        return torch.view_as_real(tensor.resolve_conj().resolve_neg().contiguous()).flatten(-2)
    # Asking first is quicker, but a question that a compiler cannot trace.
    return tensor.resolve_neg() if compiling or tensor.is_neg() else tensor


def complex_dtype_of(grads: Tensor | Sequence[Tensor]) -> torch.dtype | None:
    """The complex dtype of validated ``grads``, or None where they are real."""
    dtype = grads.dtype if isinstance(grads, Tensor) else grads[0].dtype
    return dtype if dtype in REAL_OF_COMPLEX else None


def check_method_weights(weights: object, gramian: Tensor, method: object) -> Tensor:
    """What a user's method returned, as (m,) float64 beside the Gramian.

    Raises:
        TypeError: not a real tensor.
        ValueError: another shape than (m,).
    """
    name = f"{type(method).__name__}.weights"
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TypeError(f"{name} must return a real tensor of shape ({len(gramian)},), got {weights!r}")
    if weights.shape != (len(gramian),):
        raise ValueError(f"{name} must return one weight a loss, shape ({len(gramian)},), got {tuple(weights.shape)}")
    return weights.detach().to(gramian.device, torch.float64)


def check_out(out: Tensor, grads: Tensor | Sequence[Tensor], rows: Rows, traced: bool = False) -> Tensor:
    """Validate ``out`` against the gradients it will combine, and return it as the real (n,) vector to write.

    Where ``traced``, memory cannot be compared: the operator does it when it runs. For a complex ``out`` a new vector
    is returned then, to be copied from, as functionalisation (torch 2.13) mistakes a real view of complex memory that
    is written to for one of complex elements, and lets the operator write past its end.

    Raises:
        TypeError: not a dense tensor, or another dtype than the gradients'.
        ValueError: another shape or device, non-contiguous, or overlapping the gradients in memory.
    """
    complex_dtype = complex_dtype_of(grads)
    wanted = complex_dtype or rows.dtype
    length = rows.n // 2 if complex_dtype else rows.n
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}; allocate it with torch.empty")
    if out.layout is not torch.strided:
        raise TypeError(f"out must be a dense tensor, got layout {out.layout}; allocate it with torch.empty")
    if out.requires_grad:
        raise ValueError("out must not require grad: combine is not differentiable; pass out.detach()")
    if out.dtype != wanted:
        raise TypeError(f"out must have the gradients' dtype {wanted}, got {out.dtype}; allocate it with that dtype")
    if out.device != rows.device:
        raise ValueError(f"out must be on the gradients' device {rows.device}, got {out.device}; allocate it there")
    if out.shape != (length,):
        raise ValueError(f"out must have shape ({length},), got {tuple(out.shape)}; allocate it with that shape")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}; pass a contiguous vector")
    if not traced and (out.is_conj() or out.is_neg()):
        raise ValueError("out must not be a lazily conjugated or negated view; allocate a tensor with torch.empty")
    if traced:
        return torch.empty(rows.n, dtype=rows.dtype, device=rows.device) if complex_dtype else out
    if complex_dtype:
        out = torch.view_as_real(out).flatten()
    for tensor in (grads,) if isinstance(grads, Tensor) else grads:
        if _overlaps(out, tensor):
            raise ValueError(
                "out overlaps grads in memory, so the result would overwrite rows still to be read; pass another tensor"
            )
    return out


def _overlaps(out: Tensor, grads: Tensor) -> bool:
    """Whether contiguous ``out`` shares memory with a matrix or vector of gradients.

    Exact where each row is contiguous: ``out`` may lie between two rows. A row strided within itself counts as all the
    memory it spans.
    """
    if out.numel() == 0 or grads.numel() == 0:
        return False
    size = grads.element_size()
    row = (grads.shape[-1] - 1) * grads.stride(-1) * size + size
    step = grads.stride(0) * size if grads.dim() == 2 else 0
    begin = out.data_ptr() - grads.data_ptr()
    end = begin + out.numel() * out.element_size()
    if step == 0:
        return begin < row and end > 0
    # Row i, at [i·step, i·step + row), meets [begin, end) for i in an interval that must hold a row of the matrix.
    first = max((begin - row) // step + 1, 0)
    last = min(-(-end // step) - 1, grads.shape[0] - 1)
    return first <= last


def check_number(name: str, value: float, low: float, high: float = math.inf, *, ends: bool = True) -> float:
    """The number; TypeError unless it is real, ValueError unless finite and from ``low`` to ``high``.

    Args:
        name: what the error calls it.
        value: the number.
        low: the least it may be.
        high: the most.
        ends: whether these two belong to the interval.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low <= value <= high and math.isfinite(value)) or (not ends and value in (low, high)):
        if math.isinf(low):
            raise ValueError(f"{name} must be finite, got {value}")
        if math.isinf(high):
            raise ValueError(f"{name} must be finite and {'at least' if ends else 'above'} {low:g}, got {value}")
        interval = f"[{low:g}, {high:g}]" if ends else f"({low:g}, {high:g})"
        raise ValueError(f"{name} must lie in {interval}, got {value}")
    return float(value)
