"""Nothing in this folder runs without a device; and what its tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from fastconfig.backends import select
from fastconfig.backends import triton as backend


@pytest.fixture(autouse=True)
def _on_a_device() -> Iterator[None]:
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs a CUDA or ROCm GPU")
    assert select(torch.device("cuda")) is backend, (
        "the kernels do not run here, so these tests would test the reference"
    )
    yield
    torch.cuda.synchronize()  # an error of the device shows in the test that caused it
