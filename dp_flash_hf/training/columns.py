"""Columns of a dataset, read whole and as they are stored: whatever format or transform its rows are read through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset


def column_names(dataset: Any) -> list[str] | None:
    """Names of the columns of a dataset, those left out by its format too; None where its rows are no mappings."""
    named = getattr(as_stored(dataset), "column_names", None)
    if named is None and len(dataset) and isinstance(dataset[0], Mapping):
        return list(dataset[0])
    return None if named is None else list(named)


def column(dataset: Any, name: str) -> list[Any]:
    """The values of one column, row by row; numbers that are tensors or arrays without dimensions become Python's own.

    Args:
        dataset: with a length and random access; of Datasets, with `set_format` or `with_transform` or without, and `Subset` of
            such; or of any other kind whose rows are mappings.
        name: of a column that is stored, or that a transform makes.
    """
    stored = as_stored(dataset)
    if name in (getattr(stored, "column_names", None) or ()):
        values = stored[name]
    else:
        values = [dataset[row][name] for row in range(len(dataset))]
    return [value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value for value in values]


def as_stored(dataset: Any) -> Any:
    """The dataset without its format, where it is one of Datasets, or a `Subset` of one; else itself."""
    if isinstance(dataset, Subset):
        whole = as_stored(dataset.dataset)
        return whole.select(dataset.indices) if callable(getattr(whole, "select", None)) else dataset
    without = getattr(dataset, "with_format", None)
    return without(None) if callable(without) else dataset
