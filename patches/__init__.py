"""Model families that need something of their own, one file each.

Importable only as `dp_flash_hf.patches`, so that no module has two identities when the checkout is on `sys.path`.
"""

import importlib
import pkgutil

if __name__ != "dp_flash_hf.patches":
    raise ImportError(f"import dp_flash_hf.patches, not {__name__}")


def load() -> None:
    """Import every family file, each of which registers what it has for its models. Safe to call again."""
    for family in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{family.name}")
