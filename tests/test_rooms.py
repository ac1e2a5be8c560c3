"""The package's rooms import one way: what stands to the left knows nothing of what stands to its right."""

from __future__ import annotations

import ast
from pathlib import Path

import fastconfig

PACKAGE = Path(fastconfig.__file__).parent
FLOORS = (
    {"kernels", "_core", "version"},
    {"backends"},
    {"validation"},
    {"ops"},
    {"methods"},
    {"gradients"},
    {"api"},
    {"optim"},
    {"conflict", "conflictfree", "integrations", "weightings"},
    {"demos", "diagnostics"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    """Of the package itself; ``fastconfig`` alone is what a user imports, and no room of it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "fastconfig":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastconfig."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fastconfig.")}
    return found


def test_every_module_stands_on_a_floor() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms <= FLOOR.keys()
    assert {"gradients", "conflict", "optim"} <= rooms


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for room in sorted(rooms_imported(path))
        if room != room_of(path) and FLOOR[room] >= FLOOR[room_of(path)]
    ]
    assert wrong == []
