"""The peer, conflictfree from PyPI, is the oracle of these tests: import it once, whatever its source warns about."""

import importlib
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings hold invalid escape sequences
    for submodule in ("grad_operator", "momentum_operator", "weight_model", "length_model", "loss_recorder", "utils"):
        importlib.import_module(f"conflictfree.{submodule}")


@pytest.fixture(autouse=True)
def sound_peer(lstsq_by_svd):
    """The peer solves by a least squares whose answer does not hang on uninitialised memory."""


@pytest.fixture
def two_heads():
    """A trunk with two heads of different size, and a loss for each head: some ``.grad`` is None after either."""
    torch.manual_seed(0)
    network = torch.nn.ModuleDict(
        {"trunk": torch.nn.Linear(3, 4), "first": torch.nn.Linear(4, 2), "second": torch.nn.Linear(4, 5)}
    )
    inputs = torch.randn(7, 3)

    def loss_of(head):
        return lambda: network[head](network["trunk"](inputs).tanh()).square().mean()

    return network, [loss_of("first"), loss_of("second")]
