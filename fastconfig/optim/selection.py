"""Which losses a step of M-ConFIG backpropagates: in order, at random, or by weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, TypedDict, cast

import torch
from torch import Tensor

Selection = Literal["ordered", "random"] | Sequence[float] | Callable[[tuple[int, ...]], Sequence[float]]
"""``"ordered"``: one after the other. ``"random"``: all equally likely. A sequence of m weights: likely in proportion.
A function of how often each loss was drawn so far, a tuple of m counts, to m weights: the same, asked at every draw."""


class SelectionState(TypedDict):
    """What resuming needs."""

    cursor: int
    round: list[int]
    drawn: list[int]
    generator: Tensor


class LossSelector:
    """Draws losses, those of one step distinct. Drawn by chance, losses that were never drawn come first.

    No update happens before every loss has been seen, so a random order would only waste the steps before that.

    Args:
        selection: the rule.
        num_losses: m.
        losses_per_step: k, how many losses make a step.
        generator: what chance is drawn from, a CPU generator; None for one of its own, seeded from torch's default one.

    Raises:
        TypeError: a selection of another kind; a generator that is none.
        ValueError: an unknown name; weights that are not m finite numbers of 0 or more, not all zero.
    """

    def __init__(
        self, selection: Selection, num_losses: int, losses_per_step: int, generator: torch.Generator | None
    ) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, where losses are drawn, got one on {generator.device}")
        self._num_losses = num_losses
        self._per_step = losses_per_step
        self._generator = generator or _seeded_generator()
        self._weights_of_losses = self._checked_selection(selection)
        self._cursor = 0
        self._round: list[int] = []
        self._drawn = [0] * num_losses

    def next(self, among: Collection[int] | None = None) -> int:
        """The next loss.

        Args:
            among: those that may be drawn; None for all.

        Raises:
            ValueError: the selection's function gave no weights; there is no loss to draw among these.
        """
        if len(self._round) >= self._per_step:
            self._round = []
        if among is not None and not set(among).difference(self._round):
            raise ValueError(
                f"present must hold a loss that was not yet drawn for this step, got {sorted(among)} after "
                f"{self._round}; leave this batch out, or go on with fewer losses"
            )
        if self._weights_of_losses is None:
            loss = self._cursor
            while among is not None and (loss not in among or loss in self._round):
                loss = (loss + 1) % self._num_losses
            self._cursor = (loss + 1) % self._num_losses
        else:
            loss = self._chosen(self._weights_of_losses(tuple(self._drawn)), among)
        self._round.append(loss)
        self._drawn[loss] += 1
        return loss

    def state(self) -> SelectionState:
        """A copy of where it stands."""
        return {
            "cursor": self._cursor,
            "round": list(self._round),
            "drawn": list(self._drawn),
            "generator": self._generator.get_state(),
        }

    def load(self, state: SelectionState) -> None:
        """Go on from ``state``, which must be of as many losses."""
        self._cursor = state["cursor"]
        self._round = list(state["round"])
        self._drawn = list(state["drawn"])
        self._generator.set_state(state["generator"].cpu())

    def _chosen(self, weights: Sequence[float], among: Collection[int] | None) -> int:
        open_losses = [i for i in range(self._num_losses) if i not in self._round and (among is None or i in among)]
        never = [i for i in open_losses if self._drawn[i] == 0]
        if never:
            open_losses, weights = never, [1.0] * self._num_losses
        else:
            weights = self._checked_weights(weights)
        likely = torch.tensor([weights[i] for i in open_losses], dtype=torch.float64, device="cpu")
        if not likely.any():  # all that is left has weight 0, but a step needs as many losses
            likely.fill_(1.0)
        return open_losses[int(torch.multinomial(likely, 1, generator=self._generator))]

    def _checked_selection(self, selection: Selection) -> Callable[[tuple[int, ...]], Sequence[float]] | None:
        """What gives the weights; None for a fixed order."""
        if isinstance(selection, str):
            if selection == "ordered":
                return None
            if selection == "random":
                equal = [1.0] * self._num_losses
                return lambda drawn: equal
            raise ValueError(f"selection must be 'ordered', 'random', m weights or a function, got {selection!r}")
        if callable(selection):
            return selection
        if not isinstance(selection, (Sequence, Tensor)):
            raise TypeError(f"selection must be 'ordered', 'random', m weights or a function, got {selection!r}")
        fixed = self._checked_weights(cast("Sequence[float]", selection))
        return lambda drawn: fixed

    def _checked_weights(self, weights: Sequence[float]) -> list[float]:
        values = [float(weight) for weight in weights]
        if len(values) != self._num_losses:
            raise ValueError(f"selection must give {self._num_losses} weights, one a loss, got {len(values)}")
        if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
            raise ValueError(f"selection's weights must be finite, 0 or more and not all zero, got {values}")
        return values


def _seeded_generator() -> torch.Generator:
    """A generator that follows from torch.manual_seed, and that no other drawing disturbs afterwards."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")))
