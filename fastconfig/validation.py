"""What the public functions accept: every check runs before anything is written, and names argument, value, remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
REAL_OF_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}


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

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold the rows: one matrix, or m vectors."""
        return self.vectors if self.matrix is None else (self.matrix,)


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
    if grads.layout is not torch.strided or grads.dtype not in FLOAT_DTYPES:
        grads = _as_real(grads, "grads")
    if grads.dim() != 2:
        raise ValueError(
            f"grads must have shape (m, n), one row a loss, got {tuple(grads.shape)}; "
            "flatten each loss's gradient to a vector and stack them"
        )
    m, n = grads.shape
    if m == 0:
        raise ValueError(f"grads must hold at least one row, got shape {(m, n)}; pass one row a loss")
    if n > 1 and grads.stride(1) != 1:
        grads = grads.contiguous()
    return Rows(m, n, grads.dtype, grads.device, grads.detach(), ())


def _rows_of_vectors(grads: Sequence[Tensor]) -> Rows:
    if len(grads) == 0:
        raise ValueError("grads must hold at least one vector, got an empty sequence; pass one vector a loss")
    vectors = []
    for i, row in enumerate(grads):
        if not isinstance(row, Tensor):
            raise TypeError(f"grads[{i}] must be a tensor, got {type(row).__name__}; convert it with torch.as_tensor")
        if row.layout is not torch.strided or row.dtype not in FLOAT_DTYPES:
            row = _as_real(row, f"grads[{i}]")
        if row.dim() != 1:
            raise ValueError(f"grads[{i}] must be a vector of shape (n,), got {tuple(row.shape)}; flatten it first")
        vectors.append(row.detach().contiguous())
    first = vectors[0]
    for i, row in enumerate(vectors):
        if row.dtype != first.dtype:
            raise TypeError(
                f"grads[{i}] has dtype {row.dtype} but grads[0] has {first.dtype}; bring all rows to one dtype"
            )
        if row.device != first.device:
            raise ValueError(
                f"grads[{i}] is on {row.device} but grads[0] is on {first.device}; move all rows to one device"
            )
        if row.shape != first.shape:
            raise ValueError(
                f"grads[{i}] has {row.numel()} elements but grads[0] has {first.numel()}; "
                "every loss needs its gradient over the same parameters"
            )
    return Rows(len(vectors), first.numel(), first.dtype, first.device, None, tuple(vectors))


def _as_real(tensor: Tensor, name: str) -> Tensor:
    """The real view of a complex tensor, its last dimension twice as long; an error for what has no gradient."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; call .to_dense() first")
    if tensor.is_quantized:
        raise TypeError(f"{name} must not be quantised, got {tensor.dtype}; call .dequantize() first")
    if tensor.dtype in REAL_OF_COMPLEX and tensor.dim() >= 1:
        return torch.view_as_real(tensor.resolve_conj().contiguous()).flatten(-2)
    raise TypeError(
        f"{name} must be float32, float64, bfloat16, float16 or complex, got {tensor.dtype}; convert it with .to()"
    )


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


def check_out(out: Tensor, rows: Rows, complex_dtype: torch.dtype | None) -> Tensor:
    """Validate ``out`` against the rows it will combine, and return it as the real (n,) vector to write.

    Raises:
        TypeError: not a tensor, or another dtype than the rows'.
        ValueError: another shape or device, non-contiguous, or overlapping the rows in memory.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    wanted = complex_dtype or rows.dtype
    length = rows.n // 2 if complex_dtype else rows.n
    if out.dtype != wanted:
        raise TypeError(f"out must have the rows' dtype {wanted}, got {out.dtype}; allocate it with that dtype")
    if out.device != rows.device:
        raise ValueError(f"out must be on the rows' device {rows.device}, got {out.device}; allocate it there")
    if out.shape != (length,):
        raise ValueError(f"out must have shape ({length},), got {tuple(out.shape)}; allocate it with that shape")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}; pass a contiguous vector")
    out = out.detach()
    if complex_dtype:
        out = torch.view_as_real(out).flatten()
    if any(_overlap(out, tensor) for tensor in rows.tensors()):
        raise ValueError(
            "out overlaps grads in memory, so the result would overwrite rows still to be read; pass another tensor"
        )
    return out


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges spanned by two strided tensors of one device meet."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    first_a, last_a = _span(a)
    first_b, last_b = _span(b)
    return first_a <= last_b and first_b <= last_a


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte address a strided tensor touches."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + (extent + 1) * tensor.element_size() - 1
