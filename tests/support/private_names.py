"""What docs/extending/private_names.md lists, and which private names of other packages the library really reads."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import ROOT

PAGE = ROOT / "docs" / "extending" / "private_names.md"
# Documented names of the standard library, its types, and ours that another file defines or that are written as text.
_OTHERS = {
    *("_asdict", "_fields", "_replace", "_ActionsContainer", "_SubParsersAction"),
    *("_groups", "_privacy_spend", "_wrapped_by_dp_flash"),
    "_scheduler",  # what a schedule around another may call it, in any package
}


class Listed(NamedTuple):
    """A row of the page."""

    path: str  # "package.Class._name"
    files: frozenset[str]
    when_gone: str

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def listed() -> list[Listed]:
    """The rows of the page; one that lists several names of one owner ("Class._a, _b") is one for each."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names, files, when_gone = (cell.strip() for cell in line.strip("|").split("|"))
            first, *more = re.findall(r"`([^`]+)`", names)
            owner = first.rpartition(".")[0]
            used = frozenset(re.findall(r"`([^`]+)`", files))
            rows += [Listed(path, used, when_gone) for path in (first, *(f"{owner}.{name}" for name in more))]
    return rows


def exists(path: str) -> bool:
    """Whether the installed version has it: as an attribute, or written in the file that the owner stands in."""
    owner, _, name = path.rpartition(".")
    found: Any = None
    parts = owner.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        break
    if found is None:
        return False
    if hasattr(found, name):
        return True
    owners = [base for base in found.__mro__ if base is not object] if isinstance(found, type) else [found]
    return any(re.search(rf"\b{name}\b", _source(part)) for part in owners)


def read_by_the_library() -> dict[tuple[str, str], int]:
    """Private names that a file reads and does not itself define, by (name, file): the line of one place."""
    found: dict[tuple[str, str], int] = {}
    for folder in ("dp_flash_hf", "patches", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.relative_to(ROOT).parts[:2] not in (("dp_flash_hf", "patches"), ("dp_flash_hf", "recipes")):  # links
                nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
                own = _OTHERS | {name for node in nodes for name in _defined(node)}
                file = path.relative_to(ROOT).as_posix().removeprefix("dp_flash_hf/")
                pieces = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
                for node in (node for node in nodes if id(node) not in pieces):
                    for name in _mentioned(node):
                        if re.fullmatch(r"_[a-zA-Z]\w*", name) and not name.startswith("_dp_") and name not in own:
                            found[name, file] = getattr(node, "lineno", 0)
    return found


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        yield node.attr


def _mentioned(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
        yield from node.value.split(".")
    elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dp_flash_hf"):
        yield from (node.module or "").split(".")
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (part for alias in node.names for part in alias.name.split("."))


@functools.cache
def _source(owner: Any) -> str:
    """Of the whole file: finding a class in it takes seconds."""
    try:
        return Path(inspect.getfile(owner)).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return ""
