"""Launches of a kernel by what was compiled for them: Triton's search for it costs more than all else of a launch.

Triton takes 7 to 20 µs to bind a call's arguments, to find out of which kinds they are, and to look up what was
compiled for these. The callers here know that already: it is the same for every call of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, cast


class Launcher(Protocol):
    """Launches something already compiled."""

    def __call__(self, *arguments: object) -> object:
        """Launch it on the current stream of the current device."""


class Compiled(Protocol):
    """What Triton returns from a launch: a kernel that is compiled and loaded."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Launcher:
        """What launches it with a grid."""


class Kernel(Protocol):
    """A function that Triton compiles when it is launched."""

    @property
    def arg_names(self) -> list[str]:
        """Its arguments, the constants last."""

    def __getitem__(self, grid: tuple[int]) -> Launcher:
        """What compiles it, where it is new, and launches it."""


_KEPT: dict[tuple[int, Hashable], tuple[Kernel, Compiled, tuple[object, ...]]] = {}


def launch(
    kernel: Kernel,
    programs: int,
    kind: Hashable,
    arguments: tuple[object, ...],
    prepare: Callable[[], tuple[Mapping[str, object], Mapping[str, object]]],
) -> None:
    """Launch ``kernel``, and keep what Triton compiled for the next launch of this kind.

    Args:
        kernel: what Triton compiles.
        programs: how many.
        kind: all that the compilation depends on: the device, the types of the arguments and which of them are None,
            the constants and the options.
        arguments: of the kernel, in its order, all but the constants, which are its last.
        prepare: returns the kernel's constants by name, in any order, and the compiler's options.
    """
    kept = _KEPT.get((id(kernel), kind))
    if kept is not None:
        _, compiled, values = kept
        compiled[(programs, 1, 1)](*arguments, *values)
        return
    constants, options = prepare()
    returned = kernel[(programs,)](*arguments, **constants, **options)
    if returned is not None:  # the interpreter compiles nothing
        values = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        # The kernel is kept, too, so that no other one gets its number.
        _KEPT[id(kernel), kind] = kernel, cast("Compiled", returned), values


def arguments_of(kernel: Kernel) -> tuple[str, ...]:
    """The names of a kernel's arguments, which are not in capitals as those of its constants are."""
    return tuple(name for name in kernel.arg_names if not name.isupper())
