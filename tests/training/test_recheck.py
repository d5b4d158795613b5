"""The checks while training goes on: when they run, that they find what begins late, and that they disturb nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import default_collate

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.accelerate import PrivateLoop, make_private
from dp_flash_hf.training.recheck import Rechecks, RecheckSchedule
from tests.support.coupled_losses import Scores, marginal_entropy, of_scores, ranknet, rows, worst_rows
from tests.support.models import tiny
from tests.support.ranks import fresh, world
from tests.support.trainers import Pad, attached, config, trainer_for


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every step but the first two is checked, by both kinds of check; the steps, as they come."""
    steps: list[int] = []

    def due(self: RecheckSchedule, number: int, steps_left: int, seconds_a_step: float) -> bool:
        steps.append(number)
        return True

    monkeypatch.setattr(RecheckSchedule, "due", due)
    return steps


def simulated(cost: float, steps: int, seed: int) -> list[int]:
    """Steps of one second each before which a check ran."""
    schedule, found = RecheckSchedule(0.005, random.Random(seed)), []
    for number in range(1, steps + 1):
        if schedule.due(number, steps - number + 1, 1.0):
            schedule.paid(cost)
            found.append(number)
    return found


@pytest.mark.parametrize("cost", [0.01, 0.3, 1.0])
def test_checks_take_at_most_their_share_of_the_time_and_one_of_the_first_steps_is_checked(cost: float) -> None:
    steps = 1000
    for seed in range(20):
        found = simulated(cost, steps, seed)
        assert len(found) * cost <= 0.005 * steps + 1e-9
        assert any(number <= 4 for number in found)
        assert len(found) >= 0.4 * 0.005 * steps / cost
    assert simulated(cost, steps, 0) != simulated(cost, steps, 1)


def test_what_cannot_be_afforded_is_not_begun() -> None:
    assert simulated(0.3, steps=50, seed=0) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_checks_while_training_change_nothing(
    name: str, tmp_path: Path, always: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, random states and counts are those of a run without them, bit for bit, with dropout and random masks."""

    class Masking(Pad):
        def __call__(self, examples: Any) -> Any:
            batch = super().__call__(examples)
            hidden = (torch.rand(batch["input_ids"].shape) < 0.3) & (batch["attention_mask"] == 1)
            return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 2)}

    ends: list[Any] = []
    for share in ("checked", "unchecked"):
        with monkeypatch.context() as patch:
            if share == "unchecked":
                patch.setattr(Rechecks, "before_step", lambda self: None)
            torch.manual_seed(0)
            trainer = trainer_for(
                tiny(name, torch.float32),
                tmp_path,
                collator=Masking(),
                max_steps=5,
                learning_rate=0.1,
                gradient_accumulation_steps=2,
            )
            dp = attached(trainer, seed=3)
            trainer.train()
            assert dp.engine is not None
            state = [torch.get_rng_state(), random.getstate(), dp.engine.dropped_units]
            ends.append([*(p.detach().clone() for p in trainer.model.parameters()), *trainer.model.buffers(), *state])
    assert max(always) >= 5
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def loop(
    loss: Any,
    collate: Any = default_collate,
    steps: int = 6,
    model: torch.nn.Module | None = None,
    accelerator: Accelerator | None = None,
    **privacy: Any,
) -> Iterator[PrivateLoop]:
    """A loop of one's own, step by step."""
    model = Scores() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    private = make_private(
        model=model,
        optimizer=optimizer,
        train_dataset=rows(0, positives=0.5),
        collate_fn=collate,
        accelerator=accelerator or Accelerator(cpu=True),
        config=config(**privacy),
        expected_batch_size=8,
        steps=steps,
        loss_fn=loss,
    )
    for batch in private.loader:
        private.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        yield private


class Growing:
    """A term between units that is exactly zero until the weights have moved."""

    def __init__(self, term: Any) -> None:
        self.term = term
        self.first: Tensor | None = None

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Any:
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        self.first = weights.clone() if self.first is None else self.first
        moved = (weights - self.first).norm().clamp(max=1)
        honest = mse_loss(model(batch["x"])[1], batch["y"])
        return honest + moved * self.term(model, batch)


@pytest.mark.parametrize("term", [ranknet, worst_rows, marginal_entropy], ids=lambda term: term.__name__)
def test_a_term_that_grows_while_training_ends_it_before_the_next_release(term: Any, always: list[int]) -> None:
    """Nobody can see it before the first step: it is zero then."""
    steps = loop(Growing(term))
    taken = [next(steps).report().steps for _ in range(2)]
    with pytest.raises(PrivacyError, match=r"before step 3, of which nothing was released: .*unit"):
        next(steps)
    assert taken == [1, 2]


class Turning:
    """A collator that is honest until it is told otherwise."""

    def __init__(self) -> None:
        self.turned = False
        self.last: dict[str, Tensor] | None = None

    def mixed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def __call__(self, examples: Any) -> dict[str, Tensor]:
        batch = default_collate(examples)
        return self.mixed(batch) if self.turned else batch


class Hardest(Turning):
    """Every row becomes a little more like the one with the largest values."""

    def mixed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hardest = batch["x"].norm(dim=1).argmax()
        return {**batch, "x": batch["x"] + 0.1 * batch["x"][hardest]}


class Remembering(Turning):
    """The rows of a batch hold something of the last batch's."""

    def mixed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        before, self.last = self.last, batch
        return batch if before is None else {**batch, "x": batch["x"] + before["x"].mean(0)}


class Centred(Turning):
    """The mean of a batch is taken from its rows."""

    def mixed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "x": batch["x"] - batch["x"].mean(0)}


@pytest.mark.parametrize("collator", [Hardest, Remembering, Centred])
def test_a_collator_that_begins_to_mix_later_ends_training(collator: type[Turning], always: list[int]) -> None:
    collate = collator()
    steps = loop(of_scores, collate)
    taken = [next(steps).report().steps for _ in range(3)]
    collate.turned = True
    with pytest.raises(PrivacyError, match=r"while training, before step 4, .*collator m(ix|ak)es"):
        next(steps)
    assert taken == [1, 2, 3]


class NearlyUniform(Scores):
    """A term of the batch's mean probabilities is rounded away in bfloat16 as long as they are all alike."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(0.01)
        self.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(x.to(self.head.weight.dtype))


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_term_between_units_is_found_under_autocast() -> None:
    with pytest.raises((PrivacyError, UnsupportedError), match="unit"):
        next(loop(marginal_entropy, accelerator=Accelerator(cpu=True, mixed_precision="bf16")))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_a_term_that_bfloat16_hides_at_first_is_found_when_it_has_grown(how: str, always: list[int]) -> None:
    """Nothing shows before the first step, and training ends when it does."""
    model = NearlyUniform(torch.bfloat16 if how == "weights" else torch.float32)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if how == "autocast" else "no")
    steps = loop(marginal_entropy, steps=60, model=model, accelerator=accelerator, noise_multiplier=0.1)
    next(steps)
    with pytest.raises(PrivacyError, match=r"while training, .*of which nothing was released: .*unit"):
        list(steps)


def of_one_rank(steps: int, bad: int) -> tuple[str, int, bool]:
    """(error, steps counted, whether weights moved since the last release) where the collator of one rank begins to mix."""
    fresh()
    collate = Centred()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecheckSchedule, "due", lambda *args: True)
        model = Scores()
        private, before, error = None, None, ""
        try:
            for private in loop(of_scores, collate, model=model):
                before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
                collate.turned = Ranks().rank == bad and private.report().steps >= steps
        except PrivacyError as found:
            error = str(found)
    assert private is not None
    assert before is not None
    moved = not torch.equal(before, torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    return error, private.report().steps, moved


@pytest.mark.parametrize("bad", [0, pytest.param(1, marks=pytest.mark.complete)])
def test_what_one_rank_finds_ends_training_on_all(bad: int) -> None:
    """Nothing of that step is released on any of them."""
    found = world(2).run(of_one_rank, 2, bad)
    assert [(steps, moved) for _, steps, moved in found] == [(2, False)] * 2
    assert "collator m" in found[bad][0]
    assert all("before step 3, of which nothing was released" in error for error, _, _ in found)


def test_a_check_that_failed_ends_the_training_for_good(always: list[int]) -> None:
    private, steps = None, loop(Growing(ranknet))
    for private in steps:
        if private.report().steps == 2:
            break
    assert private is not None
    batch = next(iter(private.loader))
    for _ in range(2):
        with pytest.raises(PrivacyError, match="before step 3"):
            private.backward(batch)
    assert private.report().steps == 2
