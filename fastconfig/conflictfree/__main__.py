"""``python -m fastconfig.conflictfree script.py args...``: run an unmodified script on top of fastconfig."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from fastconfig.conflictfree import install

USAGE = """\
usage: python -m fastconfig.conflictfree script.py [argument ...]
       python -m fastconfig.conflictfree -m module [argument ...]

Runs the script or module as python itself would, except that `import conflictfree` gives fastconfig's drop-in
for it, whether or not the conflictfree package is installed.
"""


def main(arguments: Sequence[str]) -> int:
    """Run what the command line names and return the exit status; a SystemExit of the program passes through.

    Arguments behind the program's name are its own, whatever they look like, so no option parser ever sees them.

    Args:
        arguments: the command line without the interpreter's part: a script or ``-m module``, then its arguments.
    """
    if not arguments:
        sys.stderr.write(USAGE)
        return 2
    first, *rest = arguments
    if first in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if first == "-m":
        return _run_module(rest)
    if first.startswith("-"):
        return _refuse(f"unknown option {first}")
    return _run_script(first, rest)


def _run_module(arguments: Sequence[str]) -> int:
    if not arguments:
        return _refuse("-m needs the name of a module")
    install()
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    return 0


def _run_script(script: str, arguments: Sequence[str]) -> int:
    path = Path(script)
    if not path.exists():
        return _refuse(f"cannot find the script {script!r}")
    install()
    sys.argv = [script, *arguments]
    # Python puts the script's own folder first on the path where -m had put the working directory; under -P, neither.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(path.resolve().parent)
    runpy.run_path(script, run_name="__main__")
    return 0


def _refuse(reason: str) -> int:
    sys.stderr.write(f"python -m fastconfig.conflictfree: {reason}\n\n{USAGE}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
