"""The oldest versions that pyproject.toml allows users, as constraints for pip: `python -m tests.support.floors > FILE`.

Of what the tests alone need, and of what the packages below need themselves, pip takes the newest that fit.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

# `dev` is the tests'; torch brings the Triton that it was built with; nothing runs flash-attn here.
_EXTRAS = ("peft", "opacus", "trl", "ray")


def floors() -> list[str]:
    """One "name==version" for each of the package's dependencies, and of those of the extras that are tested."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (line for extra in _EXTRAS for line in project["optional-dependencies"][extra])
    found = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", line) for line in (*project["dependencies"], *extras)]
    assert all(found), "a dependency without a floor"
    return [f"{line[1]}=={line[2]}" for line in found if line]


if __name__ == "__main__":
    print("\n".join(floors()))
