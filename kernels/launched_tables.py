"""The kernels that write the tables which those of M-ConFIG's step read: without the host's memory, for graphs.

They are launched when a table changes, not every step.
"""

import triton
import triton.language as tl

from .parameters import GROUP

# As ``launched.UNSPECIALIZED``.
UNSPECIALIZED = [
    "table",
    "losses",
    "first",
    "count",
    *(f"loss{u}" for u in range(8)),
    *(f"address{u}" for u in range(8)),
    "groups",
    "group",
    "lr",
    "weight_decay",
    "eps",
    "along",
    "lr_address",
    "lr_is_double",
    "assign",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def table_of_gradients(
    table,
    losses: tl.int32,
    first: tl.int32,
    count: tl.int32,
    loss0: tl.int32,
    loss1: tl.int32,
    loss2: tl.int32,
    loss3: tl.int32,
    loss4: tl.int32,
    loss5: tl.int32,
    loss6: tl.int32,
    loss7: tl.int32,
    address0: tl.int64,
    address1: tl.int64,
    address2: tl.int64,
    address3: tl.int64,
    address4: tl.int64,
    address5: tl.int64,
    address6: tl.int64,
    address7: tl.int64,
):
    """Write up to 8 gradients' addresses and the places of their scales into a table, without the host's memory.

    Args:
        table: (2·losses,) int64, as ``moments_of_many`` has it; the entries of other losses stay.
        first: the place of the first gradient's scale, the others' follow.
        count: how many gradients there are, at most 8.
    """
    indices = (loss0, loss1, loss2, loss3, loss4, loss5, loss6, loss7)
    addresses = (address0, address1, address2, address3, address4, address5, address6, address7)
    for u in tl.static_range(8):
        tl.store(table + indices[u], addresses[u], mask=u < count)
        tl.store(table + losses + indices[u], (first + u).to(tl.int64), mask=u < count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def table_of_group(
    groups,
    group: tl.int32,
    lr: tl.float64,
    weight_decay: tl.float64,
    eps: tl.float64,
    along: tl.float64,
    lr_address: tl.int64,
    lr_is_double: tl.int64,
    assign: tl.int64,
):
    """Write a group's entry of the table of ``parameters``."""
    words = groups + group * GROUP
    numbers = words.to(tl.pointer_type(tl.float64))
    zero = tl.full([], 0.0, tl.float64)  # by adding to it, the interpreter, too, keeps the numbers in float64
    tl.store(numbers, zero + lr)
    tl.store(numbers + 1, zero + weight_decay)
    tl.store(numbers + 2, zero + eps)
    tl.store(numbers + 3, zero + along)
    tl.store(words + 4, lr_address)
    tl.store(words + 5, lr_is_double)
    tl.store(words + 6, assign)
