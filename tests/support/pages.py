"""README and the pages under docs/, taken apart: blocks of code with the comment before each, links, and names in code."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in path.parts
)
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,}|:{3,})(?P<language>\S*) *\n(?P<text>.*?)^ *(?P=ticks) *$", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"<!-- (setup|skip): ([^\n]+?) -->\s*\Z")
_LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)>\s]+)>?\)")


class Block(NamedTuple):
    """A fenced block: its language, its text, and what the comment right before it says, such as ("setup", "trainer")."""

    language: str
    text: str
    mark: tuple[str, str] | None


class Example(NamedTuple):
    """Python blocks of one page that run one after the other in the names of one setup."""

    page: str
    setup: str
    blocks: tuple[str, ...]

    @property
    def code(self) -> str:
        """All of it."""
        return "\n".join(self.blocks)


def read(page: str) -> str:
    """A page by its path from the root."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The page's blocks in these languages, in their order."""
    text, found = read(page), []
    for fence in _FENCE.finditer(text):
        mark = _MARK.search(text, 0, fence.start())
        if fence["language"] in languages:
            found.append(Block(fence["language"], textwrap.dedent(fence["text"]), None if mark is None else (mark[1], mark[2])))
    return found


def examples(page: str) -> list[Example]:
    """What of a page can run. Raises ValueError for a block of which it is not said how to run it, nor why not."""
    found: list[Example] = []
    for block in blocks(page, "python"):
        kind, value = block.mark or ("", "")
        if kind == "skip":
            continue
        if kind == "setup":
            found.append(Example(page, value, (block.text,)))
        elif found:
            found[-1] = found[-1]._replace(blocks=(*found[-1].blocks, block.text))
        else:
            raise ValueError(f"{page}: write <!-- setup: NAME --> or <!-- skip: REASON --> before this block:\n{block.text}")
    return found


def commands(page: str) -> Iterator[list[str]]:
    """The words of every command line in the page's shell blocks, whose lines may go on after a backslash."""
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def prose(page: str) -> str:
    """The page without its blocks."""
    return _FENCE.sub("", read(page))


def links(page: str) -> list[str]:
    """Where the page's links lead: addresses, paths and anchors as written."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What links to a page may name after `#`: GitHub's and MyST's name of each heading, and explicit targets."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\((\S+)\)=$", text, re.MULTILINE))
