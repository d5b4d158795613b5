"""The rooms of the package, and which of them may look into which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dp_flash_hf"
# The engine and everything below it, from the bottom up: a file imports from those before it only, a folder from itself too.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("units", "config", "planner", "noise"),
    ("kernels",),
    ("clipping", "coupling", "distributed", "layouts"),
    ("records",),
    ("layers",),
    ("learning", "sums"),
    ("engine",),
)
FILES = {
    path: (room, name)
    for room, names in enumerate(ROOMS)
    for name in names
    for path in ([PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else sorted((PACKAGE / name).glob("*.py")))
}


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way_and_not_to_transformers(path: Path) -> None:
    room, own = FILES[path]
    allowed = {name for names in ROOMS[:room] for name in names} | {own}
    names = imported(path)
    assert {name.split(".")[1] for name in names if name.startswith("dp_flash_hf.")} <= allowed
    assert not {name for name in names if name.split(".")[0] in ("transformers", "accelerate", "peft", "trl")}
