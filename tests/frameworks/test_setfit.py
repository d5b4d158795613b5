"""setfit, whose rows are pairs of texts: refused wherever a user can hand a callback over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from datasets import Dataset

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.integrations.private import private
from dp_flash_hf.integrations.trainer import DPCallback
from tests.support.trainers import SETTINGS, config

pytest.importorskip("setfit")

import setfit
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from tests.frameworks.test_sentence_transformers import bert, table, tokenizer

FRAMEWORK = "setfit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    hf.BertModel(bert()).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def data() -> Dataset:
    return table("text", label=lambda row: row % 2)


def trainer(folder: Path, path: Path, *callbacks: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    body = SentenceTransformer(modules=[modules.Transformer(str(folder)), modules.Pooling(16)], device="cpu")
    args = setfit.TrainingArguments(output_dir=str(path), max_steps=2, batch_size=4, report_to="none", save_strategy="no")
    model = setfit.SetFitModel(model_body=body, model_head=LogisticRegression())  # type: ignore[no-untyped-call]
    return setfit.Trainer(model=model, args=args, train_dataset=data(), callbacks=list(callbacks))


def test_attaching_is_refused(folder: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    with pytest.raises(UnsupportedError, match="pairs of texts") as refusal:
        DPCallback(config()).attach(trainer(folder, tmp_path))
    row("`DPCallback.attach(setfit.Trainer)`, a callback of it, and `private`", "refused", str(refusal.value))


def test_a_callback_that_it_hands_on_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="head without noise"):
        trainer(folder, tmp_path, DPCallback(config())).train()


def test_training_within_private_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="pairs of texts"), private(config()):
        trainer(folder, tmp_path).train()


def test_what_the_refusal_names_trains(folder: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    names = tokenizer()
    rows = data().map(lambda one: names(one["text"]), remove_columns="text")
    made = hf.Trainer(
        model=hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
        args=hf.TrainingArguments(**{**SETTINGS, "output_dir": str(tmp_path), "max_steps": 2}),
        train_dataset=rows,
        data_collator=hf.DataCollatorWithPadding(names),
    )
    dp = DPCallback(config()).attach(made)
    made.train()
    assert dp.report().steps == 2
