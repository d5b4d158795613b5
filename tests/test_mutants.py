"""The faults that `make mutants` plants: they are what they say, and a test that finds one is seen to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import ROOT, mutants
from tests.support.mutants import TESTS, Copies, Mutant, all_mutants, mutants_of

SOURCE = '''
def f(x, y):
    """A docstring with 1 number."""
    if x < 1 and not y:
        raise ValueError(f"{x} < 1")
    check(x)
    return x + 2 if y.ok else x.add_(y)
'''


def test_every_kind_of_fault_is_planted() -> None:
    found = {(mutant.line, mutant.old, mutant.new) for mutant in mutants_of("f.py", SOURCE)}
    assert found == {
        (4, "x < 1 and not y", "(x < 1 or not y)"),
        (4, "x < 1", "(x <= 1)"),
        (4, "1", "(2)"),
        (4, "not y", "(y)"),
        (5, 'raise ValueError(f"{x} < 1")', "pass"),
        (6, "check(x)", "pass"),
        (7, "y.ok", "(not (y.ok))"),
        (7, "x + 2", "(x - 2)"),
        (7, "2", "(3)"),
        (7, "x.add_", "(x.sub_)"),
    }


def test_every_mutant_of_the_core_is_a_program_and_every_file_has_its_tests() -> None:
    sources = {file: (ROOT / "dp_flash_hf" / file).read_text(encoding="utf-8") for file in TESTS}
    found = all_mutants()
    assert len(found) > 200
    assert {mutant.file for mutant in found} == set(TESTS)
    for mutant in found:
        source = sources[mutant.file]
        ast.parse(source[: mutant.start] + mutant.new + source[mutant.end :])
    assert all((ROOT / test).is_file() for tests in TESTS.values() for test in tests)
    explained = set(mutants.explained())
    assert explained <= {mutant.key for mutant in found}, "explained, but no longer there"


@pytest.mark.complete
def test_a_fault_is_found_and_leaves_nothing_behind(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 1)
    file = "mechanisms/clipping.py"
    source = (ROOT / "dp_flash_hf" / file).read_text(encoding="utf-8")
    assert not copies.fails(TESTS[file])
    start = source.index("def clip_factors")
    end = source.index("(", start)
    assert copies.fails(TESTS[file], Mutant(file, 1, start, end, "def clip_factors", "def other_factors"))
    assert not copies.fails(TESTS[file])
    assert (tmp_path / "0" / "dp_flash_hf" / file).read_text(encoding="utf-8") == source
