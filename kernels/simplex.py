"""Projected gradient descent with momentum on the simplex: SDMGrad's weights (arXiv 2305.18409, alg. 1)."""

import triton
import triton.language as tl

from .matrices import times


@triton.jit
def project_on_simplex(point, active, projected, MP: tl.constexpr):
    """Write the nearest point with w ≥ 0 and Σ w = 1 over the active rows; all zeros where there is none.

    Source: Duchi et al., ICML 2008: w = max(v - θ, 0), θ = max_k (v_(1) + … + v_(k) - 1)/k over the sorted v. The
    largest of these needs no order: each row sums what is as large as itself.
    """
    i = tl.arange(0, MP)
    inside = tl.load(active + i) > 0.0
    # Shifting all by the largest changes nothing but that 1 is not lost beside it.
    largest = tl.max(tl.where(inside, tl.load(point + i), -float("inf")))
    largest = tl.where(largest > -float("inf"), largest, 0.0)
    own = tl.load(point + i)[None, :] - largest
    others = tl.load(point + i)[:, None] - largest
    as_large = (tl.load(active + i)[:, None] > 0.0) & (others >= own)
    count = tl.sum(tl.where(as_large, 1.0, 0.0), axis=0)
    total = tl.sum(tl.where(as_large, others, 0.0), axis=0)
    level = tl.max(tl.where(inside, (total - 1.0) / tl.maximum(count, 1.0), -float("inf")))
    tl.store(projected + i, tl.where(inside, tl.maximum(tl.load(point + i) - largest - level, 0.0), 0.0))
    tl.debug_barrier()


@triton.jit
def descend_on_simplex(matrix, preference, active, lam, rate, momentum, steps, w, work, MP: tl.constexpr):
    """Take steps on ½ (w + lam·p)ᵀB(w + lam·p) from ``w``, in place.

    Args:
        matrix: B.
        steps: float64, as all numbers of a rule are.
        work: 3·MP float64.
    """
    i = tl.arange(0, MP)
    velocity = work
    moved = work + MP
    shifted = work + 2 * MP
    tl.store(velocity + i, tl.zeros([MP], tl.float64))
    tl.store(moved + i, tl.load(w + i))
    tl.debug_barrier()
    project_on_simplex(moved, active, w, MP)
    step = 0
    while step < steps:
        step += 1
        tl.store(shifted + i, tl.load(w + i) + lam * tl.load(preference + i))
        tl.debug_barrier()
        speed = momentum * tl.load(velocity + i) + times(matrix, shifted, MP)
        tl.debug_barrier()
        tl.store(velocity + i, speed)
        tl.store(moved + i, tl.load(w + i) - rate * speed)
        tl.debug_barrier()
        project_on_simplex(moved, active, w, MP)
