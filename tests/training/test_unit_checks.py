"""Units that see each other are refused whoever is tried, and honest losses are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import default_collate

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.training import preflight
from tests.support.coupled_losses import COUSINS, HONEST, NAMED, Loss, Scores, checked, of_classes, of_pairs_in_a_row, rows
from tests.support.loops import loop, run
from tests.support.models import VOCABULARY
from tests.support.trainers import attached, texts, trainer_for

SEEDS = pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 20), marks=pytest.mark.complete)], ids=str)


def name_of(loss: Any) -> str:
    return str(getattr(loss, "__name__", loss))


@SEEDS
@pytest.mark.parametrize("loss", [*NAMED, *COUSINS], ids=name_of)
def test_a_loss_that_compares_units_is_refused_whatever_labels_the_tried_ones_have(loss: Loss, seeds: range) -> None:
    """A tenth of the rows is positive: four of them taken blindly share a label two times in three."""
    for seed in seeds:
        with pytest.raises((PrivacyError, UnsupportedError)):
            checked(loss, rows(seed), seed=seed)


@pytest.mark.sampled(5)
@SEEDS
@pytest.mark.parametrize("loss", [*NAMED, *COUSINS], ids=name_of)
def test_it_is_refused_also_where_all_rows_that_can_be_looked_at_share_a_label(loss: Loss, seeds: range) -> None:
    for seed in seeds[:3]:
        with pytest.raises((PrivacyError, UnsupportedError)):
            checked(loss, rows(seed, positives=0.0), seed=seed)


@pytest.mark.sampled(4)
@SEEDS
@pytest.mark.parametrize("loss", HONEST, ids=name_of)
def test_an_honest_loss_of_every_kind_of_label_is_accepted(loss: Loss, seeds: range) -> None:
    for seed in seeds[:3]:
        assert checked(loss, rows(seed), seed=seed).checked
    if loss is not of_pairs_in_a_row:  # which is zero for all rows that are apart already, and says nothing of how it divides
        assert checked(loss, rows(0, positives=0.0)).checked
        assert checked(loss, rows(0, n=2)).checked


def through_a_trainer(loss: Loss, data: Any, path: Path) -> None:
    class Custom(hf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return loss(model, inputs)

    attached(trainer := trainer_for(Scores(), path, data, cls=Custom, collator=default_collate))
    trainer.train()


def through_a_loop(loss: Loss, data: Any, path: Path) -> None:
    private, _, optimizer = loop(Scores(), train_dataset=data, collate_fn=default_collate, loss_fn=loss)
    run(private, optimizer)


ALSO = [pytest.param(loss, marks=pytest.mark.complete) for loss in (*NAMED[1:], *COUSINS)]


@pytest.mark.parametrize("train", [through_a_trainer, through_a_loop], ids=name_of)
@pytest.mark.parametrize("loss", [NAMED[0], *ALSO], ids=name_of)
def test_it_is_refused_where_people_put_it(loss: Loss, train: Any, tmp_path: Path, fresh_accelerate: None) -> None:
    """In an overridden `Trainer.compute_loss`, and as `loss_fn` of `make_private`."""
    for seed in range(3 if loss is not NAMED[0] else 1):
        with pytest.raises((PrivacyError, UnsupportedError)):
            train(loss, rows(seed), tmp_path)


@pytest.mark.parametrize("train", [through_a_trainer, through_a_loop], ids=name_of)
@pytest.mark.parametrize(
    "loss", [HONEST[0], *(pytest.param(loss, marks=pytest.mark.complete) for loss in HONEST[1:-2])], ids=name_of
)
def test_and_an_honest_one_trains_there(loss: Loss, train: Any, tmp_path: Path, fresh_accelerate: None) -> None:
    train(loss, rows(0), tmp_path)


class Similar(nn.Module):
    """Cosine similarity of two texts: their mean embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 8)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.cosine_similarity(self.mean(one), self.mean(other), dim=1)

    def mean(self, ids: Tensor) -> Tensor:
        mask = (ids > 0).to(self.table.weight.dtype).unsqueeze(1)
        words = self.table(ids).mT.contiguous()
        mean: Tensor = (words * mask).sum(2) / mask.sum(2)  # in an order that depends on the length
        return mean


def pairs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Two int64 (rows, length), padded with zeros, and scores."""
    batch = {"score": torch.stack([example["score"] for example in examples])}
    for name in ("one", "other"):
        length = max(len(example[name]) for example in examples)
        batch[f"{name}_ids"] = torch.tensor([example[name] + [0] * (length - len(example[name])) for example in examples])
    return batch


def test_a_unit_whose_gradient_is_nothing_but_rounding_is_accepted() -> None:
    """Two texts that are the same, with score 1: padding rounds otherwise, a thousand billion times below other gradients."""
    long, same = list(range(3, 60)), list(range(3, 22))
    data = [
        {"one": same, "other": same, "score": 1.0},
        {"one": long, "other": long[::-2], "score": 0.2},
        {"one": [7, 3, 8], "other": [6], "score": 0.5},
        {"one": [4, 4, 9, 50, 51], "other": [12, 13], "score": 0.9},
    ]
    for row in data:
        row["score"] = torch.tensor(row["score"])
    model = Similar()
    norms = [float(torch.autograd.grad(alike(model, pairs([row])), model.table.weight)[0].norm()) for row in data]
    assert norms[0] < 1e-4 * max(norms)
    assert checked(alike, data, model=model, collate=pairs).checked


def alike(model: Any, batch: dict[str, Tensor]) -> Any:
    return mse_loss(model(batch["one_ids"], batch["other_ids"]), batch["score"])


class RandomMean(nn.Module):
    """Rows become a little like the mean of their batch, with a probability."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability, self.scores = probability, Scores()

    def forward(self, x: Tensor) -> Any:
        if self.training and float(torch.rand(())) < self.probability:
            x = x + 0.1 * x.mean(0)
        return self.scores(x)


@SEEDS
@pytest.mark.parametrize("probability", [0.8, 0.4])
def test_mixing_at_random_is_refused(probability: float, seeds: range) -> None:
    """One round of the check misses it two times in ten, or six."""
    for seed in seeds:
        with pytest.raises(PrivacyError, match="training mode"):
            checked(of_classes, rows(seed), model=RandomMean(probability))


@pytest.mark.complete
def test_how_often_rare_mixing_is_found_is_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - (1 - p)^rounds, within four standard deviations of so many tries."""
    monkeypatch.setattr(preflight, "check_training_mode", lambda *args, **kwargs: None)
    monkeypatch.setattr(preflight, "_ROUNDS", 8)
    tries, found = 40, 0
    for seed in range(tries):
        try:
            checked(of_classes, rows(seed), model=RandomMean(0.1))
        except PrivacyError:
            found += 1
    rate = 1 - 0.9**8
    assert abs(found / tries - rate) < 4 * (rate * (1 - rate) / tries) ** 0.5


def test_data_without_any_label_are_refused(tmp_path: Path) -> None:
    data = [{**example, "labels": [-100] * len(example["input_ids"])} for example in texts()]
    dp = attached(trainer := trainer_for("gpt2", tmp_path, data))
    with pytest.raises(PrivacyError, match="has a label"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


def test_few_units_with_labels_are_enough(tmp_path: Path) -> None:
    data = [
        {**example, "labels": example["labels"] if row == 17 else [-100] * len(example["input_ids"])}
        for row, example in enumerate(texts())
    ]
    dp = attached(trainer := trainer_for("gpt2", tmp_path, data))
    trainer.train()
    assert dp.mechanism.account.steps == 2
