"""docs/coverage.md, written from what `tests/end_to_end/test_coverage.py` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import transformers

from tests.support.examination import Examination, Verdict
from tests.support.zoo import TASKS, class_names

_VERDICTS: tuple[Verdict, ...] = ("fast", "microbatch", "one length", "refused", "inexact", "crash", "not built")
_HEAD = """# Coverage

Every class that Transformers registers for a task, examined by `make coverage` as a tiny random model. The gradients that the
library clips and sums on a padded batch of unequal texts are compared, parameter by parameter, with the model's own loss on
every row alone and unpadded. Versions: transformers {transformers}, torch {torch}.

- **fast**: exact, all parameters by rules, in one backward pass.
- **microbatch**: exact, one unit at a time, because of the parameters named.
- **one length**: padding changes the model's gradients, so a unit would feel the longest text of its batch: refused, but exact
  where every row is padded to one length (`padding="max_length"`), in the way named.
- **refused**: training stops before the first step, with the reason given.
- **inexact** and **crash**: a silently wrong gradient, and an error that is no message of the library's; there must be none.
- **not built**: cannot be examined here.

Attention is the implementation that was called; "its own" means that the class does not take it from Transformers' interface,
"none" that it has none. Models compute in float64 where they can, else in float32. Where the inputs of a multi-modal model hold
no `pixel_values` or the like, it was given text only, and its towers were frozen.
"""


def render(rows: Iterable[Examination]) -> str:
    """The whole document, in markdown; the same for the same rows in any order."""
    found = sorted(rows, key=lambda row: (row.task, row.name))
    parts = [_HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])]
    parts.append(_table(("task", "classes", *_VERDICTS), [_counts(task, found) for task in TASKS] + [_counts(None, found)]))
    for task in TASKS:
        own = [row for row in found if row.task == task]
        if own:
            parts.append(f"## {task}\n")
            parts.append(_table(("class", "result", "attention", "inputs", "dtype"), map(_line, own)))
    return "\n".join(parts)


def _counts(task: str | None, rows: list[Examination]) -> tuple[str, ...]:
    counts = Counter(row.verdict for row in rows if task in (None, row.task))
    registered = sum(len(class_names(one)) for one in TASKS if task in (None, one))
    examined = sum(counts.values())
    total = str(registered) if examined == registered else f"{examined} of {registered}"
    return (task or "all", total, *(str(counts[verdict]) for verdict in _VERDICTS))


def _line(row: Examination) -> tuple[str, ...]:
    computed = f"microbatch: {row.slow}" if row.slow else "fast"
    result = {
        "one length": f"one length, {computed}",
        "refused": f"refused: {row.refused.split('; ')[0]}",  # what to do instead is not repeated here
        "inexact": f"inexact: {row.problem}",
        "crash": f"crash: {row.problem}",
        "not built": f"not built: {row.not_built}",
    }
    return row.name, result.get(row.verdict, computed), row.attention, row.inputs, row.dtype


def _table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)
