"""The demo's training: Adam on the summed loss, ConFIG and M-ConFIG, each for the same wall time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from fastconfig.demos.burgers_problem import LOSS_NAMES, BurgersNetwork, ExactGrid, Problem
from fastconfig.gradients.buffer import GradientBuffer
from fastconfig.methods.catalogue import CATALOGUE
from fastconfig.optim import MConFIG

PAIRS = ((0, 1), (0, 2), (1, 2))
"""Pairs of losses, in the order of ``History.cosines``."""

_PEAK_RATE, _FINAL_RATE = 2e-3, 1e-5
_WARM_UP = 0.02
"""Share of the budget over which the learning rate rises to its peak."""

_ROUNDS = 200
"""The methods take turns, each for one round's share of its budget, so that a busy machine is equally busy for all."""
_ROUNDS_PER_EVALUATION = 5
_STEPS_PER_COSINE = 10


@dataclass
class History:
    """What was measured on the way. Times are seconds of this method's own training, evaluations left out.

    Attributes:
        seconds, errors, losses: at each evaluation: time, test MSE, latest training losses (residual, boundary,
            initial), NaN before a loss's first evaluation.
        cosine_seconds, cosines: time and the cosines between the losses' gradients, in the order of ``PAIRS``.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    losses: list[tuple[float, ...]] = field(default_factory=list)
    cosine_seconds: list[float] = field(default_factory=list)
    cosines: list[tuple[float, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Budget:
    """What each method may use. One of the two at least is set; the first to be used up ends the training.

    Attributes:
        seconds: of training, wall time.
        steps: optimizer steps.
    """

    seconds: float | None
    steps: int | None

    def share(self, seconds: float, steps: int) -> float:
        """The share used up; 1 or more ends the training."""
        of_seconds = 0.0 if self.seconds is None else seconds / self.seconds
        of_steps = 0.0 if self.steps is None else steps / self.steps
        return max(of_seconds, of_steps)


def learning_rate(share: float) -> float:
    """The rate at a share of the budget: a short linear rise, then half a cosine. The same for every method."""
    if share < _WARM_UP:
        return _PEAK_RATE * (share + 1e-3) / (_WARM_UP + 1e-3)
    decayed = min(1.0, (share - _WARM_UP) / (1.0 - _WARM_UP))
    return _FINAL_RATE + (_PEAK_RATE - _FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * decayed))


class Trainer(ABC):
    """One method at work on its own copy of the network, with its own clock.

    Attributes:
        steps: optimizer steps taken. seconds: wall time they took. backward_seconds: of that, in computing losses and
            backpropagating them; the rest is what a method costs.
    """

    name: str

    def __init__(self, seed: int, device: torch.device, budget: Budget) -> None:
        self.network = BurgersNetwork(seed).to(device)
        self.problem = Problem(seed, device)
        self.budget = budget
        self.history = History()
        self.steps = 0
        self.seconds = 0.0
        self.backward_seconds = 0.0
        self.losses = [math.nan] * len(LOSS_NAMES)
        self._evaluated = -1
        self._device = device
        self._optimizer = self._make_optimizer()

    @property
    def share(self) -> float:
        """The share of the budget used up, at most 1."""
        return min(1.0, self.budget.share(self.seconds, self.steps))

    def train_until(self, share: float, stop: Callable[[], bool]) -> None:
        """Take steps until ``share`` of the budget is used up or ``stop()``."""
        while self.share < share and not stop():
            started = self._now()
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self.share)
            self._step()
            self.steps += 1
            self.seconds += self._now() - started

    def evaluate(self, grid: ExactGrid) -> None:
        """Write the test error and the losses into the history, off the clock, if they can have changed since."""
        if self._evaluated == self.steps:
            return
        self._evaluated = self.steps
        self.history.seconds.append(self.seconds)
        self.history.errors.append(grid.error(grid.predict(self.network)))
        self.history.losses.append(tuple(self.losses))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=_PEAK_RATE, fused=True)

    @abstractmethod
    def _step(self) -> None:
        """One step of the optimizer, the losses' values noted in ``self.losses``."""

    def _all_losses(self) -> list[Tensor]:
        losses = [self.problem.loss(self.network, i) for i in range(len(LOSS_NAMES))]
        self.losses = torch.stack([loss.detach() for loss in losses]).tolist()
        return losses

    @contextmanager
    def _backpropagating(self) -> Generator[None, None, None]:
        started = self._now()
        yield
        self.backward_seconds += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()


class SummedLoss(Trainer):
    """Adam on the sum of the losses: what one does without a method."""

    name = "Adam"

    def _step(self) -> None:
        self._optimizer.zero_grad()
        with self._backpropagating():
            torch.stack(self._all_losses()).sum().backward()
        self._optimizer.step()


class MethodTrainer(Trainer):
    """Adam on a method's combination of the three losses' gradients."""

    def __init__(self, seed: int, device: torch.device, budget: Budget, method: str = "config") -> None:
        super().__init__(seed, device, budget)
        self.name = CATALOGUE[method].kind.__name__
        self._buffer = GradientBuffer(self.network, num_losses=LOSS_NAMES)
        self._method = CATALOGUE[method].make(len(LOSS_NAMES))

    def _step(self) -> None:
        with self._backpropagating():
            self._buffer.backward(self._all_losses())
        info = self._buffer.combine(self._method)
        self._optimizer.step()
        if self.steps % _STEPS_PER_COSINE == 0:
            cosines = info.cosines.tolist()
            self.history.cosine_seconds.append(self.seconds)
            self.history.cosines.append(tuple(cosines[i][j] for i, j in PAIRS))


class MConFIGTrainer(Trainer):
    """M-ConFIG: one loss a step, in turn; ConFIG combines the gradients' moving averages."""

    name = "M-ConFIG"

    _optimizer: MConFIG

    def _make_optimizer(self) -> MConFIG:
        return MConFIG(self.network.parameters(), lr=_PEAK_RATE, num_losses=LOSS_NAMES)

    def _step(self) -> None:
        name = str(self._optimizer.next_loss())
        index = LOSS_NAMES.index(name)
        with self._optimizer.record(name), self._backpropagating():
            loss = self.problem.loss(self.network, index)
            loss.backward()
        self.losses[index] = loss.item()
        self._optimizer.step()


def trainers(seed: int, device: torch.device, budget: Budget, method: str = "config") -> list[Trainer]:
    """The demo's three: Adam on the summed loss, on a method's combination, and M-ConFIG.

    Args:
        seed: of the weights and the points, the same for all.
        device: where they train.
        budget: what each may use.
        method: a name of the catalogue.
    """
    return [
        SummedLoss(seed, device, budget),
        MethodTrainer(seed, device, budget, method),
        MConFIGTrainer(seed, device, budget),
    ]


@contextmanager
def _one_thread() -> Generator[None, None, None]:
    """One thread of torch's: the network is too small to gain from more, and loses tenfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(trainers: Sequence[Trainer], grid: ExactGrid, stop: Callable[[], bool], progress: Callable[[], None]) -> None:
    """Train all in turns until their budgets are used up, or until ``stop()``.

    Args:
        trainers: their histories are filled in on the way.
        grid: what the test errors are measured on.
        stop: asked before every step.
        progress: called after every turn.
    """
    with _one_thread():
        for trainer in trainers:
            trainer.evaluate(grid)
        for turn in range(1, _ROUNDS + 1):
            for trainer in trainers:
                trainer.train_until(turn / _ROUNDS, stop)
                if turn % _ROUNDS_PER_EVALUATION == 0 or stop():
                    trainer.evaluate(grid)
                progress()
            if stop():
                return
