"""The tests of one file again and again, each time with another fault in it: in copies of the checkout, by a fork server.

A process that runs them is forked from a server that has imported torch, transformers and what else the tests need, but nothing
of this project: that comes from the copy, so the fault is in what is imported, by further processes of a test too. Once the
tests ran without a fault, those that run the line with a fault come first, the shortest before all others.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from types import FrameType
from typing import Any

import pytest

from tests.support import ROOT

_SECONDS = 300  # after which a fault counts as found: something hangs
_OTHER_SOURCE = 90  # exit code: the tests passed without importing the file
_IMPORTED = (
    *(
        "torch",
        "transformers",
        "transformers.trainer",
        "accelerate",
        "datasets",
        "peft",
        "triton",
        "pytest",
        "opacus.accountants",
    ),
    *("scipy.stats", "scipy.signal", "scipy.special", "dp_accounting.pld.privacy_loss_distribution", "hypothesis.extra.numpy"),
)


@dataclass(frozen=True)
class Fault:
    """start, end: of the text of `file` (below the package) that `new` replaces. line: on which it starts."""

    file: str
    line: int
    start: int
    end: int
    new: str


class Copies:
    """Copies of the checkout, one for each of so many workers."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder, self._workers = folder, workers
        self._free: Queue[Path] = Queue()
        self._measured: dict[str, dict[str, _Test]] = {}
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(list(_IMPORTED))
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", ".*_cache")
        self._first = folder / "0"
        shutil.copytree(ROOT, self._first, ignore=ignored)  # the links to patches and recipes become real folders

    def measure(self, file: str, tests: Sequence[str]) -> None:
        """Run the tests without a fault. Raises RuntimeError where one of them fails."""
        results = self._folder / f"{file.replace('/', '.')}.json"
        code = self._run(self._first, file, tests, None, results)
        if code:
            said = (self._first / "output.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"tests of {file} do not pass without a fault, exit code {code}:\n{said[-3000:]}")
        self._measured[file] = {
            name: _Test(seconds, frozenset(lines)) for name, (seconds, lines) in json.loads(results.read_bytes()).items()
        }

    def ready(self) -> None:
        """All files have been measured: make the other copies, compiled files and all."""
        for worker in range(1, self._workers):
            shutil.copytree(self._first, self._folder / str(worker))
        for worker in range(self._workers):
            self._free.put(self._folder / str(worker))

    def find(self, fault: Fault, tests: Sequence[str]) -> bool:
        """Whether one of these tests, which were measured, fails with this fault, or never ends."""
        copy = self._free.get()
        path = copy / "dp_flash_hf" / fault.file
        source, times = path.read_text(encoding="utf-8"), path.stat()
        try:
            path.write_text(source[: fault.start] + fault.new + source[fault.end :], encoding="utf-8")
            code = self._run(copy, fault.file, tests, _Sort(self._measured[fault.file], fault.line), copy / "results.json")
        finally:
            path.write_text(source, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # by which what was compiled of it is known
            self._free.put(copy)
        if code == _OTHER_SOURCE:
            raise RuntimeError(f"tests of {fault.file} pass and do not import it: {' '.join(tests)}")
        return code != 0

    def _run(self, copy: Path, file: str, tests: Sequence[str], plugin: _Sort | None, results: Path) -> int | None:
        process = self._context.Process(target=_run_tests, args=(copy, file, tests, plugin, results))
        process.start()
        process.join(_SECONDS)
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)  # with all that a test started
            process.join()
        return process.exitcode


def _run_tests(copy: Path, file: str, tests: Sequence[str], plugin: _Sort | None, results: Path) -> None:
    """In a process of its own: exits with 0 if all tests pass."""
    os.setsid()
    gc.freeze()  # what was imported stays, and is shared with the server
    with (copy / "output.log").open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dp_flash_hf", "tests")]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = plugin is not None
    source = str(copy / "dp_flash_hf" / file)
    measure = _Measure(source)
    options = ["-x", "-q", *(f"-pno:{name}" for name in ("cacheprovider", "xdist", "unraisableexception")), *tests, source]
    code = int(pytest.main(options, plugins=[measure if plugin is None else plugin]))
    module = sys.modules.get(f"dp_flash_hf.{file.removesuffix('.py').replace('/', '.')}")
    if code == 0 and (module is None or module.__file__ != source):
        code = _OTHER_SOURCE
    results.write_text(json.dumps(measure.found), encoding="utf-8")
    sys.exit(code)


@dataclass(frozen=True)
class _Test:
    """How long it takes, and which lines of the file it runs."""

    seconds: float
    lines: frozenset[int]


class _Measure:
    """A plugin of pytest, which measures every test: (seconds, lines) by its name."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: dict[str, tuple[float, list[int]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        lines: set[int] = set()

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code.co_filename != self.source:
                return None
            lines.add(frame.f_lineno)
            return trace

        begun = time.perf_counter()
        sys.settrace(trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.found[item.nodeid] = (time.perf_counter() - begun, sorted(lines))


class _Sort:
    """A plugin of pytest: tests that run the line come first, the shortest before all others; a failure ends the process."""

    def __init__(self, measured: Mapping[str, _Test], line: int) -> None:
        self.measured, self.line = measured, line

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=self._rank)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._end_at(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._end_at(report)

    @staticmethod
    def _end_at(report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed:
            os._exit(1)  # what pytest does at its end takes longer than most tests

    def _rank(self, item: pytest.Item) -> tuple[bool, float]:
        test = self.measured.get(item.nodeid)  # a fault may change the parameters of tests, and so their names
        return (True, 0.0) if test is None else (self.line not in test.lines, test.seconds)
