"""Several processes that torch.distributed connects over the loopback, started once and asked again and again."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

PATIENCE = 900
"""Seconds after which ranks that wait for each other have failed: a bound for what never ends, not a measure."""


class World:
    """W processes, each with a rank.

    Args:
        count: W.
        folder: where they meet.
    """

    def __init__(self, count: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.count = count
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, str(folder)), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable, *args: object) -> list:
        """What ``function(rank, *args)`` returns on each rank; the failures of all, where one raises."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} of {function.__name__} does not answer"
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def end(self) -> None:
        """Stop the processes: at once, as gloo's threads cannot always be taken down in order."""
        for process in self._processes:
            process.kill()


def _serve(pipe: Connection, rank: int, count: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((False, function(rank, *args)))
        except BaseException:  # told to the test, whatever it is
            pipe.send((True, traceback.format_exc()))


def world_of(count: int):
    """A fixture: a world of so many ranks, for the tests of a module."""

    @pytest.fixture(scope="module")
    def world(tmp_path_factory: pytest.TempPathFactory):
        if not dist.is_available() or not dist.is_gloo_available():
            pytest.skip("this PyTorch has no torch.distributed with gloo")
        ranks = World(count, tmp_path_factory.mktemp(f"world-{count}"))
        yield ranks
        ranks.end()

    return world
