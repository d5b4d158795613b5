"""Shared by every test: no network, one thread, the same random numbers each time; and the options of the coverage sweep."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, so before any is imported

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_is_not_estimated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimating what a step needs takes a third of a tiny training's time: only tests marked `estimates_memory` do it."""
    if request.node.get_closest_marker("estimates_memory") is None:
        choice = ("bookkeeping", "nothing was estimated")
        monkeypatch.setattr("dp_flash_hf.training.session.choose_by_memory", lambda *args, **kwargs: choice)


# What the number of rounds decides: whether mixing at random is found.
_ABOUT_ROUNDS = {"test_unit_checks.py", "test_preflight.py", "test_recheck.py", "test_collator_checks.py"}


@pytest.fixture(autouse=True)
def _few_rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks before the first step take most of a tiny training's time."""
    if request.node.path.name not in _ABOUT_ROUNDS:
        monkeypatch.setattr("dp_flash_hf.training.preflight._ROUNDS", 4)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the settings of a process's first Accelerator."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_collection_finish() -> None:
    """What is imported stays: a collection of garbage, which every training of `Trainer` begins with, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: on a GPU as they are, else on CPU tensors in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coverage of architectures")
    group.addoption("--coverage-table", type=Path, metavar="PATH", help="write what -m coverage found as markdown")
    group.addoption("--coverage-shard", type=_shard, metavar="K/N", help="of the coverage tests, every N-th from the K-th on")


def _shard(text: str) -> tuple[int, int]:
    try:
        first, step = map(int, text.split("/"))
    except ValueError:
        first, step = 0, 0
    if not 1 <= first <= step:
        raise pytest.UsageError(f"--coverage-shard {text}: expected K/N with 1 <= K <= N, such as 3/12")
    return first, step


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen = Counter[str]()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None and not any(item.get_closest_marker(name) for name in ("complete", "coverage")):
            test = item.nodeid.partition("[")[0]
            if seen[test] % marker.args[0]:
                item.add_marker(pytest.mark.complete)
            seen[test] += 1
    shard = config.getoption("--coverage-shard")
    if shard is None:
        return
    first, step = shard
    swept = [item for item in items if item.get_closest_marker("coverage")]
    left_out = set(swept) - set(swept[first - 1 :: step])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


class _CoverageTable:
    """Collects rows where reports arrive: with xdist, in the process that started the workers."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[dict[str, object]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "coverage" and isinstance(value, dict)]

    def pytest_sessionfinish(self) -> None:
        from tests.support.coverage_table import render
        from tests.support.examination import Examination

        self.path.write_text(render(Examination(**row) for row in self.rows))  # type: ignore[arg-type]


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--coverage-table")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_CoverageTable(path))
