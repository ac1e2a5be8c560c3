"""A network's gradients and parameters as vectors, and the small helpers around them: ``conflictfree.utils``.

A vector holds the parameters one after the other in the order of ``network.parameters()``, each in its logical
(row-major) order whatever its memory layout, so that what ``get_*`` reads, ``apply_*`` puts back in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Literal, Sequence, Tuple, TypeVar, Union  # noqa: UP035  (users import these names from here)

import numpy as np
import torch
from torch import Tensor

from fastconfig.api import combine, gramian
from fastconfig.gradients.combination import Combination
from fastconfig.methods import ConFIG

__all__ = [
    "Literal",
    "OrderedSliceSelector",
    "RandomSliceSelector",
    "Sequence",
    "Tuple",
    "Union",
    "apply_gradient_vector",
    "apply_gradient_vector_para_based",
    "apply_para_vector",
    "estimate_conflict",
    "get_cos_similarity",
    "get_gradient_vector",
    "get_para_vector",
    "has_zero",
    "np",
    "torch",
    "transfer_coef_double",
    "unit_vector",
]

Item = TypeVar("Item")


def _one(norms: Tensor, cosines: Tensor) -> float:
    return 1.0


UNIT_DIRECTION = ConFIG(length=_one)
"""ConFIG's direction at length 1. Of a single row that is the row normalised: zero for zero, NaN for non-finite."""


def get_para_vector(network: torch.nn.Module) -> Tensor:
    """All parameters of ``network`` as one vector.

    Args:
        network: anything with ``parameters()``.

    Returns:
        (n,) detached tensor. It is new, except for a network of one contiguous parameter, where it is a view of that.

    Raises:
        ValueError: the network has no parameters. (conflictfree returns None.)

    Unlike conflictfree's, parameters in any memory layout (channels_last) are taken.
    """
    pieces = [parameter.detach() for parameter in network.parameters()]
    if not pieces:
        raise ValueError("network has no parameters, so there is no vector of them; pass the network that is trained")
    return _flattened(pieces)


def get_gradient_vector(network: torch.nn.Module, none_grad_mode: Literal["raise", "zero", "skip"] = "skip") -> Tensor:
    """The ``.grad`` of all parameters of ``network`` as one vector.

    Args:
        network: anything with ``parameters()``, after a backward pass.
        none_grad_mode: what to do with a parameter whose ``.grad`` is None. ``"skip"`` leaves it out, which suits
            losses that all reach the same parameters; ``"zero"`` puts zeros in its place, which losses that reach
            different parameters need; ``"raise"`` raises.

    Returns:
        (n,) detached tensor. It is new, except where it is of one contiguous gradient alone: then a view of that.

    Raises:
        RuntimeError: a gradient is None and the mode is ``"raise"``; or all are, and the mode is ``"skip"``.
            (conflictfree returns None for the latter.)
        ValueError: an unknown mode; conflictfree only notices one when it meets a None.
        TypeError: a gradient is sparse.

    Unlike conflictfree's, gradients in any memory layout (channels_last) are taken.
    """
    _check_choice("none_grad_mode", none_grad_mode, ("raise", "zero", "skip"))
    pieces = []
    for i, parameter in enumerate(network.parameters()):
        if parameter.grad is not None:
            _check_dense(parameter.grad, i)
            pieces.append(parameter.grad.detach())
        elif none_grad_mode == "raise":
            raise RuntimeError(
                f"parameter {i} of network, shape {tuple(parameter.shape)}, has .grad None and none_grad_mode is "
                "'raise'; use 'zero' where losses reach different parameters, 'skip' where they reach the same"
            )
        elif none_grad_mode == "zero":
            pieces.append(torch.zeros_like(parameter).detach())
    if not pieces:
        raise RuntimeError(
            "no parameter of network has a gradient; call loss.backward() first, or use none_grad_mode='zero' for a "
            "loss that reaches none of them"
        )
    return _flattened(pieces)


def apply_gradient_vector(
    network: torch.nn.Module,
    grad_vec: Tensor,
    none_grad_mode: Literal["zero", "skip"] = "skip",
    zero_grad_mode: Literal["skip", "pad_zero", "pad_value"] = "pad_value",
) -> None:
    """Put a vector from ``get_gradient_vector``, or a combination of such, into the ``.grad`` of the parameters.

    Every ``.grad`` that there is stays the same object and becomes a view of ``grad_vec`` (a copy for a parameter
    that is not contiguous, or of another dtype).

    Args:
        network: anything with ``parameters()``.
        grad_vec: (n,) tensor.
        none_grad_mode: as it was in ``get_gradient_vector``.
        zero_grad_mode: what a parameter whose ``.grad`` is None gets where ``grad_vec`` has a place for it:
            ``"pad_value"`` what stands there, ``"pad_zero"`` zeros, ``"skip"`` nothing, it stays None.

    Raises:
        ValueError: an unknown mode; ``grad_vec`` is no vector, or its length fits none of the network's layouts, or it
            is on another device. Nothing has been written.
        TypeError: ``grad_vec`` is no tensor.

    Differs from conflictfree: with ``"skip"``, a vector as long as all parameters together is laid out over all of
    them, where conflictfree shifts every slice after the first ``.grad`` that is None; a wrong length raises;
    parameters with ``requires_grad=False`` receive no gradient.
    """
    _check_choice("none_grad_mode", none_grad_mode, ("zero", "skip"))
    _check_choice("zero_grad_mode", zero_grad_mode, ("skip", "pad_zero", "pad_value"))
    covered = list(network.parameters())
    if none_grad_mode == "skip":
        reached = [parameter for parameter in covered if parameter.grad is not None]
        if isinstance(grad_vec, Tensor) and grad_vec.numel() == _elements(reached):
            covered = reached
    for parameter, piece in _cut(grad_vec, covered, "grad_vec"):
        if not parameter.requires_grad:
            continue
        if parameter.grad is not None:
            parameter.grad.data = piece
        elif zero_grad_mode != "skip":
            parameter.grad = piece if zero_grad_mode == "pad_value" else torch.zeros_like(parameter)


def apply_gradient_vector_para_based(network: torch.nn.Module, grad_vec: Tensor) -> None:
    """Put a vector over all parameters into their ``.grad``, whatever ``.grad`` is now.

    Each ``.grad`` becomes a new tensor, a view of ``grad_vec`` (a copy for a parameter that is not contiguous, or of
    another dtype).

    Args:
        network: anything with ``parameters()``.
        grad_vec: (n,) tensor over all parameters, as from ``get_gradient_vector(network, "zero")``.

    Raises:
        ValueError: ``grad_vec`` is no vector, has not as many elements as the parameters, or is on another device.
            Nothing has been written.
        TypeError: ``grad_vec`` is no tensor.

    Differs from conflictfree: parameters with ``requires_grad=False`` receive no gradient.
    """
    for parameter, piece in _cut(grad_vec, list(network.parameters()), "grad_vec"):
        if parameter.requires_grad:
            parameter.grad = piece


def apply_para_vector(network: torch.nn.Module, para_vec: Tensor) -> None:
    """Put a vector from ``get_para_vector`` into the parameters, frozen ones included.

    Each ``.data`` becomes a view of ``para_vec``; a parameter that is not contiguous keeps its layout, and one of
    another dtype its dtype: those get a copy.

    Args:
        network: anything with ``parameters()``.
        para_vec: (n,) tensor.

    Raises:
        ValueError: ``para_vec`` is no vector, has not as many elements as the parameters, or is on another device.
            Nothing has been written.
        TypeError: ``para_vec`` is no tensor.
    """
    for parameter, piece in _cut(para_vec, list(network.parameters()), "para_vec"):
        parameter.data = piece


def get_cos_similarity(vector1: Tensor, vector2: Tensor) -> Tensor:
    """The cosine of the angle between two vectors.

    Args:
        vector1: (n,) tensor.
        vector2: (n,) tensor of the same dtype, on the same device.

    Returns:
        0-d tensor of the vectors' dtype; accumulated in float64. 0 where a vector is zero (conflictfree: NaN).

    Raises:
        TypeError, ValueError: not two such vectors.
    """
    return norms_and_cosines([vector1, vector2]).cosines[0, 1].to(vector1.dtype.to_real())


def unit_vector(vector: Tensor, warn_zero: bool = False) -> Tensor:
    """``vector`` divided by its Euclidean norm; zero stays zero.

    Args:
        vector: tensor of any shape. The norm is accumulated in float64, so no float32
            vector over- or underflows; float64 ones are safe between about 1e-150 and 1e150.
        warn_zero: print a line where the vector is zero; finding out waits for the device.

    Returns:
        New tensor of the same shape and dtype; all NaN where ``vector`` holds inf or NaN.
    """
    unit = combine([vector.reshape(-1)], UNIT_DIRECTION).view(vector.shape)
    if warn_zero and not bool(unit.any()):
        print("unit_vector: the vector is zero and has no direction; it stays zero.")
    return unit


def transfer_coef_double(
    weights: Tensor,
    unit_vec_1: Tensor,
    unit_vec_2: Tensor,
    or_unit_vec_1: Tensor,
    or_unit_vec_2: Tensor,
) -> tuple[Tensor, int]:
    """Coefficients (c, 1) for which the cosines of c·o1 + o2 with two unit vectors u1, u2 are in the ratio w1 : w2.

    With o1 orthogonal to u1 and o2 to u2, (c·o1 + o2)·u1 = o2·u1 and (c·o1 + o2)·u2 = c·o1·u2, so that
    c = w2 (o2·u1) / (w1 (o1·u2)). Source: the two-loss form of ConFIG, arXiv 2408.11104, section 3.2.

    Args:
        weights: (2,) direction weights w1, w2.
        unit_vec_1: (n,) unit vector u1.
        unit_vec_2: (n,) unit vector u2.
        or_unit_vec_1: (n,) unit vector o1: the part of u2 orthogonal to u1, normalised.
        or_unit_vec_2: (n,) unit vector o2: the part of u1 orthogonal to u2, normalised.

    Returns:
        c as a 0-d tensor, and 1. c is 0 where 0/0 would come out, as it does for parallel vectors (conflictfree: NaN).
    """
    numerator = weights[1] * torch.dot(or_unit_vec_2, unit_vec_1)
    denominator = weights[0] * torch.dot(or_unit_vec_1, unit_vec_2)
    return torch.where(numerator == 0, 0.0, numerator / denominator), 1


def estimate_conflict(gradients: Tensor) -> Tensor:
    """The cosines between the sum of the gradients and each of them: one under 0 means that summing hurts that loss.

    Args:
        gradients: (m, n) tensor, one row a loss.

    Returns:
        (m,) tensor of the gradients' dtype; 0 for a zero gradient (conflictfree: NaN).

    """
    with torch.no_grad():
        measured = norms_and_cosines([*gradients, gradients.sum(dim=0)])
        return measured.cosines[:-1, -1].to(gradients.dtype.to_real())


def has_zero(lists: Iterable[object]) -> bool:
    """Whether any element of ``lists`` equals 0."""
    return any(bool(element == 0) for element in lists)


class OrderedSliceSelector:
    """Goes round a sequence, n elements at a time: which losses to evaluate in this step of a momentum operator.

    Attributes:
        start_index: where the next slice starts.
    """

    def __init__(self) -> None:
        self.start_index = 0

    def select(self, n: int, source_sequence: Sequence[Item]) -> tuple[list[int], Item | list[Item]]:
        """The next n elements, from the front again where the sequence ends.

        Args:
            n: how many, 0 to ``len(source_sequence)``.
            source_sequence: what to select from.

        Returns:
            Their indexes, a list, and the elements: a list, or the element itself where n is 1.

        Raises:
            ValueError: no such n.
        """
        length = _check_slice(n, source_sequence)
        indexes = [(self.start_index + step) % length for step in range(n)]
        self.start_index = (self.start_index + n) % max(length, 1)
        return indexes, _take(source_sequence, indexes)


class RandomSliceSelector:
    """Draws n different elements of a sequence from NumPy's global generator, which ``np.random.seed`` seeds."""

    def select(self, n: int, source_sequence: Sequence[Item]) -> tuple[list[int], Item | list[Item]]:
        """Elements drawn without replacement.

        Args:
            n: how many, 0 to ``len(source_sequence)``.
            source_sequence: what to select from.

        Returns:
            Their indexes, a list (conflictfree: an array, which its momentum operators cannot take), and the elements:
            a list, or the element itself where n is 1.

        Raises:
            ValueError: no such n. (conflictfree: AssertionError.)
        """
        length = _check_slice(n, source_sequence)
        # The legacy generator on purpose: a script's np.random.seed gives the draws it always gave.
        indexes: list[int] = np.random.choice(length, n, replace=False).tolist() if n else []  # noqa: NPY002
        return indexes, _take(source_sequence, indexes)


def norms_and_cosines(vectors: Sequence[Tensor]) -> Combination:
    """The norms of ``vectors`` (k,) and their cosines (k, k), float64, read off the combination that just adds them.

    Raises:
        TypeError, ValueError: not vectors of one length, dtype and device.
    """
    products = gramian(vectors)
    return Combination(products, weights=products.new_ones(len(products)), rtol=0.0)


def _flattened(pieces: list[Tensor]) -> Tensor:
    """All pieces as one vector, each in logical order. One contiguous piece alone is seen, not copied."""
    vectors = [piece.reshape(-1) for piece in pieces]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _cut(vector: Tensor, parameters: list[torch.nn.Parameter], name: str) -> list[tuple[torch.nn.Parameter, Tensor]]:
    """Each parameter with its piece of ``vector``; all checks are made before the first is handed out."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}; pass one combined vector")
    if vector.dim() != 1:
        raise ValueError(f"{name} must have shape (n,), got {tuple(vector.shape)}; pass one combined vector")
    if vector.numel() != _elements(parameters):
        with_grad = _elements(parameter for parameter in parameters if parameter.grad is not None)
        raise ValueError(
            f"{name} has {vector.numel()} elements, but the network's parameters have {_elements(parameters)} "
            f"({with_grad} where .grad is not None); collect it from the same network, and where losses reach "
            "different parameters with get_gradient_vector(network, none_grad_mode='zero')"
        )
    for i, parameter in enumerate(parameters):
        if parameter.device != vector.device:
            raise ValueError(f"{name} is on {vector.device} but parameter {i} on {parameter.device}; move it there")
    pieces = torch.split(vector.detach().contiguous(), [parameter.numel() for parameter in parameters])
    return [(parameter, _shaped(piece, parameter)) for parameter, piece in zip(parameters, pieces, strict=True)]


def _shaped(piece: Tensor, parameter: Tensor) -> Tensor:
    """``piece`` with the parameter's shape, dtype and memory layout: a view of it where that is possible."""
    shaped = piece.view(parameter.shape).to(parameter.dtype)
    if parameter.is_contiguous():
        return shaped
    return torch.empty_like(parameter, requires_grad=False).copy_(shaped)


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _check_dense(grad: Tensor, index: int) -> None:
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of parameter {index} has layout {grad.layout}, which is no vector; make it dense, for "
            "an embedding with sparse=False"
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_slice(n: int, source_sequence: Sequence[Item]) -> int:
    length = len(source_sequence)
    if not 0 <= operator.index(n) <= length:
        raise ValueError(f"n must be 0 to {length}, the length of source_sequence, got {n}; select fewer")
    return length


def _take(source_sequence: Sequence[Item], indexes: list[int]) -> Item | list[Item]:
    """The elements at ``indexes``; one alone comes without a list around it."""
    if len(indexes) == 1:
        return source_sequence[indexes[0]]
    return [source_sequence[i] for i in indexes]
