"""The page of promises names tests that exist, and that `make test` runs."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (\d+)\. .*?\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
NAMED = sorted(set(re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE)))


def test_every_promise_was_shown_to_have_a_test_that_fails() -> None:
    assert [int(number) for number, _ in SECTIONS] == list(range(1, 11))
    for number, text in SECTIONS:
        assert re.search(r"^Shown by: .*\n\n- `tests/", text, re.MULTILINE), number


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_it_is_there(file: str, name: str) -> None:
    functions = [
        node for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    (found,) = (node for node in functions if node.name == name)
    marks = " ".join(ast.unparse(mark) for mark in found.decorator_list if "parametrize" not in ast.unparse(mark))
    assert not re.search(r"mark\.(complete|slow|coverage|gpu)\b", marks), f"{name} is left out of `make test`"
