"""axolotl's trainer of causal language models, and the plugin that makes it private."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.trainer import DPCallback
from tests.frameworks.tokenised import collator, model, table, tokenizer
from tests.support import pages
from tests.support.frameworks import STEPS, TOLERANCE, difference, trained
from tests.support.trainers import SETTINGS

pytest.importorskip("axolotl")

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args_base import AxolotlTrainingMixins
from axolotl.integrations.base import PluginManager
from axolotl.utils.collators.batching import V2BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.dict import DictDefault

FRAMEWORK = "axolotl"
PLUGIN = "dp_flash_hf.integrations.axolotl.DPPlugin"


@dataclass
class Arguments(AxolotlTrainingMixins, hf.TrainingArguments):  # type: ignore[misc]
    """Made as axolotl's own are, whose module also imports what newer versions of TRL have elsewhere."""


def trainer(path: Path, cls: type = AxolotlTrainer, collate: Any = None, **settings: Any) -> Any:
    arguments = {**SETTINGS, "output_dir": str(path), "max_steps": len(STEPS), "dataloader_drop_last": False, **settings}
    return cls(model=model(), args=Arguments(**arguments), train_dataset=table(), data_collator=collate or collator())


@pytest.fixture
def plugins() -> Any:
    """Those of a new process."""
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    yield manager
    manager.plugins.clear()


def test_sums_are_those_of_single_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]) -> None:
    found, dp = difference(lambda: trainer(tmp_path), monkeypatch)
    assert found < TOLERANCE
    assert dp.report().epsilon > 0
    row("AxolotlTrainer", "exact", figure=found)


def packing(path: Path, **others: Any) -> Any:
    return trainer(path, sample_packing=True, max_seq_length=16, dataset_num_proc=1, **others)


def test_packing_is_given_up_with_its_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]
) -> None:
    found, _ = difference(lambda: packing(tmp_path), monkeypatch)
    assert found < TOLERANCE
    row("AxolotlTrainer, sample_packing with a collator that pads", "exact", "its sampler is given up", figure=found)


def test_a_collator_that_packs_is_refused(tmp_path: Path, row: Callable[..., None]) -> None:
    with pytest.raises((UnsupportedError, PrivacyError)) as refusal:
        trained(packing(tmp_path, collate=V2BatchSamplerDataCollatorForSeq2Seq(tokenizer())))
    row("AxolotlTrainer, sample_packing with its own collator", "refused", str(refusal.value).partition(";")[0])


class OfTheBatch(AxolotlTrainer):  # type: ignore[misc]
    """Divides by what the batch holds."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return (logits / logits.std(0, unbiased=False).clamp(min=1e-3).mean()).square().mean()


def test_a_loss_that_normalises_over_the_batch_is_refused(tmp_path: Path, row: Callable[..., None]) -> None:
    with pytest.raises((UnsupportedError, RuntimeError)) as refusal:
        trained(trainer(tmp_path, OfTheBatch))
    row(
        "AxolotlTrainer, a loss that normalises over the batch",
        "refused",
        str(refusal.value).partition(", so units would share")[0],
    )


def settings_of_the_guide() -> Any:
    (block,) = pages.blocks("docs/guides/frameworks/axolotl.md", "yaml")
    return DictDefault(yaml.safe_load(block.text))


def test_the_plugin_of_the_guide_trains_privately(tmp_path: Path, plugins: Any, caplog: pytest.LogCaptureFixture) -> None:
    cfg = settings_of_the_guide()
    for name in cfg.plugins:
        plugins.register(name)
    plugins.plugins[PLUGIN].register(cfg)
    made = trainer(tmp_path)
    plugins.post_trainer_create(cfg, made)
    made.train()
    (dp,) = (found for found in made.callback_handler.callbacks if isinstance(found, DPCallback))
    assert dp.config.target_epsilon == cfg.privacy.target_epsilon
    assert 0 < dp.report().epsilon <= cfg.privacy.target_epsilon
    assert dp.report().steps == len(STEPS)
    with caplog.at_level("WARNING"):
        plugins.post_train(cfg, made.model)
    assert "private training has ended" in caplog.text


@pytest.mark.parametrize("privacy", [None, {}, {"epsilon": 8.0}, {"target_epsilon": "8"}, 8.0])
def test_a_plugin_without_settings_says_what_to_write(privacy: Any, plugins: Any) -> None:
    plugins.register(PLUGIN)
    with pytest.raises(ValueError, match=r"privacy|epsilon"):
        plugins.plugins[PLUGIN].register(DictDefault({"plugins": [PLUGIN], "privacy": privacy}))
