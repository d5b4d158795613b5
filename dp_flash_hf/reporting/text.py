"""How a report looks on a terminal: one layout for all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

WIDTH = 100
_LABEL = 10


def page(title: str, rows: Iterable[tuple[str, str]], not_covered: Iterable[str]) -> str:
    """A report as plain text of at most `WIDTH` columns: a title, labelled rows, and what the guarantee does not cover.

    Long texts are wrapped, and their further lines indented to stand under the first.

    >>> print(page("Report", [("steps", "3 of 10"), ("noise", "Gaussian")], ["Metrics are computed without noise."]))
    Report
      steps      3 of 10
      noise      Gaussian
    Not covered
      - Metrics are computed without noise.

    Args:
        title: One line, or several.
        rows: (label, text) pairs in their order; a label has at most 10 characters.
        not_covered: Sentences.

    Returns:
        The page, without a newline at its end.
    """
    lines = [title]
    for label, text in rows:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"  {label:<{_LABEL}} ", subsequent_indent=" " * (_LABEL + 3))
    lines.append("Not covered")
    for sentence in not_covered:
        lines += textwrap.wrap(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def rounded_up(value: float) -> str:
    """The value to three decimals, never less than it is: a printed epsilon must not claim more privacy than was computed.

    >>> rounded_up(1.0001), rounded_up(2.5), rounded_up(float("inf"))
    ('1.001', '2.500', 'inf')
    """
    text = f"{value:.3f}"
    return text if float(text) >= value else f"{value + 0.0005:.3f}"
