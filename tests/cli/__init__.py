"""The command line."""

from __future__ import annotations


def printed_rows(printed: str) -> list[list[str]]:
    """The cells of a printed table, without its heading."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
