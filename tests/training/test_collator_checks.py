"""Collators that let one example reach the rows of others are refused; random masks and padding are not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from dp_flash_hf.errors import PrivacyError
from tests.support.examples import VOCABULARY
from tests.support.trainers import Pad, attached, texts, trainer_for


class CutToShortest(Pad):
    """All texts as long as the shortest of the batch."""

    def __call__(self, examples: Any) -> Any:
        shortest = min(len(example["input_ids"]) for example in examples)
        return {name: value[:, :shortest] for name, value in super().__call__(examples).items()}


class FilledFromOthers(Pad):
    """What would be padding is the text of the longest."""

    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        longest = batch["attention_mask"].sum(1).argmax()
        filled = torch.where(batch["attention_mask"] == 1, batch["input_ids"], batch["input_ids"][longest])
        return {**batch, "input_ids": filled}


class Remembering(Pad):
    """The first token of a batch is that of the batch before."""

    last: ClassVar = [3]

    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        first, self.last[0] = self.last[0], int(batch["input_ids"][0, 0])
        batch["input_ids"][:, 0] = first
        return batch


class HardFromThirdCall(Pad):
    """Hard examples are mined from the third batch on: the easiest row becomes the hardest."""

    calls = 0  # no field

    def __call__(self, examples: Any) -> Any:
        object.__setattr__(self, "calls", self.calls + 1)
        batch = super().__call__(examples)
        hard, easy = batch["input_ids"].sum(1).argmax(), batch["input_ids"].sum(1).argmin()
        for value in batch.values() if self.calls >= 3 else ():
            value[easy] = value[hard]
        return batch


class MixingAtRandom(Pad):
    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        return {**batch, "labels": batch["labels"].flip(0)} if random.random() < 0.4 else batch


class Counting(Pad):
    """Every batch holds the number of tokens seen so far, in its first token."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [0])

    def __call__(self, examples: Any) -> Any:
        batch: Any = super().__call__(examples)
        seen = vars(self)["seen"]
        seen[0] += int(batch["input_ids"].sum())
        batch["input_ids"][:, 0] = 3 + seen[0] % 7
        return batch


class FromKindsOfBatch(Pad):
    """The last token is drawn from the kinds of text in the batch: nearly always all, whatever text is exchanged."""

    def __call__(self, examples: Any) -> Any:
        batch = super().__call__(examples)
        kinds = {int(token) % 4 for example in examples for token in example["input_ids"][:3]}
        drawn = torch.tensor([sum(kinds) + random.randrange(VOCABULARY) for _ in examples])
        batch["input_ids"][:, -1] = drawn % VOCABULARY
        return batch


@pytest.mark.parametrize(
    "collator",
    [CutToShortest, FilledFromOthers, Remembering, HardFromThirdCall, MixingAtRandom, Counting, FromKindsOfBatch],
)
def test_rows_that_depend_on_other_examples_are_refused(collator: type[Pad], tmp_path: Path) -> None:
    dp = attached(trainer := trainer_for("gpt2", tmp_path, collator=collator()))
    with pytest.raises(PrivacyError, match=r"collator (mixes|makes)"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


class OwnNumbers(Pad):
    """Masks from a generator that the collator holds."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "generator", np.random.default_rng(0))

    def __call__(self, examples: Any) -> Any:
        batch: Any = super().__call__(examples)
        hidden = torch.from_numpy(vars(self)["generator"].random(tuple(batch["input_ids"].shape)) < 0.3)
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden & (batch["attention_mask"] == 1), 2)}


def test_random_numbers_of_its_own_are_no_memory(tmp_path: Path) -> None:
    dp = attached(trainer := trainer_for("gpt2", tmp_path, collator=OwnNumbers()))
    trainer.train()
    assert dp.mechanism.account.steps == 2


@pytest.mark.complete
def test_data_may_be_one_example_many_times(tmp_path: Path) -> None:
    """The very same object: which of two is exchanged cannot be told by what they are."""
    dp = attached(trainer := trainer_for("gpt2", tmp_path, [texts()[0]] * 12))
    trainer.train()
    assert dp.mechanism.account.steps == 2
