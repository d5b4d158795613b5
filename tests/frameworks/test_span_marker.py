"""span-marker, which asks for transformers < 5: its models cannot be made beside ours, and what is trained instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.frameworks.tokenised import save_encoder, table, tokenizer
from tests.support.frameworks import STEPS, TOLERANCE, difference
from tests.support.trainers import SETTINGS

pytest.importorskip("span_marker")

from span_marker import SpanMarkerModel

FRAMEWORK = "span-marker"


def test_its_models_cannot_be_made(tmp_path: Path, row: Callable[..., None]) -> None:
    save_encoder(tmp_path)
    with pytest.raises(TypeError, match="size"):
        SpanMarkerModel.from_pretrained(str(tmp_path), labels=["O", "A", "B"])
    row(
        "SpanMarkerModel, which its Trainer takes",
        "refused",
        "by itself: it asks for transformers < 5, and its configuration has no number of labels in newer ones; train "
        "AutoModelForTokenClassification on the encoder with Trainer and DPCallback instead",
    )


def test_sums_of_what_is_trained_instead_are_those_of_single_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    save_encoder(tmp_path / "encoder")
    data = table().map(lambda one: {"labels": [word % 3 for word in one["input_ids"]]})

    def make() -> Any:
        torch.manual_seed(2)
        return hf.Trainer(
            model=hf.AutoModelForTokenClassification.from_pretrained(tmp_path / "encoder", num_labels=3),
            args=hf.TrainingArguments(**{**SETTINGS, "output_dir": str(tmp_path), "max_steps": len(STEPS)}),
            train_dataset=data,
            data_collator=hf.DataCollatorForTokenClassification(tokenizer()),
        )

    found, dp = difference(make, monkeypatch)
    assert found < TOLERANCE
    assert dp.report().epsilon > 0
    row("AutoModelForTokenClassification on the encoder, with Transformers' own Trainer", "exact", figure=found)
