"""The faults that `make mutants` plants: they are what they say, and a test that finds one is seen to."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter

import pytest

from tests.support import ROOT, mutants
from tests.support.mutants import TESTS, all_mutants, mutants_of

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
    assert all((ROOT / test.partition("::")[0]).is_file() for tests in TESTS.values() for test in tests)
    keys = Counter(mutant.key for mutant in found)
    assert all(keys[key] == 1 for key in mutants.explained()), "explained, but no longer there, or there twice"


def run(*arguments: str) -> tuple[int, str]:
    """What the command says, in a process of its own: fork servers are one to a process."""
    command = [sys.executable, "-m", "tests.support.mutants", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.complete
def test_the_sample_of_this_commit_is_found() -> None:
    code, said = run("--sample", "24")
    assert code == 0, said
