"""Which units are tried, and that every kind of label is changed: also where in a text its answer is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.training.tried_units import known_values, relabelled
from dp_flash_hf.units import Units
from tests.support.models import VOCABULARY
from tests.support.trainers import Example, attached, texts, trainer_for, without_dropout

LONGEST = 9  # of `texts`
ANSWERS = ("start_positions", "end_positions")


def answered(examples: list[Example]) -> Any:
    """A batch of questions, with the places of their answers.

    All padded to one length: the model looks for answers in padding, too, so its loss depends on how much there is.
    """
    length = LONGEST
    ids = torch.tensor([example["input_ids"] + [0] * (length - len(example["input_ids"])) for example in examples])
    places = {name: torch.tensor([example[name] for example in examples]) for name in ANSWERS}
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **places}


def questions(n: int = 24) -> list[Example]:
    """All of which are answered by the second token: their labels are alike."""
    return [{"input_ids": text["input_ids"], **dict.fromkeys(ANSWERS, 1)} for text in texts(n)]


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_moved_and_stay_inside_every_text(seed: int) -> None:
    data = questions(4)
    batch = answered(data)
    shortest = min(len(example["input_ids"]) for example in data)
    made = relabelled(batch, Units.rows(4), known_values(data), None, random.Random(seed))
    assert len(made) == 3
    for name in ANSWERS:
        found = torch.stack([other[name] for other in made])
        assert found.dtype == torch.int64
        assert bool(((found >= 0) & (found < shortest)).all())
        assert all(len(places.unique()) == 2 for places in found)  # in each of them, units differ
    for other in made:
        assert all(torch.equal(other[name], batch[name]) for name in ("input_ids", "attention_mask"))


class Comparing(hf.Trainer):
    """Beside the model's loss, scores of texts whose answers come later are to be above the others'."""

    name = "start_positions"
    strength = 1.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        out = model(**inputs)
        later = inputs[self.name].unsqueeze(1) > inputs[self.name].unsqueeze(0)
        scores: Tensor = out.start_logits[:, 0]
        apart = (scores.unsqueeze(1) - scores.unsqueeze(0))[later]
        return out.loss + self.strength * torch.nn.functional.softplus(-apart).sum()


class ComparingEnds(Comparing):
    name = "end_positions"


class Honest(Comparing):
    strength = 0.0


def reader() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return without_dropout(hf.BertForQuestionAnswering(hf.BertConfig(vocab_size=VOCABULARY, **sizes)).double())


@pytest.mark.parametrize("cls", [Comparing, ComparingEnds])
def test_texts_that_are_compared_where_their_answers_differ_are_refused_though_none_of_the_data_do(
    cls: type[Comparing], tmp_path: Path
) -> None:
    dp = attached(trainer := trainer_for(reader(), tmp_path, questions(), cls=cls, collator=answered))
    with pytest.raises(PrivacyError, match="unit"):
        trainer.train()
    assert dp.report().steps == 0


def test_honest_answers_train(tmp_path: Path) -> None:
    dp = attached(trainer := trainer_for(reader(), tmp_path, questions(), cls=Honest, collator=answered))
    trainer.train()
    assert dp.report().steps == 2
