"""A dataset is known again by its values, and distinguished from any other."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch

from dp_flash_hf.accounting.dataset_fingerprint import fingerprint_of
from tests.support.accounts import KEY
from tests.support.trainers import texts


def shapes_of(rows: list[dict[str, Any]]) -> list[Any]:
    table = datasets.Dataset.from_list(rows)
    return [
        rows,
        [{**row, "input_ids": torch.tensor(row["input_ids"])} for row in rows],
        [{**row, "input_ids": np.array(row["input_ids"], dtype=np.int32)} for row in rows],
        table,
        table.with_format("torch"),
    ]


def test_a_dataset_is_known_again_by_its_values() -> None:
    rows = texts()
    plain, tensors, arrays, table, formatted = (fingerprint_of(data, KEY) for data in shapes_of(rows))
    assert plain == tensors == arrays == fingerprint_of(texts(), KEY)
    assert table == formatted
    assert plain != fingerprint_of(rows, "01" * 16)


@pytest.mark.parametrize("kind", range(5))
def test_a_changed_dataset_is_noticed(kind: int) -> None:
    rows = texts()
    whole = fingerprint_of(shapes_of(rows)[kind], KEY)
    token = [{**row, "input_ids": [*row["input_ids"][:-1], 1]} if i == 7 else row for i, row in enumerate(rows)]
    for other in (token, rows[:-1], rows[::-1], [{**row, "more": 1} for row in rows]):
        assert fingerprint_of(shapes_of(other)[kind], KEY) != whole


def test_tensors_and_tuples_are_datasets_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.arange(40)
    data = torch.utils.data.TensorDataset(x, y)
    changed = torch.utils.data.TensorDataset(x.clone().index_fill_(0, torch.tensor(3), 0.0), y)
    assert fingerprint_of(data, KEY) == fingerprint_of(torch.utils.data.TensorDataset(x.clone(), y), KEY)
    assert fingerprint_of(data, KEY) != fingerprint_of(changed, KEY)
    assert fingerprint_of(x.numpy(), KEY) == fingerprint_of(x, KEY)


def test_random_crops_do_not_look_like_other_data() -> None:
    class Crops(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 5000

        def __getitem__(self, row: int) -> Any:
            return {"pixels": torch.rand(4, 4)}

    assert fingerprint_of(Crops(), KEY) == fingerprint_of(Crops(), KEY)


def test_parts_do_not_run_into_each_other() -> None:
    assert fingerprint_of([{"a": "xy", "b": "z"}], KEY) != fingerprint_of([{"a": "x", "b": "yz"}], KEY)
    assert fingerprint_of([["a", ["b"]]], KEY) != fingerprint_of([["a", "b"]], KEY)
