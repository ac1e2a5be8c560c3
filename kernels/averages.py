"""The losses' moving averages with this step's gradients in them: m_i ← β₁ m_i + (1 - β₁)·scale_i·g_i.

They are formed twice, in registers, once to be looked at and once to be written: by this one function, so to the same
bits. Which losses have a gradient is data, as it changes from step to step: a row without one masks its load, which
then costs no traffic, and skips the arithmetic by a branch that all threads take together.
"""

import triton
import triton.language as tl

from .rows import rounded, widened


@triton.jit
def renewed(average, gradient, kept, entering):
    """The new average, in float64 and rounded once to the dtype of the old; kept is β₁, entering (1 - β₁)·scale."""
    return rounded(widened(average) * kept + widened(gradient) * entering, average.dtype)


@triton.jit
def gradient_tile(pointers, mask):
    """Elements of a gradient: in a narrower dtype than the state's, its loads are narrower, too."""
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def is_recorded(recorded, i):
    """Whether bit i of an int64 says that loss i has a gradient."""
    return ((recorded >> i) & 1) != 0


@triton.jit
def few_gradients(addresses, slots, recorded, scales, beta1, M: tl.constexpr, GRADIENT: tl.constexpr):
    """What the tiles of up to 8 rows have to know of the gradients: (pointers, bits, slots, scales, β₁).

    Args:
        addresses: a tuple of 8 int64, where the gradient of each loss begins; of any value where there is none.
        slots: int64, byte i says which of ``scales`` is that of loss i.
        recorded: int64, bit i says whether loss i has a gradient.
        scales: float64.
        beta1: float64.
    """
    pointers = ()
    for i in tl.static_range(M):
        pointers = pointers + (tl.cast(addresses[i], tl.int64).to(tl.pointer_type(GRADIENT)),)
    return pointers, recorded, slots, scales, beta1


@triton.jit
def few_renewed(average, gradient, gradients, i):
    """The new average i, which has a gradient. Its scale is read here, once a tile, for it would fill registers."""
    _, _, slots, scales, beta1 = gradients
    scale = tl.load(scales + ((slots >> (8 * i)) & 255))
    return renewed(average, gradient, beta1, (1.0 - beta1) * scale)


@triton.jit
def table_address(table, i, inside):
    """Where the gradient of loss i begins, 0 where it has none: i a number or a tensor; of more than 8 rows."""
    return tl.load(table + i, mask=inside, other=0)


@triton.jit
def table_renewed(average, gradient, gradients, i, inside, M: tl.constexpr):
    """The new averages i of more than 8: behind the M addresses of the table stand the places of the losses' scales."""
    table, scales, beta1 = gradients
    scale = tl.load(scales + tl.load(table + M + i, mask=inside, other=0))
    return renewed(average, gradient, beta1, (1.0 - beta1) * scale)
