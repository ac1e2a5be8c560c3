"""What older PyTorchs lack, by the version that brought it: `make matrix` runs the tests on several."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def since(major: int, minor: int, lack: str) -> pytest.MarkDecorator:
    """Skip a test on a PyTorch that is older than this, for something of its own that it lacks."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"before PyTorch {major}.{minor} {lack}")


FSDP2 = since(2, 7, "fully_shard runs on GPUs alone")
HSDP = since(2, 8, "fully_shard of two dimensions runs on GPUs alone")
REPLICATE = pytest.mark.skipif(
    find_spec("torch.distributed._composable.replicate_with_fsdp") is None,
    reason="this PyTorch has no replicate on DTensors",
)
_LAYOUTS = {"sharded": FSDP2, "hybrid": HSDP, "tensor and sharded": FSDP2, "fsdp": FSDP2, "replicate": REPLICATE}


def layouts(*names: str) -> list[object]:
    """For a test's parameters: ways of laying a model out, where this PyTorch has them."""
    return [pytest.param(name, marks=_LAYOUTS.get(name, ())) for name in names]
