"""Dropout, masking and augmentation draw secret numbers, fresh for every step, and no state of them is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.mechanisms.fresh_randomness import fresh_randomness
from dp_flash_hf.training.batches import FreshCollator, UnitCollator, WithUnits
from tests.support.engines import STRATEGIES
from tests.support.loops import loop, run
from tests.support.models import VOCABULARY, tiny
from tests.support.oracle import distance
from tests.support.ranks import fresh, world
from tests.support.trainers import Example, Pad, attached, config, draws, texts, trainer_for, watch, without_dropout

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

Draw = Callable[[], float]
DRAWS: dict[str, Draw] = {"torch": lambda: float(torch.rand(())), "numpy": np.random.random, "python": random.random}


class Masks(Pad):
    """Replaces a word of every text, by numbers of one kind of generator."""

    def __init__(self, kind: str = "torch") -> None:
        super().__init__()
        own = {"own torch": torch.Generator().manual_seed(0), "own numpy": np.random.default_rng(0)}
        object.__setattr__(self, "own", own.get(kind))
        object.__setattr__(self, "kind", kind)

    def __call__(self, examples: Sequence[Example]) -> Any:
        own: Any = vars(self)["own"]
        batch = super().__call__(examples)
        for row in batch["input_ids"]:
            if isinstance(own, torch.Generator):
                number = float(torch.rand((), generator=own))
            else:
                number = DRAWS[vars(self)["kind"]]() if own is None else own.random()
            row[0] = 3 + int(number * (VOCABULARY - 3))
        return batch


def masked_words(seed: int | None) -> hf.DataCollatorForLanguageModeling:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(word): word for word in range(VOCABULARY)}, unk_token="0"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, mask_token="1", pad_token="0")  # type: ignore[no-untyped-call]
    return hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=seed)


class Augmented(torch.utils.data.Dataset[Example]):
    """Changes a word of a text whenever it is read, by all kinds of generators."""

    def __init__(self, rows: int) -> None:
        self.rows, self.own = texts(rows), np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Example:
        number = sum(draw() for draw in DRAWS.values()) + float(self.own.random())
        ids = self.rows[row]["input_ids"]
        return {"input_ids": [3 + int(number * 5) % (VOCABULARY - 3), *ids[1:]], "labels": ids}


class Jitter(nn.Module):
    """Scales every row by its own number, drawn as one says, in training."""

    def __init__(self, draw: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.draw(len(x)).to(x).view(-1, 1, 1)) if self.training else x


JITTERS: dict[str, Callable[[int], Tensor]] = {
    "numpy": lambda rows: torch.from_numpy(np.random.random(rows)),
    "python": lambda rows: torch.tensor([random.random() for _ in range(rows)]),
}


def with_dropout(jitter: str | None = None) -> Any:
    """A model with dropout, and numbers of another generator as well."""
    model = tiny("gpt2")
    if jitter is not None:
        without_dropout(model)
        model.transformer.drop = Jitter(JITTERS[jitter])
    return model.train()


def states(path: Path, data: Any, collator: Any, model: Any, **settings: Any) -> list[Any]:
    """What the checkpoints of two steps hold of generators."""
    trainer = trainer_for(model, path, data, collator=collator, save_strategy="steps", save_steps=1, **settings)
    attached(trainer)
    trainer.train()
    found = []
    for step in (1, 2):
        name = "rng_state.pth" if Ranks().size == 1 else f"rng_state_{Ranks().rank}.pth"
        saved = torch.load(path / f"checkpoint-{step}" / name, weights_only=False)
        found.append(
            repr((saved["cpu"].tolist(), saved["python"], [*map(str, saved["numpy"][1].tolist()), saved["numpy"][2:]]))
        )
    return found


@pytest.mark.sampled(9)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("collate", "dataset", "jitter"),
    [
        (lambda: Masks("torch"), texts, None),
        (lambda: Masks("own numpy"), texts, "python"),
        (lambda: masked_words(3), lambda n: [{"input_ids": text["input_ids"]} for text in texts(n)], None),
        (Pad, Augmented, "numpy"),
    ],
)
def test_saved_states_of_generators_are_those_of_a_neighbouring_dataset(
    collate: Callable[[], Any], dataset: Callable[[int], Any], jitter: str | None, workers: int, tmp_path: Path
) -> None:
    """The files depend on the public seed alone: not on how many units were drawn, nor on whose."""
    settings = {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
    found = [states(tmp_path / str(n), dataset(n), collate(), with_dropout(jitter), **settings) for n in (24, 25)]
    assert found[0] == found[1]


@pytest.mark.sampled(4)
def states_of_this_rank(path: str, rows: int) -> list[Any]:
    fresh()
    return states(
        Path(path), Augmented(rows), Masks("torch"), with_dropout("numpy"), gradient_accumulation_steps=2, ddp_backend="gloo"
    )


@pytest.mark.complete
def test_so_they_are_of_every_rank(tmp_path: Path) -> None:
    found = [world(2).run(states_of_this_rank, str(tmp_path / str(rows)), rows) for rows in (24, 25)]
    assert found[0] == found[1]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("jitter", [None, *JITTERS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_cannot_be_foreseen_and_generators_stay_as_they_were(
    strategy: Strategy, jitter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same public seed the same draw has another sum each time; `PrivacyConfig.seed`, of tests, repeats it."""
    seen = watch(monkeypatch)
    draws(monkeypatch, *[[0, 2, 5, 7]] * 4)
    for privacy in (config(), config(), config(seed=1), config(seed=1)):
        model = with_dropout(jitter)
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        private, _, optimizer = loop(model, strategy=strategy, privacy=privacy, steps=1, max_rows_per_device=2)
        run(private, optimizer)
        found = [draw() for draw in DRAWS.values()]
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        torch.empty((), dtype=torch.int64).random_()  # the loader's, for its workers, whatever is drawn
        assert found == [draw() for draw in DRAWS.values()]
    assert distance(seen.sums[0], seen.sums[1]) > 1e-3
    assert distance(seen.sums[2], seen.sums[3]) == 0.0


def test_the_parts_of_a_step_draw_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the seed of tests too: one text in two parts, or in two steps, has two masks."""
    data = [text if row % 4 else texts()[0] for row, text in enumerate(texts())]
    found: list[float] = []

    class Watched(hf.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss: Any = super().compute_loss(*args, **kwargs)
            if torch.is_grad_enabled():
                found.append(float(loss.detach()))
            return loss

    draws(monkeypatch, [0, 4], [8, 12])
    trainer = trainer_for(
        with_dropout(),
        tmp_path,
        data,
        cls=Watched,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    attached(trainer, seed=1)
    trainer.train()
    assert len(set(found[-4:])) == 4


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_strategies_agree_under_dropout_in_a_training(gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes repeat the first one's masks, also where layers are computed again in the backward pass."""
    seen = watch(monkeypatch)
    draws(monkeypatch, *[[0, 2, 5, 7]] * 2)
    for strategy in ("bookkeeping", "two_pass"):
        model = with_dropout()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        private, _, optimizer = loop(model, strategy=strategy, privacy=config(seed=1), steps=1, max_rows_per_device=4)
        run(private, optimizer)
    assert distance(*seen.sums) < 1e-9


KINDS = ["torch", "numpy", "python", "own torch", "own numpy", "masked words", "masked words, seeded"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_collator_draws_cannot_be_foreseen(kind: str, workers: int) -> None:
    """From the same public seed, with workers too: two runs collate the same rows to other batches."""
    collate = masked_words(3 if "seeded" in kind else None) if "masked" in kind else Masks(kind)
    data = [{"input_ids": text["input_ids"]} for text in texts()] if "masked" in kind else texts()
    batches = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        loader = torch.utils.data.DataLoader(
            WithUnits(data),
            batch_sampler=[[(row, row) for row in range(24)]] * 2,
            collate_fn=FreshCollator(UnitCollator(collate)),
            num_workers=workers,
        )
        batches += [batch["input_ids"] for batch in loader]
    assert not any(torch.equal(one, other) for at, one in enumerate(batches) for other in batches[:at])


def test_others_are_masked_alike_with_and_without_a_row() -> None:
    """What the guarantee rests on: the law of their masks is the same, though a row before them draws numbers, too."""
    data = [{"input_ids": [5] * 8} for _ in range(3)]
    collate = FreshCollator(UnitCollator(masked_words(3)))
    times = 600
    with_it = torch.stack([collate([(data[0], 0), (data[1], 1), (data[2], 2)])["labels"][1:] for _ in range(times)]) != -100
    without = torch.stack([collate([(data[1], 0), (data[2], 1)])["labels"] for _ in range(times)]) != -100
    deviation = (0.3 * 0.7 * 2 / times) ** 0.5
    assert float((with_it.double().mean(0) - without.double().mean(0)).abs().max()) < 5 * deviation
    for masks in (with_it, without):  # and independent of each other
        both = masks.flatten(1)[:, :8].double().T @ masks.flatten(1)[:, 8:].double() / times
        assert float((both - 0.09).abs().max()) < 5 * (0.09 * 0.91 / times) ** 0.5


def test_a_collator_that_makes_generators_anew_is_refused() -> None:
    class Repeats(Pad):
        def __call__(self, examples: Sequence[Example]) -> Any:
            object.__setattr__(self, "own", torch.Generator().manual_seed(0))
            return super().__call__(examples)

    with pytest.raises(UnsupportedError, match="new random generator for every batch"):
        FreshCollator(UnitCollator(Repeats()))([(texts()[0], 0)])


def numbers_of_this_rank() -> tuple[list[float], bool]:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state()
    with fresh_randomness():
        numbers = [draw() for draw in DRAWS.values()]
    return numbers, torch.equal(before, torch.get_rng_state())


def test_ranks_draw_numbers_of_their_own() -> None:
    (first, kept), (second, also_kept) = world(2).run(numbers_of_this_rank)
    assert kept
    assert also_kept
    assert set(first).isdisjoint(second)
