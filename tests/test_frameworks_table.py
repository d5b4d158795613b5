"""The table of frameworks: what was not tried again stays, what was is written anew."""

from __future__ import annotations

from dataclasses import asdict

from tests.support.frameworks_table import PAGE, Row, render

BESIDE = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}


def test_rows_of_frameworks_that_were_not_tried_stay() -> None:
    one = {"beside": BESIDE, "rows": [asdict(Row("one", "1.0", "a loss", "exact", figure=2.3e-7))]}
    other = {"beside": BESIDE, "rows": [asdict(Row("other", "2.0", "a | b", "refused", "it compares rows"))]}
    both = render([one, other])
    assert "## one\n\nVersion 1.0, with torch 2.13.0, transformers 5.23.0.\n\n| tried" in both
    assert "| a loss | exact: 2e-07 |  |" in both
    assert "| a \\| b | refused | it compares rows |" in both
    assert render([], both) == both
    one["rows"] = [asdict(Row("one", "1.1", "a loss", "refused", "why"))]
    again = render([one], both)
    assert "exact: 2e-07" not in again
    assert again.partition("## other")[2] == both.partition("## other")[2]


def test_the_page_is_as_it_would_be_written() -> None:
    assert render([], page := PAGE.read_text(encoding="utf-8")) == page
