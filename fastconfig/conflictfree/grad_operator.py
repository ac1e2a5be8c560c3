"""ConFIG, PCGrad and IMTL-G on lists of gradient vectors: ``conflictfree.grad_operator``, over ``fastconfig.combine``.

Only the m×m Gramian of the gradients is worked on; the n parameters are read twice and written once. Gradients of
float64, bfloat16 and float16 work for any number of losses (conflictfree fails on them from three on).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from fastconfig.api import combine
from fastconfig.conflictfree import length_model as _length_model
from fastconfig.conflictfree import weight_model as _weight_model
from fastconfig.conflictfree.length_model import *  # noqa: F403  (upstream's star exports)
from fastconfig.conflictfree.length_model import LengthModel, ProjectionLength, core_length, method_of_length
from fastconfig.conflictfree.utils import Sequence, apply_gradient_vector
from fastconfig.conflictfree.weight_model import *  # noqa: F403  (upstream's star exports)
from fastconfig.conflictfree.weight_model import EqualWeight, WeightModel
from fastconfig.methods import IMTLG, ConFIG, Method, PCGrad
from fastconfig.validation import check_rows

__all__ = [
    *_length_model.__all__,
    *_weight_model.__all__,
    "ConFIGOperator",
    "ConFIG_update",
    "ConFIG_update_double",
    "GradientOperator",
    "IMTLGOperator",
    "PCGradOperator",
]

_PCGRAD, _IMTLG = PCGrad(order="fixed"), IMTLG()


def ConFIG_update_double(  # noqa: N802  (upstream's name)
    grad_1: Tensor,
    grad_2: Tensor,
    weight_model: WeightModel | None = None,
    length_model: LengthModel | None = None,
    losses: Sequence[float | Tensor] | None = None,
) -> Tensor:
    """The ConFIG update of two gradients: ``ConFIG_update([grad_1, grad_2], ...)``.

    Differs from conflictfree, whose own formula for two gives NaN for a zero gradient, and zero or a wrong length for
    equal and nearly parallel ones: here those are combined as any others.

    Args:
        grad_1: (n,) gradient of the first loss.
        grad_2: (n,) gradient of the second loss, of the same dtype and device.
        weight_model: as in ``ConFIG_update``.
        length_model: as in ``ConFIG_update``; its ``target_vector`` is U⁺ŵ here, too.
        losses: as in ``ConFIG_update``.

    Returns:
        New (n,) tensor of the gradients' dtype.

    Raises:
        TypeError, ValueError: as ``ConFIG_update``.
    """
    return ConFIG_update([grad_1, grad_2], weight_model, length_model, losses=losses)


def ConFIG_update(  # noqa: N802  (upstream's name)
    grads: Tensor | Sequence[Tensor],
    weight_model: WeightModel | None = None,
    length_model: LengthModel | None = None,
    use_least_square: bool = True,
    losses: Sequence[float | Tensor] | None = None,
) -> Tensor:
    """The conflict-free update: U⁺ŵ at the length that the length model gives (arXiv 2408.11104, eq. 2 to 4).

    Differs from conflictfree: the answer is right at any number of parameters and any scale of the gradients, also
    where the first m columns are dependent, as behind a dead unit (torch.linalg.lstsq then fails conflictfree: pytorch
    issue 187411); it is zero for exactly opposed gradients, and never NaN for finite ones; a zero gradient constrains
    nothing; and the default models are None in the signature, not instances that all calls share.

    Args:
        grads: (m, n) tensor, or a sequence of m vectors (n,), one gradient a loss. With the built-in models a sequence
            is neither stacked nor copied.
        weight_model: gives the direction weights ŵ; None for ``EqualWeight()``.
        length_model: gives the length; None for ``ProjectionLength()``.
        use_least_square: has no effect: conflictfree's two ways to the pseudo-inverse are one here.
        losses: passed on to models of your own; the built-in ones need none.

    Returns:
        New (n,) tensor of the gradients' dtype. NaN where a gradient holds inf or NaN, as a GradScaler expects.

    Raises:
        TypeError, ValueError: gradients that are no tensors, or not of one length, dtype and device; a weight model
            that does not return m finite numbers, not all zero; a tracked loss that does not exist.

    Example:
        >>> import torch
        >>> from fastconfig.conflictfree.grad_operator import ConFIG_update
        >>> ConFIG_update([torch.tensor([-4.0, 1.0, 1.0]), torch.tensor([6.0, 1.0, 1.0])])
        tensor([0.1588, 2.0706, 2.0706])
    """
    weights = None
    if weight_model is not None and type(weight_model) is not EqualWeight:
        grads = _stacked(grads)
        weights = _weights_from(weight_model, grads, losses)
    if length_model is None:
        length_model = ProjectionLength()
    length = core_length(length_model)
    if length is not None:
        return combine(grads, method_of_length(length) if weights is None else ConFIG(weights, length))
    grads = _stacked(grads)
    with torch.no_grad():
        direction = combine(grads, ConFIG(weights, _PseudoInverseLength(weights)))
        return length_model.rescale_length(target_vector=direction, gradients=grads, losses=losses)


class GradientOperator:
    """Base class of gradient operators: a subclass implements ``calculate_gradient``."""

    def __init__(self) -> None:
        pass

    def calculate_gradient(
        self, grads: Tensor | Sequence[Tensor], losses: Sequence[float | Tensor] | None = None
    ) -> Tensor:
        """One update from the gradients of all losses.

        Args:
            grads: (m, n) tensor, or a sequence of m vectors (n,), one gradient a loss.
            losses: passed on to the operator's models, which may need them.

        Returns:
            (n,) tensor.

        Raises:
            NotImplementedError: always, in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement calculate_gradient(grads, losses) -> tensor")

    def update_gradient(
        self,
        network: torch.nn.Module,
        grads: Tensor | Sequence[Tensor],
        losses: Sequence[float | Tensor] | None = None,
    ) -> None:
        """Compute the update and put it into the ``.grad`` of the network's parameters.

        Differs from conflictfree: gradients collected with ``none_grad_mode="zero"`` land in their places, whichever
        ``.grad`` the last backward pass left None; parameters with ``requires_grad=False`` receive none.

        Args:
            network: whose gradients they are.
            grads: as in ``calculate_gradient``.
            losses: as in ``calculate_gradient``.

        Raises:
            ValueError: the update does not fit the network; nothing has been written to it.
        """
        apply_gradient_vector(network, self.calculate_gradient(grads, losses))


class ConFIGOperator(GradientOperator):
    """ConFIG as an operator (arXiv 2408.11104): see ``ConFIG_update``.

    Args:
        weight_model: gives the direction weights; None for a new ``EqualWeight()``.
        length_model: gives the length; None for a new ``ProjectionLength()``.
        allow_simplified_model: has no effect: two losses need no shortcut here.
        use_least_square: has no effect.

    Attributes:
        weight_model, length_model: the models in use; both may be reassigned at any time.
        allow_simplified_model, use_least_square: as given.
    """

    def __init__(
        self,
        weight_model: WeightModel | None = None,
        length_model: LengthModel | None = None,
        allow_simplified_model: bool = True,
        use_least_square: bool = True,
    ) -> None:
        super().__init__()
        self.weight_model = EqualWeight() if weight_model is None else weight_model
        self.length_model = ProjectionLength() if length_model is None else length_model
        self.allow_simplified_model = allow_simplified_model
        self.use_least_square = use_least_square

    def calculate_gradient(
        self, grads: Tensor | Sequence[Tensor], losses: Sequence[float | Tensor] | None = None
    ) -> Tensor:
        """``ConFIG_update`` with this operator's models; arguments, result and errors are documented there."""
        return ConFIG_update(grads, self.weight_model, self.length_model, losses=losses)


class PCGradOperator(GradientOperator):
    """PCGrad: each gradient gives up its components against the others, one after the other; then they are summed.

    The others are taken in the order 0 to m - 1, as in conflictfree, not in a random one as in the paper.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, algorithm 1.
    """

    def calculate_gradient(
        self, grads: Tensor | Sequence[Tensor], losses: Sequence[float | Tensor] | None = None
    ) -> Tensor:
        """The sum of the projected gradients.

        Args:
            grads: (m, n) tensor, or a sequence of m vectors (n,), one gradient a loss.
            losses: not used.

        Returns:
            New (n,) tensor of the gradients' dtype; NaN where a gradient holds inf or NaN.

        Raises:
            TypeError, ValueError: gradients that are no tensors, or not of one length, dtype and device.
        """
        return combine(grads, _PCGRAD)


class IMTLGOperator(GradientOperator):
    """IMTL-G: the affine combination, Σ c_i = 1, whose projections on all gradients' directions are equal.

    Differs from conflictfree: one loss alone works and gives its gradient; a zero gradient constrains nothing, where
    conflictfree's answer then has to stand at right angles to all gradients.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021 (the closed form of IMTL-G).
    """

    def calculate_gradient(
        self, grads: Tensor | Sequence[Tensor], losses: Sequence[float | Tensor] | None = None
    ) -> Tensor:
        """The impartial combination of the gradients.

        Args:
            grads: (m, n) tensor, or a sequence of m vectors (n,), one gradient a loss.
            losses: not used.

        Returns:
            New (n,) tensor of the gradients' dtype; NaN where a gradient holds inf or NaN.

        Raises:
            TypeError, ValueError: gradients that are no tensors, or not of one length, dtype and device.
        """
        return combine(grads, _IMTLG)


def method_of(operator: GradientOperator) -> Method | None:
    """The rule on the Gramian that an operator is; None where it may be anything else, as any subclass may."""
    if type(operator) is ConFIGOperator and type(operator.weight_model) in (EqualWeight, type(None)):
        length = "projection" if operator.length_model is None else core_length(operator.length_model)
        return None if length is None else method_of_length(length)
    if type(operator) is PCGradOperator:
        return _PCGRAD
    return _IMTLG if type(operator) is IMTLGOperator else None


class _PseudoInverseLength:
    """The length of U⁺ŵ itself, from the gradients' cosines with it.

    With Pŵ = UU⁺ŵ the part of ŵ that can be met, the cosines are Pŵ/|U⁺ŵ|, so that ŵ·cos / cos·cos = |U⁺ŵ|.
    """

    def __init__(self, weights: Tensor | None) -> None:
        self._weights = weights

    def __call__(self, norms: Tensor, cosines: Tensor) -> Tensor:
        weights = torch.ones_like(cosines) if self._weights is None else self._weights.to(cosines)
        square = cosines @ cosines
        return torch.where(square > 0, (cosines @ weights) / square, 0.0)


@torch.no_grad()
def _stacked(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """The (m, n) tensor that a user's model gets; a tensor is handed on as it is."""
    check_rows(grads)
    return grads if isinstance(grads, Tensor) else torch.stack(tuple(grads))


def _weights_from(model: WeightModel, grads: Tensor, losses: Sequence[float | Tensor] | None) -> Tensor | None:
    """The weights that a user's model gives; None where no weights matter, as the gradients are not finite.

    Raises:
        TypeError: the model has no get_weights, or it returned no numbers.
    """
    if not callable(getattr(model, "get_weights", None)):
        raise TypeError(
            f"weight_model must have get_weights(gradients, losses), got {model!r}; for instance EqualWeight(). "
            "A method of fastconfig combines by itself: fastconfig.combine(grads, method)"
        )
    get_weights: Callable[..., object] = model.get_weights
    parameters = inspect.signature(get_weights).parameters
    takes_device = "device" in parameters or any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    device = {"device": grads.device} if takes_device else {}
    with torch.no_grad():
        returned = get_weights(gradients=grads, losses=losses, **device)
        if not isinstance(returned, (Tensor, list, tuple)):
            raise TypeError(
                f"{type(model).__name__}.get_weights must return a tensor of shape ({len(grads)},), got {returned!r}"
            )
        weights = torch.as_tensor(returned)
        # Weights made from overflown gradients are not a mistake to report: the update is NaN, and the step is skipped.
        if not bool(torch.isfinite(weights).all()) and not bool(torch.isfinite(grads).all()):
            return None
    return weights
