"""All methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from fastconfig.methods.aligned_mtl import AlignedMTL
from fastconfig.methods.base import Method, StreamingMethod
from fastconfig.methods.cagrad import CAGrad
from fastconfig.methods.config import ConFIG
from fastconfig.methods.constant import Constant, Mean, Sum
from fastconfig.methods.crmogm import CRMOGM
from fastconfig.methods.dualproj import DualProj
from fastconfig.methods.fairgrad import FairGrad
from fastconfig.methods.graddrop import GradDrop
from fastconfig.methods.gradvac import GradVac
from fastconfig.methods.imtlg import IMTLG
from fastconfig.methods.inverse_norm import InverseNorm
from fastconfig.methods.mgda import MGDA
from fastconfig.methods.nash_mtl import NashMTL
from fastconfig.methods.pcgrad import PCGrad
from fastconfig.methods.priority import Priority
from fastconfig.methods.random_weights import RandomWeights
from fastconfig.methods.sdmgrad import SDMGrad
from fastconfig.methods.upgrad import UPGrad


@dataclass(frozen=True)
class Entry:
    """A method of the catalogue.

    Attributes:
        kind: its class, which carries its source.
        rule: what it does, in a line.
        make: for m losses, with its defaults.
        remembers: whether a combination depends on those before, so that one object must serve all of a training.
    """

    kind: type[Method | StreamingMethod]
    rule: str
    make: Callable[[int], Method | StreamingMethod]
    remembers: bool = False

    @property
    def source(self) -> str:
        """Where it was published."""
        return str(self.kind.source)  # type: ignore[union-attr]


def _entries() -> dict[str, Entry]:
    entries = [
        Entry(ConFIG, "the same positive cosine with every gradient", lambda m: ConFIG()),
        Entry(Sum, "c = 1", lambda m: Sum()),
        Entry(Mean, "c = 1/m", lambda m: Mean()),
        Entry(Constant, "c = w, given", lambda m: Constant([1.0] * m)),
        Entry(RandomWeights, "c = softmax of normal numbers, anew each step", lambda m: RandomWeights()),
        Entry(InverseNorm, "c ∝ |g|^(-power)", lambda m: InverseNorm()),
        Entry(PCGrad, "conflicting components projected away, pair by pair", lambda m: PCGrad()),
        Entry(Priority, "projected from those of higher priority alone", lambda m: Priority()),
        Entry(GradVac, "pairs brought up to a moving average of their cosine", lambda m: GradVac(), remembers=True),
        Entry(MGDA, "least-norm point of the convex hull", lambda m: MGDA()),
        Entry(CAGrad, "best worst product within a ball about the mean", lambda m: CAGrad()),
        Entry(SDMGrad, "MGDA drawn to the mean, followed in steps", lambda m: SDMGrad(), remembers=True),
        Entry(DualProj, "the mean, projected on the dual cone", lambda m: DualProj()),
        Entry(UPGrad, "each projected on the dual cone, then averaged", lambda m: UPGrad()),
        Entry(IMTLG, "equal projections, Σc = 1", lambda m: IMTLG()),
        Entry(NashMTL, "bargaining solution K a = 1/a", lambda m: NashMTL()),
        Entry(FairGrad, "α-fairness: K a = a^(-1/α)", lambda m: FairGrad()),
        Entry(AlignedMTL, "orthogonalised along the Gramian's eigenvectors", lambda m: AlignedMTL()),
        Entry(GradDrop, "of every parameter the gradients of one sign, drawn", lambda m: GradDrop()),
        Entry(CRMOGM, "another method's weights, smoothed", lambda m: CRMOGM(MGDA()), remembers=True),
    ]
    return {entry.kind.__name__.lower(): entry for entry in entries}


CATALOGUE: dict[str, Entry] = _entries()
"""The methods by the lower-case names of their classes."""


def entry_of(name: str) -> Entry:
    """The method of a name, in letters of either case.

    Raises:
        ValueError: there is none; the message tells those that are spelled alike.
    """
    entry = CATALOGUE.get(name.lower())
    if entry is None:
        alike = difflib.get_close_matches(name.lower(), CATALOGUE, n=3)
        hint = f"; is it {' or '.join(map(repr, alike))}?" if alike else ""
        raise ValueError(f"method must be one that `fastconfig methods` lists, got {name!r}{hint}")
    return entry


def remembers(method: object) -> bool:
    """Whether a method of the catalogue depends on the combinations before."""
    return isinstance(method, tuple(entry.kind for entry in CATALOGUE.values() if entry.remembers))


def method_of(name: str, num_losses: int) -> Method | StreamingMethod:
    """A new method of this name for so many losses, with its defaults.

    Raises:
        ValueError: as ``entry_of``.
    """
    return entry_of(name).make(num_losses)


def method_for_one_call(name: str, num_losses: int) -> Method | StreamingMethod:
    """As ``method_of``, where no object is kept for the next call.

    Raises:
        ValueError: as ``entry_of``; or the method remembers.
    """
    entry = entry_of(name)
    if entry.remembers:
        kind = entry.kind.__name__
        raise ValueError(
            f"method={name!r} remembers from step to step, and by its name it would be a new one in every call; make "
            f"it once, method = fc.{kind}({'fc.MGDA()' if kind == 'CRMOGM' else ''}), and pass that"
        )
    return entry.make(num_losses)
