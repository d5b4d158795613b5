"""Which losses are sums over units once their division is undone, and which are not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.training.losses import UnitLoss, label_counts, learn_loss
from dp_flash_hf.units import Units, select_unit
from tests.support.models import VOCABULARY, batch_of, loss_of, packed_batch, tiny

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
_BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}


def model_loss(model: Any) -> Any:
    """As `Trainer` calls the model: with the count where it is given, else without."""
    accepts = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values())

    def loss(batch: dict[str, Any], count: Tensor | None) -> Tensor:
        given = {"num_items_in_batch": count} if accepts and count is not None else {}
        value: Tensor = model(**batch, **given).loss
        return value

    return loss


def learnt(model: Any, batch: dict[str, Any], units: Units | None = None) -> UnitLoss:
    units = units or Units.rows(len(batch["input_ids"]))
    tolerance = 1e-2 if model.dtype == torch.bfloat16 else 1e-4
    return learn_loss(model_loss(model.eval()), batch, units, tolerance=tolerance)


def rounded(loss: UnitLoss) -> tuple[str, str]:
    return loss.divides, loss.counted


EXPECTED = {
    "gpt2": ("sum", "shifted labels"),
    "llama": ("sum", "shifted labels"),
    "opt": ("sum", "shifted labels"),
    "bert": ("mean", "labels"),
    "roberta": ("mean", "labels"),
    "albert": ("mean", "labels"),
    "t5": ("mean", "labels"),
    "bert_classifier": ("mean", "labels"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_how_models_divide_is_found_out(name: str, dtype: torch.dtype) -> None:
    assert rounded(learnt(tiny(name, dtype), batch_of(name))) == EXPECTED[name]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bert_classifier"])
def test_the_undone_division_leaves_the_sum_over_labels(name: str) -> None:
    model, batch = tiny(name), batch_of(name)
    loss = learnt(model, batch)
    rtol = 4 * float(torch.finfo(loss(batch).dtype).eps) * 32  # causal models add up float32 losses, of at most 32 labels
    torch.testing.assert_close(loss(batch).double(), loss_of(name, model)(batch), rtol=rtol, atol=0.0)
    alone = torch.stack([loss(select_unit(batch, Units.rows(5), unit)) for unit in range(5)])
    torch.testing.assert_close(loss(batch), alone.sum(), rtol=rtol, atol=0.0)


def first_ignored(batch: dict[str, Any]) -> None:
    batch["labels"][:, 0] = -100  # as MLM collators leave [CLS]


def unlabelled(batch: dict[str, Any]) -> None:
    batch["labels"][0] = -100


def nothing_labelled(batch: dict[str, Any]) -> None:
    batch["labels"][:] = -100


def two_tokens(batch: dict[str, Any]) -> None:
    batch["labels"][:, 2:] = -100  # rows and shifted labels are as many


@pytest.mark.parametrize("data", [first_ignored, unlabelled, nothing_labelled, two_tokens])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_what_is_found_out_does_not_depend_on_the_data(name: str, data: Any) -> None:
    """Or else one example in the first batch would decide how the gradients of all others are scaled."""
    batch = batch_of(name)
    data(batch)
    assert rounded(learnt(tiny(name), batch)) == EXPECTED[name]


def test_packed_rows() -> None:
    batch, boundaries = packed_batch()
    units = Units.of(boundaries, (1, 14))
    loss = learnt(tiny("llama"), batch, units)
    assert rounded(loss) == ("sum", "labels")
    assert label_counts(batch, units, "labels").tolist() == [3, 0, 5, 2]


def test_units_of_several_rows() -> None:
    batch, units = batch_of("bert", rows=6), Units.of(torch.tensor([0, 1, 0, 1, 2, 2]), (6, 7))
    loss = learnt(tiny("bert"), batch, units)
    assert rounded(loss) == ("mean", "labels")
    counts = (batch["labels"] != -100).sum(1)
    wanted = 1 / torch.stack([counts[[0, 2]].sum(), counts[[1, 3]].sum(), counts[[4, 5]].sum()])
    torch.testing.assert_close(loss.scale(batch, units), wanted)


@pytest.mark.parametrize("build", [hf.BartForConditionalGeneration, hf.BartForCausalLM])
def test_language_models_that_ignore_the_count(build: Any) -> None:
    torch.manual_seed(0)
    assert rounded(learnt(build(hf.BartConfig(**_BART)).double(), batch_of("gpt2"))) == ("mean", "labels")


def test_regression_and_several_labels_count_rows() -> None:
    for problem, labels in ((1, torch.randn(5)), (3, torch.rand(5, 3).round())):
        model = hf.BertForSequenceClassification(hf.BertConfig(**{**_SMALL, "num_labels": problem}))
        batch = {**batch_of("bert_classifier", dtype=torch.float32), "labels": labels}
        loss = learnt(model, batch)
        assert loss.divides == "mean"
        assert loss.count(batch) == 5
        torch.testing.assert_close(loss.scale(batch, Units.rows(5)), torch.ones(5))


def test_a_sum_of_means_over_different_things_is_refused() -> None:
    """Masked tokens and next sentences have denominators of their own."""
    torch.manual_seed(0)
    model = hf.BertForPreTraining(hf.BertConfig(**_SMALL)).double()
    batch = {**batch_of("bert"), "next_sentence_label": torch.tensor([0, 1, 0, 1, 1])}
    with pytest.raises(UnsupportedError, match=r"share a denominator.*Override Trainer\.compute_loss"):
        learnt(model, batch)


def test_answers_that_are_left_out_of_the_mean_are_refused() -> None:
    """Question answering leaves positions outside the text out of its mean, and they are no labels that could be counted."""
    model = hf.BertForQuestionAnswering(hf.BertConfig(**_SMALL))
    batch = {k: v for k, v in batch_of("bert").items() if k != "labels"}
    inside, outside = torch.tensor([1, 2, 1, 0, 2]), torch.tensor([1, 99, 1, 0, 2])
    assert learnt(model, {**batch, "start_positions": inside, "end_positions": inside}).divides == "mean"
    with pytest.raises(UnsupportedError, match="start_positions outside its text"):
        learnt(model, {**batch, "start_positions": outside, "end_positions": outside})


def test_counts_by_hand() -> None:
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, -100, -100], [5, -100, -100, -100], [1, 2, 3, 4]])
    units = Units.of(torch.tensor([0, 1, 2, 0]), (4, 4))
    batch = {"input_ids": torch.zeros(4, 4, dtype=torch.long), "labels": labels}
    assert label_counts(batch, units, "labels").tolist() == [7, 0, 1]
    assert label_counts(batch, units, "shifted labels").tolist() == [5, 0, 0]
    assert label_counts(batch, units, "rows").tolist() == [2, 1, 1]
    assert labels[0, 0] == 5  # counting leaves the labels alone
    loss = UnitLoss(lambda part, count: torch.zeros(()), "sum", "shifted labels")
    assert loss.scale(batch, units).tolist() == [pytest.approx(1 / 5), 0.0, 0.0]
    assert loss.count(batch) == 5


def test_a_batch_without_labels_has_loss_zero() -> None:
    model = tiny("bert")
    batch = batch_of("bert")
    loss = learnt(model, batch)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert loss(nothing).item() == 0.0  # and not 0 / 0
    loss(nothing).backward()


@pytest.mark.parametrize("where", ["start_positions", "end_positions"])
@pytest.mark.parametrize("answer", [-1, 4, 6])
def test_answers_outside_their_text_are_refused_in_any_batch(where: str, answer: int) -> None:
    """Of a text of 4 tokens padded to 6: the model would leave out position 6, and position 4 in a batch of shorter texts."""
    loss = UnitLoss(lambda batch, divisor: torch.zeros(()), "mean", "labels")
    batch = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        "start_positions": torch.tensor([5, 3]),
        "end_positions": torch.tensor([5, 3]),
    }
    loss(batch)
    batch[where] = torch.tensor([5, answer])
    with pytest.raises(UnsupportedError, match=f"{where} outside its text"):
        loss(batch)


@pytest.mark.parametrize("labels", [[0, 0, 0], [2, 2, 2], [0, 1, 2]])
def test_class_weights_are_refused_whatever_the_classes_of_the_first_rows(labels: list[int]) -> None:
    """A weighted mean divides by the weights of the classes in the batch; of rows of one class it looks like a plain mean."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4)

    def weighted(weights: list[float]) -> UnitLoss:
        def model_loss(batch: dict[str, Any], divisor: Tensor | None) -> Tensor:
            return F.cross_entropy(logits[batch["row"]], batch["labels"], weight=torch.tensor(weights))

        batch = {"row": torch.arange(3), "labels": torch.tensor(labels)}
        units = Units.rows(3)
        return learn_loss(model_loss, batch, units, n_classes=4)

    assert weighted([1.0, 1.0, 1.0, 1.0]).divides == "mean"
    with pytest.raises(UnsupportedError, match="share a denominator"):
        weighted([1.0, 1.0, 1.0, 1.5])


LOGITS = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
CLASSES = {"row": torch.arange(5), "labels": torch.tensor([0, 1, 2, 1, 0])}
PENALTY = 0.37  # a term that depends on weights alone


def each(batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(LOGITS[batch["row"]], batch["labels"], reduction="none")


def _over(batch: dict[str, Any], number: Tensor | None) -> Any:
    return len(batch["row"]) if number is None else number


COUPLING_NOBODY: dict[str, tuple[Any, str]] = {
    "sum": (lambda batch, number: each(batch).sum(), "sum"),
    "sum divided by a constant": (lambda batch, number: each(batch).sum() / 8, "sum"),
    "sum divided by the number": (lambda batch, number: each(batch).sum() / _over(batch, number), "sum"),
    "mean": (lambda batch, number: each(batch).mean(), "mean"),
    "mean and a penalty": (lambda batch, number: each(batch).mean() + PENALTY, "mean"),
    "mean and a bonus": (lambda batch, number: each(batch).mean() - 20 * PENALTY, "mean"),
    "by the number, and a penalty": (lambda batch, number: each(batch).sum() / _over(batch, number) + PENALTY, "mean"),
    "by the number, and a small penalty": (lambda batch, number: each(batch).sum() / _over(batch, number) + 0.01, "mean"),
    "weights of each row's class": (lambda batch, number: (each(batch) * torch.arange(1, 5)[batch["labels"]]).mean(), "mean"),
}


@pytest.mark.parametrize("name", COUPLING_NOBODY)
def test_losses_that_couple_nobody_are_sums_over_units(name: str) -> None:
    model_loss, divides = COUPLING_NOBODY[name]
    units = Units.rows(5)
    loss = learn_loss(model_loss, dict(CLASSES), units, n_classes=4)
    assert loss.divides == divides
    alone = torch.stack([loss(select_unit(CLASSES, units, unit)) for unit in range(5)])
    torch.testing.assert_close(loss(CLASSES), alone.sum())
    assert loss.scale(CLASSES, units).tolist() == [1.0] * 5


COUPLING: dict[str, Any] = {
    "mean and a term of the batch": lambda batch, number: each(batch).mean() + LOGITS[batch["row"]].mean(0).square().sum(),
    "by the number, and a term of the batch": lambda batch, number: (
        each(batch).sum() / _over(batch, number) + LOGITS[batch["row"]].mean(0).square().sum()
    ),
    "sum and a penalty": lambda batch, number: each(batch).sum() + PENALTY,
    "divided by the root of the rows": lambda batch, number: each(batch).sum() / len(batch["row"]) ** 0.5,
    "the largest": lambda batch, number: each(batch).max(),
}


@pytest.mark.parametrize("name", COUPLING)
def test_losses_that_couple_units_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)Class weights: .*reduction='none'.*added to a mean, not to a sum"):
        learn_loss(COUPLING[name], dict(CLASSES), Units.rows(5), n_classes=4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_connectionist_losses(reduction: str) -> None:
    """Of sounds with several labels each: summed, or each divided by its own labels."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions: dict[str, Any] = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
    setting = hf.Wav2Vec2Config(
        **shape, **convolutions, vocab_size=12, ctc_loss_reduction=reduction, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    model: Any = hf.Wav2Vec2ForCTC(setting)
    model.double().eval()
    batch = {"input_values": torch.randn(4, 200).double(), "labels": torch.randint(1, 12, (4, 6))}
    loss = learn_loss(lambda part, number: model(**part).loss, batch, Units.rows(4))
    assert rounded(loss) == (("sum", "labels") if reduction == "sum" else ("mean", "rows"))


@pytest.mark.parametrize("divides", ["sum", "mean"])
def test_labels_of_no_width_are_no_labels(divides: Any) -> None:
    """As a collator makes of rows that all have empty labels: no model is asked."""

    def model_loss(batch: dict[str, Any], number: Tensor | None) -> Tensor:
        raise AssertionError

    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(2, 0, dtype=torch.long)}
    loss = UnitLoss(model_loss, divides, "labels")
    assert loss(batch).item() == 0.0
    assert loss.scale(batch, Units.rows(2)).tolist() == [0.0, 0.0]


def _scored(batch: Any) -> Tensor:
    return F.normalize(batch["x"], dim=-1)


COMPARING: dict[str, Any] = {
    "in-batch negatives": lambda b: F.cross_entropy(5 * _scored(b) @ _scored(b).roll(1, 1).T, torch.arange(len(b["x"]))),
    "ranking": lambda b: (
        (b["x"][:, :1] - b["x"][:, :1].T).sigmoid().mean() ** 2 + (b["x"][:, 0] - b["x"][:, 0].mean()).square().sum()
    ),
    "correlation": lambda b: (b["x"][:, 0] * b["x"][:, 1]).sum() / (1 + b["x"][:, 0].norm() * b["x"][:, 1].norm()),
    "centred": lambda b: (b["x"] - b["x"].mean(0)).square().sum(),
}
DIVIDING: dict[str, Any] = {
    "weights": lambda b: (b["w"] * b["x"].square().sum(1)).sum() / b["w"].sum(),
    "focal": lambda b: b["x"].square().sum() / b["w"].square().sum(),
}


@pytest.mark.parametrize("name", [*COMPARING, *DIVIDING])
def test_losses_that_compare_rows_are_told_from_those_that_share_a_divisor(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(4, 6, generator=generator), "w": torch.rand(4, generator=generator) + 0.5}
    match = "compares the rows of a batch" if name in COMPARING else "share a denominator"
    loss = {**COMPARING, **DIVIDING}[name]
    with pytest.raises(UnsupportedError, match=match):
        learn_loss(lambda given, num_items: loss(given), batch, Units.rows(4))
