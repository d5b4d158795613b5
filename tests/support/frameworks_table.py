"""docs/frameworks.md, from what `tests/frameworks` found: `python -m tests.support.frameworks_table FOLDER`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.support import ROOT

Outcome = Literal["exact", "refused"]
PAGE = ROOT / "docs" / "frameworks.md"
_HEAD = """# Frameworks

What was tried with frameworks on top of Transformers, each in an environment of its own, by `make test-frameworks`
(`FRAMEWORKS="setfit"` for some of them; what each environment holds is in `tests/frameworks/NAME.txt`).

- **exact**: the clipped sums of three steps, before noise, equal a loop over single units through the framework's own collator
  and loss; the figure is the largest relative difference.
- **refused**: training stops before the first step, with the reason given.

```{toctree}
:glob:

guides/frameworks/*
```

flair (0.15.1), spaCy-transformers (1.4.0) and span-marker (1.8.1) ask for transformers < 5, and cannot be installed
beside this library. Save the encoder there with `save_pretrained`, and train it in another environment: as
`AutoModelForTokenClassification` or another model of Transformers with `Trainer` and `DPCallback`, or in a loop of your
own with `make_private`. The trained encoder can be loaded there again, if that version of Transformers knows its
architecture. A tagger or pipeline that is then trained there on the same data is not private.
"""


@dataclass(frozen=True)
class Row:
    """One thing that was tried.

    Attributes:
        framework: the name of its distribution.
        version: of it.
        tried: a trainer, a loss or a setting, in markdown.
        outcome: what happened.
        sentence: the reason of a refusal, or what else is to be known.
        figure: where the outcome is "exact", the largest relative difference of a step's sum from the loop over single units.
    """

    framework: str
    version: str
    tried: str
    outcome: Outcome
    sentence: str = ""
    figure: float | None = None


def render(found: Iterable[Mapping[str, Any]], page: str = "") -> str:
    """The whole page; what it said before of frameworks that were not tried now stays."""
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    for one in found:
        rows = [Row(**row) for row in one["rows"]]
        for framework in dict.fromkeys(row.framework for row in rows):
            sections[framework] = _section([row for row in rows if row.framework == framework], one["beside"])
    parts = [_HEAD, *(f"## {name}\n\n{sections[name].strip()}\n" for name in sorted(sections))]
    return "\n".join(parts)


def _section(rows: list[Row], beside: Mapping[str, str]) -> str:
    versions = ", ".join(f"{name} {number.split('+')[0]}" for name, number in beside.items())
    lines = [("tried", "result", ""), ("---",) * 3]
    lines += [(row.tried, row.outcome if row.figure is None else f"exact: {row.figure:.0e}", row.sentence) for row in rows]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return f"Version {rows[0].version}, with {versions}.\n\n{table}"


def main(folder: str) -> None:
    """Write the page from the JSON files of a folder."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    PAGE.write_text(render(found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
