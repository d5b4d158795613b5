"""The families of `patches/`: loading their files registers what each has for its models."""

from __future__ import annotations

import importlib
import pkgutil

from dp_flash_hf import patches


def register() -> None:
    """Load every family file. Safe to call again."""
    for family in pkgutil.iter_modules(patches.__path__):
        importlib.import_module(f"{patches.__name__}.{family.name}")
