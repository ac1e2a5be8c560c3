"""The launched kernel of the methods' rules: a Gramian in memory to weights, one constant a rule."""

import triton
import triton.language as tl

from .arrival import arrived_last, sum_of_partials
from .config_rule import active_rows
from .gramian_rules import (
    ALIGNED,
    CAGRAD,
    CONSTANT,
    DUALPROJ,
    FAIRGRAD,
    GRADVAC,
    IMTLG,
    INVERSE_NORM,
    MGDA,
    NASH,
    PCGRAD,
    PRIORITY,
    SDMGRAD,
    UPGRAD,
    VECTORS,
    aligned_weights,
    bargain_weights,
    cagrad_weights,
    constant_weights,
    dualproj_weights,
    imtlg_weights,
    inverse_norm_weights,
    mgda_weights,
    prepare,
    sdmgrad_weights,
    surgery_weights,
    upgrad_part,
)

# As in ``launched``: no compilation depends on the value of a number or on where a tensor lies.
UNSPECIALIZED = [
    "gramian",
    "weights",
    "preferences",
    "operand",
    "first",
    "second",
    "third",
    "fourth",
    "tickets",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rule_of_gramian(
    gramian,
    weights,
    preferences,
    operand,
    first: tl.float64,
    second: tl.float64,
    third: tl.float64,
    fourth: tl.float64,
    scratch,
    tickets,
    M: tl.constexpr,
    MP: tl.constexpr,
    KIND: tl.constexpr,
    DROP: tl.constexpr,
    SHARES: tl.constexpr,
    ONLY_PREFERRED: tl.constexpr,
    FENCE: tl.constexpr,
):
    """A method's weights of a Gramian in memory, by one program; UPGrad's by M, one a row.

    Args:
        gramian: (M, M) float64 contiguous.
        weights: (M,) float64, written.
        preferences: (M,) float64, or None for 1 each.
        operand: float64, what the rule reads besides, or None: CONSTANT's weights, PCGRAD's order, PRIORITY's places,
            GRADVAC's targets and order, SDMGRAD's weights; what the last two remember is brought up to date.
        first, second, third, fourth: the rule's numbers.
        scratch: ``geometry.rule_elements`` float64 that no other launch uses meanwhile.
        tickets: int32 zeros, one, zero again when the launch ends; None with one program.
        KIND: the rule, one of those of ``gramian_rules``.
        DROP: leave non-finite rows out; else they make every weight NaN.
        SHARES, ONLY_PREFERRED: as ``gramian_rules.prepare``.
        FENCE: as ``arrival.arrived_last``.
    """
    i = tl.arange(0, MP)
    inside = i < M
    if KIND == UPGRAD:
        row = tl.program_id(0)
        own = scratch + row * (VECTORS * MP + 3 * MP * MP)
        parts = scratch + M * (VECTORS * MP + 3 * MP * MP)
        prepare(gramian, preferences, own, M, MP, SHARES, ONLY_PREFERRED)
        tl.store(parts + row * MP + i, upgrad_part(own, row, M, MP))
        if arrived_last(tickets, M, FENCE):
            found = sum_of_partials(parts, 0, M, 0, MP, MP, MP)
            tl.store(weights + i, checked(found, gramian, M, MP, DROP), mask=inside)
    else:
        total = prepare(gramian, preferences, scratch, M, MP, SHARES, ONLY_PREFERRED)
        if KIND == CONSTANT:
            found = constant_weights(operand, total, first, scratch, M, MP)
        elif KIND == INVERSE_NORM:
            found = inverse_norm_weights(scratch, first, MP)
        elif KIND == PCGRAD or KIND == PRIORITY or KIND == GRADVAC:
            found = surgery_weights(gramian, operand, first, scratch, M, MP, KIND, DROP)
        elif KIND == MGDA:
            found = mgda_weights(scratch, M, MP)
        elif KIND == CAGRAD:
            found = cagrad_weights(scratch, first, second, M, MP)
        elif KIND == IMTLG:
            found = imtlg_weights(scratch, M, MP)
        elif KIND == NASH or KIND == FAIRGRAD:
            found = bargain_weights(scratch, first, second, M, MP)
        elif KIND == ALIGNED:
            found = aligned_weights(scratch, first, M, MP)
        elif KIND == DUALPROJ:
            found = dualproj_weights(scratch, M, MP)
        elif KIND == SDMGRAD:
            found = sdmgrad_weights(gramian, operand, first, second, third, fourth, scratch, M, MP, DROP)
        tl.store(weights + i, checked(found, gramian, M, MP, DROP), mask=inside)


@triton.jit
def checked(found, gramian, M: tl.constexpr, MP: tl.constexpr, DROP: tl.constexpr):
    """[MP] the weights, exactly 0 where not active; all of them NaN where a row is not finite and none is dropped."""
    finite, active, _ = active_rows(gramian, M, MP)
    found = tl.where(active, found, 0.0)
    if not DROP:
        found = tl.where(tl.max(tl.where(finite, 0, 1)) > 0, float("nan"), found)
    return found
