"""A buffer's parts, each combined by its own Gramian: which columns they are, and which method each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastconfig.gradients.combination import Combination, checked_method, combine_parts, rtol_of
from fastconfig.gradients.landing import Segment
from fastconfig.gradients.losses import Losses
from fastconfig.gradients.parts import By, runs_of_parts
from fastconfig.methods import Method, StreamingMethod, check_weights_of, method_of, remembers

AnyMethod = Method | StreamingMethod | str | None
"""What is taken for a method."""


class Apart:
    """The parts of a model by one way of making them, with what is kept of each.

    Args:
        segments: the columns.
        outputs: of each segment, where the combined gradient goes, (n_segment,).
        places: as in ``runs_of_parts``.
        by: likewise.
        kept: methods made by name, as they may remember; added to.

    Raises:
        TypeError, ValueError: as ``runs_of_parts``.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        outputs: Sequence[Tensor],
        places: Mapping[str, int] | None,
        by: By,
        kept: dict[str, Method | StreamingMethod],
    ) -> None:
        self.by = by
        runs = runs_of_parts(segments, places, by)
        self.names = tuple(runs)
        self._runs = list(runs.values())
        self._home = segments[0].device
        self._segments = [(segment.description, out) for segment, out in zip(segments, outputs, strict=True)]
        self._kept = kept

    def methods(self, method: AnyMethod | Mapping[str, AnyMethod], num_losses: int) -> list[Method]:
        """The method of each part, checked.

        Raises:
            TypeError, ValueError: as ``GradientBuffer.combine``.
        """
        if not isinstance(method, Mapping):
            if not isinstance(method, str) and remembers(method) and len(self.names) > 1:
                raise ValueError(
                    f"{method!r} remembers from step to step, and one object cannot for {len(self.names)} parts; give "
                    "its name, or a dict of methods, one a part"
                )
            if not isinstance(method, str):
                return [check_weights_of(checked_method(method, num_losses))] * len(self.names)
            return [self._method(name, method, num_losses) for name in self.names]
        if missing := [name for name in self.names if name not in method]:
            raise ValueError(f"method must have one for every part, and lacks {', '.join(map(repr, missing))}")
        if unknown := [name for name in method if name not in self.names]:
            raise ValueError(
                f"method names {', '.join(map(repr, unknown))}, and the parts are {', '.join(map(repr, self.names))}"
            )
        return [self._method(name, method[name], num_losses) for name in self.names]

    def combine(
        self, methods: Sequence[Method], losses: Losses, absent: Sequence[int], scale: Tensor | None
    ) -> Combination:
        """Combine each part by its method."""
        m, parts = len(losses), len(self.names)
        gramians = torch.empty(parts, m, m, dtype=torch.float64, device=self._home)
        weights = gramians.new_empty(parts, m)
        combine_parts(self._segments, self._runs, methods, gramians, weights, scale)
        return Combination(
            gramians.sum(0),
            weights.new_full((m,), torch.nan),
            rtol_of(methods[0]),
            losses,
            absent,
            (self.names, gramians, weights),
        )

    def _method(self, part: str, method: AnyMethod, num_losses: int) -> Method:
        """One given by name is made once for the part, as it may remember."""
        if not isinstance(method, str):
            return check_weights_of(checked_method(method, num_losses))
        key = f"{method.lower()} of {part}"
        if key not in self._kept:
            self._kept[key] = method_of(method, num_losses)
        return check_weights_of(self._kept[key])
