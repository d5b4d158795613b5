"""A DPCallback handed over like any other callback attaches itself before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.trainer import DPCallback
from tests.integrations.test_trainer import C
from tests.support.attributes import attributes, differing
from tests.support.models import loss_of, tiny
from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import Pad, config, draws, texts, trainer_for, watch, without_dropout

ROUNDING = 4 * float(torch.finfo(torch.float32).eps)


def given(path: Path, *callbacks: Any, cls: type[hf.Trainer] = hf.Trainer, model: Any = None, **settings: Any) -> Any:
    """A trainer that is given its callbacks where it is made, as by a framework that does not hand it out."""
    made = trainer_for("gpt2", path, **settings)
    return cls(
        model=made.model if model is None else model,
        args=made.args,
        train_dataset=texts(),
        data_collator=Pad(),
        callbacks=list(callbacks),
    )


class Prepares(hf.Trainer):
    """Does something of its own before it trains."""

    prepared = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.prepared += 1
        return super().train(*args, **kwargs)


def test_a_callback_given_to_the_constructor_sees_the_units_gradients_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of a step against a loop over single units; the class's own beginning runs once."""
    drawn, model = [0, 3, 4, 9, 11, 17, 20], without_dropout(tiny("bert"))
    seen = watch(monkeypatch)
    draws(monkeypatch, drawn)
    dp = DPCallback(config(max_grad_norm=C))
    trainer = given(tmp_path, dp, cls=Prepares, model=model, max_steps=1)
    trainer.train()
    assert trainer.prepared == 1
    assert trainer.callback_handler.callbacks[0] is dp
    assert dp.report().steps == 1
    parts = [Pad()([texts()[row]]) for row in drawn]
    scale = [1 / int((part["labels"] != -100).sum()) for part in parts]
    wanted, norms = clipped_sum(unit_gradients(model.eval(), loss_of("bert", model), parts), C, scale=scale)
    assert norms.min() < C < norms.max()
    assert distance(seen.sums[0], wanted) <= ROUNDING
    with pytest.raises(PrivacyError, match="1 planned steps are spent"):
        trainer.train()


def test_one_added_later_saves_what_was_spent_and_resumes(tmp_path: Path) -> None:
    for stop, resume in ((1, False), (2, True)):
        trainer = trainer_for("gpt2", tmp_path, save_strategy="steps", save_steps=1)
        dp = DPCallback(config())
        trainer.add_callback(dp)

        class Stop(hf.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, last: int = stop, **kwargs: Any) -> None:
                control.should_training_stop = control.should_training_stop or state.global_step >= last

        trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        assert dp.report().steps == trainer.state.global_step == stop


def test_what_is_refused_is_refused_when_training_begins(tmp_path: Path) -> None:
    trainer = given(tmp_path, DPCallback(config()), dataloader_drop_last=True)
    before = attributes(trainer)
    with pytest.raises(UnsupportedError, match="dataloader_drop_last"):
        trainer.train()
    assert differing(before, attributes(trainer)) == set()


def test_two_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="another DPCallback"):
        given(tmp_path, DPCallback(config()), DPCallback(config())).train()


def test_detach_gives_back_a_trainer_that_was_made_with_it(tmp_path: Path) -> None:
    dp = DPCallback(config())
    trainer = given(tmp_path, hf.TrainerCallback(), dp)
    before = attributes(trainer)
    assert dp.attach(trainer) is dp
    dp.detach()
    assert differing(before, attributes(trainer)) == set()


def test_what_is_no_trainer_of_transformers_is_refused(tmp_path: Path) -> None:
    class Trainer:
        """As SetFit's, say."""

    with pytest.raises(UnsupportedError, match=r"test_attaching\.Trainer is no transformers\.Trainer.*make_private"):
        DPCallback(config()).attach(Trainer())  # type: ignore[arg-type]


def test_what_setfit_holds_of_transformers_is_refused(tmp_path: Path) -> None:
    """Its rows are pairs of texts: as a `Trainer` like any other it would train, and protect no text."""

    class Inner(hf.Trainer):
        pass

    class Outer:
        pass

    Inner.__module__, Outer.__module__ = "setfit.trainer", "setfit.span.trainer"

    class Derived(Inner):
        pass

    trainers: list[Any] = [given(tmp_path, cls=Inner), given(tmp_path, cls=Derived), Outer()]
    for trainer in trainers:
        with pytest.raises(UnsupportedError, match=r"pairs of texts.*AutoModelForSequenceClassification"):
            DPCallback(config()).attach(trainer)
    handed_on = given(tmp_path, DPCallback(config()), cls=Inner)
    with pytest.raises(UnsupportedError, match="head without noise"):
        handed_on.train()
