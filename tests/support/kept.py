"""The tests that a plain `pytest` keeps of some files: ``python -m tests.support.kept FILE ...`` prints their names.

It is pytest that says so, whatever it is that leaves a test out: marks of a function, of some of its parameters or of the whole
module, names that are not collected, options in pyproject.toml. Tests that may be skipped do not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tests.support import ROOT

_LINE = "kept: "
_NOT_SURE = {"skip", "skipif", "xfail"}


class _Printing:
    @staticmethod
    def pytest_collection_finish(session: pytest.Session) -> None:
        for item in session.items:
            if _NOT_SURE.isdisjoint(mark.name for mark in item.iter_markers()):
                print(f"{_LINE}{item.nodeid}")


def kept(files: Iterable[str]) -> set[str]:
    """Paths and names of the test functions of which at least one set of parameters is kept; paths from the root."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "tests.support.kept", *files]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = (line.removeprefix(_LINE) for line in run.stdout.splitlines() if line.startswith(_LINE))
    return {name.partition("[")[0] for name in found}


if __name__ == "__main__":
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[_Printing()]))
