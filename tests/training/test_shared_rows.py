"""Evaluation rows that were taken out of the training data are found, and rows that are equal by chance are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import Dataset, Subset

from dp_flash_hf.training import shared_rows
from dp_flash_hf.training.shared_rows import rows_in_training
from tests.support.trainers import texts

TRAINING, HELD_OUT = texts(200, longest=30), texts(50, seed=9, longest=30)
TABLE = datasets.Dataset.from_list(TRAINING)


class Tensors(Dataset[Any]):
    """The same rows as tensors."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return {name: torch.tensor(value) for name, value in self.rows[place].items()}


TAKEN: dict[str, Callable[[], Any]] = {
    "the same": lambda: TRAINING,
    "one row": lambda: TRAINING[7:8],
    "half of them": lambda: HELD_OUT[:10] + TRAINING[50:60],
    "a table": lambda: TABLE.select(range(30)),
    "shuffled": lambda: TABLE.shuffle(seed=3),
    "a split": lambda: TABLE.train_test_split(0.1, seed=0)["test"],
    "with a format": lambda: TABLE.select(range(30)).with_format("torch", columns=["label"]),
    "with a transform": lambda: TABLE.select(range(30)).with_transform(lambda rows: {"other": rows["label"]}),
    "some columns": lambda: TABLE.select(range(30)).remove_columns("label"),
    "further columns": lambda: TABLE.select(range(30)).add_column("length", list(range(30))),
    "a subset": lambda: Subset(TABLE, [3, 5, 8]),
    "tensors": lambda: Tensors(TRAINING[20:40]),
}
APART: dict[str, Callable[[], Any]] = {
    "held out": lambda: HELD_OUT,
    "a table": lambda: datasets.Dataset.from_list(HELD_OUT),
    "nothing": lambda: None,
    "empty": lambda: [],
    "a stream": lambda: TABLE.to_iterable_dataset(),
    "no column in common": lambda: TABLE.select_columns("label").rename_column("label", "other"),
    "a column with few values": lambda: TABLE.select_columns("label"),
    "numbered anew": lambda: [{**row, "row": 100 + place} for place, row in enumerate(TRAINING[:9])],  # which is said
    "one row in a hundred": lambda: texts(99, seed=9, longest=30) + TRAINING[:1],
}


TABLES = {"list": TRAINING, "table": TABLE, "table with a format": TABLE.with_format("numpy"), "tensors": Tensors(TRAINING)}


@pytest.mark.parametrize("training", TABLES)
@pytest.mark.parametrize("kind", TAKEN)
def test_rows_that_were_taken_are_found(kind: str, training: str) -> None:
    data = TAKEN[kind]()
    found, read = rows_in_training(TABLES[training], data)
    assert read == len(data)
    assert found == (10 if kind == "half of them" else read)


@pytest.mark.parametrize("kind", APART)
def test_rows_that_were_held_out_are_not(kind: str) -> None:
    numbered = TABLE.add_column("row", list(range(len(TABLE))))
    assert rows_in_training(numbered, APART[kind]()) == (0, 0)


def test_rows_that_are_none_of_those() -> None:
    pairs = [(torch.tensor(row["input_ids"]), row["label"]) for row in TRAINING]
    assert rows_in_training(pairs, pairs[:5]) == (5, 5)
    assert rows_in_training(pairs, [(torch.tensor([1, 1, place]), 0) for place in range(20)]) == (0, 0)
    assert rows_in_training([object() for _ in range(9)], [object()]) == (0, 0)  # of which nothing is known


def test_of_large_datasets_a_sample_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 rows 2,000: of 300 that were taken, about 30 are found; what duplicates there are by chance is allowed for."""
    monkeypatch.setattr(shared_rows, "_TRAINING_ROWS", 2000)
    training = [{"row": place} for place in range(20_000)]
    found, read = rows_in_training(training, training[:300])
    assert read == 300
    assert abs(found - 30) < 6 * 30**0.5
    often = [{"row": place // 2 if place < 8000 else place} for place in range(20_000)]  # two in five rows occur twice
    by_chance = [{"row": place} for place in range(100)] + [{"row": -place} for place in range(1, 400)]
    assert rows_in_training(often, by_chance) == (0, 0)


def test_reading_ends_and_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "_SECONDS", 0.0)
    states = torch.get_rng_state(), random.getstate()
    found, read = rows_in_training(TRAINING, TRAINING)
    assert read == shared_rows._LEAST
    assert 2 < found < read  # a third of them
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
