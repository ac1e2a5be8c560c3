"""Sums of products in two float32 numbers each: the arithmetic of devices with few float64 units.

There it is six times as quick as float64 and, over a run of columns, as accurate. It is the compensated dot product of
Ogita, Rump & Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005), algorithm 5.3, with the errors of
products by fused multiply-adds. Ten operations a product, seven where products are exact, as those of two 16-bit
numbers are.

The bound. Let u = 2⁻²⁴, and S the largest Σ|xy| of a sum so far. ``add_product`` changes high + low by xy, but for the
rounding of the two additions that carry errors: each error is at most uS, and so is |low| after ``normalised``, so that
after T products more |low| ≤ (T + 1)uS, and each rounds to within u of that. L products in groups of T between
normalisations err by no more than L(T + 3)u²S in all; a run of 128 columns in groups of 4 or 8, by 1408·2⁻⁴⁸ < 2⁻³⁷ of
Σ|xy|, which is at most the product of the two rows' norms. That is the worst case, all roundings on one side; they are
on both, and what is seen is 2⁻⁴⁸. Sums of runs are float64.

The range. Products of float32 leave its exponents, so elements are scaled by 2²⁴ and the rows' largest elements of a
run must be zero or lie between 2⁻³⁶ and 2⁵⁰ after that: 2⁻⁶⁰ (8.7e-19) and 2²⁶ (6.7e7) before. Then no product, nor a
sum of 2²⁷ of them, overflows, and what products lose as denormals, at most 2⁻¹⁵⁰ each, is less than 2⁻⁷⁸ of the
product of the two rows' largest. Runs that do not fit are summed in float64.
"""

import triton
import triton.language as tl

SCALE = tl.constexpr(2.0**24)
UNSCALE = tl.constexpr(2.0**-48)
"""What takes the scale out of a product again."""
LEAST = tl.constexpr(2.0**-36)
LARGEST = tl.constexpr(2.0**50)


@triton.jit
def scaled(x):
    """Elements of a dtype of up to 32 bits in float32, scaled."""
    return x.to(tl.float32) * SCALE


@triton.jit
def add(high, low, x):
    """(high, low) with the float32 number x added."""
    total = high + x
    part = total - high
    return total, low + ((high - (total - part)) + (x - part))


@triton.jit
def add_product(high, low, x, y, EXACT: tl.constexpr):
    """(high, low) with x·y added; EXACT: float32 holds the product of any two."""
    product = x * y
    total = high + product
    part = total - high
    error = (high - (total - part)) + (product - part)
    if not EXACT:
        error = error + tl.fma(x, y, -product)
    return total, low + error


@triton.jit
def normalised(high, low):
    """The same sum with a low part that is at most half a unit in the last place of the high one."""
    total = high + low
    return total, low - (total - high)


@triton.jit
def sum_of_two(high, low, other_high, other_low):
    """(high, low) of two sums together, for a reduction."""
    total, error = add(high, low + other_low, other_high)
    return normalised(total, error)


@triton.jit
def fits(largest):
    """Whether a row with this largest element, scaled, does not leave the exponents of float32."""
    return (largest == 0.0) | ((largest >= LEAST) & (largest <= LARGEST))
