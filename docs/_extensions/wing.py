"""Pages of the reference that follow the package: `<!-- wing: NAME -->` becomes a section for every file of that wing."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

import dp_flash_hf

PACKAGE = Path(dp_flash_hf.__file__).parent
PUBLIC = {name: getattr(dp_flash_hf, name).__module__ for name in dp_flash_hf.__all__}  # on a page of their own


def expand(app: Sphinx, docname: str, source: list[str]) -> None:
    """Before a page is read."""
    source[0] = re.sub(r"^<!-- wing: (\w+) -->$", lambda found: sections(found[1]), source[0], flags=re.MULTILINE)


def sections(wing: str) -> str:
    """A wing that is a folder or a file, in markdown."""
    files = sorted((PACKAGE / wing).glob("[!_]*.py")) or [PACKAGE / f"{wing}.py"]
    files = [path for path in files if not in_triton(path)]
    return "\n".join(section(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)) for path in files)


def in_triton(path: Path) -> bool:
    """Whether a file holds kernels: it is called by the file beside it only, and cannot be imported everywhere."""
    return re.search(r"^import triton", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def section(module: str) -> str:
    """One file."""
    own = ", ".join(name for name, origin in PUBLIC.items() if origin == module)
    exclude = f"\n   :exclude-members: {own}" if own else ""
    return f"""
## {module.removeprefix("dp_flash_hf.")}

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :ignore-module-all:{exclude}
```
"""


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", expand)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
