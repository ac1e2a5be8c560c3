"""ConflictMonitor: how much the losses' gradients conflict, step by step, at next to no cost."""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from itertools import combinations, count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, SupportsIndex, cast, get_args, overload

import numpy as np
import torch
from torch import Tensor

from fastconfig.conflict.history import ConflictHistory, names_in, write_header
from fastconfig.gradients.buffer import GradientBuffer
from fastconfig.gradients.combination import Combination
from fastconfig.gradients.losses import Losses
from fastconfig.gradients.ranks import world

if TYPE_CHECKING:
    import pandas

_BATCH_BYTES = 1 << 22
_LARGEST_BATCH = 256
_MOST_PAIRS_WRITTEN = 45
"""Pairs of ten losses: with more, a TensorBoard shows their worst cosine alone."""


Existing = Literal["keep", "overwrite", "append"]


class Combiner(Protocol):
    """What a monitor looks at: a GradientBuffer or an optimizer MConFIG."""

    @property
    def names(self) -> tuple[str, ...]:
        """The m losses' names."""

    @property
    def combination(self) -> Combination | None:
        """What was combined last; None before the first."""


class ScalarWriter(Protocol):
    """Where numbers go beside the monitor's own memory: TensorBoard's ``SummaryWriter``, or what takes the same."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take one number of one step."""


class ModuleConflict(NamedTuple):
    """How the losses' gradients get on within the parameters that one module owns itself."""

    module: str
    """Its name in ``model.named_modules()``, "" for the model."""
    worst_cosine: float
    """Of the pair of losses that conflict most here, the mean over the steps; NaN where no two losses meet."""
    pair: tuple[str, str] | None
    """That pair."""
    conflict_rate: float
    """Share of pairs and steps with a cosine below 0; NaN where no two losses meet."""
    norm_share: float
    """How much of the gradients lies here: |part|²/|whole|², the mean over losses and steps. Over all modules it sums
    up to 1."""


class ModuleConflicts(list[ModuleConflict]):
    """Rows of ``ConflictMonitor.by_module``, a list that prints as a table."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> ModuleConflict: ...

    @overload
    def __getitem__(self, index: slice) -> ModuleConflicts: ...

    def __getitem__(self, index: SupportsIndex | slice) -> ModuleConflict | ModuleConflicts:
        """A row, or those of a slice as a table again."""
        return ModuleConflicts(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def __repr__(self) -> str:
        head = ("module", "worst cosine", "of the pair", "conflict rate", "share of norm")
        rows = [
            (
                row.module or "(the model)",
                f"{row.worst_cosine:.4g}",
                "-" if row.pair is None else " · ".join(row.pair),
                "-" if row.pair is None else f"{100 * row.conflict_rate:.0f} %",
                f"{100 * row.norm_share:.1f} %",
            )
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows))


class ConflictMonitor:
    """Records how the losses' gradients conflict, and what the method made of it, after every ``combine``.

    Of each step the Gramian K and the weights c are kept, on their device, and moved to the host in batches. All else
    follows from them there: norms, cosines of all pairs, conflict rate (the share of pairs with a cosine below 0), rank
    and condition of the cosines, and the decrease K c that a small step promises each loss per unit of learning rate.
    Between two batches nothing waits for the device.

    Of an ``MConFIG`` K and c are those of the moving averages, freed of bias; as its update is scaled element by
    element, K c then is what a step along the combined gradient itself would promise.

    Args:
        buffer: the GradientBuffer, or the MConFIG, whose combinations to record; or m names of losses, for those of
            ``fc.backward``, which has no buffer: each is handed to ``record``.
        every: record one step in so many, the first one included.
        csv: a file to append the records to, batch by batch, whose first line names the columns, as
            ``ConflictHistory.columns`` does. ``fastconfig plot`` and ``ConflictHistory.read_csv`` read it.
        existing: what becomes of a ``csv`` that exists. ``"keep"``, so that a script can be run again and nothing is
            lost: it is moved aside, to ``run.1.csv`` or the next free number. ``"overwrite"``. Or ``"append"``: go on
            in it, as a run that is resumed, with the step after its last; what a killed run left of a line is cut off,
            with a warning.
        writer: what else takes the numbers: TensorBoard's ``SummaryWriter``, or any object with its ``add_scalar``.
        memory: keep the records for ``history``, ``to_pandas`` and ``plot``: 8·(4 + 3m + m(m - 1)/2) bytes each.
        modules_every: look at the modules' conflicts one step in so many, for ``by_module``; None for only when asked.
            Each look is one more pass over the rows, and asks the buffer for its parameters' names.
        first_step: the number of the first step, for a run that is resumed; None for 0, or the one after the last in a
            ``csv`` that is gone on with.

    Raises:
        TypeError, ValueError: an argument that cannot be; the message names it, its value and the remedy.
        OSError: ``csv`` cannot be written.

    On several ranks every rank has the records, which are equal, and rank 0 alone writes: file, writer and pictures.
    ``by_module`` and ``look_at_modules``, and ``step`` with ``modules_every``, are calls of all ranks.

    A loss that is absent from a step, ``None`` in ``buf.backward``, is a gap in its records: NaN, not 0.

    Example:
        >>> import torch, fastconfig as fc
        >>> model = torch.nn.Linear(3, 2)
        >>> buf = fc.GradientBuffer(model, num_losses=["left", "right"])
        >>> with fc.ConflictMonitor(buf) as monitor:
        ...     for _ in range(10):
        ...         prediction = model(torch.ones(3))
        ...         buf.backward([prediction[0].square(), prediction[1].square()])
        ...         info = buf.combine()
        ...         monitor.step()
        >>> monitor.history.cosines.shape
        (10, 1)
    """

    def __init__(
        self,
        buffer: Combiner | Sequence[str],
        every: int = 1,
        *,
        csv: str | Path | None = None,
        existing: Existing = "keep",
        writer: ScalarWriter | None = None,
        memory: bool = True,
        modules_every: int | None = None,
        first_step: int | None = None,
    ) -> None:
        combiner = _combiner_of(buffer)
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer must have add_scalar(tag, value, step), as a SummaryWriter has, got {writer!r}")
        _check_int("every", every, 1)
        if first_step is not None:
            _check_int("first_step", first_step, 0)
        if existing not in get_args(Existing):
            raise ValueError(f"existing must be one of {', '.join(map(repr, get_args(Existing)))}, got {existing!r}")
        if modules_every is not None:
            _check_int("modules_every", modules_every, 1)
            _check_has_modules(combiner)
        self._buffer = combiner
        self._names = combiner.names
        self._every = every
        self._modules_every = modules_every
        self._writes = getattr(combiner, "rank", 0) == 0
        self._writer = writer if self._writes else None
        self._remembers = memory
        self._path = None if csv is None or not self._writes else Path(csv)
        self._absent: list[tuple[int, ...]] = []
        self._calls = 0
        m = len(self._names)
        self._batch = max(1, min(_LARGEST_BATCH, _BATCH_BYTES // (8 * m * (m + 1))))
        self._slots: list[tuple[Tensor, Tensor]] = []
        self._ring: Tensor | None = None
        self._steps: list[int] = []
        self._rtols: list[float] = []
        self._histories: list[ConflictHistory] = []
        self._modules: _Modules | None = None
        self._closed = False
        self._next_step = first_step or 0
        if self._path is not None:
            self._next_step = _begin_file(self._path, self._names, existing, first_step)

    def step(self) -> None:
        """Record what was combined last: to be called once a step, after ``combine`` or the optimizer's ``step``.

        Raises:
            RuntimeError: nothing was combined yet, or the monitor is closed.
            OSError: a full batch cannot be written to the file. It stays in the memory.
        """
        self._take(None)

    def record(self, combination: Combination) -> None:
        """As ``step``, of a combination at hand: ``monitor.record(buf.combine())``.

        Raises:
            TypeError: no Combination.
            ValueError: of another number of losses.
            RuntimeError, OSError: as ``step``.
        """
        if not isinstance(combination, Combination):
            raise TypeError(f"combination must be what combine returned, got {combination!r}")
        if len(combination.weights) != len(self._names):
            raise ValueError(
                f"combination must be of the buffer's {len(self._names)} losses, got one of {len(combination.weights)}"
            )
        self._take(combination)

    def flush(self) -> None:
        """Move what is still on the device to memory, file and writer. Waits for the device."""
        if not self._steps or self._ring is None:
            return
        raw = self._ring[: len(self._steps)].cpu().numpy()
        history = ConflictHistory.of(self._names, self._steps, raw[:, :-1], raw[:, -1], self._rtols, self._absent)
        self._steps.clear()
        self._rtols.clear()
        self._absent.clear()
        if self._remembers:
            self._histories.append(history)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                history.write_rows(file)
        if self._writer is not None:
            _write_scalars(history, self._writer)

    def close(self) -> None:
        """Flush, and record no more. What was recorded can still be read. The writer is the caller's to close."""
        self.flush()
        self._closed = True

    def __repr__(self) -> str:
        recorded = sum(map(len, self._histories)) + len(self._steps)
        file = "" if self._path is None else f", csv={str(self._path)!r}"
        return f"ConflictMonitor(losses={list(self._names)}, {recorded} records, every={self._every}{file})"

    def __enter__(self) -> ConflictMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def history(self) -> ConflictHistory:
        """Everything recorded so far, as numpy arrays. Flushes.

        Raises:
            RuntimeError: made with ``memory=False``.
        """
        if not self._remembers:
            raise RuntimeError(
                "this monitor was made with memory=False and keeps no records; read its csv by ConflictHistory.read_csv"
            )
        self.flush()
        self._histories = [ConflictHistory.joined(self._names, self._histories)]
        return self._histories[0]

    def to_pandas(self) -> pandas.DataFrame:
        """``history`` as a DataFrame with the steps as index. Flushes.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            RuntimeError: as ``history``.
        """
        return self.history.to_pandas()

    def plot(self, path: str | Path) -> None:
        """Draw the records: mean cosines of all pairs, cosines, norms, weights and conflict rate over time. Flushes.

        Args:
            path: the picture, .png, .svg or .pdf; replaced whole or left as it is. On several ranks rank 0 draws it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            RuntimeError: nothing was recorded yet; or as ``history``.
            ValueError: another suffix.
            OSError: it cannot be written.
        """
        history = self.history
        if not self._writes:
            return
        if not len(history):
            raise RuntimeError("plot found nothing to draw: nothing was recorded yet; call step() after combine first")
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("plot needs matplotlib, which is not installed; pip install matplotlib")
        from fastconfig.conflict.figure import save_figure  # here, not above: it draws in the optional package

        save_figure(history, Path(path))

    def look_at_modules(self) -> None:
        """Add the conflicts within each module, of the gradients now in the buffer's rows, to what ``by_module`` ranks.

        One pass over the rows. Nothing waits for a device.

        Raises:
            TypeError: the monitor is not over a GradientBuffer.
            ValueError: the buffer was made from parameters without names.
        """
        self._modules = self._look(self._modules)

    def by_module(self) -> ModuleConflicts:
        """The modules ranked by how much the losses fight in them: what to share between the losses, and what not.

        Over all looks so far, of ``modules_every`` and ``look_at_modules``; where there was none, of the rows as they
        are now. Waits for the device.

        Returns:
            A list that prints as a table, one row for each module that owns parameters: by ``worst_cosine``, the worst
            first, those without a conflict to speak of (NaN) last.

        Raises:
            TypeError, ValueError: as ``look_at_modules``.
        """
        modules = self._look(None) if self._modules is None else self._modules
        return modules.ranked()

    def _look(self, looks: _Modules | None) -> _Modules:
        gramians = _check_has_modules(self._buffer).gramian(by="module")
        stacked = torch.stack(list(gramians.values()))
        if looks is None:
            looks = _Modules(list(gramians), self._names, stacked)
        looks.add(stacked)
        return looks

    def _take(self, combination: Combination | None) -> None:
        if self._closed:
            raise RuntimeError(
                "this monitor is closed and records no more; make a new one, with existing='append' for a csv"
            )
        due = self._calls % self._every == 0
        if due and combination is None:
            combination = self._buffer.combination
            if combination is None:
                raise RuntimeError("step found nothing to record: nothing was combined yet; call it after combine")
        if self._modules_every is not None and self._calls % self._modules_every == 0:
            self.look_at_modules()
        if due and combination is not None:
            self._keep(combination)
        self._calls += 1
        self._next_step += 1
        if len(self._steps) == self._batch:
            self.flush()

    def _keep(self, combination: Combination) -> None:
        """Copy K and c into the next place on the device."""
        if self._ring is None:
            m = len(self._names)
            with torch.inference_mode(False):  # else it could only be written to under inference mode
                self._ring = combination.gramian.new_empty(self._batch, m + 1, m)
            self._slots = [(record[:m], record[m]) for record in self._ring.unbind()]
        # A copy, as a captured graph writes every step's K and c to one place.
        gramian, weights = self._slots[len(self._steps)]
        gramian.copy_(combination.gramian)
        weights.copy_(combination.weights)
        self._steps.append(self._next_step)
        self._rtols.append(combination.rtol)
        self._absent.append(combination.absent)


class _Named:
    """Losses of combinations that come without a buffer.

    Args:
        names: theirs.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        everyone = world()
        self.rank = 0 if everyone is None else torch.distributed.get_rank(everyone)

    @property
    def combination(self) -> Combination:
        """None is kept: RuntimeError."""
        raise RuntimeError(
            "this monitor was made of names and has no buffer to look at; hand it record(fc.backward(...))"
        )


def _combiner_of(buffer: Combiner | Sequence[str]) -> Combiner:
    if isinstance(buffer, (list, tuple)):
        return _Named(Losses(buffer).names)
    if hasattr(buffer, "combination") and hasattr(buffer, "names"):
        return cast("Combiner", buffer)
    raise TypeError(f"buffer must be a GradientBuffer, an MConFIG or a list of names, got {type(buffer).__name__}")


class _Modules:
    """Sums over looks at L modules' Gramians, on their device."""

    def __init__(self, modules: Sequence[str], names: tuple[str, ...], like: Tensor) -> None:
        m = len(names)
        self._modules = modules
        self._names = names
        with torch.inference_mode(False):
            self._cosines = like.new_zeros(len(modules), m, m)
            self._conflicts = like.new_zeros(len(modules), m, m)
            self._met = like.new_zeros(len(modules), m, m)
            self._shares = like.new_zeros(len(modules), m)
            self._whole = like.new_zeros(m)

    def add(self, gramians: Tensor) -> None:
        """Add one look, (L, m, m)."""
        squares = gramians.diagonal(dim1=1, dim2=2)
        directed = torch.isfinite(squares) & (squares > 0)
        met = directed.unsqueeze(1) & directed.unsqueeze(2)
        inverse = torch.where(directed, squares, 1.0).rsqrt()
        cosines = torch.where(met, gramians, 0.0) * inverse.unsqueeze(1) * inverse.unsqueeze(2)
        self._cosines += cosines
        self._conflicts += cosines < 0
        self._met += met
        total = squares.sum(dim=0)
        counts = torch.isfinite(total) & (total > 0)
        self._shares += torch.where(counts, squares / torch.where(counts, total, 1.0), 0.0)
        self._whole += counts

    def ranked(self) -> ModuleConflicts:
        """The modules, the worst first."""
        i, j = np.triu_indices(len(self._names), 1)
        total, conflicts, met = (sums.cpu().numpy()[:, i, j] for sums in (self._cosines, self._conflicts, self._met))
        mean = np.divide(total, met, out=np.full_like(total, np.nan), where=met > 0)
        shares = self._shares.sum(dim=1).cpu().numpy() / max(float(self._whole.sum()), 1.0)
        pairs = list(combinations(self._names, 2))
        rows = []
        for module, cosines, fights, meetings, share in zip(self._modules, mean, conflicts, met, shares, strict=True):
            worst = None if np.isnan(cosines).all() else int(np.nanargmin(cosines))
            rows.append(
                ModuleConflict(
                    module,
                    math.nan if worst is None else float(cosines[worst]),
                    None if worst is None else pairs[worst],
                    math.nan if worst is None else float(fights.sum() / meetings.sum()),
                    float(share),
                )
            )
        return ModuleConflicts(sorted(rows, key=lambda row: (row.pair is None, row.worst_cosine)))


def _check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_has_modules(buffer: Combiner) -> GradientBuffer:
    """The buffer, where it is one that knows its parameters' names."""
    if not isinstance(buffer, GradientBuffer):
        raise TypeError(f"modules can be looked at in a GradientBuffer, whose rows hold gradients, got {buffer!r}")
    if not buffer.has_names:
        raise ValueError(
            "modules can be looked at where parameters have names; make the buffer by GradientBuffer(model, ...) or "
            "GradientBuffer(model.named_parameters(), ...)"
        )
    return buffer


def _begin_file(path: Path, names: Sequence[str], existing: Existing, first_step: int | None) -> int:
    """Begin a file, or make sure that the one that exists can be gone on with. The number of the first step."""
    if existing == "append" and path.is_file() and not _is_only_begun(path, names):
        with path.open(encoding="utf-8", newline="") as file:
            try:
                there_names = names_in(file)
            except (ValueError, UnicodeDecodeError) as error:
                raise ValueError(f"csv {str(path)!r} is no file of a ConflictMonitor ({error}); name another") from None
        if there_names != tuple(names):
            raise ValueError(
                f"csv {str(path)!r} is of the losses {list(there_names)}, not {list(names)}; name another file"
            )
        _cut_off_rest(path)
        there = ConflictHistory.read_csv(path)
        last = int(there.steps[-1]) if len(there) else -1
        if first_step is not None and last >= first_step:
            raise ValueError(f"first_step must be over {last}, the last in {str(path)!r}, got {first_step}")
        return last + 1 if first_step is None else first_step
    if existing == "keep" and path.is_file():  # no folder, and no device such as /dev/null
        path.rename(_free_name(path))
    with path.open("w", encoding="utf-8", newline="") as file:
        write_header(names, file)
    return first_step or 0


def _is_only_begun(path: Path, names: Sequence[str]) -> bool:
    """Whether a run was killed before its first line was whole."""
    header = io.StringIO()
    write_header(names, header)
    content = path.read_bytes()
    return b"\n" not in content and header.getvalue().encode().startswith(content)


def _free_name(path: Path) -> Path:
    """``run.1.csv`` for ``run.csv``, or the first number after it that is free."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


def _cut_off_rest(path: Path) -> None:
    """Remove what a run that was killed left of a line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content) and whole > 0:
        warnings.warn(f"csv {str(path)!r} ends in the middle of a line, which is removed", UserWarning, stacklevel=4)
        with path.open("r+b") as file:
            file.truncate(whole)


def _write_scalars(history: ConflictHistory, writer: ScalarWriter) -> None:
    shown = [
        i
        for i, column in enumerate(history.columns)
        if i > 0 and (len(history.pairs) <= _MOST_PAIRS_WRITTEN or not column.startswith("cosine."))
    ]
    tags = [f"conflict/{history.columns[i].replace('.', '/', 1)}" for i in shown]
    worst = np.fmin.reduce(history.cosines, axis=1, initial=np.inf)
    for step, record, lowest in zip(history.steps.tolist(), history.table[:, shown].tolist(), worst, strict=True):
        for tag, value in zip(tags, record, strict=True):
            if not math.isnan(value):  # a gap
                writer.add_scalar(tag, value, step)
        if math.isfinite(lowest):
            writer.add_scalar("conflict/worst_cosine", float(lowest), step)
