"""The methods' rules from the Gramian to weights, each by one program; ``fastconfig.backends.reference.rule_weights``.

They share what ``prepare`` writes, all float64, m padded to MP, a power of two: the unit rows' Gramian C, the inverse
norms, and the preferences, all three 0 in rows that are not active. As in ``config_rule`` everything is handed on in
memory, with a barrier after every write.
"""

import triton
import triton.language as tl

from . import geometry
from .config_rule import active_rows, solve_direction, store_unit_gramian
from .jacobi import diagonalise
from .matrices import cells, copy_matrix, multiply, times
from .newton import is_solved, power_of, solve_bargain
from .quadratic import minimise_nonnegative, start_empty
from .simplex import descend_on_simplex
from .surgery import project_conflicts, raise_cosines, store_order, sum_of_changed

# The kinds, in the order of KIND_NAMES.
CONSTANT = tl.constexpr(0)
INVERSE_NORM = tl.constexpr(1)
PCGRAD = tl.constexpr(2)
PRIORITY = tl.constexpr(3)
MGDA = tl.constexpr(4)
CAGRAD = tl.constexpr(5)
IMTLG = tl.constexpr(6)
NASH = tl.constexpr(7)
FAIRGRAD = tl.constexpr(8)
ALIGNED = tl.constexpr(9)
DUALPROJ = tl.constexpr(10)
UPGRAD = tl.constexpr(11)
GRADVAC = tl.constexpr(12)
SDMGRAD = tl.constexpr(13)
KIND_NAMES = (
    "constant",
    "inverse_norm",
    "pcgrad",
    "priority",
    "mgda",
    "cagrad",
    "imtlg",
    "nash",
    "fairgrad",
    "aligned",
    "dualproj",
    "upgrad",
    "gradvac",
    "sdmgrad",
)

RTOL = tl.constexpr(1e-12)
VECTORS = tl.constexpr(geometry.RULE_VECTORS)
MAX_LEVELS = tl.constexpr(40)  # of CAGrad's search; 14 were seen
ON_THE_SPHERE = tl.constexpr(1.0 + 1e-14)


@triton.jit
def matrix_of(scratch, number: tl.constexpr, MP: tl.constexpr):
    """One of the (MP, MP) matrices behind the vectors; the first is C."""
    return scratch + VECTORS * MP + number * MP * MP


@triton.jit
def vector_of(scratch, number: tl.constexpr, MP: tl.constexpr):
    """One of the vectors of MP numbers: 0 active, 1 inverse norms, 2 preferences; the rest is a rule's own."""
    return scratch + number * MP


@triton.jit
def prepare(
    gramian,
    preferences,
    scratch,
    M: tl.constexpr,
    MP: tl.constexpr,
    SHARES: tl.constexpr,
    ONLY_PREFERRED: tl.constexpr,
):
    """Write what every rule begins with. Returns the sum of the preferences of all finite rows, zero ones too.

    Args:
        preferences: (M,) float64, or None for 1 each.
        SHARES: whether they are taken over that sum.
        ONLY_PREFERRED: whether rows of preference 0 are not active.
    """
    i = tl.arange(0, MP)
    inverse_norms = vector_of(scratch, 1, MP)
    finite, active, norms = active_rows(gramian, M, MP)
    preference = tl.where(i < M, 1.0, 0.0).to(tl.float64)
    if preferences is not None:
        preference = tl.load(preferences + i, mask=i < M, other=0.0)
    total = tl.sum(tl.where(finite, preference, 0.0))
    if ONLY_PREFERRED:
        active = active & (preference > 0.0)
    if SHARES:
        preference = quotient(preference, total)
    tl.store(vector_of(scratch, 0, MP) + i, tl.where(active, 1.0, 0.0).to(tl.float64))
    tl.store(inverse_norms + i, tl.where(active, 1.0 / tl.where(active, norms, 1.0), 0.0))
    tl.store(vector_of(scratch, 2, MP) + i, tl.where(active, preference, 0.0))
    tl.debug_barrier()
    store_unit_gramian(gramian, inverse_norms, matrix_of(scratch, 0, MP), M, MP)
    return total


@triton.jit
def all_of(flags):
    """Whether all are true."""
    return tl.min(tl.where(flags, 1, 0)) > 0


@triton.jit
def largest_norm(scratch, MP: tl.constexpr):
    """The largest norm of an active row; 1 where there is none."""
    inverse = tl.load(vector_of(scratch, 1, MP) + tl.arange(0, MP))
    smallest = tl.min(tl.where(inverse > 0.0, inverse, float("inf")))
    return tl.where(smallest < float("inf"), 1.0 / smallest, 1.0)


@triton.jit
def relative_norms(scratch, MP: tl.constexpr):
    """[MP] norms over the largest one, at most 1; 0 where not active."""
    inverse = tl.load(vector_of(scratch, 1, MP) + tl.arange(0, MP))
    return tl.where(inverse > 0.0, 1.0 / tl.where(inverse > 0.0, inverse, 1.0) / largest_norm(scratch, MP), 0.0)


@triton.jit
def store_along_all(scratch, along, MP: tl.constexpr):
    """Write η, η_i = (smallest norm)/|g_i|, at most 1; 0 where not active."""
    i = tl.arange(0, MP)
    inverse = tl.load(vector_of(scratch, 1, MP) + i)
    largest = tl.max(inverse)
    tl.store(along + i, inverse / tl.where(largest > 0.0, largest, 1.0))
    tl.debug_barrier()


@triton.jit
def quotient(x, y):
    """x/y, and 0 where y is 0."""
    return tl.where(y != 0.0, x / tl.where(y != 0.0, y, 1.0), 0.0)


@triton.jit
def constant_weights(operand, total, divided, scratch, M: tl.constexpr, MP: tl.constexpr):
    """[MP] the operand, or the preferences where there is none; over the preferences' total with ``divided``."""
    i = tl.arange(0, MP)
    weights = tl.load(vector_of(scratch, 2, MP) + i)
    if operand is not None:
        weights = tl.load(operand + i, mask=i < M, other=0.0)
    return tl.where(divided != 0.0, quotient(weights, total), weights)


@triton.jit
def inverse_norm_weights(scratch, power, MP: tl.constexpr):
    """[MP] p_i |g_i|^-power, scaled to their sum without the norms."""
    i = tl.arange(0, MP)
    store_along_all(scratch, vector_of(scratch, 3, MP), MP)
    along = tl.load(vector_of(scratch, 3, MP) + i)
    preference = tl.load(vector_of(scratch, 2, MP) + i)
    # The largest factor is 1, whatever the power's sign.
    logarithm = power * tl.log(tl.where(along > 0.0, along, 1.0))
    highest = tl.max(tl.where(along > 0.0, logarithm, -float("inf")))
    factor = tl.where(along > 0.0, tl.exp(logarithm - tl.where(highest > -float("inf"), highest, 0.0)), 0.0)
    return preference * factor * quotient(tl.sum(preference), tl.sum(preference * factor))


@triton.jit
def surgery_weights(
    gramian, operand, first, scratch, M: tl.constexpr, MP: tl.constexpr, KIND: tl.constexpr, DROP: tl.constexpr
):
    """[MP] the weights of PCGrad, Priority and GradVac."""
    unit = matrix_of(scratch, 0, MP)
    changed = matrix_of(scratch, 1, MP)
    products = matrix_of(scratch, 2, MP)
    order = matrix_of(scratch, 3, MP)
    change = vector_of(scratch, 3, MP)
    active = vector_of(scratch, 0, MP)
    if KIND == GRADVAC:
        store_order(operand + M * M, active, order, False, M, MP)
        finite, _, _ = active_rows(gramian, M, MP)
        learns = all_of(finite)
        if DROP:
            learns = first == first
        squares = vector_of(scratch, 4, MP)
        terms = vector_of(scratch, 5, MP)
        raise_cosines(unit, changed, products, order, operand, first, learns, squares, terms, change, M, MP)
    else:
        store_order(operand, active, order, KIND == PRIORITY, M, MP)
        project_conflicts(unit, changed, products, order, change, M, MP)
    return sum_of_changed(changed, vector_of(scratch, 2, MP), vector_of(scratch, 1, MP), MP)


@triton.jit
def start_shortest(scratch, MP: tl.constexpr):
    """Set out to find the point Σ w_i g_i of the hull that is nearest to 0, in y, y_i = w_i |g_i| up to a scale; MGDA.

    Source: arXiv 1810.04650, eq. 3. With the sum of w as one more coordinate the simplex becomes y ≥ 0: the least
    squares ½ |Σ y_i u_i|² + ½ (ηᵀy - 1)² have the same direction, where η_i |g_i|, in vector 3, is the same for all.

    Writes the matrix C + ηηᵀ into matrix 1, and its tableau and free set into matrix 2 and vector 4. Returns what
    ``start_empty`` does.
    """
    i = tl.arange(0, MP)
    along = vector_of(scratch, 3, MP)
    matrix = matrix_of(scratch, 1, MP)
    ones = tl.load(along + i)[:, None] * tl.load(along + i)[None, :]
    tl.store(matrix + cells(MP), tl.load(matrix_of(scratch, 0, MP) + cells(MP)) + ones)
    tl.debug_barrier()
    return start_empty(matrix, matrix_of(scratch, 2, MP), vector_of(scratch, 4, MP), MP)


@triton.jit
def minimise(scratch, target, y, damage, M: tl.constexpr, MP: tl.constexpr):
    """As ``minimise_nonnegative``, of matrix 1 with tableau 2; the free set in vector 4, work in vectors 5 to 9."""
    return minimise_nonnegative(
        matrix_of(scratch, 1, MP),
        target,
        matrix_of(scratch, 2, MP),
        vector_of(scratch, 4, MP),
        vector_of(scratch, 0, MP),
        y,
        vector_of(scratch, 5, MP),
        damage,
        M,
        MP,
    )


@triton.jit
def square_of(unit, y, MP: tl.constexpr):
    """(yᵀCy, Σ y²)."""
    values = tl.load(y + tl.arange(0, MP))
    return tl.maximum(tl.sum(values * times(unit, y, MP)), 0.0), tl.sum(values * values)


@triton.jit
def mgda_weights(scratch, M: tl.constexpr, MP: tl.constexpr):
    """[MP] the simplex's weights; zeros where the hull holds 0."""
    i = tl.arange(0, MP)
    y = vector_of(scratch, 10, MP)
    store_along_all(scratch, vector_of(scratch, 3, MP), MP)
    damage = start_shortest(scratch, MP)
    minimise(scratch, vector_of(scratch, 3, MP), y, damage, M, MP)
    square, own = square_of(matrix_of(scratch, 0, MP), y, MP)
    w = tl.load(y + i) * tl.load(vector_of(scratch, 3, MP) + i)
    return tl.where(square <= RTOL * own, 0.0, quotient(w, tl.sum(w)))


@triton.jit
def cagrad_weights(scratch, radius, divisor, M: tl.constexpr, MP: tl.constexpr):
    """[MP] (p + v)/divisor; Σ v_i g_i leads from the mean g0 to the best point of a ball of radius·|g0| around it.

    Source: arXiv 2110.14048, eq. 3. The nearest point to g0 with g_i·d ≥ t for all i is g0 + Σ v_i g_i with the v ≥ 0
    that minimises ½vᵀKv + (Kp - t)ᵀv. Its distance n(t) is convex and grows with t, so that Newton's method for
    n(t) = radius·|g0| comes from above without fail, and ends, as n² is quadratic between finitely many t. It starts
    from the shortest point w of the hull, which says that no t over (Kp)ᵀw + radius·|g0|·|Gᵀw| can be; if that is 0,
    from t = 0.
    """
    i = tl.arange(0, MP)
    unit = matrix_of(scratch, 0, MP)
    along = vector_of(scratch, 3, MP)
    y = vector_of(scratch, 10, MP)
    mean = vector_of(scratch, 11, MP)
    products = vector_of(scratch, 12, MP)
    target = vector_of(scratch, 13, MP)
    distance = vector_of(scratch, 14, MP)  # one number, kept there as registers are short
    tl.store(mean + i, tl.load(vector_of(scratch, 2, MP) + i) * relative_norms(scratch, MP))
    tl.debug_barrier()
    multiply(unit, mean, products, MP)
    mean_square = tl.maximum(tl.sum(tl.load(mean + i) * tl.load(products + i)), 0.0)
    tl.store(distance, radius * tl.sqrt(mean_square))
    store_along_all(scratch, along, MP)
    damage = start_shortest(scratch, MP)
    tl.store(target + i, tl.load(along + i))
    tl.debug_barrier()
    searching = tl.load(distance) > 0.0
    level = damage * 0.0
    steps = 0
    while searching & (steps < MAX_LEVELS):
        damage = minimise(scratch, target, y, damage, M, MP)
        square, own = square_of(unit, y, MP)
        lower = highest_level(y, along, products, distance, square, MP)
        if steps == 0:  # the shortest point; from here on the program is that of a level
            level = tl.where(square <= RTOL * own, 0.0, lower)
            copy_matrix(unit, matrix_of(scratch, 1, MP), MP)
            damage = start_empty(unit, matrix_of(scratch, 2, MP), vector_of(scratch, 4, MP), MP)
        else:
            searching = (tl.sqrt(square) > tl.load(distance) * ON_THE_SPHERE) & (lower < level)
            level = tl.where(searching, lower, level)
        tl.store(target + i, level * tl.load(along + i) - tl.load(products + i))
        tl.debug_barrier()
        steps += 1
    added = tl.load(y + i) * tl.load(vector_of(scratch, 1, MP) + i) * largest_norm(scratch, MP)
    weights = tl.load(vector_of(scratch, 2, MP) + i) + tl.where(tl.load(distance) > 0.0, added, 0.0)
    mean_square = tl.sum(tl.load(mean + i) * tl.load(products + i))
    return tl.where(mean_square > 0.0, weights / divisor, 0.0)


@triton.jit
def highest_level(y, along, products, distance, square, MP: tl.constexpr):
    """What g_i·d ≥ t allows t to be at most, by the weights y: also the next of Newton's steps."""
    i = tl.arange(0, MP)
    values = tl.load(y + i)
    level = tl.sum(tl.load(products + i) * values) + tl.load(distance) * tl.sqrt(square)
    return quotient(level, tl.sum(tl.load(along + i) * values))


@triton.jit
def imtlg_weights(scratch, M: tl.constexpr, MP: tl.constexpr):
    """[MP] ConFIG's direction, scaled to weights with sum 1 (IMTL-G, ICLR 2021, eq. 7)."""
    i = tl.arange(0, MP)
    solution = vector_of(scratch, 3, MP)
    wanted = vector_of(scratch, 0, MP)
    solve_direction(
        matrix_of(scratch, 0, MP),
        matrix_of(scratch, 1, MP),
        matrix_of(scratch, 2, MP),
        wanted,
        vector_of(scratch, 4, MP),
        solution,
        tl.sum(tl.load(wanted + i)),
        RTOL,
        M,
        MP,
    )
    direction = tl.load(solution + i)
    store_along_all(scratch, vector_of(scratch, 4, MP), MP)
    weights = direction * tl.load(vector_of(scratch, 4, MP) + i)
    return quotient(weights, tl.sum(weights))


@triton.jit
def bargain_weights(scratch, beta, max_norm, M: tl.constexpr, MP: tl.constexpr):
    """[MP] a with (Ka)_i = p_i a_i^-β; zeros where there is none, as the hull of the unit rows holds 0.

    Args:
        max_norm: the most that |Σ a_i g_i| may be, to which longer ones are scaled; 0 for any.
    """
    i = tl.arange(0, MP)
    unit = matrix_of(scratch, 0, MP)
    active = vector_of(scratch, 0, MP)
    factors = vector_of(scratch, 11, MP)
    x = vector_of(scratch, 12, MP)
    norms = relative_norms(scratch, MP)
    scaled = power_of(tl.where(norms > 0.0, norms, 1.0), beta - 1.0)
    tl.store(factors + i, tl.load(vector_of(scratch, 2, MP) + i) * scaled)
    tl.debug_barrier()
    solve_bargain(
        unit,
        factors,
        beta,
        matrix_of(scratch, 1, MP),
        matrix_of(scratch, 2, MP),
        active,
        x,
        vector_of(scratch, 13, MP),
        vector_of(scratch, 5, MP),
        M,
        MP,
    )
    opposed = ~is_solved(unit, factors, beta, active, x, MP)
    if opposed:
        opposed = holds_zero(scratch, M, MP)
    values = tl.load(x + i) * tl.load(active + i)
    norm = tl.sqrt(tl.maximum(tl.sum(values * times(unit, x, MP)), 0.0))
    largest = largest_norm(scratch, MP)
    unscaled = largest * power_of(largest, -2.0 / (1.0 + beta))
    weights = values * tl.load(vector_of(scratch, 1, MP) + i) * unscaled
    too_long = (max_norm > 0.0) & (norm * unscaled > max_norm)
    weights = tl.where(too_long, weights * quotient(max_norm, norm * unscaled), weights)
    return tl.where(opposed, 0.0, weights)


@triton.jit
def holds_zero(scratch, M: tl.constexpr, MP: tl.constexpr):
    """Whether the hull of the unit rows holds 0. Overwrites what ``minimise`` does."""
    i = tl.arange(0, MP)
    y = vector_of(scratch, 10, MP)
    tl.store(vector_of(scratch, 3, MP) + i, tl.load(vector_of(scratch, 0, MP) + i))
    tl.debug_barrier()
    damage = start_shortest(scratch, MP)
    minimise(scratch, vector_of(scratch, 3, MP), y, damage, M, MP)
    square, own = square_of(matrix_of(scratch, 0, MP), y, MP)
    return square <= RTOL * own


@triton.jit
def aligned_weights(scratch, scale, M: tl.constexpr, MP: tl.constexpr):
    """[MP] V √(s/Λ) Vᵀp, K = VΛVᵀ, of the eigenvalues over RTOL times the largest; Aligned-MTL.

    Source: arXiv 2305.19000, eq. 8; s is the least (scale 0), the median (1, the lower of two) or the mean (2).
    """
    i = tl.arange(0, MP)
    matrix = matrix_of(scratch, 1, MP)
    along = vector_of(scratch, 3, MP)
    squares = vector_of(scratch, 4, MP)
    left = relative_norms(scratch, MP)
    tl.store(along + i, left)
    tl.debug_barrier()
    scaled = tl.load(matrix_of(scratch, 0, MP) + cells(MP)) * tl.load(along + i)[:, None] * tl.load(along + i)[None, :]
    tl.store(matrix + cells(MP), scaled)
    tl.debug_barrier()
    diagonalise(matrix, M, MP)
    columns = tl.load(matrix + cells(MP))  # λ_k v_k
    tl.store(squares + i, tl.sum(columns * columns, axis=0))
    tl.store(along + i, tl.sum(columns * tl.load(vector_of(scratch, 2, MP) + i)[:, None], axis=0))
    tl.debug_barrier()
    eigenvalues = tl.sqrt(tl.load(squares + i))
    largest = tl.max(eigenvalues)
    kept = ~(eigenvalues <= RTOL * largest)  # a NaN stays
    ordered = tl.where(kept, eigenvalues, float("inf"))
    tl.store(vector_of(scratch, 5, MP) + i, ordered)
    tl.debug_barrier()
    own = tl.load(vector_of(scratch, 5, MP) + i)[None, :]
    others = tl.load(vector_of(scratch, 5, MP) + i)[:, None]
    before = (others < own) | ((others == own) & (i[:, None] < i[None, :]))
    place = tl.sum(tl.where(before, 1, 0), axis=0)
    count = tl.sum(tl.where(kept, 1, 0))
    median = tl.sum(tl.where(kept & (place == (count - 1) // 2), ordered, 0.0))
    mean = tl.sum(tl.where(kept, ordered, 0.0)) / tl.maximum(count, 1).to(tl.float64)
    chosen = tl.where(scale == 0.0, tl.min(ordered), tl.where(scale == 1.0, median, mean))
    # The columns are λ_k long, and so is what lies along them.
    factor = tl.where(kept, tl.sqrt(chosen / tl.where(kept, ordered, 1.0)), 0.0)
    turned = tl.where(kept, tl.load(along + i) * factor / tl.where(kept, ordered * ordered, 1.0), 0.0)
    tl.debug_barrier()
    tl.store(along + i, turned)
    tl.debug_barrier()
    return tl.sum(tl.load(matrix + cells(MP)) * tl.load(along + i)[None, :], axis=1)


@triton.jit
def project_on_dual_cone(scratch, target, y, M: tl.constexpr, MP: tl.constexpr):
    """Write the y ≥ 0 that minimises ½ yᵀCy - bᵀy, by ``minimise``, which keeps matrix 1 as C."""
    copy_matrix(matrix_of(scratch, 0, MP), matrix_of(scratch, 1, MP), MP)
    damage = start_empty(matrix_of(scratch, 1, MP), matrix_of(scratch, 2, MP), vector_of(scratch, 4, MP), MP)
    minimise(scratch, target, y, damage, M, MP)


@triton.jit
def dualproj_weights(scratch, M: tl.constexpr, MP: tl.constexpr):
    """[MP] the projection of the mean on the dual cone, DualProj (Jacobian descent, arXiv 2406.16232, sec. 3.3)."""
    i = tl.arange(0, MP)
    mean = vector_of(scratch, 3, MP)
    target = vector_of(scratch, 10, MP)
    y = vector_of(scratch, 11, MP)
    tl.store(mean + i, tl.load(vector_of(scratch, 2, MP) + i) * relative_norms(scratch, MP))
    tl.debug_barrier()
    tl.store(target + i, -times(matrix_of(scratch, 0, MP), mean, MP))
    tl.debug_barrier()
    project_on_dual_cone(scratch, target, y, M, MP)
    added = tl.load(y + i) * tl.load(vector_of(scratch, 1, MP) + i) * largest_norm(scratch, MP)
    return tl.load(vector_of(scratch, 2, MP) + i) + added


@triton.jit
def upgrad_part(scratch, row, M: tl.constexpr, MP: tl.constexpr):
    """[MP] p_i (e_i + x), row i's gradient projected on the dual cone: one part of UPGrad (arXiv 2406.16232, eq. 7)."""
    i = tl.arange(0, MP)
    target = vector_of(scratch, 10, MP)
    y = vector_of(scratch, 11, MP)
    tl.store(target + i, -tl.load(matrix_of(scratch, 0, MP) + row * MP + i))
    tl.debug_barrier()
    project_on_dual_cone(scratch, target, y, M, MP)
    inverse = tl.load(vector_of(scratch, 1, MP) + row)
    added = tl.load(y + i) * tl.load(vector_of(scratch, 1, MP) + i)
    own = tl.where(i == row, 1.0, 0.0)
    return tl.load(vector_of(scratch, 2, MP) + row) * (own + tl.where(inverse > 0.0, quotient(added, inverse), 0.0))


@triton.jit
def sdmgrad_weights(
    gramian,
    operand,
    lam,
    rate,
    momentum,
    steps,
    scratch,
    M: tl.constexpr,
    MP: tl.constexpr,
    DROP: tl.constexpr,
):
    """[MP] (w + lam·p)/(1 + lam), w brought on by some steps, SDMGrad; ``operand`` keeps it for the next call."""
    i = tl.arange(0, MP)
    matrix = matrix_of(scratch, 1, MP)
    norms = vector_of(scratch, 3, MP)
    w = vector_of(scratch, 4, MP)
    own = relative_norms(scratch, MP)
    count = tl.sum(tl.load(vector_of(scratch, 0, MP) + i))
    tl.store(norms + i, own * quotient(count, tl.sum(own)))
    tl.store(w + i, tl.load(operand + i, mask=i < M, other=0.0))
    tl.debug_barrier()
    scaled = tl.load(matrix_of(scratch, 0, MP) + cells(MP)) * tl.load(norms + i)[:, None] * tl.load(norms + i)[None, :]
    tl.store(matrix + cells(MP), scaled)
    tl.debug_barrier()
    descend_on_simplex(
        matrix,
        vector_of(scratch, 2, MP),
        vector_of(scratch, 0, MP),
        lam,
        rate,
        momentum,
        steps,
        w,
        vector_of(scratch, 5, MP),
        MP,
    )
    found = tl.load(w + i)
    finite, active, _ = active_rows(gramian, M, MP)
    learns = tl.max(tl.where(active, 1, 0)) > 0
    if not DROP:
        learns = learns & all_of(finite)
    tl.store(operand + i, found, mask=i < tl.where(learns, M, 0))
    return (found + lam * tl.load(vector_of(scratch, 2, MP) + i)) / (1.0 + lam)
