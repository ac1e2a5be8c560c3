"""What a method is: a rule from the losses' Gramian to the weights of their combination, or one on the rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Protocol, TypeGuard, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastconfig.backends import Backend
from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import NONFINITE_NAMES, GramianRule, NonFinite
from fastconfig.ops import backend_for, is_traced


@runtime_checkable
class Method(Protocol):
    """A small object that turns a Gramian into coefficients. Any object with this method is one.

    ``fc.combine`` computes ``K = G Gᵀ``, asks the method for ``c``, and returns ``c G``: the method never sees the n
    parameters, so a new one is m×m code alone.
    """

    def weights(self, gramian: Tensor, /) -> Tensor:
        """The coefficients c of the combination Σ c_i g_i.

        Args:
            gramian: (m, m) float64, K_ij = g_i · g_j, on the gradients' device. It must not be modified.

        Returns:
            (m,) floating-point tensor on the same device. A row of weight 0 is not read.
        """
        ...


class StreamingMethod(Protocol):
    """A method that no weights express, as it treats every column by itself: it reads the rows and writes a result."""

    def combine_rows(self, parts: Sequence[tuple[Backend, Rows, Tensor]], /) -> None:
        """Combine the rows of all parts, which are the columns of one problem, in order.

        Args:
            parts: for each, the backend to ask, its rows, and its (n,) output, to be overwritten.

        Raises:
            ValueError, TypeError: the method is not made for these rows. Nothing has been written.
        """
        ...


def is_streaming(method: object) -> TypeGuard[StreamingMethod]:
    """Whether a method combines by rows, not by weights. Quicker to ask than a protocol at run time."""
    return callable(getattr(method, "combine_rows", None)) and not isinstance(method, type)


def check_weights_of(method: object) -> Method:
    """The method; TypeError where it has no weights to answer with."""
    if is_streaming(method):
        raise TypeError(
            f"{method!r} has no weights(gramian), as it treats every parameter by itself; "
            "use it in fc.combine or fc.GradientBuffer.combine"
        )
    if isinstance(method, type) or not callable(getattr(method, "weights", None)):
        raise TypeError(f"method must have weights(gramian) -> (m,), got {method!r}; for instance fc.ConFIG()")
    return cast("Method", method)


class GramianMethod:
    """A built-in method, compiled on every backend. What is said here holds for each.

    A gradient that is zero constrains nothing and gets weight 0. One that holds inf or NaN makes every weight NaN, is
    left out, or raises, as ``nonfinite`` says. Inside ``torch.compile`` a method that draws from a generator of its own
    breaks the graph, as PyTorch records none but its default one.

    Args:
        rule: which method, and its numbers, validated.
        shown: the arguments that the method was made with, for its repr.
    """

    source: str
    """Where the method was published, in a line."""

    def __init__(self, rule: GramianRule, **shown: object) -> None:
        self._rule = rule
        self._shown = shown

    @property
    def rule(self) -> GramianRule:
        """The validated parameters, as backends read them."""
        return self._rule

    @property
    def is_fused(self) -> bool:
        """Whether the weights are the rule's answer and nothing else, so that a backend may combine in one call."""
        return type(self).weights is GramianMethod.weights

    def operand(self, m: int, device: torch.device) -> Tensor | None:
        """What the rule takes besides the Gramian in the next combination, as float64 on ``device``: draws, or state.

        Called once a combination; a random method draws here.
        """
        del m, device
        return None

    def weights(self, gramian: Tensor) -> Tensor:
        """The coefficients c, (m,) float64, for a Gramian (m, m): g = Σ c_i g_i.

        Raises:
            TypeError: the Gramian is no tensor.
            ValueError: it is not square, or the method's numbers do not fit it.
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
        """
        check_gramian(gramian)
        self._rule.check_losses(len(gramian))
        backend = backend_for(gramian.device, None, is_traced(gramian))
        operand = self.operand(len(gramian), gramian.device)
        return backend.rule_weights(gramian.detach().to(torch.float64), self._rule, operand)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._shown.items())})"


class Stateful:
    """What a method remembers from one combination to the next: a float64 tensor, and the place in its draws.

    Attributes:
        generator: what its draws come from, if it draws; None for torch's own.
    """

    generator: torch.Generator | None = None
    _state: Tensor | None = None

    def state_dict(self) -> dict[str, object]:
        """What the next combination depends on: the state's tensor and, where one was given, the generator's."""
        return {
            "state": None if self._state is None else self._state.clone(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Continue from a ``state_dict``.

        Raises:
            ValueError: it is none, or is of a method that draws from a generator of its own, which this one has not.
        """
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(f"state_dict must have the keys {sorted(self.state_dict())}, got {sorted(state_dict)}")
        state, generator = state_dict["state"], state_dict["generator"]
        if (generator is None) != (self.generator is None):
            raise ValueError(
                f"state_dict was saved {'without' if generator is None else 'with'} a generator; make the method "
                "as it was made then"
            )
        if isinstance(generator, Tensor) and self.generator is not None:
            self.generator.set_state(generator.cpu())
        self._state = state.detach().double().clone().contiguous() if isinstance(state, Tensor) else None

    def reset(self) -> None:
        """Forget what was remembered: the next combination is the first. The generator goes on."""
        self._state = None

    def _kept(self, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """The state on ``device``; ValueError unless it is of this shape, whose last size is m."""
        state, name = self._state, type(self).__name__
        if state is None:
            return None
        if state.shape[-1:] != shape[-1:]:
            raise ValueError(
                f"{name} remembers {state.shape[-1]} losses and was asked for {shape[-1]}; "
                "call reset(), or make a method of its own for each set of losses"
            )
        if state.shape != shape:  # by its address the core would read on past the end
            raise ValueError(
                f"{name} was given a state of shape {tuple(state.shape)} and needs {shape}; "
                "load the state_dict of the same method"
            )
        if state.device != device:
            state = self._state = state.to(device)
        return state

    def _begun(self, state: Tensor) -> Tensor:
        """A first state, remembered unless it is a tracer's that holds no memory and must not outlive the trace."""
        if type(state) is Tensor:
            self._state = state
        return state


class StatefulMethod(Stateful, GramianMethod):
    """A built-in method that remembers or draws."""


def draw(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None, normal: bool) -> Tensor:
    """Uniform numbers in [0, 1), or normal ones, float64 on ``device``, drawn where the generator lives."""
    function = torch.randn if normal else torch.rand
    if generator is None:
        return function(shape, dtype=torch.float64, device=device)
    return function(shape, dtype=torch.float64, device=generator.device, generator=generator).to(device)


def check_gramian(gramian: Tensor) -> None:
    """Raise TypeError unless it is a tensor, ValueError unless (m, m), m ≥ 1."""
    if not isinstance(gramian, Tensor):
        raise TypeError(f"gramian must be a tensor of shape (m, m), got {type(gramian).__name__}; see fc.gramian")
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
        raise ValueError(f"gramian must have shape (m, m), got {tuple(gramian.shape)}")


def check_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """Raise TypeError unless it is one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}; seed one with manual_seed")
    return generator


def check_nonfinite(nonfinite: NonFinite) -> str:
    """Raise ValueError unless it is known."""
    if nonfinite not in NONFINITE_NAMES:
        raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE_NAMES)}, got {nonfinite!r}")
    return nonfinite


def check_count(name: str, value: int, least: int = 1) -> int:
    """An int of at least ``least``. TypeError, ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return operator.index(value)


def check_preferences(weights: Sequence[float] | Tensor | None, *, signed: bool = False) -> tuple[float, ...] | None:
    """Preferences as floats: finite, not all zero, and not negative unless ``signed``. A tensor is read once, here.

    Raises:
        ValueError: they are not that.
    """
    if weights is None:
        return None
    values = _numbers_of(weights)
    if not values:
        raise ValueError(f"weights must be a vector of real numbers, one a loss, got {weights!r}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"weights must be finite, got {list(values)}; a loss is left out by weight 0")
    if not any(values):
        raise ValueError(f"weights must not all be zero, got {list(values)}: they would leave no direction")
    if not signed and min(values) < 0:
        raise ValueError(f"weights must not be negative, got {list(values)}; a loss is left out by weight 0")
    return values


def _numbers_of(weights: Sequence[float] | Tensor) -> tuple[float, ...]:
    """A vector of real numbers, as floats; empty where it is none."""
    try:
        if isinstance(weights, (list, tuple)) and all(type(value) in (float, int) for value in weights):
            return tuple(float(value) for value in weights)  # a compiler can trace this, and nothing below
        # float64 from the start: a list would pass through float32, where 0.1 is 0.10000000149.
        vector = weights.detach() if isinstance(weights, Tensor) else torch.from_numpy(np.array(weights))
    except (OverflowError, RuntimeError, TypeError, ValueError):  # huge, ragged, text, or tensors that require grad
        return ()
    if vector.dim() != 1 or vector.is_complex() or vector.dtype == torch.bool:
        return ()
    return tuple(float(value) for value in vector.tolist())
