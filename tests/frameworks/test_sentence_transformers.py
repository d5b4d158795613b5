"""sentence-transformers' own trainers, with tiny models and texts made up here."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset

from dp_flash_hf.errors import UnsupportedError
from tests.support.frameworks import STEPS, TOLERANCE, difference, trained
from tests.support.trainers import SETTINGS

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses, modules
from tokenizers import Tokenizer, models, pre_tokenizers, processors

FRAMEWORK = "sentence-transformers"
WORDS = 60


def tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{word}" for word in range(WORDS))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)  # type: ignore[no-untyped-call]


def bert() -> hf.BertConfig:
    return hf.BertConfig(
        vocab_size=5 + WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder with its tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    hf.BertModel(bert()).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def table(*texts: str, **others: Callable[[int], Any]) -> Dataset:
    """24 rows with texts of unequal length in the named columns, and other columns as functions of the row."""
    chance = random.Random(0)

    def text() -> str:
        return " ".join(f"w{chance.randrange(WORDS)}" for _ in range(chance.randrange(2, 9)))

    columns = {name: [text() for _ in range(24)] for name in texts}
    return Dataset.from_dict({**columns, **{name: [value(row) for row in range(24)] for name, value in others.items()}})


def scores() -> Dataset:
    return table("sentence1", "sentence2", score=lambda row: row * 7 % 24 / 24)


def classes(n: int = 2) -> Dataset:
    return table("sentence1", "sentence2", label=lambda row: row * 5 % n)


def triplets() -> Dataset:
    return table("anchor", "positive", "negative")


def trainer(folder: Path, path: Path, loss: Callable[[Any], Any], data: Any, **settings: Any) -> Any:
    model = SentenceTransformer(modules=[modules.Transformer(str(folder)), modules.Pooling(16)], device="cpu")
    model[0].model.pooler.requires_grad_(False)
    arguments = {**SETTINGS, "output_dir": str(path), "max_steps": len(STEPS), **settings}
    return SentenceTransformerTrainer(
        model=model, args=SentenceTransformerTrainingArguments(**arguments), train_dataset=data, loss=loss(model)
    )


ROWWISE = {
    "CosineSimilarityLoss": (losses.CosineSimilarityLoss, scores),
}
COUPLED = {
    "MultipleNegativesRankingLoss": (losses.MultipleNegativesRankingLoss, triplets),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_sums_are_those_of_single_rows(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    loss, data = ROWWISE[name]
    found, dp = difference(lambda: trainer(folder, tmp_path, loss, data()), monkeypatch)
    assert found < TOLERANCE
    assert dp.report().epsilon > 0
    row(f"SentenceTransformerTrainer, {name}", "exact", figure=found)


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_compare_rows_are_refused(name: str, folder: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    loss, data = COUPLED[name]
    with pytest.raises(UnsupportedError, match="compares the rows") as refusal:
        trained(trainer(folder, tmp_path, loss, data()))
    row(f"SentenceTransformerTrainer, {name}", "refused", str(refusal.value).partition(", so it couples")[0])
