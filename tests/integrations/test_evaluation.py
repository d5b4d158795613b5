"""Results on training data choose nothing, and are logged as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers as hf

from dp_flash_hf.errors import UnsupportedError
from tests.support.trainers import attached, texts, trainer_for

DATA = texts()
STEPS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
CHOOSING: dict[str, dict[str, Any]] = {
    "the best model": {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1},
    "the best checkpoint": {"save_strategy": "best", "metric_for_best_model": "loss"},
    "learning rates": {"lr_scheduler_type": "reduce_lr_on_plateau"},
}


@pytest.mark.parametrize("how", CHOOSING)
@pytest.mark.parametrize("kind", ["list", "dict", "table"])
def test_rows_of_the_training_data_choose_nothing(how: str, kind: str, tmp_path: Path) -> None:
    taken: Any = [dict(row) for row in DATA[3:9]]
    evaluation = {
        "list": taken,
        "dict": {"apart": texts(5, seed=9), "mixed": taken},
        "table": datasets.Dataset.from_list(taken),
    }
    trainer = trainer_for("gpt2", tmp_path, DATA, evaluation=evaluation[kind], **STEPS, **CHOOSING[how])
    with pytest.raises(UnsupportedError, match=r"6 of 6 rows of eval_dataset.* are rows of train_dataset: .*hold data out"):
        attached(trainer)
    trainer.eval_dataset = texts(6, seed=9)
    attached(trainer)


def test_so_they_do_with_early_stopping_and_when_they_come_later(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, DATA, evaluation=texts(5, seed=9), max_steps=3, **STEPS)
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", False

    class Exchange(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.eval_dataset = DATA[:5] if state.global_step == 2 else trainer.eval_dataset

    trainer.add_callback(hf.EarlyStoppingCallback(early_stopping_patience=9))
    trainer.add_callback(Exchange())
    dp = attached(trainer)
    with pytest.raises(UnsupportedError, match="5 of 5 rows of eval_dataset"):
        trainer.train()
    assert dp.report().steps == 2


def test_results_on_training_data_are_named_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluation = {"taken": DATA[2:5], "apart": texts(5, seed=9)}
    trainer = trainer_for("gpt2", tmp_path, DATA, evaluation=evaluation, **STEPS)
    dp = attached(trainer)
    trainer.train()
    logged = {name for logs in trainer.state.log_history for name in logs}
    assert {"not_private/eval_taken_loss", "eval_apart_loss", "privacy/epsilon", "epoch"} <= logged
    assert not {"eval_taken_loss", "not_private/eval_apart_loss", "not_private/epoch"} & logged
    said = "3 of 3 rows of eval_dataset['taken'] that were read are rows of train_dataset: results on them hold no noise"
    assert caplog.text.count(said) == 1

    assert "eval_loss" in trainer.evaluate(DATA[:4])  # returned as always
    assert "not_private/eval_loss" in trainer.state.log_history[-1]
    assert "4 of 4 rows of eval_dataset" in caplog.text
    assert "eval_loss" in trainer.evaluate(texts(3, seed=7))
    assert "eval_loss" in trainer.state.log_history[-1]
    dp.detach()
    trainer.evaluate(DATA[:4])
    assert "eval_loss" in trainer.state.log_history[-1]
