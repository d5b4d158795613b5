"""`with private(config):` every trainer that is built or trained inside is private, or raises."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.private import private
from dp_flash_hf.integrations.trainer import DPCallback
from tests.integrations.test_attaching import given
from tests.support.attributes import attributes, differing
from tests.support.trainers import config, trainer_for


def methods() -> dict[str, Any]:
    return dict(vars(hf.Trainer))


def test_a_trainer_built_and_trained_inside_is_private_and_reported(tmp_path: Path) -> None:
    before = methods()
    with private(config(), max_tokens_per_device=20) as run:
        trainer = trainer_for("gpt2", tmp_path, max_steps=1)
        trainer.train()
    assert methods() == before
    (dp,) = run.callbacks
    assert dp.max_tokens_per_device == 20
    assert trainer.callback_handler.callbacks[0] is dp
    assert [report.steps for report in run.reports()] == [1]
    assert "privacy/epsilon" in trainer.state.log_history[0]
    with pytest.raises(PrivacyError, match="planned steps are spent"):  # it stays private
        trainer.train()


def test_one_built_inside_and_trained_outside_is_private(tmp_path: Path) -> None:
    with private(config()) as run:
        trainer = trainer_for("gpt2", tmp_path, max_steps=1)
    assert run.reports() == []
    trainer.train()
    assert [report.steps for report in run.reports()] == [1]


def test_one_built_outside_is_private_inside_and_as_it_was_afterwards(tmp_path: Path) -> None:
    trainer, untouched = (trainer_for("gpt2", tmp_path / name, max_steps=1) for name in "ab")
    before = attributes(untouched)
    with private(config()) as run:
        trainer.train()
        with pytest.raises(UnsupportedError, match="dataloader_drop_last"):
            trainer_for("gpt2", tmp_path / "c", dataloader_drop_last=True).train()
    assert run.reports()[0].steps == 1
    assert not any(isinstance(callback, DPCallback) for callback in trainer.callback_handler.callbacks)
    assert "train" not in vars(trainer)
    assert differing(before, attributes(untouched)) == set()


def test_a_callback_of_its_own_is_kept(tmp_path: Path) -> None:
    own = DPCallback(config(noise_multiplier=2.0))
    with private(config()) as run:
        given(tmp_path, own, max_steps=1).train()
    assert own in run.callbacks
    assert [report.noise_multiplier for report in run.reports()] == [2.0]


def test_an_error_inside_leaves_nothing_behind(tmp_path: Path) -> None:
    before = methods()
    with pytest.raises(ZeroDivisionError), private(config()):
        _ = 1 / 0
    with pytest.raises(ValueError, match="config: expected a PrivacyConfig"), private({}):  # type: ignore[arg-type]
        pass
    assert methods() == before
    with private(config()):
        trainer_for("gpt2", tmp_path)


def test_nesting_and_threads_are_refused(tmp_path: Path) -> None:
    refused: list[bool] = []

    def enter() -> None:
        with pytest.raises(UnsupportedError, match=r"private\(\.\.\.\) inside another private"), private(config()):
            pass
        refused.append(True)

    with private(config()):
        trainer_for("gpt2", tmp_path)
        enter()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert refused == [True, True]


def test_a_training_of_another_thread_is_private_too(tmp_path: Path) -> None:
    with private(config()) as run:
        thread = threading.Thread(target=lambda: trainer_for("gpt2", tmp_path, max_steps=1).train())
        thread.start()
        thread.join()
    assert [report.steps for report in run.reports()] == [1]


def test_a_loop_that_is_no_trainers_is_not_taken_for_a_private_one() -> None:
    with pytest.raises(PrivacyError, match=r"no transformers\.Trainer was built or trained.*make_private"), private(config()):
        torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
