"""The page of promises names tests that exist, and that `make test` runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.kept import kept

PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (\d+)\. .*?\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
NAMED = sorted(set(re.findall(r"`(tests/\S+\.py)::(\w+)`", PAGE)))


def test_every_promise_was_shown_to_have_a_test_that_fails() -> None:
    assert [int(number) for number, _ in SECTIONS] == [*range(1, 11), 13, 15, 16, 17]
    for number, text in SECTIONS:
        assert re.search(r"^Shown by: .*\n\n- `tests/", text, re.MULTILINE), number


@pytest.mark.complete
def test_make_test_runs_every_test_that_is_named() -> None:
    """As pytest says: a test all of whose parameters are marked `complete` shows nothing, nor does one that may be skipped."""
    assert re.search(r"^test: .*\n(\t.*\n)*\t\$\(PYTEST\)\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    missing = {f"{file}::{name}" for file, name in NAMED} - kept({file for file, _ in NAMED})
    assert not missing, f"not there, or left out of `make test`: {sorted(missing)}"


LEFT_OUT = """
import pytest

def test_of_nothing():
    pass

@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.complete), 2])
def test_of_the_smaller(size):
    pass

@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.complete) for size in (1, 2)])
def test_of_all_sizes(size):
    pass

@pytest.mark.skipif(False, reason="")
def test_of_some_machines():
    pass

def helper():
    pass
"""


def test_what_is_left_out_is_seen(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(LEFT_OUT)
    (tmp_path / "test_slow.py").write_text("import pytest\npytestmark = pytest.mark.slow\ndef test_slow(): pass")
    found = {name.partition("::")[2] for name in kept(map(str, tmp_path.iterdir()))}
    assert found == {"test_of_nothing", "test_of_the_smaller"}
