"""Nothing in this folder runs without a device; and what its tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastconfig.backends import select
from fastconfig.backends import triton as backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A device's machine has versions that CI does not: what they warn of is shown, but no failure."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)


@pytest.fixture(autouse=True)
def _on_a_device() -> Iterator[None]:
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs a CUDA or ROCm GPU")
    assert select(torch.device("cuda")) is backend, (
        "the kernels do not run here, so these tests would test the reference"
    )
    yield
    torch.cuda.synchronize()  # an error of the device shows in the test that caused it
