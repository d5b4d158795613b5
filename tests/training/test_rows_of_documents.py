"""Rows that are parts of documents are said to be, where it can be known."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from dp_flash_hf.training.rows_of_documents import documents_of_rows, say_of_documents
from tests.support.trainers import texts


def blocks(n: int = 12, **changes: Any) -> list[dict[str, Any]]:
    """As `group_texts` of Transformers' examples makes them."""
    ids = [[row, *range(7)] for row in range(n)]
    return [{"input_ids": own, "attention_mask": [1] * 8, "labels": list(own), **changes} for own in ids]


@pytest.mark.parametrize("name", ["overflow_to_sample_mapping", "example_id"])
def test_a_column_that_names_documents_is_offered_as_the_unit(name: str, caplog: pytest.LogCaptureFixture) -> None:
    table = datasets.Dataset.from_list([{**example, name: row // 2} for row, example in enumerate(texts())])
    say_of_documents(table)
    (record,) = caplog.records
    assert f"privacy_unit={name!r}, max_examples_per_unit=" in record.message
    alone = datasets.Dataset.from_list([{**example, name: row} for row, example in enumerate(texts())])
    assert documents_of_rows(alone) is None


def test_blocks_of_concatenated_texts_are_known_by_their_shape() -> None:
    assert "blocks of concatenated texts" in (documents_of_rows(blocks()) or "")
    assert documents_of_rows(texts()) is None  # of unequal length
    assert documents_of_rows(blocks(3)) is None  # too few to tell
    assert documents_of_rows(blocks(attention_mask=[1] * 7 + [0])) is None  # padded to one length
    assert documents_of_rows(blocks(labels=[-100] * 4 + [1] * 4)) is None  # prompts and answers
    assert documents_of_rows([{"label": 0}] * 12) is None
