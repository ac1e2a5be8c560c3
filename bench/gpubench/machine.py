"""Which machine this is, and which device: what a result must say to mean anything later."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess

import torch


def describe_machine() -> dict[str, object]:
    """Names and versions, without touching the device."""
    machine: dict[str, object] = {
        "gpu": "gpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cpus": os.cpu_count(),
    }
    if importlib.util.find_spec("triton"):
        import triton

        machine["triton"] = triton.__version__
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        machine["gpu"], machine["driver"] = (part.strip() for part in answer.rsplit(",", 1))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        machine["driver"] = f"unknown: {error}"
    return machine


def describe_device(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }
