"""What runs here: versions, backends, ISA tiers, threads. For a person (show_config) and for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import TextIO

import torch

from fastconfig import backends
from fastconfig.backends import cpu, triton
from fastconfig.version import __version__

_DISTRIBUTION = "fastconfig-torch"
_ANOTHER = "fastconfig"
"""Another project's distribution, which installs a package of the name that this one is imported by."""
_COMMAND = "fastconfig.cli:main"
"""The entry point that this library alone has, under whatever name it is installed."""

_FORCING = ("FASTCONFIG_BACKEND", "FASTCONFIG_ISA", "FASTCONFIG_AUTOTUNE", "TRITON_INTERPRET")


def collect_config() -> dict[str, str]:
    """What ``show_config`` prints, as name -> value, in order."""
    return {
        "fastconfig": __version__,
        **_state_of_another(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "triton": _version_of("triton"),
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads)",
        **{f"backend {name}": _state_of_backend(name) for name in backends.BACKENDS},
        "ISA tier": _state_of_tiers(),
        "processes": _state_of_processes(),
        "environment": ", ".join(f"{name}={os.environ[name]}" for name in _FORCING if name in os.environ) or "default",
    }


def show_config(file: TextIO | None = None) -> None:
    """Print what fastconfig runs on: versions, each backend and why one is missing, the ISA tier in use, threads.

    Args:
        file: where to print, standard output by default.
    """
    entries = collect_config()
    width = max(map(len, entries))
    for name, value in entries.items():
        print(f"{name:{width}}  {value}", file=file or sys.stdout)


def _state_of_another() -> dict[str, str]:
    """What is said of the distribution ``fastconfig``, where it is installed: its package lies in this one's folder."""
    try:
        found = importlib.metadata.distribution(_ANOTHER)
    except importlib.metadata.PackageNotFoundError:
        return {}
    if any(entry.value == _COMMAND for entry in found.entry_points):  # this library, as an old checkout still calls it
        return {}
    what = f"the distribution {_ANOTHER} {found.version} ({found.metadata['Summary']}) is installed, too"
    remedy = f"run: pip uninstall {_ANOTHER}, and install {_DISTRIBUTION} once more"
    return {"warning": f"{what}, and is not this library, which is {_DISTRIBUTION}; {remedy}"}


def _state_of_backend(name: str) -> str:
    reason = backends.BACKENDS[name].available()
    if reason is not None:
        return f"missing: {reason}"
    if name == "triton":
        return _state_of_devices()
    device = backends.DEVICE_TYPES.get(name)
    return f"ready, drives {device} tensors" if device else "ready, drives every device that has no other backend"


def _state_of_devices() -> str:
    """Which devices the kernels drive, and why not the others."""
    if triton.INTERPRETED:
        return "ready, interpreted in Python on tensors of any device: for tests alone (TRITON_INTERPRET=1)"
    states = []
    for index in range(torch.cuda.device_count()):
        reason = triton.drives(torch.device("cuda", index))
        states.append(f"cuda:{index} {torch.cuda.get_device_name(index)}" + (f" not: {reason}" if reason else ""))
    return f"ready, drives {', '.join(states)}"


def _state_of_tiers() -> str:
    if cpu.available() is not None:
        return "none: the compiled core is missing"
    return f"{cpu.active_tier()} (this machine runs {', '.join(cpu.tiers())})"


def _state_of_processes() -> str:
    """Whether this process is one of several that train together."""
    dist = torch.distributed
    if not dist.is_available():
        return "one: this PyTorch has no torch.distributed"
    if not dist.is_initialized():
        launched = os.environ.get("WORLD_SIZE")
        told = f"; a launcher says WORLD_SIZE={launched}" if launched else ""
        return f"one: torch.distributed is not initialised{told}"
    return f"rank {dist.get_rank()} of {dist.get_world_size()}, by {dist.get_backend()}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
