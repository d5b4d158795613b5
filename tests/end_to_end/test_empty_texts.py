"""Texts without a token, and texts without a label: units of norm zero, wherever in the data they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.training.batches import is_empty
from tests.integrations.test_trainer import sums_of
from tests.support.models import tiny
from tests.support.oracle import distance
from tests.support.trainers import Pad, attached, texts, trainer_for, without_dropout

ROUNDING = 1e-5
DRAWN = [0, 3, 4, 9, 11, 17, 20]
EMPTY = [3, 9, 20]

WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "token budget": {"max_tokens_per_device": 20},
    "small parts": {"per_device_train_batch_size": 1},
    "flattened": {"collator": hf.DataCollatorWithFlattening()},  # type: ignore[no-untyped-call]
    "flattened, token budget": {
        "collator": hf.DataCollatorWithFlattening(),  # type: ignore[no-untyped-call]
        "max_tokens_per_device": 20,
    },
}


def model() -> Any:
    built = without_dropout(tiny("llama"))
    built.set_attn_implementation("dp_flash")
    return built


@pytest.mark.sampled(6)
@pytest.mark.parametrize("way", WAYS)
def test_empty_texts_add_nothing(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = texts()
    for row in EMPTY:
        data[row] = {"input_ids": [], "labels": [], "label": 0}
    (got,) = sums_of(model(), tmp_path / "empty", monkeypatch, DRAWN, data=data, **WAYS[way])
    (wanted,) = sums_of(model(), tmp_path / "full", monkeypatch, [unit for unit in DRAWN if unit not in EMPTY], **WAYS[way])
    assert distance(got, wanted) <= ROUNDING


@pytest.mark.parametrize("kind", ["list", "numpy", "tensor"])
def test_what_is_empty(kind: str) -> None:
    made: dict[str, Any] = {"list": list, "numpy": np.array, "tensor": torch.tensor}
    assert is_empty({"input_ids": made[kind]([])})
    assert not is_empty({"input_ids": made[kind]([0])})
    assert not is_empty({"labels": made[kind]([])})
    assert not is_empty(made[kind]([]))


def test_data_of_nothing_but_empty_texts_are_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_for(model(), tmp_path, [{"input_ids": [], "labels": [], "label": 0}] * 5)
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match="every text of train_dataset is empty"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


def test_a_user_with_some_empty_texts_is_one_unit_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{**example, "user": row // 3} for row, example in enumerate(texts())]
    for row in (0, 4, 9, 10, 11):  # the first text of one, one in the middle, all of another
        data[row] = {**data[row], "input_ids": [], "labels": []}
    kept = [example for example in data if example["input_ids"]]
    users: dict[str, Any] = {"privacy_unit": "user", "max_examples_per_unit": 3}
    (got,) = sums_of(model(), tmp_path, monkeypatch, [0, 1, 3, 5], data=data, **users)
    (wanted,) = sums_of(model(), tmp_path / "kept", monkeypatch, [0, 1, 4], data=kept, **users)  # user 3 is not among them
    assert distance(got, wanted) <= ROUNDING


@pytest.mark.complete
@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_device": 16}, {"per_device_train_batch_size": 1}], ids=str)
def test_empty_labels_add_nothing(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an encoder-decoder: where all rows of a part have them, its labels have no width."""
    data = texts()
    for row in EMPTY:
        data[row] = {**data[row], "labels": []}

    def collate(examples: list[dict[str, Any]]) -> Any:
        batch = Pad()([{**example, "labels": example["input_ids"]} for example in examples])
        width = max(len(example["labels"]) for example in examples)
        padded = [[*example["labels"], *[-100] * (width - len(example["labels"]))] for example in examples]
        return {**batch, "labels": torch.tensor(padded, dtype=torch.long).view(len(examples), width)}

    (got,) = sums_of("t5", tmp_path, monkeypatch, DRAWN, data=data, collator=collate, **settings)
    kept = [unit for unit in DRAWN if unit not in EMPTY]
    (wanted,) = sums_of("t5", tmp_path, monkeypatch, kept, data=data, collator=collate, **settings)
    assert distance(got, wanted) <= ROUNDING
