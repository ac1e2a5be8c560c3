"""What all weightings share: the losses as a vector, the weights in use, and state that only finite values enter.

Nothing here waits for an accelerator, and no Python branch asks for a tensor's value: state is selected, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastconfig.gradients.losses import Losses


class Weighting(nn.Module):
    """The losses' weighted sum ``Σ w_i L_i``, by weights that a rule adapts. The base of all weightings.

    ``total = weighting(losses)`` takes the losses, an (m,) tensor or a sequence of m tensors of one element, and gives
    a 0-d tensor of their dtype to backpropagate; it computes in float64. All state is in ``state_dict``, from the
    start, so a checkpoint may be of any moment; it is float64, and stays so after ``.to(dtype)``. After ``eval()`` a
    call leaves the state as it is. A call compiles with ``fullgraph=True``, but for that of ``ReLoBRaLo``, as a
    compiler cannot see into its generator.

    The total is to be backpropagated, not watched: its weights are of this step, so it may fall, or rise, while the
    losses do not (``FAMO`` and ``UncertaintyWeighting`` say how). Give ``ReduceLROnPlateau`` the losses' mean, or that
    of their logarithms.

    A call with a loss that is not finite gives a total that is not finite either, as a GradScaler expects, and leaves
    the state as it is, so training goes on where it was.

    Args:
        num_losses: m, or the m losses' names.

    Attributes:
        weights: (m,) float64, detached, those of the last call: the derivatives of the total by the losses.

    Raises:
        TypeError: num_losses neither an int nor a sequence of str; a call with losses that are no floating-point
            tensors.
        ValueError: no losses, or names that are not distinct; a call with another number of losses, with one of
            several elements, or on another device than the weighting.
    """

    weights: Tensor
    __call__: Callable[[Tensor | Sequence[Tensor]], Tensor]

    def __init__(self, num_losses: int | Sequence[str]) -> None:
        super().__init__()
        self._losses = Losses(num_losses)
        self.register_buffer("weights", torch.ones(self.num_losses, dtype=torch.float64))

    @property
    def names(self) -> tuple[str, ...]:
        """M names of the losses; "0", "1" ... where none were given."""
        return self._losses.names

    @property
    def num_losses(self) -> int:
        """m, the number of losses."""
        return len(self._losses)

    def forward(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The total, 0-d, of the losses' dtype."""
        given = self._stacked(losses)
        total, weights = self._total(given.double())
        self.weights.copy_(weights.detach())
        return total.to(given.dtype)

    def extra_repr(self) -> str:
        """For ``repr``: the names where they were given, else the number."""
        return f"{list(self.names)}" if self._losses.named else f"{self.num_losses}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weighting:
        """Follow a model's ``.to(device)``, but not its ``.to(dtype)``: sixteen bits cannot hold moving averages."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = tensor.dtype == torch.float64 and result.dtype != torch.float64
            return tensor.to(result.device) if narrowed else result

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _total(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The total, 0-d, and the weights, (m,), of losses (m,) in float64."""
        if self.training:
            self._observe(losses.detach())
        weights = self.weights.clone()  # autograd keeps them, and the next call overwrites the buffer
        return (weights * losses).sum(), weights

    def _observe(self, losses: Tensor) -> None:
        """Let detached losses (m,) into the state, and form the weights anew. Nothing, for those of fixed weights."""

    def _keep(self, usable: Tensor, **values: Tensor) -> None:
        """Give buffers new values where ``usable``, a bool that broadcasts over each of them."""
        for name, value in values.items():
            buffer: Tensor = getattr(self, name)  # PyTorch 2.4 cannot compile get_buffer
            buffer.copy_(torch.where(usable, value, buffer))

    def _each(self, losses: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The losses as m 0-d tensors.

        Raises:
            TypeError, ValueError: see the class.
        """
        if isinstance(losses, Tensor):
            if losses.shape != (self.num_losses,):
                raise ValueError(f"losses must have shape ({self.num_losses},), got {tuple(losses.shape)}")
            each = [losses] if self.num_losses == 1 else list(losses.unbind())
        elif isinstance(losses, Sequence):
            each = list(losses)
        else:
            raise TypeError(f"losses must be an (m,) tensor or a sequence of tensors, got {type(losses).__name__}")
        if len(each) != self.num_losses:
            raise ValueError(f"losses must hold {self.num_losses} losses, {', '.join(self.names)}, got {len(each)}")
        for loss, name in zip(each, self.names, strict=True):
            if not isinstance(loss, Tensor) or not loss.is_floating_point():
                kind = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"loss {name} must be a floating-point tensor, got {kind}")
            if loss.numel() != 1:
                raise ValueError(f"loss {name} must have one element, got shape {tuple(loss.shape)}; take its mean()")
            if loss.device != self.weights.device:
                raise ValueError(
                    f"loss {name} is on {loss.device} but this weighting on {self.weights.device}; move it there with "
                    "weighting.to(device)"
                )
        return [loss.reshape(()) for loss in each]

    def _stacked(self, losses: Tensor | Sequence[Tensor]) -> Tensor:
        """The losses as one (m,) tensor, of the widest of their dtypes."""
        each = self._each(losses)
        return losses if isinstance(losses, Tensor) else torch.stack(each)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient; 1, no change, where the denominator is 0."""
    return torch.where(denominator == 0, 1.0, numerator / denominator)


def all_finite(*tensors: Tensor) -> Tensor:
    """0-d bool: whether there is no inf or NaN."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
