"""Units read by their number, outside of any draw."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_hf.training.session import PrivateTraining
from dp_flash_hf.training.unit_reader import UnitReader
from tests.support.trainers import Pad, config, texts


@dataclass(frozen=True)
class Adapter:
    """A `TrainingAdapter` of one's own: what a session needs of an integration, and nothing else."""

    rows_per_example: int = 1
    reduced_precision: bool = False

    def to_rows(self, collated: Mapping[str, Any]) -> dict[str, Any]:
        return dict(collated)

    def model_loss(self, batch: dict[str, Any], num_items: Tensor | None) -> Tensor:
        return torch.as_tensor(batch["input_ids"]).float().sum()

    def without_metrics(self) -> AbstractContextManager[None]:
        return nullcontext()


def reader(unit: str | None = None, most: int | None = None) -> UnitReader:
    data = [{**example, "user": row // 3} for row, example in enumerate(texts())]
    training = PrivateTraining(
        config(privacy_unit=unit, max_examples_per_unit=most),
        data,
        Adapter(),
        expected_batch_size=2,
        steps=1,
        epochs=0.0,
        max_examples=8,
        max_tokens=None,
        strategy="bookkeeping",
    )
    loader = training.loader(data, Pad(), steps=1, first_step=0)
    n_units = training.mechanism.account.plan.sampler.n_units
    return UnitReader(loader, training.adapter, rows=training.rows, max_examples_per_unit=most, n_units=n_units)


@pytest.mark.parametrize(
    ("unit", "most", "keys"),
    [(None, None, [(5, 0), (2, 1)]), ("user", 2, [(15, 0), (16, 0), (6, 1), (7, 1)])],
)
def test_keys_are_rows_with_the_number_of_their_unit(unit: str | None, most: int | None, keys: list[tuple[int, int]]) -> None:
    found = reader(unit, most)
    assert found.keys([5, 2]) == keys
    assert found.examples(keys)[0] == ({**texts()[keys[0][0]], "user": keys[0][0] // 3}, 0)
    first = found.first_examples([2, 5])
    assert list(first) == [2, 5]
    assert first[5]["input_ids"] == texts()[keys[0][0]]["input_ids"]


def test_a_batch_is_collated_as_a_step_would_be() -> None:
    batch, units = reader("user", 2).batch([5, 2])
    wanted = Pad()([texts()[row] for row in (15, 16, 6, 7)])
    assert batch.keys() == wanted.keys()
    assert all(torch.equal(batch[name], value) for name, value in wanted.items())
    assert units.of_item.tolist() == [0, 0, 1, 1]
