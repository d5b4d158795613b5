"""How long the package's files and functions are: `python -m tests.support.sizes` lists those that are too long.

A file counts every line, a function those from its first to its last without its docstring.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

LINES_OF_A_FILE = 450
LINES_OF_A_FUNCTION = 70
# What may be longer, and why.
EXCEPTIONS: Mapping[str, str] = {}


class TooLong(NamedTuple):
    """A file, by its module's name, or a function, by "module:name"."""

    name: str
    lines: int
    most: int

    def __str__(self) -> str:
        return f"{self.name}: {self.lines} lines, {self.most} at most; {EXCEPTIONS.get(self.name, 'split it')}"


def too_long(modules: Mapping[str, Path]) -> Iterator[TooLong]:
    """What is over a limit, exceptions included."""
    for module, path in modules.items():
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > LINES_OF_A_FILE:
            yield TooLong(module, lines, LINES_OF_A_FILE)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = _lines_of(node)
                if length > LINES_OF_A_FUNCTION:
                    yield TooLong(f"{module}:{node.name}", length, LINES_OF_A_FUNCTION)


def _lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    length = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        length -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return length


if __name__ == "__main__":
    from tests.test_layout import MODULES

    for found in too_long(MODULES):
        print(found)
