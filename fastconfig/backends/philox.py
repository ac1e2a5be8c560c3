"""Random numbers that need no memory: what a column gets depends on a seed and the column's number alone.

They are those of Triton's ``tl.rand4x(seed, column // 4)``, word ``column % 4``, so that every backend draws the same
bits: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), here in int64, no product of
which leaves its range.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = 4
"""Columns that share a counter: all the words that it gives."""

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_SCALE = 4.6566127342e-10
"""Just under 2^-31, so that no word is rounded to 1."""


def uniform(seed: Tensor, first: int, count: int) -> Tensor:
    """Numbers in [0, 1) for ``count`` columns from number ``first`` on.

    Args:
        seed: one int64, read as 64 bits, on the device where the numbers are wanted.
        first: the first column's number, from 0 to 2^63 - 1.
        count: how many columns.

    Returns:
        (count,) float64 holding float32 values, on the seed's device.
    """
    counters = torch.arange(first // WORDS, (first + count - 1) // WORDS + 1, device=seed.device)
    words = torch.stack(philox(seed, counters), dim=1).flatten()[first % WORDS :][:count]
    # Triton reads the word as a signed number and takes the complement of a negative one.
    magnitudes = torch.where(words > _WORD >> 1, _WORD - words, words)
    return (magnitudes.to(torch.float32) * _SCALE).to(torch.float64)


def philox(seed: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, from 0 to 2^32 - 1, of each counter (low word, high word, 0, 0) under the key ``seed``."""
    c0, c1 = counters & _WORD, counters >> 32 & _WORD
    c2 = c3 = torch.zeros_like(counters)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _product(words: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of words, by halves of the first."""
    low = (words & 0xFFFF) * multiplier
    carried = (words >> 16) * multiplier + (low >> 16)
    return carried >> 16, (carried & 0xFFFF) << 16 | low & 0xFFFF
