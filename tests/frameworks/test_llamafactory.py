"""LLaMA-Factory's trainers, beside versions of Transformers that its own requirements exclude."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import trl

from dp_flash_hf.errors import UnsupportedError
from tests.frameworks.tokenised import collator, model, table, tokenizer
from tests.support.frameworks import STEPS, TOLERANCE, difference, trained
from tests.support.trainers import SETTINGS

pytest.importorskip("llamafactory")

# What is imported beside the trainers and takes no part in them, so that they can be had beside versions that it excludes: its
# own switch, what reads sound (whose builds fit one version of torch each), and a model for PPO, which TRL has elsewhere now.
os.environ["DISABLE_VERSION_CHECK"] = "1"
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
trl.AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (), {})

from llamafactory.hparams import FinetuningArguments  # noqa: E402
from llamafactory.train.pt.trainer import CustomTrainer  # noqa: E402
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer  # noqa: E402

FRAMEWORK = "llamafactory"


def trainer(cls: type, path: Path, finetuning: dict[str, Any] | None = None, **settings: Any) -> Any:
    arguments = {**SETTINGS, "output_dir": str(path), "max_steps": len(STEPS), **settings}
    args = hf.Seq2SeqTrainingArguments(**arguments)
    args.fp8 = False  # type: ignore[attr-defined]  # a field of its own arguments, whose class needs versions that it pins
    return cls(
        model=model(),
        args=args,
        finetuning_args=FinetuningArguments(**(finetuning or {})),
        processor=None,
        tokenizer=tokenizer(),
        train_dataset=table(),
        data_collator=collator(),
    )


@pytest.mark.parametrize("cls", [CustomSeq2SeqTrainer, CustomTrainer], ids=["sft", "pt"])
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
def test_sums_are_those_of_single_texts(
    cls: type, shuffled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    found, dp = difference(lambda: trainer(cls, tmp_path, {"disable_shuffling": not shuffled}), monkeypatch)
    assert found < TOLERANCE
    assert dp.report().epsilon > 0
    row(f"{cls.__name__}{'' if shuffled else ', disable_shuffling'}", "exact", figure=found)


@pytest.mark.parametrize("loss", ["use_dft_loss", "use_eaft_loss", "use_asft_loss"])
def test_losses_that_replace_the_models_are_refused(loss: str, tmp_path: Path, row: Callable[..., None]) -> None:
    with pytest.raises(UnsupportedError, match="compute_loss_func") as refusal:
        trained(trainer(CustomSeq2SeqTrainer, tmp_path, {loss: True}))
    row(f"CustomSeq2SeqTrainer, {loss}", "refused", str(refusal.value).partition(" not possible with ")[2])


def test_a_callback_attaches_itself_as_in_the_guide(
    tmp_path: Path, run_guide: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run_exp` builds the trainer with the callbacks that it is given and trains it; that much of it is played here."""
    made = []

    def run_exp(args: dict[str, Any], callbacks: list[Any]) -> None:
        made.append(trainer(CustomSeq2SeqTrainer, tmp_path / "out", finetuning=None, learning_rate=1e-3))
        for callback in callbacks:
            made[0].add_callback(callback)
        made[0].train()

    module = types.ModuleType("llamafactory.train.tuner")
    module.run_exp = run_exp  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", module)
    names = run_guide("llamafactory")
    assert names["dp"].report().steps == len(STEPS)
    assert 0 < names["dp"].report().epsilon <= 8
