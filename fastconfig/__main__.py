"""``python -m fastconfig``: the same as the ``fastconfig`` command."""

from fastconfig.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
