"""A column is read as it is stored, through whatever format its rows are read."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import Subset

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.training.columns import as_stored, column, column_names
from dp_flash_hf.training.session import _units_named

ROWS: list[dict[str, Any]] = [{"input_ids": [1, 2, 3], "user": f"u{row % 3}", "number": row % 3} for row in range(7)]
USERS = [row["user"] for row in ROWS]


def stored() -> Any:
    return datasets.Dataset.from_list(ROWS)


def formatted() -> Any:
    dataset = stored()
    dataset.set_format("torch", columns=["input_ids"])
    return dataset


DATASETS: dict[str, Any] = {
    "as it is": stored,
    "set_format with columns": formatted,
    "with_format": lambda: stored().with_format("torch"),
    "numpy, with columns": lambda: stored().with_format("numpy", columns=["input_ids"]),
    "with_transform": lambda: stored().with_transform(lambda rows: {"input_ids": rows["input_ids"]}),
    "selected": lambda: formatted().select(range(7)),
    "subset": lambda: Subset(formatted(), list(range(7))),
    "subset of a subset": lambda: Subset(Subset(formatted(), list(range(7))), list(range(7))),
    "list": lambda: ROWS,
    "subset of a list": lambda: Subset(ROWS, list(range(7))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", DATASETS)
def test_units_are_read_through_every_format(name: str) -> None:
    dataset = DATASETS[name]()
    assert _units_named(dataset, "user") == USERS
    assert _units_named(dataset, "number") == [row["number"] for row in ROWS]
    assert "user" in (column_names(dataset) or ())
    with pytest.raises(ValueError, match=r"a column of train_dataset \(.*user"):
        _units_named(dataset, "nobody")


def test_a_column_that_a_transform_makes() -> None:
    dataset = stored().with_transform(lambda rows: {**rows, "household": [user + "!" for user in rows["user"]]})
    assert _units_named(dataset, "household") == [user + "!" for user in USERS]


def test_the_format_stays_for_everybody_else() -> None:
    dataset = formatted()
    column(dataset, "user")
    assert set(dataset[0]) == {"input_ids"}
    assert isinstance(dataset[0]["input_ids"], torch.Tensor)
    assert as_stored(ROWS) is ROWS


def test_rows_that_are_no_mappings_have_no_columns() -> None:
    assert column_names([torch.zeros(2)]) is None
    with pytest.raises((PrivacyError, IndexError, TypeError)):
        _units_named([torch.zeros(2)], "user")
