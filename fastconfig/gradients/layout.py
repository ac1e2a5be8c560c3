"""Which columns a rank holds, and which of them it owns: every column of the model has one owner among the ranks.

K is the sum over ranks of the Gramians of the columns that they own, and c·G covers all that a rank holds. Ranks that
hold the same part of a parameter hold copies of it. The columns of which the same ranks have copies are a region, and
each of these ranks owns an equal share of it: so replicas divide the work, and a shard is its rank's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fastconfig.gradients.local import runs_of, shard_of
from fastconfig.gradients.parameters import columns_of, elements_to_columns, gradient_dtype
from fastconfig.gradients.ranks import Ranks

Key = tuple[object, ...]
"""A name, and which part of the parameter of that name."""

ALIGNED = 64
"""Shares of a region begin at multiples of so many columns, where there are enough: 128 bytes of 16-bit elements."""


def share_of(columns: int, ranks: int) -> int:
    """How many columns make a rank's share of some: rounded up, so that every share begins at a multiple of ALIGNED."""
    each = -(-columns // ranks)
    return each + -each % ALIGNED


class Holding(NamedTuple):
    """A part of a parameter that a rank holds, as it tells the others."""

    key: Key
    columns: int
    dtype: str
    whole: int
    """Columns of the whole parameter, of which this is a part or all."""


class Layout:
    """Of the parameters of one buffer: who has copies of what.

    Made by all ranks together, each for its own parameters.

    Args:
        parameters: this rank's.
        names: by identity; None where they have none, and then the i-th parameters of all ranks are one.
        ranks: all that hold a part of the model.
        own: identities of parameters that are this rank's alone, though others may be named alike.

    Attributes:
        names: all distinct names of the model, in the order of the first rank that has them.

    Raises:
        ValueError: copies of different size or dtype.
    """

    def __init__(
        self, parameters: Sequence[Tensor], names: Mapping[int, str] | None, ranks: Ranks, own: Collection[int]
    ) -> None:
        self._ranks = ranks
        self._name_of: dict[int, Key] = {}
        mine = []
        for i, parameter in enumerate(parameters):
            name: Key = (i if names is None else names[id(parameter)],)
            if id(parameter) in own:
                name = (*name, "of rank", ranks.rank)
            self._name_of[id(parameter)] = name
            whole = parameter.numel() * elements_to_columns(parameter)
            key = (*name, *shard_of(parameter))
            mine.append(Holding(key, columns_of(parameter), str(gradient_dtype(parameter)), whole))
        self._key_of = {id(parameter): holding.key for parameter, holding in zip(parameters, mine, strict=True)}
        told = ranks.gather((list(self._name_of.values()), mine))
        self._holders: dict[Key, tuple[int, ...]] = {}
        self._place: dict[Key, int] = {}
        first: dict[Key, Holding] = {}
        for rank, (_, holdings) in enumerate(told):
            for holding in holdings:
                known = first.setdefault(holding.key, holding)
                if known != holding:
                    raise ValueError(
                        f"parameter {holding.key[0]!r} has {holding.columns} columns of {holding.dtype} on rank {rank} "
                        f"and {known.columns} of {known.dtype} on rank {self._holders[holding.key][0]}, so these are "
                        "no copies of one; name parameters that are a rank's own in local="
                    )
                self._place.setdefault(holding.key, len(self._place))
                self._holders[holding.key] = (*self._holders.get(holding.key, ()), rank)
        of_model = {
            name: part for names_of_rank, parts in told for name, part in zip(names_of_rank, parts, strict=True)
        }
        self.names = list(of_model)
        self._number = {name: i for i, name in enumerate(self.names)}
        self._begins: dict[Key, int] = {}
        begin = 0
        for dtype in dict.fromkeys(part.dtype for part in of_model.values()):
            for name, part in of_model.items():
                if part.dtype == dtype:
                    self._begins[name] = begin
                    begin += part.whole

    def ordered(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """By region, those alone here first; within a region in an order that is the same on every rank."""
        keyed = [(self._holders_of(p), self._place[self._key_of[id(p)]], p) for p in parameters]
        return [p for _, _, p in sorted(keyed, key=lambda item: (len(item[0]), item[0], item[1]))]

    def number(self, parameter: Tensor) -> int:
        """Which of ``names`` is this parameter's."""
        return self._number[self._name_of[id(parameter)]]

    def numbers(self, parameters: Sequence[Tensor]) -> list[tuple[int, int, int]]:
        """Which columns of the whole model ordered parameters' columns here are, numbered as in a single process.

        Returns:
            Runs: the first column here, its number in the model, and how many follow one another, both here and there.
        """
        found: list[tuple[int, int, int]] = []
        here = 0
        for parameter in parameters:
            begin, width = self._begins[self._name_of[id(parameter)]], elements_to_columns(parameter)
            for first, count in runs_of(parameter):
                there, columns = begin + first * width, count * width
                if found and found[-1][1] + found[-1][2] == there:
                    found[-1] = (*found[-1][:2], found[-1][2] + columns)
                else:
                    found.append((here, there, columns))
                here += columns
        return found

    def regions(self, parameters: Sequence[Tensor]) -> list[Region]:
        """The regions of ordered parameters, whose columns follow one another."""
        found: list[Region] = []
        first = 0
        for parameter in parameters:
            holders, last = self._holders_of(parameter), first + columns_of(parameter)
            if found and found[-1].holders == holders:
                found[-1] = found[-1]._replace(last=last)
            else:
                found.append(Region(holders, first, last))
            first = last
        return found

    def _holders_of(self, parameter: Tensor) -> tuple[int, ...]:
        return self._holders[self._key_of[id(parameter)]]


class Region(NamedTuple):
    """Columns that the same ranks hold."""

    holders: tuple[int, ...]
    first: int
    last: int

    def share(self, rank: int) -> tuple[int, int]:
        """Those that a rank owns: from the first up to, not with, the last."""
        place, count, columns = self.holders.index(rank), len(self.holders), self.last - self.first
        each = share_of(columns, count)
        return self.first + min(place * each, columns), self.first + min((place + 1) * each, columns)
