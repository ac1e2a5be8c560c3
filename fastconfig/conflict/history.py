"""What a ConflictMonitor has recorded, as numpy arrays: how it follows from K and c, and how it lies in a CSV file."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, combinations
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


class ConflictHistory:
    """T records of the conflict between m losses, one row each; P = m(m - 1)/2 pairs of losses.

    A gradient that is zero or not finite has no direction: its cosines are NaN, and no pair with it is counted. Of a
    loss that was absent from a step, norm, weight and decrease are NaN, too.

    Args:
        names: of the m losses.
        table: (T, 4 + 3m + P) float64, the columns as in ``columns``.

    Attributes:
        names: as given.
        table: as given.
    """

    def __init__(self, names: Sequence[str], table: Floats) -> None:
        self.names = tuple(names)
        self.table = table

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        steps: Sequence[int],
        gramians: Floats,
        weights: Floats,
        rtols: Sequence[float],
        absent: Sequence[Sequence[int]],
    ) -> ConflictHistory:
        """The records that follow from K (T, m, m), c (T, m), where an eigenvalue counts as zero and who was absent."""
        cut = np.asarray(rtols, dtype=np.float64)
        squares = np.diagonal(gramians, axis1=1, axis2=2)
        directed = np.isfinite(squares) & (squares > 0)
        with np.errstate(invalid="ignore", over="ignore"):
            norms = np.sqrt(squares)
            # A row of weight 0 took no part, NaN or not: select, don't multiply by 0.
            decreases = np.einsum("tij,tj->ti", np.where(weights[:, None, :] != 0, gramians, 0.0), weights)
        was_there = np.ones_like(weights, dtype=np.bool_)
        for step, losses in enumerate(absent):
            was_there[step, list(losses)] = False
        norms, weights, decreases = (np.where(was_there, values, np.nan) for values in (norms, weights, decreases))
        unit = _unit(gramians, squares, directed)
        ranks, conditions = _ranks_and_conditions(unit, directed, cut)
        i, j = np.triu_indices(len(names), 1)
        cosines = np.where(directed[:, i] & directed[:, j], unit[:, i, j], np.nan)
        table = np.column_stack(
            [
                np.asarray(steps, dtype=np.float64),
                norms,
                cosines,
                weights,
                decreases,
                _conflict_rates(cosines),
                ranks,
                conditions,
            ]
        )
        return cls(names, table)

    @classmethod
    def joined(cls, names: Sequence[str], histories: Iterable[ConflictHistory]) -> ConflictHistory:
        """One after the other."""
        empty = np.empty((0, len(columns_of(names))))
        return cls(names, np.concatenate([empty, *(history.table for history in histories)]))

    @classmethod
    def read_csv(cls, path: str | Path) -> ConflictHistory:
        """What a ConflictMonitor wrote into a file, to the bit.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file, or its last line is incomplete.
        """
        with open(path, encoding="utf-8", newline="") as file:
            try:
                names = names_in(file)
                rest = file.read()
                wanted = len(columns_of(names))
                table = np.loadtxt(io.StringIO(rest), delimiter=",", ndmin=2) if rest else np.empty((0, wanted))
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{path} is no CSV file of a ConflictMonitor: {error}") from None
        if table.shape[1] != wanted or (rest and not rest.endswith("\n")):
            raise ValueError(f"{path} ends in the middle of a line; remove that line")
        return cls(names, table)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self) else ""
        return f"ConflictHistory(losses={list(self.names)}, {len(self)} records{span})"

    @property
    def columns(self) -> list[str]:
        """The columns' names: step, norm.a …, cosine.a.b …, weight.a …, decrease.a …, conflict_rate, rank, condition.

        So they stand in a CSV file and in pandas.
        """
        return columns_of(self.names)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The P pairs of losses, in the order of ``cosines``' columns."""
        return list(combinations(range(len(self.names)), 2))

    @property
    def steps(self) -> NDArray[np.int64]:
        """(T,) the numbers of the steps."""
        return self.table[:, 0].astype(np.int64)

    @property
    def norms(self) -> Floats:
        """(T, m) |g_i|."""
        return self._part(0)

    @property
    def cosines(self) -> Floats:
        """(T, P) the cosines between the gradients, NaN with one that has no direction."""
        return self._part(1)

    @property
    def weights(self) -> Floats:
        """(T, m) the coefficients c that the method chose."""
        return self._part(2)

    @property
    def decreases(self) -> Floats:
        """(T, m) K c: to first order, how much a step θ ← θ - lr·g takes off each loss, per unit of lr."""
        return self._part(3)

    @property
    def conflict_rates(self) -> Floats:
        """(T,) the share of pairs whose cosine is below 0, NaN without a pair."""
        return self.table[:, -3]

    @property
    def ranks(self) -> NDArray[np.int64]:
        """(T,) how many independent directions the gradients span, as ``Combination.rank``."""
        return self.table[:, -2].astype(np.int64)

    @property
    def conditions(self) -> Floats:
        """(T,) the largest eigenvalue of the cosines over the smallest; inf where that counts as zero, NaN if none."""
        return self.table[:, -1]

    def mean_cosines(self) -> Floats:
        """(m, m) the cosines' means over the records in which a pair has one, NaN where none has; 1 on the diagonal."""
        mean = np.eye(len(self.names))
        total, count = np.zeros(len(self.pairs)), np.zeros(len(self.pairs))
        for part in np.array_split(self.cosines, 1 + len(self) // 1000):  # a long run is not copied as a whole
            there = ~np.isnan(part)
            total += np.where(there, part, 0.0).sum(axis=0)
            count += there.sum(axis=0)
        i, j = np.triu_indices(len(self.names), 1)
        mean[i, j] = mean[j, i] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return mean

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame of ``columns``, with the steps as index.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        if importlib.util.find_spec("pandas") is None:
            raise ModuleNotFoundError("to_pandas needs pandas, which is not installed; pip install pandas")
        import pandas

        frame = pandas.DataFrame(self.table[:, 1:], columns=self.columns[1:], index=self.steps)
        return frame.rename_axis("step").astype({"rank": "int64"})

    def write_rows(self, file: TextIO) -> None:
        """Append the records to a CSV file: every number in the shortest form that reads back to the bit."""
        file.write("".join(map(_line, self.table.tolist())))

    @cached_property
    def _bounds(self) -> list[int]:
        m = len(self.names)
        return list(accumulate([1, m, m * (m - 1) // 2, m, m]))

    def _part(self, index: int) -> Floats:
        return self.table[:, self._bounds[index] : self._bounds[index + 1]]


def columns_of(names: Sequence[str]) -> list[str]:
    """The columns of a history of losses of these names."""
    return [
        "step",
        *(f"norm.{name}" for name in names),
        *(f"cosine.{a}.{b}" for a, b in combinations(names, 2)),
        *(f"weight.{name}" for name in names),
        *(f"decrease.{name}" for name in names),
        "conflict_rate",
        "rank",
        "condition",
    ]


def write_header(names: Sequence[str], file: TextIO) -> None:
    """Begin a CSV file."""
    csv.writer(file, lineterminator="\n").writerow(columns_of(names))


def names_in(file: TextIO) -> tuple[str, ...]:
    """The losses' names, read from the first line of a CSV file.

    Raises:
        ValueError: it is no line of ``write_header``.
    """
    header = next(csv.reader(iter(file.readline, "")), [])
    names = tuple(name.removeprefix("norm.") for name in header if name.startswith("norm."))
    if not names or header != columns_of(names):
        raise ValueError("its first line names other columns")
    return names


def _line(record: list[float]) -> str:
    step, *numbers, rank, condition = record
    return ",".join([str(int(step)), *map(repr, numbers), str(int(rank)), repr(condition)]) + "\n"


def _unit(gramians: Floats, squares: Floats, directed: Booleans) -> Floats:
    """(T, m, m) cosines, 0 with a gradient that has no direction."""
    inverse = np.where(directed, 1.0 / np.sqrt(np.where(directed, squares, 1.0)), 0.0)
    both = directed[:, :, None] & directed[:, None, :]
    unit: Floats = np.where(both, gramians, 0.0) * inverse[:, :, None] * inverse[:, None, :]
    return unit.clip(-1.0, 1.0)


def _ranks_and_conditions(unit: Floats, directed: Booleans, cut: Floats) -> tuple[Floats, Floats]:
    matrices = unit.copy()
    diagonal = np.arange(matrices.shape[1])
    # -1 where there is no direction: an eigenvalue before all others, never counted, that leaves those as they are.
    matrices[:, diagonal, diagonal] = np.where(directed, 1.0, -1.0)
    values = np.linalg.eigvalsh(matrices)
    without = (~directed).sum(axis=1)
    largest = values[:, -1]
    smallest = np.take_along_axis(values, np.minimum(without, len(diagonal) - 1)[:, None], axis=1)[:, 0]
    zero = cut * np.maximum(largest, 0.0)
    ranks = (values > zero[:, None]).sum(axis=1).astype(np.float64)
    conditions = np.divide(largest, smallest, out=np.full_like(largest, np.inf), where=smallest > zero)
    return ranks, np.where(without == len(diagonal), np.nan, conditions)


def _conflict_rates(cosines: Floats) -> Floats:
    there = (~np.isnan(cosines)).sum(axis=1)
    below = (cosines < 0).sum(axis=1)
    rates: Floats = np.divide(below, there, out=np.full(len(cosines), np.nan), where=there > 0)
    return rates
