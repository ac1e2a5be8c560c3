"""Sums of products in two float32 numbers each: the arithmetic of devices with few float64 units.

There it is six times as quick as float64. It is the compensated dot product of Ogita, Rump & Oishi, "Accurate sum and
dot product", SIAM J. Sci. Comput. 26 (2005), algorithm 5.3, with the errors of products by fused multiply-adds. Ten
operations a product, seven where products are exact, as those of two 16-bit numbers are.

The bound, of the order u². Let u = 2⁻²⁴, S the sum of all |xy| of a run, L the products of a thread, T how many of them
stand between normalisations. The error of an addition and that of a product, at most uS together with what is left of
them, are found without error; what rounds is

- the sum of the two: 2u²S a product;
- its addition to low: as |low| ≤ uS after ``normalised``, it is at most (T + 2)uS, so (T + 2)u²S a product;
- ``normalised`` itself, where terms have cancelled until high is smaller than low: (T + 2)u²S once in T products;
- ``sum_of_two``, of up to 256 threads' sums in eight steps: less than 64u²S in all.

With T = 4 or 8 and L = 128 that is at most 128·(10 + 2 + 1.25)u²S + 64u²S = 1760·2⁻⁴⁸S < 2⁻³⁷S, and S is at most the
product of the two rows' norms. It is the worst case, all roundings on one side; the tests hold sums to 2⁻⁴⁴S. Sums of
runs are float64, whose own worst case is 2⁻⁵³S times the columns that a thread adds up.

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
