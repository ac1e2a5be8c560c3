"""The parts of a model, and the columns of each: what a Gramian a module is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from fastconfig.backends.rows import Rows
from fastconfig.gradients.combination import Run
from fastconfig.gradients.landing import Segment
from fastconfig.gradients.parameters import columns_of

By = Literal["module", "parameter"] | Callable[[str], str]
"""What makes the parts of a model: the module that owns a parameter, the parameter, or a function of its name."""


def rows_of_parts(segments: Sequence[Segment], places: Mapping[str, int] | None, by: By) -> dict[str, list[Rows]]:
    """The rows cut into the parts' columns, as few runs a part as can be. Views: nothing is copied.

    Raises:
        ValueError, TypeError: as ``runs_of_parts``, which says what the arguments are.
    """
    return {
        part: [segments[s].description.columns(first, last) for s, first, last in runs]
        for part, runs in runs_of_parts(segments, places, by).items()
    }


def runs_of_parts(segments: Sequence[Segment], places: Mapping[str, int] | None, by: By) -> dict[str, list[Run]]:
    """The columns of each part, as few runs a part as can be.

    Args:
        segments: the columns.
        places: the parameters' positions among those of all segments, by name; None where they have no names.
        by: as in ``GradientBuffer.gramian``.

    Raises:
        ValueError: another ``by``; or there are no names.
        TypeError: a function that answers anything but a str.
    """
    part_of = _part_of(by)
    if places is None:
        raise ValueError(
            f"by={by!r} needs the parameters' names, and this buffer was made without; make it by "
            "GradientBuffer(model, ...) or GradientBuffer(model.named_parameters(), ...)"
        )
    parts = {place: _checked_part(part_of(name), name) for name, place in places.items()}
    runs: dict[str, list[Run]] = {part: [] for part in parts.values()}
    spans = [
        (s, first, first + columns_of(parameter))
        for s, segment in enumerate(segments)
        for parameter, first in zip(segment.parameters, segment.starts, strict=True)
    ]
    for place, (s, first, last) in enumerate(spans):
        run = runs[parts[place]]
        if run and run[-1][0] == s and run[-1][2] == first:
            run[-1] = s, run[-1][1], last
        else:
            run.append((s, first, last))
    return runs


def _part_of(by: By) -> Callable[[str], str]:
    """From a parameter's name to that of its part."""
    if callable(by):
        return by
    if by == "parameter":
        return str
    if by == "module":
        return lambda name: name.rpartition(".")[0]
    raise ValueError(f"by must be 'module', 'parameter', a function of a parameter's name or None, got {by!r}")


def _checked_part(part: str, name: str) -> str:
    if not isinstance(part, str):
        raise TypeError(f"by must return a str, the name of a part, got {part!r} for parameter {name!r}")
    return part
