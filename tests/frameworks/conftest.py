"""Frameworks on top of Transformers, each in an environment of its own: `make test-frameworks`.

A file names its distribution in `FRAMEWORK`, and its tests say what they found through `row`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.support import pages
from tests.support.frameworks_table import Outcome, Row


@pytest.fixture
def row(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds a row to docs/frameworks.md."""

    def add(tried: str, outcome: Outcome, sentence: str = "", *, figure: float | None = None) -> None:
        framework = request.module.FRAMEWORK
        record_property("framework", asdict(Row(framework, version(framework), tried, outcome, sentence, figure)))

    return add


@pytest.fixture
def run_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the first script of docs/guides/frameworks/NAME.md in an empty folder, and returns the names it defined."""

    def run(name: str, **given: Any) -> dict[str, Any]:
        page = f"docs/guides/frameworks/{name}.md"
        block = pages.blocks(page, "python")[0]
        names: dict[str, Any] = {"__name__": "__main__", **given}
        monkeypatch.chdir(tmp_path)
        exec(compile(block.text, page, "exec"), names)
        return names

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--frameworks-rows", type=Path, metavar="PATH", help="write what was found about frameworks as JSON")


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.frameworks)


class _Rows:
    """Collects rows where reports arrive."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[object]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.rows += [value for name, value in report.user_properties if name == "framework"]

    def pytest_sessionfinish(self) -> None:
        beside = {name: version(name) for name in ("torch", "transformers")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"beside": beside, "rows": self.rows}, indent=1), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--frameworks-rows", None)  # None where pytest came to this folder late
    if path is not None:
        config.pluginmanager.register(_Rows(path))
