"""Threads of the core and processes: the same bits for any number of them, in children of fork(), from many callers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastconfig as fc
from fastconfig.backends import cpu

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="the core is not built")  # test_cpu.py asserts it

COUNTS = [1, 2, 3, 5, 8, 13, 32, 64]
FORKS = """
import os, signal, sys, torch, fastconfig as fc

torch.set_num_threads(4)
grads, out = torch.randn(5, 300_000), torch.empty(300_000)

def work():
    return fc.combine(grads, out=out).numpy().tobytes(), fc.gramian(grads).numpy().tobytes()

wanted = work()  # by several threads
for generation in range(2):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 100 + os.WTERMSIG(status)
        os._exit(code)  # past what PyTorch does at the end, which a forked process does not survive
    signal.alarm(600)  # a bound for what never ends
    if work() != wanted:
        os._exit(5)
os._exit(0)
"""


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_a_process_with_threads_goes_on() -> None:
    """OpenMP's threads stay with the parent, and a team would wait for them for ever; PyTorch's own operations do."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("threads_as_before")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_to_sixty_four_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    grads = torch.randn(3, 200_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    answers = []
    for count in [*COUNTS, *COUNTS[::-1]]:  # changed between calls, up and down
        torch.set_num_threads(count)
        answers.append((fc.combine(grads), fc.gramian(grads)))
    for combined, gramian in answers[1:]:
        assert torch.equal(combined, answers[0][0])
        assert torch.equal(gramian, answers[0][1])


@pytest.mark.usefixtures("threads_as_before")
def test_a_number_of_threads_that_another_caller_changes_meanwhile() -> None:
    grads = torch.randn(3, 200_001, generator=torch.Generator().manual_seed(0))
    wanted, done = fc.combine(grads), threading.Event()

    def change() -> None:
        while not done.is_set():
            for count in COUNTS:
                torch.set_num_threads(count)

    other = threading.Thread(target=change)
    other.start()
    same = [torch.equal(fc.combine(grads), wanted) for _ in range(50)]
    done.set()
    other.join()
    assert all(same)
