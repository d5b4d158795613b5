"""sentence-transformers' own trainers, with tiny models and texts made up here."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset, DatasetDict, concatenate_datasets

from dp_flash_hf import DPCallback, private
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from tests.support.frameworks import STEPS, TOLERANCE, difference, trained
from tests.support.trainers import SETTINGS, config

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.sentence_transformer import losses, modules
from sentence_transformers.sparse_encoder import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.sparse_encoder import modules as sparse_modules
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
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


def scores(**others: Callable[[int], Any]) -> Dataset:
    return table("sentence1", "sentence2", score=lambda row: row * 7 % 24 / 24, **others)


def classes(n: int = 2) -> Dataset:
    return table("sentence1", "sentence2", label=lambda row: row * 5 % n)


def triplets() -> Dataset:
    return table("anchor", "positive", "negative")


def margins() -> Dataset:
    return table("query", "positive", "negative", label=lambda row: (row % 5 - 2) / 3)


def embeddings() -> Dataset:
    generator = torch.Generator().manual_seed(3)
    return table("sentence", label=lambda row: torch.randn(16, generator=generator).tolist())


def arguments(kind: Any, path: Path, **settings: Any) -> Any:
    return kind(**{**SETTINGS, "output_dir": str(path), "max_steps": len(STEPS), **settings})


Loss = Callable[[Any], Any]  # of a model


def bi_encoder(folder: Path, path: Path, loss: Loss, data: Any, *, callbacks: Any = None, **settings: Any) -> Any:
    torch.manual_seed(2)  # for losses with weights
    model = SentenceTransformer(modules=[modules.Transformer(str(folder)), modules.Pooling(16)], device="cpu")
    args = arguments(SentenceTransformerTrainingArguments, path, **settings)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss(model), callbacks=callbacks)


def sparse_encoder(folder: Path, path: Path, loss: Loss, data: Any, *, pooling: Any = None) -> Any:
    torch.manual_seed(2)
    model = SparseEncoder(modules=[sparse_modules.MLMTransformer(str(folder)), pooling or Pooling()], device="cpu")
    args = arguments(SparseEncoderTrainingArguments, path)
    return SparseEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss(model))


def cross_encoder(labels: int) -> Callable[..., Any]:
    def make(folder: Path, path: Path, loss: Loss, data: Any) -> Any:
        torch.manual_seed(2)
        model = CrossEncoder(str(folder), num_labels=labels, device="cpu")
        args = arguments(CrossEncoderTrainingArguments, path)
        return CrossEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss(model))

    return make


class Pooling(sparse_modules.SpladePooling):  # type: ignore[misc]
    """In training mode always, for in evaluation mode it overwrites what a backward pass needs; it has no dropout."""

    def train(self, mode: bool = True) -> Any:
        return super().train(True)


class RowNorms(torch.nn.Module):
    """The L1 norm of every row, in place of FlopsLoss, which squares means over the batch."""

    def compute_loss_from_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.abs().sum(1).mean()


def splade(model: Any, loss: Any, regularizer: Any) -> Any:
    return sparse_losses.SpladeLoss(
        model,
        loss,
        document_regularizer_weight=0.03,
        query_regularizer_weight=0.05,
        document_regularizer=regularizer,
        query_regularizer=regularizer,
    )


BI, SPARSE, CROSS = "SentenceTransformerTrainer", "SparseEncoderTrainer", "CrossEncoderTrainer"
ROWWISE: dict[str, tuple[Any, Any, Any]] = {
    f"{BI}, CosineSimilarityLoss": (bi_encoder, losses.CosineSimilarityLoss, scores),
    f"{BI}, ContrastiveLoss": (bi_encoder, losses.ContrastiveLoss, classes),
    f"{BI}, TripletLoss": (bi_encoder, losses.TripletLoss, triplets),
    f"{BI}, SoftmaxLoss": (bi_encoder, lambda model: losses.SoftmaxLoss(model, 16, 2), classes),
    f"{BI}, MSELoss": (bi_encoder, losses.MSELoss, embeddings),
    f"{BI}, MarginMSELoss": (bi_encoder, losses.MarginMSELoss, margins),
    f"{CROSS}, BinaryCrossEntropyLoss": (cross_encoder(1), cross_losses.BinaryCrossEntropyLoss, classes),
    f"{CROSS}, CrossEntropyLoss": (cross_encoder(3), cross_losses.CrossEntropyLoss, lambda: classes(3)),
    f"{CROSS}, MSELoss": (cross_encoder(1), cross_losses.MSELoss, scores),
    f"{CROSS}, MarginMSELoss": (cross_encoder(1), cross_losses.MarginMSELoss, margins),
    f"{SPARSE}, SpladeLoss of SparseCosineSimilarityLoss with a regularizer of single rows": (
        sparse_encoder,
        lambda model: splade(model, sparse_losses.SparseCosineSimilarityLoss(model), RowNorms()),
        scores,
    ),
    f"{SPARSE}, SpladeLoss of SparseMarginMSELoss with a regularizer of single rows": (
        sparse_encoder,
        lambda model: splade(model, sparse_losses.SparseMarginMSELoss(model), RowNorms()),
        margins,
    ),
}
COUPLED: dict[str, tuple[Any, Any, Any]] = {
    **{
        f"{BI}, {loss.__name__}": (bi_encoder, loss, data)
        for loss, data in (
            (losses.MultipleNegativesRankingLoss, triplets),
            (losses.MultipleNegativesSymmetricRankingLoss, triplets),
            (losses.CachedMultipleNegativesRankingLoss, triplets),
            (losses.CoSENTLoss, scores),
            (losses.AnglELoss, scores),
            (losses.OnlineContrastiveLoss, classes),
            (losses.BatchHardTripletLoss, lambda: table("sentence", label=lambda row: row % 3)),
            (losses.BatchAllTripletLoss, lambda: table("sentence", label=lambda row: row % 3)),
        )
    },
    f"{CROSS}, MultipleNegativesRankingLoss": (cross_encoder(1), cross_losses.MultipleNegativesRankingLoss, triplets),
    f"{SPARSE}, SpladeLoss of SparseMultipleNegativesRankingLoss": (
        sparse_encoder,
        lambda model: splade(model, sparse_losses.SparseMultipleNegativesRankingLoss(model), RowNorms()),
        triplets,
    ),
    f"{SPARSE}, SpladeLoss with FlopsLoss, its default regularizer": (
        sparse_encoder,
        lambda model: splade(model, sparse_losses.SparseMarginMSELoss(model), None),
        margins,
    ),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_sums_are_those_of_single_rows(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    build, loss, data = ROWWISE[name]

    def make() -> Any:
        trainer = build(folder, tmp_path, loss, data())
        trainer.remove_callback(SpladeRegularizerWeightSchedulerCallback)  # the loop over single rows has no steps
        return trainer

    found, dp = difference(make, monkeypatch)
    assert found < TOLERANCE
    assert dp.report().epsilon > 0
    assert dp.engine is not None
    alone = "microbatch" in dp.engine.norm_methods().values()
    assert alone == name.startswith(CROSS)
    row(name, "exact", "unit by unit: it tokenises inside the loss" if alone else "", figure=found)


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_compare_rows_are_refused(name: str, folder: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    build, loss, data = COUPLED[name]
    trainer = build(folder, tmp_path, loss, data())
    with pytest.raises((PrivacyError, UnsupportedError), match=r"compares (the )?rows|couples|neither a mean") as refusal:
        trained(trainer)
    row(name, "refused", re.split(r", so it couples|[;(]", str(refusal.value))[0].strip())


def test_splade_pooling_is_refused_with_what_works(folder: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    """The losses above are trained with what it says."""
    _, loss, data = ROWWISE[f"{SPARSE}, SpladeLoss of SparseMarginMSELoss with a regularizer of single rows"]
    trainer = sparse_encoder(folder, tmp_path, loss, data(), pooling=sparse_modules.SpladePooling())
    with pytest.raises(UnsupportedError, match="keep it in training mode by a subclass") as refusal:
        trained(trainer)
    row(f"{SPARSE}, SpladePooling itself", "refused", str(refusal.value).partition(". ")[0])


def test_the_column_of_units_is_no_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    def make(**others: Callable[[int], Any]) -> Any:
        return bi_encoder(folder, tmp_path, losses.CosineSimilarityLoss, scores(**others))

    found, _ = difference(lambda: make(user=str), monkeypatch, alone_by=make, privacy_unit="user", max_examples_per_unit=1)
    assert found < TOLERANCE
    row(f"{BI}, a column for privacy_unit", "exact", "the collator is not shown it", figure=found)


def test_several_data_sets_are_refused_and_made_one(folder: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    several = DatasetDict(one=scores(), other=scores())
    with pytest.raises(UnsupportedError, match="concatenate_datasets") as refusal:
        trained(bi_encoder(folder, tmp_path, losses.CosineSimilarityLoss, several))
    one = concatenate_datasets(list(several.values()))
    assert trained(bi_encoder(folder, tmp_path, losses.CosineSimilarityLoss, one)).report().steps == len(STEPS)
    row(f"{BI}, a DatasetDict", "refused", str(refusal.value).partition(":")[0])


def test_a_pooler_that_nothing_reads_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    dp = DPCallback(config())
    trainer = bi_encoder(folder, tmp_path, losses.CosineSimilarityLoss, scores(), callbacks=[dp], learning_rate=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert dp.report().steps == len(STEPS)
    same = {name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])}
    assert same == {name for name in before if "pooler" in name}
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_private_needs_no_trainer(folder: Path, tmp_path: Path) -> None:
    with private(config()) as run:
        bi_encoder(folder, tmp_path, losses.CosineSimilarityLoss, scores()).train()
    assert [report.steps for report in run.reports()] == [len(STEPS)]


def test_the_guide_runs_and_its_model_is_read_again(run_guide: Callable[..., dict[str, Any]]) -> None:
    names = run_guide("sentence_transformers")
    assert 0 < names["dp"].report().epsilon <= 8
    texts = ["where is my card", "close it"]
    trained, again = (names[name].encode(texts, convert_to_tensor=True) for name in ("model", "again"))
    assert torch.equal(trained, again)
