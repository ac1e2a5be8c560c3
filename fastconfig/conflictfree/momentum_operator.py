"""M-ConFIG and its kin: combine moving averages of the gradients, so that a step need not evaluate every loss.

``conflictfree.momentum_operator``. The averages are kept in at least float32, in float64 for float64 gradients, and
the update is returned in the gradients' dtype; gradients of three or more losses may be of any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastconfig.conflictfree import grad_operator as _grad_operator
from fastconfig.conflictfree import loss_recorder as _loss_recorder
from fastconfig.conflictfree.grad_operator import *  # noqa: F403  (upstream's star exports)
from fastconfig.conflictfree.grad_operator import ConFIGOperator, GradientOperator
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
        TypeError, ValueError: num_vectors or a constant that cannot be.
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
            self.len_vectors = len(vectors[0])
            self.device = vectors[0].device
            self.dtype = torch.promote_types(vectors[0].dtype, torch.float32)
        return positions, [vector.detach() for vector in vectors], recorded

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

    def _averages(self) -> list[Tensor]:
        """One average a loss, all zero."""
        return [self._average() for _ in range(self.num_vectors)]

    def _average(self) -> Tensor:
        assert self.len_vectors is not None  # set with the first gradients
        return torch.zeros(self.len_vectors, dtype=self.dtype, device=self.device)


class PseudoMomentumOperator(MomentumOperator):
    """M-ConFIG: averages of each loss's gradient are combined; one second moment, of a pseudo gradient, scales the sum.

    The pseudo gradient is the one whose moving average would be the combined gradient. Use a plain SGD optimizer:
    this is Adam's scaling already. Until every loss has had a gradient, the update is zero.

    Differs from conflictfree as ``MomentumOperator`` says.

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
        self.m: list[Tensor] | None = None
        self.s: Tensor | None = None
        self.fake_m: Tensor | None = None
        self.t = 0
        self.t_grads = [0] * num_vectors
        self.all_initialized = False

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
        if self.m is None or self.s is None or self.fake_m is None:
            self.m, self.s, self.fake_m = self._averages(), self._average(), self._average()
        for position, vector in zip(positions, vectors, strict=True):
            self.t_grads[position] += 1
            _follow(self.m[position], vector, self.beta_1)
        if not self.all_initialized:
            if has_zero(self.t_grads):
                return torch.zeros_like(vectors[0])
            self.all_initialized = True
        self.t += 1
        combined = self.gradient_operator.calculate_gradient(_unbiased(self.m, self.beta_1, self.t_grads), recorded)
        return self._scaled(combined, self.s, self.fake_m).to(vectors[0].dtype)

    def _scaled(self, combined: Tensor, second: Tensor, first: Tensor) -> Tensor:
        """``combined`` over the root of the pseudo gradient's second moment; both moments are brought up to date."""
        new_first = combined * (1 - self.beta_1**self.t)
        pseudo = first.mul_(-self.beta_1).add_(new_first).div_(1 - self.beta_1)
        _follow(second, pseudo.square_(), self.beta_2)
        first.copy_(new_first)
        return combined / (second / (1 - self.beta_2**self.t)).sqrt_().add_(_EPSILON)


class SeparateMomentumOperator(MomentumOperator):
    """Each loss's gradient is scaled by its own first and second moment, as in Adam; the results are combined.

    m_i ← β1 m_i + (1 - β1) g_i, s_i ← β2 s_i + (1 - β2) g_i², each freed of its bias by the loss's own count of
    gradients; combined are the m̂_i / (√ŝ_i + 1e-8). Until every loss has had a gradient, the update is zero.

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
        self.m: list[Tensor] | None = None
        self.s: list[Tensor] | None = None
        self.t_grads = [0] * num_vectors
        self.all_initialized = False

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
        if self.m is None or self.s is None:
            self.m, self.s = self._averages(), self._averages()
        for position, vector in zip(positions, vectors, strict=True):
            self.t_grads[position] += 1
            _follow(self.m[position], vector, self.beta_1)
            _follow(self.s[position], vector.to(self.dtype).square(), self.beta_2)
        if not self.all_initialized:
            if has_zero(self.t_grads):
                return torch.zeros_like(vectors[0])
            self.all_initialized = True
        scaled = _unbiased(self.m, self.beta_1, self.t_grads)
        scaled /= _unbiased(self.s, self.beta_2, self.t_grads).sqrt_().add_(_EPSILON)
        return self.gradient_operator.calculate_gradient(scaled, recorded).to(vectors[0].dtype)


def _follow(average: Tensor, value: Tensor, beta: float) -> None:
    """One step of a moving average, in place."""
    average.mul_(beta).add_(value, alpha=1 - beta)


def _unbiased(averages: list[Tensor], beta: float, counts: list[int]) -> Tensor:
    """The averages freed of their start at zero, (m, n): what an operator combines."""
    unbiased = torch.empty(len(averages), len(averages[0]), dtype=averages[0].dtype, device=averages[0].device)
    for row, average, count in zip(unbiased, averages, counts, strict=True):
        torch.div(average, 1 - beta**count, out=row)
    return unbiased
