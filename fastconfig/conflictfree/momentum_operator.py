"""M-ConFIG and its kin: combine moving averages of the gradients, so that a step need not evaluate every loss.

``conflictfree.momentum_operator``. The averages are kept in at least float32, in float64 for float64 gradients, and
the update is returned in the gradients' dtype; gradients of three or more losses may be of any of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastconfig.api import combine, gramian
from fastconfig.backends.moments import Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.momentum import Segment, segment_on
from fastconfig.conflictfree import grad_operator as _grad_operator
from fastconfig.conflictfree import loss_recorder as _loss_recorder
from fastconfig.conflictfree.grad_operator import *  # noqa: F403  (upstream's star exports)
from fastconfig.conflictfree.grad_operator import ConFIGOperator, GradientOperator, method_of
from fastconfig.conflictfree.loss_recorder import *  # noqa: F403  (upstream's star exports)
from fastconfig.conflictfree.loss_recorder import (
    Indexes,
    Loss,
    Losses,
    LossRecorder,
    as_indexes,
    as_losses,
    check_beta,
    check_count,
    check_pairs,
)
from fastconfig.conflictfree.utils import Sequence, apply_gradient_vector, has_zero
from fastconfig.gradients.memory import aligned_rows, fresh
from fastconfig.methods import Method
from fastconfig.optim.momentum import take_step
from fastconfig.validation import REAL_OF_COMPLEX, check_rows

__all__ = [
    *_grad_operator.__all__,
    *_loss_recorder.__all__,
    "MomentumOperator",
    "PseudoMomentumOperator",
    "SeparateMomentumOperator",
]

_EPSILON = 1e-8
"""Added to the root of the second moment, as in Adam."""

_UPDATE = Group(lr=0.0, weight_decay=0.0, eps=_EPSILON, maximize=False, assign=True)
"""The kernels write the update itself into a vector."""


class MomentumOperator:
    """Base class of momentum operators: a subclass implements ``calculate_gradient``.

    Args:
        num_vectors: m, the number of losses.
        beta_1: moving average constant of the first moments, in [0, 1).
        beta_2: moving average constant of the second moments, in [0, 1).
        gradient_operator: combines the averages; None for a new ``ConFIGOperator()``. (conflictfree's default is one
            instance, which all momentum operators share.)
        loss_recorder: needed where losses are passed to ``calculate_gradient`` or ``update_gradient``.

    Attributes:
        num_vectors, beta_1, beta_2, gradient_operator, loss_recorder: as given; the last two may be reassigned.
        len_vectors, device, dtype: n, device and dtype of the averages; None before the first gradient.

    Raises:
        TypeError, ValueError: num_vectors, a constant or a gradient_operator that cannot be.
    """

    def __init__(
        self,
        num_vectors: int,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        gradient_operator: GradientOperator | None = None,
        loss_recorder: LossRecorder | None = None,
    ) -> None:
        self.len_vectors: int | None = None
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None
        self.beta_1 = check_beta("beta_1", beta_1)
        self.beta_2 = check_beta("beta_2", beta_2)
        self.num_vectors = check_count("num_vectors", num_vectors)
        self.gradient_operator = ConFIGOperator() if gradient_operator is None else gradient_operator
        if not callable(getattr(self.gradient_operator, "calculate_gradient", None)):
            raise TypeError(
                f"gradient_operator must have calculate_gradient(grads, losses), got {gradient_operator!r}; "
                "for instance ConFIGOperator()"
            )
        self.loss_recorder = loss_recorder

    def calculate_gradient(
        self, indexes: Indexes, grads: Tensor | Sequence[Tensor], losses: Losses | None = None
    ) -> Tensor:
        """Take the gradients of some losses into the averages, and give the update that follows from all averages.

        Args:
            indexes: which losses' gradients these are: an int, or a sequence of ints.
            grads: one (n,) vector, a sequence of vectors or a (k, n) tensor, in the order of ``indexes``. (conflictfree
                fails on the tensor.)
            losses: the losses themselves, in the same order; recorded by ``loss_recorder``, and what that returns is
                passed to ``gradient_operator``.

        Returns:
            (n,) tensor of the gradients' dtype.

        Raises:
            NotImplementedError: always, in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement calculate_gradient(indexes, grads, losses)")

    def update_gradient(
        self,
        network: torch.nn.Module,
        indexes: Indexes,
        grads: Tensor | Sequence[Tensor],
        losses: Losses | None = None,
    ) -> None:
        """Compute the update and put it into the ``.grad`` of the network's parameters.

        Differs from conflictfree as ``GradientOperator.update_gradient`` does.

        Args:
            network: whose gradients they are.
            indexes: as in ``calculate_gradient``.
            grads: as in ``calculate_gradient``.
            losses: as in ``calculate_gradient``.

        Raises:
            TypeError, ValueError, IndexError: as ``calculate_gradient``, or the update does not fit the network.
        """
        apply_gradient_vector(network, self.calculate_gradient(indexes, grads, losses))

    def _preprocess_gradients_losses(
        self, indexes: Indexes, grads: Tensor | Sequence[Tensor], losses: Losses | None = None
    ) -> tuple[list[int], list[Tensor], list[Loss] | None]:
        """The arguments of ``calculate_gradient`` as lists, the losses after the recorder has seen them.

        Everything is checked before the recorder records.

        Raises:
            IndexError: no such loss.
            ValueError: not as many gradients or losses as indexes; gradients of another length or device than before;
                losses without a recorder.
            TypeError: gradients that are no real floating-point vectors.
        """
        positions = as_indexes("indexes", indexes, self.num_vectors)
        vectors = [grads] if isinstance(grads, Tensor) and grads.dim() == 1 else list(grads)
        check_pairs("grads", len(vectors), positions)
        self._check_vectors(vectors)
        recorded = None
        if losses is not None:
            if self.loss_recorder is None:
                raise ValueError("losses were given, but the operator has no loss_recorder; pass one when making it")
            values = as_losses(losses)
            check_pairs("losses", len(values), positions)
            recorded = self.loss_recorder.record_loss(positions, values)
        if self.len_vectors is None:
            self._set_kind(vectors[0])
        return positions, [vector.detach() for vector in vectors], recorded

    def _set_kind(self, like: Tensor) -> None:
        """Note the length, device and dtype of the averages of vectors ``like`` this one."""
        self.len_vectors = len(like)
        self.device = like.device
        self.dtype = torch.promote_types(like.dtype, torch.float32)

    def _check_vectors(self, vectors: list[Tensor]) -> None:
        rows = check_rows(vectors)
        if vectors[0].dtype in REAL_OF_COMPLEX:
            raise TypeError(f"grads must be real, got {vectors[0].dtype}; pass torch.view_as_real(grad).flatten()")
        if self.len_vectors is not None and rows.n != self.len_vectors:
            raise ValueError(
                f"grads have {rows.n} elements, but had {self.len_vectors} before; collect them over the same "
                "parameters in every step, where losses reach different ones with none_grad_mode='zero'"
            )
        if self.device is not None and rows.device != self.device:
            raise ValueError(f"grads are on {rows.device}, but were on {self.device} before; make a new operator")

    def _zero_rows(self, count: int, like: Tensor) -> Tensor:
        """(count, n) zeros for averages of vectors ``like`` this one."""
        if self.len_vectors is None or self.dtype is None:
            self._set_kind(like)
        assert self.len_vectors is not None  # set along with the dtype
        assert self.dtype is not None
        return aligned_rows(count, self.len_vectors, self.dtype, like.device)


class PseudoMomentumOperator(MomentumOperator):
    """M-ConFIG: averages of each loss's gradient are combined; one second moment, of a pseudo gradient, scales the sum.

    The pseudo gradient is the one whose moving average would be the combined gradient. Use a plain SGD optimizer:
    this is Adam's scaling already. Until every loss has had a gradient, the update is zero. ``fc.optim.MConFIG`` is
    the same as an optimizer, and moves fewer bytes.

    With conflictfree's own operators and models, a step is that optimizer's two passes over the averages; an operator
    of your own gets the stack of averages, as in conflictfree.

    Differs from conflictfree as ``MomentumOperator`` says; and a gradient that is not finite gives NaN, which a
    GradScaler looks for, but enters no average.

    Source: arXiv 2408.11104, section 3.3, algorithm 1.

    Args:
        num_vectors: m, the number of losses.
        beta_1: moving average constant of the first moments, in [0, 1).
        beta_2: moving average constant of the second moment, in [0, 1).
        gradient_operator: combines the averages; None for a new ``ConFIGOperator()``.
        loss_recorder: needed where losses are passed along.

    Attributes:
        m: list of the m first moments (n,); None before the first gradient.
        s: (n,) second moment of the pseudo gradient.
        fake_m: (n,) first moment of the pseudo gradient.
        t: updates so far. t_grads: gradients so far, one count a loss.
        all_initialized: whether every loss has had a gradient.
        All but the last may be assigned, to resume; what is read of them are copies.

    Example:
        >>> import torch
        >>> from fastconfig.conflictfree.momentum_operator import PseudoMomentumOperator
        >>> operator = PseudoMomentumOperator(num_vectors=2)
        >>> operator.calculate_gradient(0, torch.tensor([1.0, 0.0]))
        tensor([0., 0.])
        >>> operator.calculate_gradient(1, torch.tensor([0.0, 1.0]))
        tensor([1., 1.])
    """

    def __init__(
        self,
        num_vectors: int,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        gradient_operator: GradientOperator | None = None,
        loss_recorder: LossRecorder | None = None,
    ) -> None:
        super().__init__(num_vectors, beta_1, beta_2, gradient_operator, loss_recorder)
        self._moments: Moments | None = None
        self._ledger = Ledger.zeros(num_vectors, torch.device("cpu"))
        self._combined: Tensor | None = None  # fake_m, where it is not Σ weights_i m_i
        self._written: tuple[Segment, Tensor] | None = None  # what an accelerator's kernels write the update into
        self._seen: set[int] = set()

    def __getstate__(self) -> dict[str, object]:
        """All but what holds addresses."""
        return {**self.__dict__, "_written": None}

    @property
    def m(self) -> list[Tensor] | None:
        """The first moments."""
        return None if self._moments is None else [row.clone() for row in self._moments.first]

    @m.setter
    def m(self, averages: Sequence[Tensor]) -> None:
        check_pairs("m", len(averages), range(self.num_vectors))
        self._check_vectors(list(averages))
        moments = self._begun(averages[0])
        self._combined = self.fake_m  # of the averages from before
        for row, average in zip(moments.first, averages, strict=True):
            row.copy_(average.detach())
        self._ledger.gramian.copy_(gramian(moments.first))

    @property
    def s(self) -> Tensor | None:
        """The second moment."""
        return None if self._moments is None else self._moments.second.clone()

    @s.setter
    def s(self, second: Tensor) -> None:
        self._check_vectors([second])
        self._begun(second).second.copy_(second.detach())

    @property
    def fake_m(self) -> Tensor | None:
        """The first moment of the pseudo gradient."""
        if self._moments is None:
            return None
        if self._combined is not None:
            return self._combined.clone()
        return combine(self._moments.first, _Given(self._ledger.weights))

    @fake_m.setter
    def fake_m(self, combined: Tensor) -> None:
        self._check_vectors([combined])
        self._combined = combined.detach().to(self._begun(combined).second, copy=True)

    @property
    def t(self) -> int:
        """Updates so far."""
        return int(self._ledger.totals[0])

    @t.setter
    def t(self, count: int) -> None:
        self._ledger.totals[0] = count

    @property
    def t_grads(self) -> list[int]:
        """Gradients so far, loss by loss."""
        return [int(count) for count in self._ledger.counts.tolist()]

    @t_grads.setter
    def t_grads(self, counts: Sequence[int]) -> None:
        check_pairs("t_grads", len(counts), range(self.num_vectors))
        self._ledger.counts.copy_(torch.tensor(list(counts)))
        self._seen = {i for i, count in enumerate(counts) if count > 0}

    @property
    def all_initialized(self) -> bool:
        """Whether every loss has had a gradient."""
        return not has_zero(self.t_grads)

    @torch.no_grad()
    def calculate_gradient(
        self, indexes: Indexes, grads: Tensor | Sequence[Tensor], losses: Losses | None = None
    ) -> Tensor:
        """Take the gradients of some losses into the averages, and give M-ConFIG's update.

        Args:
            indexes: which losses' gradients these are: an int, or a sequence of ints.
            grads: one (n,) vector, a sequence of vectors or a (k, n) tensor, in the order of ``indexes``.
            losses: the losses themselves, in the same order; recorded, then passed to ``gradient_operator``.

        Returns:
            New (n,) tensor of the gradients' dtype.

        Raises:
            TypeError, ValueError, IndexError: arguments that do not fit. No average has changed.
        """
        positions, vectors, recorded = self._preprocess_gradients_losses(indexes, grads, losses)
        moments = self._begun(vectors[0])
        dtype = vectors[0].dtype
        if dtype.itemsize > moments.first.dtype.itemsize:
            vectors = [vector.to(moments.first.dtype) for vector in vectors]
        self._seen.update(positions)
        method = method_of(self.gradient_operator)
        if method is not None and self._combined is None and len(set(positions)) == len(positions):
            return self._fused(method, moments, positions, vectors).to(dtype)
        return self._by_operator(method, moments, positions, vectors, recorded).to(dtype)

    def _begun(self, like: Tensor) -> Moments:
        """The averages; zeros as long as ``like`` where there are none yet."""
        if self._moments is None:
            rows = self._zero_rows(self.num_vectors + 1, like)
            self._moments = Moments(rows[:-1], rows[-1])
            self._ledger = Ledger(*(entry.to(like.device) for entry in self._ledger))
        return self._moments

    def _fused(self, method: Method, moments: Moments, positions: list[int], vectors: list[Tensor]) -> Tensor:
        """The step by the kernels: the combination is never written down."""
        rows = tuple(vector.contiguous() for vector in vectors)
        segment, update = self._writing(moments, rows[0])
        take_step(
            [(segment, Recorded(tuple(positions), rows))],
            self._ledger,
            StepRule(self.beta_1, self.beta_2, (_UPDATE,)),
            method,
            all_seen=len(self._seen) == self.num_vectors,
        )
        return update if update.device.type == "cpu" else update.clone()

    def _writing(self, moments: Moments, like: Tensor) -> tuple[Segment, Tensor]:
        """A segment that writes the update into a vector ``like`` a gradient, and that vector.

        The CPU's is new every time. On an accelerator a new segment's addresses are copied to the device, which waits:
        there one is kept.
        """
        kept = self._written
        if kept is not None and kept[1].dtype == like.dtype:
            return kept
        update = fresh(like.shape, like.dtype, like.device)
        written = segment_on(like.device, None, moments, [Piece(update, 0, 0)]), update
        if like.device.type != "cpu":
            self._written = written
        return written

    def _by_operator(
        self,
        method: Method | None,
        moments: Moments,
        positions: list[int],
        vectors: list[Tensor],
        recorded: list[Loss] | None,
    ) -> Tensor:
        """The step by any operator, which gets the stack of averages."""
        first, second = moments
        ledger = self._ledger
        if not all(bool(torch.isfinite(vector).all()) for vector in vectors):
            return torch.full_like(vectors[0], torch.nan)
        before = self.fake_m
        assert before is not None  # there are averages
        for position, vector in zip(positions, vectors, strict=True):
            ledger.counts[position] += 1
            _follow(first[position], vector, self.beta_1)
        if not self.all_initialized:
            return torch.zeros_like(vectors[0])
        ledger.totals[0] += 1
        counts = self.t_grads
        combined = self.gradient_operator.calculate_gradient(_unbiased(first, self.beta_1, counts), recorded)
        update, self._combined = self._scaled(combined, second, before)
        if method is not None:  # then the kernels can go on from here
            ledger.gramian.copy_(gramian(first))
            bias = 1.0 - self.beta_1**ledger.counts
            weights = method.weights(ledger.gramian / bias / bias.unsqueeze(1))
            ledger.weights.copy_(weights / bias * (1.0 - self.beta_1**self.t))
            self._combined = None
        return update

    def _scaled(self, combined: Tensor, second: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """``combined`` over the root of the pseudo gradient's second moment, and that gradient's new first moment."""
        first = combined * (1 - self.beta_1**self.t)
        pseudo = before.mul_(-self.beta_1).add_(first).div_(1 - self.beta_1)
        _follow(second, pseudo.square_(), self.beta_2)
        return combined / (second / (1 - self.beta_2**self.t)).sqrt_().add_(_EPSILON), first


class _Given:
    """Weights that are known."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def weights(self, gramian: Tensor) -> Tensor:
        return self._weights


class SeparateMomentumOperator(MomentumOperator):
    """Each loss's gradient is scaled by its own first and second moment, as in Adam; the results are combined.

    m_i ← β1 m_i + (1 - β1) g_i, s_i ← β2 s_i + (1 - β2) g_i², each freed of its bias by the loss's own count of
    gradients; combined are the m̂_i / (√ŝ_i + 1e-8). Until every loss has had a gradient, the update is zero.

    Only losses with a new gradient change what is combined: the others' rows are kept. Memory: 3m vectors (n,).

    The authors advise ``PseudoMomentumOperator`` instead. Use a plain SGD optimizer.

    conflictfree's cannot run: this is what its text means.

    Args:
        num_vectors: m, the number of losses.
        beta_1: moving average constant of the first moments, in [0, 1).
        beta_2: moving average constant of the second moments, in [0, 1).
        gradient_operator: combines the scaled averages; None for a new ``ConFIGOperator()``.
        loss_recorder: needed where losses are passed along.

    Attributes:
        m: list of the m first moments (n,); None before the first gradient.
        s: list of the m second moments (n,).
        t_grads: gradients so far, one count a loss.
        all_initialized: whether every loss has had a gradient.
        All but the last may be assigned, to resume; what is read of them are copies.
    """

    def __init__(
        self,
        num_vectors: int,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        gradient_operator: GradientOperator | None = None,
        loss_recorder: LossRecorder | None = None,
    ) -> None:
        super().__init__(num_vectors, beta_1, beta_2, gradient_operator, loss_recorder)
        self._moments: Tensor | None = None  # (3, m, n): first moments, second moments, what is combined
        self._counts = [0] * num_vectors

    @property
    def m(self) -> list[Tensor] | None:
        """The first moments."""
        return None if self._moments is None else [row.clone() for row in self._moments[0]]

    @m.setter
    def m(self, averages: Sequence[Tensor]) -> None:
        self._assign("m", 0, averages)

    @property
    def s(self) -> list[Tensor] | None:
        """The second moments."""
        return None if self._moments is None else [row.clone() for row in self._moments[1]]

    @s.setter
    def s(self, averages: Sequence[Tensor]) -> None:
        self._assign("s", 1, averages)

    @property
    def t_grads(self) -> list[int]:
        """Gradients so far, loss by loss."""
        return list(self._counts)

    @t_grads.setter
    def t_grads(self, counts: Sequence[int]) -> None:
        check_pairs("t_grads", len(counts), range(self.num_vectors))
        self._counts = list(counts)
        self._scale(range(self.num_vectors))

    @property
    def all_initialized(self) -> bool:
        """Whether every loss has had a gradient."""
        return not has_zero(self._counts)

    @torch.no_grad()
    def calculate_gradient(
        self, indexes: Indexes, grads: Tensor | Sequence[Tensor], losses: Losses | None = None
    ) -> Tensor:
        """Take the gradients of some losses into the averages, and give the combination of the scaled averages.

        Args:
            indexes: which losses' gradients these are: an int, or a sequence of ints.
            grads: one (n,) vector, a sequence of vectors or a (k, n) tensor, in the order of ``indexes``.
            losses: the losses themselves, in the same order; recorded, then passed to ``gradient_operator``.

        Returns:
            New (n,) tensor of the gradients' dtype.

        Raises:
            TypeError, ValueError, IndexError: arguments that do not fit. No average has changed.
        """
        positions, vectors, recorded = self._preprocess_gradients_losses(indexes, grads, losses)
        first, second, scaled = self._begun(vectors[0])
        for position, vector in zip(positions, vectors, strict=True):
            self._counts[position] += 1
            _follow(first[position], vector, self.beta_1)
            _follow(second[position], vector.to(self.dtype).square(), self.beta_2)
        self._scale(set(positions))
        if not self.all_initialized:
            return torch.zeros_like(vectors[0])
        known = method_of(self.gradient_operator) is not None
        rows = scaled if known else scaled.clone()  # an operator of the user's may write to them
        return self.gradient_operator.calculate_gradient(rows, recorded).to(vectors[0].dtype)

    def _begun(self, like: Tensor) -> Tensor:
        """The moments; zeros as long as ``like`` where there are none yet."""
        if self._moments is None:
            self._moments = self._zero_rows(3 * self.num_vectors, like).unflatten(0, (3, self.num_vectors))
        return self._moments

    def _scale(self, positions: Iterable[int]) -> None:
        """Bring m̂_i / (√ŝ_i + ε) up to date for some losses; zero for one that has had no gradient."""
        if self._moments is None:
            return
        first, second, scaled = self._moments
        for i in positions:
            count = self._counts[i]
            if count == 0:
                scaled[i].zero_()
                continue
            torch.div(second[i], 1 - self.beta_2**count, out=scaled[i]).sqrt_().add_(_EPSILON)
            torch.div(first[i], scaled[i].mul_(1 - self.beta_1**count), out=scaled[i])

    def _assign(self, name: str, which: int, averages: Sequence[Tensor]) -> None:
        check_pairs(name, len(averages), range(self.num_vectors))
        self._check_vectors(list(averages))
        for row, average in zip(self._begun(averages[0])[which], averages, strict=True):
            row.copy_(average.detach())
        self._scale(range(self.num_vectors))


def _follow(average: Tensor, value: Tensor, beta: float) -> None:
    """One step of a moving average, in place."""
    average.mul_(beta).add_(value, alpha=1 - beta)


def _unbiased(averages: Sequence[Tensor] | Tensor, beta: float, counts: list[int]) -> Tensor:
    """The averages freed of their start at zero, (m, n): what an operator combines."""
    unbiased = fresh((len(averages), len(averages[0])), averages[0].dtype, averages[0].device)
    for row, average, count in zip(unbiased, averages, counts, strict=True):
        torch.div(average, 1 - beta**count, out=row)
    return unbiased
