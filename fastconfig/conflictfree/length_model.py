"""Length models: how long ConFIG's update is, ``conflictfree.length_model`` (arXiv 2408.11104, eq. 4, appendix A.3).

All built-in ones measure in float64 and let zero gradients take no part; conflictfree's Track models return NaN then.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import ClassVar, Optional

import torch
from torch import Tensor

from fastconfig.backends.rules import LengthName
from fastconfig.conflictfree import utils
from fastconfig.conflictfree.utils import *  # noqa: F403  (upstream's star exports)
from fastconfig.conflictfree.utils import Sequence, norms_and_cosines, unit_vector
from fastconfig.methods import ConFIG

__all__ = [
    *utils.__all__,
    "LengthModel",
    "Optional",
    "ProjectionLength",
    "Tensor",
    "TrackArithmeticAverage",
    "TrackGeometricAverage",
    "TrackHarmonicAverage",
    "TrackMaximum",
    "TrackMinimum",
    "TrackSpecific",
]


class LengthModel:
    """Base class of length models: a subclass gives the length in ``get_length``, or does all in ``rescale_length``."""

    def __init__(self) -> None:
        pass

    def get_length(
        self,
        target_vector: Tensor | None = None,
        unit_target_vector: Tensor | None = None,
        gradients: Tensor | None = None,
        losses: Sequence[float | Tensor] | None = None,
    ) -> Tensor | float:
        """The length of the update. Called with keywords, without gradient tracking.

        Args:
            target_vector: (n,) the direction, of any length; in ConFIG, U⁺ŵ (eq. 2).
            unit_target_vector: (n,) the direction, of length 1.
            gradients: (m, n) tensor, one row a loss.
            losses: what the caller passed along, or None.

        Returns:
            A number or a 0-d tensor.

        Raises:
            NotImplementedError: always, in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement get_length(...) -> number or 0-d tensor")

    def rescale_length(
        self,
        target_vector: Tensor,
        gradients: Tensor | None = None,
        losses: Sequence[float | Tensor] | None = None,
    ) -> Tensor:
        """``target_vector`` at the length that ``get_length`` gives.

        Args:
            target_vector: (n,) the direction, of any length; zero stays zero.
            gradients: (m, n) tensor, one row a loss.
            losses: what the caller passed along, or None.

        Returns:
            New (n,) tensor of the direction's dtype.
        """
        unit_target_vector = unit_vector(target_vector)
        length = self.get_length(
            target_vector=target_vector,
            unit_target_vector=unit_target_vector,
            gradients=gradients,
            losses=losses,
        )
        return length * unit_target_vector


class _MeasuredLength(LengthModel):
    """A length that only depends on the gradients' norms and on their cosines with the update."""

    def get_length(
        self,
        target_vector: Tensor | None = None,
        unit_target_vector: Tensor | None = None,
        gradients: Tensor | None = None,
        losses: Sequence[float | Tensor] | None = None,
    ) -> Tensor:
        """The length of the update, as the class says.

        Args:
            target_vector: (n,) the direction, of any length; needed where ``unit_target_vector`` is not given.
            unit_target_vector: (n,) the direction, of length 1.
            gradients: (m, n) tensor or m vectors, one a loss, of the direction's dtype and device.
            losses: not used.

        Returns:
            0-d tensor, float64 for float64 gradients and float32 for all others.

        Raises:
            ValueError: no gradients, or neither vector. (conflictfree: AssertionError.)
            TypeError, ValueError: gradients and direction that do not fit each other.
        """
        direction = target_vector if unit_target_vector is None else unit_target_vector
        if direction is None:
            raise ValueError("target_vector and unit_target_vector are both None; pass one of them: the direction")
        if gradients is None:
            raise ValueError(f"gradients must be the (m, n) tensor of gradients, got None: {self!r} measures them")
        measured = norms_and_cosines([*gradients, direction])
        length = self._length(measured.norms[:-1], measured.cosines[:-1, -1])
        return length.to(torch.promote_types(direction.dtype.to_real(), torch.float32))

    def _length(self, norms: Tensor, cosines: Tensor) -> Tensor:
        """The length from norms (m,) and cosines with the direction (m,), both float64."""
        raise NotImplementedError


class ProjectionLength(_MeasuredLength):
    """The sum of the gradients' projections on the update, Σ |g_i| cos(g_i, g_c): eq. 4 of the paper."""

    def _length(self, norms: Tensor, cosines: Tensor) -> Tensor:
        return method_of_length("projection").rule.length_of(norms, cosines)


class _FlexibleTrackProjectionLength(_MeasuredLength):
    """The sum of the projections of gradients that have all been given the same norm, Σ |g|_tracked cos(g_i, g_c).

    A subclass says in ``_tracked_value(grad_norms)`` which norm that is.
    """

    def _length(self, norms: Tensor, cosines: Tensor) -> Tensor:
        return self._tracked_value(norms) * cosines.sum()

    def _tracked_value(self, grad_norms: Tensor) -> Tensor:
        """The norm to give to every gradient, from their own (m,), float64."""
        raise NotImplementedError(f"{type(self).__name__} must implement _tracked_value(grad_norms) -> 0-d tensor")


class _NamedTrack(_FlexibleTrackProjectionLength):
    """A tracked norm that the core knows by a name or an index."""

    core_length: ClassVar[LengthName]

    def _tracked_value(self, grad_norms: Tensor) -> Tensor:
        rule = method_of_length(self._core_length()).rule
        rule.check_losses(len(grad_norms))
        # At a single cosine of 1 a tracked length is the tracked norm itself.
        return rule.length_of(grad_norms, grad_norms.new_ones(1))

    def _core_length(self) -> LengthName | int:
        return self.core_length


class TrackMinimum(_NamedTrack):
    """All gradients count with the smallest of their norms: Σ |g|_min cos(g_i, g_c)."""

    core_length = "minimum"


class TrackMaximum(_NamedTrack):
    """All gradients count with the largest of their norms: Σ |g|_max cos(g_i, g_c)."""

    core_length = "maximum"


class TrackHarmonicAverage(_NamedTrack):
    """All gradients count with the harmonic mean of their norms, m / Σ 1/|g_i|, which large ones hardly move."""

    core_length = "harmonic"


class TrackArithmeticAverage(_NamedTrack):
    """All gradients count with the arithmetic mean of their norms, Σ |g_i| / m."""

    core_length = "arithmetic"


class TrackGeometricAverage(_NamedTrack):
    """All gradients count with the geometric mean of their norms, (Π |g_i|)^(1/m).

    Computed from logarithms: conflictfree's product underflows to 0, or overflows, from a few dozen gradients on.
    """

    core_length = "geometric"


class TrackSpecific(_NamedTrack):
    """All gradients count with the norm of one of them: Σ |g_k| cos(g_i, g_c).

    Args:
        track_id: k, the index of that loss; negative counts from the end.

    Raises:
        TypeError: ``track_id`` is no integer. (conflictfree fails at the first update.)
    """

    def __init__(self, track_id: int) -> None:
        super().__init__()
        self.track_id = operator.index(track_id)

    def _core_length(self) -> int:
        return operator.index(self.track_id)


@cache
def method_of_length(length: LengthName | int) -> ConFIG:
    """ConFIG with equal weights and this length: made once, so that an update does not pay for its validation."""
    return ConFIG(length=length)


def core_length(model: LengthModel) -> LengthName | int | None:
    """What the core calls the length model, or None where it does not know it.

    Only the exact classes of this module are known: a subclass may have changed anything.
    """
    if type(model) is ProjectionLength:
        return "projection"
    if isinstance(model, _NamedTrack) and type(model) in _NAMED:
        return model._core_length()
    return None


_NAMED = frozenset(
    (TrackMinimum, TrackMaximum, TrackHarmonicAverage, TrackArithmeticAverage, TrackGeometricAverage, TrackSpecific)
)
