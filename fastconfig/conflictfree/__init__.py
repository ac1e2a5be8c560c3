"""The drop-in for the ``conflictfree`` package: its modules, names and signatures, computed by ``fastconfig``.

Three ways in:

- import it: ``from fastconfig.conflictfree.grad_operator import ConFIG_update``;
- once, before anything imports conflictfree: ``fastconfig.conflictfree.install()``. ``import conflictfree`` and every
  ``import conflictfree.x`` then give these modules, whether or not the real package is installed;
- leave the script alone: ``python -m fastconfig.conflictfree script.py args...``.

Answers equal those of conflictfree 0.1.8 wherever those are right. Where they are not, the docstring of the function
says what changed.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__all__ = ["install", "uninstall"]

_STOOD_FOR = "conflictfree"
_SUBMODULES = ("grad_operator", "length_model", "loss_recorder", "momentum_operator", "utils", "weight_model")


def install() -> None:
    """Make ``import conflictfree`` and its submodules resolve to this package in this process.

    The modules are the same objects under both names, so a class from ``conflictfree.weight_model`` is the one from
    ``fastconfig.conflictfree.weight_model``. Calling it again changes nothing. A process started by multiprocessing's
    "spawn" imports afresh and must call it, too.

    Raises:
        RuntimeError: another conflictfree has already been imported. Names taken from it would go on meaning the old
            code in some modules and the new in others, so nothing is replaced.
    """
    ours = _modules()
    foreign = sorted(name for name in sys.modules if _is_stood_for(name) and sys.modules[name] is not ours.get(name))
    if foreign:
        origin = getattr(sys.modules[foreign[0]], "__file__", None)
        raise RuntimeError(
            f"{foreign[0]} has already been imported (from {origin}), and names taken from it would not change; call "
            "fastconfig.conflictfree.install() before the first import of conflictfree, or start the program with "
            "python -m fastconfig.conflictfree"
        )
    sys.modules.update(ours)


def uninstall() -> None:
    """Undo ``install``: the next ``import conflictfree`` looks for the real package again.

    Without an ``install`` before it, it changes nothing. Names that were already imported stay what they are.
    """
    for name, module in _modules().items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _modules() -> dict[str, ModuleType]:
    """Each name of the conflictfree package, with our module for it."""
    submodules = {f"{_STOOD_FOR}.{name}": importlib.import_module(f"{__name__}.{name}") for name in _SUBMODULES}
    return {_STOOD_FOR: sys.modules[__name__], **submodules}


def _is_stood_for(name: str) -> bool:
    return name == _STOOD_FOR or name.startswith(f"{_STOOD_FOR}.")
