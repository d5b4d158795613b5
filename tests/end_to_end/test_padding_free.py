"""Documents sampled as documents, computed in one flattened row: the values of padded batches, or no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from tests.integrations.test_trainer import FLATTENING, flattening, owners, sums_of
from tests.support.models import tiny
from tests.support.oracle import distance
from tests.support.trainers import attached, texts, trainer_for, without_dropout

ROUNDING = 4 * float(torch.finfo(torch.float32).eps)
DRAWN = [0, 3, 4, 9, 11, 17, 20]


def model_of(name: str, attention: str, dtype: torch.dtype = torch.float64) -> Any:
    model = without_dropout(tiny(name, dtype))
    model.set_attn_implementation(attention)
    return model


@pytest.mark.sampled(6)
@pytest.mark.parametrize("every_collator", [False, pytest.param(True, marks=pytest.mark.complete)], ids=["two", "every"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "phi3", "opt"])
def test_families_get_the_sums_of_padded_batches(
    name: str, every_collator: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = sums_of(model_of(name, "sdpa"), tmp_path, monkeypatch, DRAWN)
    counted = name in ("gpt2", "opt")  # they look positions up, and would number them through the row
    collators = FLATTENING[:3] if counted else FLATTENING
    for options in collators if every_collator else collators[-2:]:
        flat = sums_of(model_of(name, "dp_flash"), tmp_path, monkeypatch, DRAWN, collator=flattening(**options))
        assert distance(flat[0], padded[0]) <= 3 * ROUNDING  # another kernel of attention
    if counted:
        with pytest.raises(PrivacyError, match="let the collator return position_ids"):
            sums_of(model_of(name, "dp_flash"), tmp_path, monkeypatch, DRAWN, collator=flattening(**FLATTENING[3]))


@pytest.mark.complete
@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_device": 30}, {"per_device_train_batch_size": 2}], ids=str)
def test_texts_of_one_user_stay_one_unit(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stay apart as texts: a user alone has several, with boundaries between them."""
    users = {"data": owners(), "privacy_unit": "user", "max_examples_per_unit": 5, "per_device_train_batch_size": 3, **settings}
    padded = sums_of(model_of("llama", "sdpa"), tmp_path, monkeypatch, [0, 2, 3, 7, 8], **users)
    for options in FLATTENING[:2]:
        collator = flattening(**options)
        flat = sums_of(model_of("llama", "dp_flash"), tmp_path, monkeypatch, [0, 2, 3, 7, 8], collator=collator, **users)
        assert distance(flat[0], padded[0]) <= 3 * ROUNDING


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_ignores_boundaries_is_refused(
    attention: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT looks for them with a varlen attention only; without the check it would train, each text by itself."""
    trainer = trainer_for(model_of("opt", attention, dtype), tmp_path, collator=flattening())
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match=rf"see each other.*attention is '{attention}'.*attn_implementation='dp_flash'"):
        trainer.train()
    assert dp.mechanism.account.steps == 0
    monkeypatch.setattr("dp_flash_hf.training.preflight.check_packing", lambda *args, **kwargs: None)
    monkeypatch.setattr("dp_flash_hf.training.preflight.check_alone", lambda *args, **kwargs: None)
    with pytest.warns(UserWarning, match="computed by itself"):
        trainer.train()


def test_models_without_boundaries_are_refused(tmp_path: Path) -> None:
    """A state-space model reads on across them."""
    trainer = trainer_for("mamba", tmp_path, collator=flattening(return_seq_idx=True))
    attached(trainer)
    with pytest.raises(PrivacyError, match="see each other"):
        trainer.train()


def test_bfloat16_trains(tmp_path: Path) -> None:
    trainer = trainer_for(model_of("llama", "dp_flash", torch.bfloat16), tmp_path, collator=flattening())
    dp = attached(trainer)
    trainer.train()
    assert dp.mechanism.account.steps == 2


class Seeing(nn.Module):
    """In training mode only, every token sees a little of the whole row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * x.mean(1, keepdim=True) if self.training else x


def test_training_mode_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2", "dp_flash")
    model.transformer.drop = Seeing()
    trainer = trainer_for(model, tmp_path, collator=flattening())
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match="in training mode a unit's gradient norm changes"):
        trainer.train()
    assert dp.mechanism.account.steps == 0
    for check in ("check_training_mode", "check_interaction"):
        monkeypatch.setattr(f"dp_flash_hf.training.preflight.{check}", lambda *args, **kwargs: None)
    trainer.train()
    assert dp.mechanism.account.steps == 2


def test_dropout_is_no_company(tmp_path: Path) -> None:
    model = tiny("gpt2", torch.float32)
    model.set_attn_implementation("dp_flash")
    trainer = trainer_for(model, tmp_path, collator=flattening())
    dp = attached(trainer)
    trainer.train()
    assert dp.mechanism.account.steps == 2


def test_a_label_across_a_boundary_is_refused(tmp_path: Path) -> None:
    """The first token of a text, predicted from the text before."""
    trainer = trainer_for(model_of("llama", "dp_flash"), tmp_path, collator=flattening(separator_id=5))
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match="see each other"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


class Absolute:
    """Flattens, and numbers positions through the whole row."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch: dict[str, Any] = flattening(return_flash_attn_kwargs=True)(examples)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).unsqueeze(0)}


def test_positions_that_follow_the_others_lengths_are_refused(tmp_path: Path) -> None:
    """Each text has the loss it has as a part of the row, but not the one it has by itself."""
    trainer = trainer_for(model_of("gpt2", "dp_flash"), tmp_path, texts(24, longest=6), collator=Absolute())
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match="flattened with others"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


def test_rows_packed_beforehand_are_refused(tmp_path: Path) -> None:
    packed = [{**example, "seq_lengths": [2, len(example["input_ids"]) - 2]} for example in texts()]
    trainer = trainer_for("llama", tmp_path, packed)
    with pytest.raises(UnsupportedError, match=r"packed rows.*padding_free=True.*DataCollatorWithFlattening"):
        attached(trainer)
    assert "train" not in vars(trainer)


def test_collators_that_change_other_texts_are_refused(tmp_path: Path) -> None:
    def shuffled(examples: Any) -> dict[str, Any]:
        batch: dict[str, Any] = flattening()(examples)
        ids = batch["input_ids"]
        return {**batch, "input_ids": ids.where(ids != ids[0, -1], ids[0, 0])}

    trainer = trainer_for(model_of("llama", "dp_flash"), tmp_path, collator=shuffled)
    attached(trainer)
    with pytest.raises(PrivacyError, match="the collator mixes examples: 'input_ids'"):
        trainer.train()


def test_one_document_moves_the_sum_by_at_most_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added or removed, whatever stands beside it; and it does move it by that much when nothing clips."""

    def moved(bound: float) -> list[float]:
        steps = ([1, 2, 5, 7], [1, 2, 3, 5, 7], [1, 2, 5, 7, 20])
        first, *others = sums_of(
            model_of("llama", "dp_flash"), tmp_path, monkeypatch, *map(list, steps), collator=flattening(), bound=bound
        )
        return [sum(float((sums[n] - first[n]).square().sum()) for n in first) ** 0.5 for sums in others]

    assert moved(0.5) == [pytest.approx(0.5)] * 2
    assert min(moved(1e6)) > 1.0


def test_the_engine_agrees_with_texts_one_by_one(tmp_path: Path) -> None:
    """norms of a flattened batch against those of single ordinary rows, without any of the trainer."""
    model = model_of("llama", "dp_flash")
    engine = ClippingEngine(model, max_grad_norm=1.0)
    batch = flattening(return_flash_attn_kwargs=True)(texts(5))
    engine.backward(lambda b: model(**b, num_items_in_batch=1).loss, batch, batch["cu_seq_lens_q"])
    flat = engine.norms
    model.zero_grad()
    for norm, example in zip(flat.tolist(), texts(5), strict=True):
        row = {name: torch.tensor([example[name]]) for name in ("input_ids", "labels")}
        engine.backward(lambda b: model(**b, num_items_in_batch=1).loss, row)
        model.zero_grad()
        assert norm == pytest.approx(float(engine.norms[0]), rel=1e-6)
    assert isinstance(model, hf.LlamaForCausalLM)


def test_texts_that_count_from_somewhere_else_are_refused_with_what_helps(tmp_path: Path) -> None:
    """RoBERTa numbers tokens from pad_token_id + 1, and a flattening collator from 0 unless it is told."""
    trainer = trainer_for(model_of("roberta", "dp_flash"), tmp_path, collator=flattening())
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match=r"pad_token_id \+ 1: DataCollatorWithFlattening\(position_ids_start=2\)"):
        trainer.train()
    assert dp.mechanism.account.steps == 0
    trainer = trainer_for(model_of("roberta", "dp_flash"), tmp_path, collator=flattening(position_ids_start=2))
    dp = attached(trainer)
    trainer.train()
    assert dp.mechanism.account.steps == 2
