"""Through the real `Trainer`: what couples units is refused before the first step, and would train without the checks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.layers import cost_model
from dp_flash_hf.training import preflight as preflight_module
from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.training.tried_units import choose_units, spread_units
from tests.support.models import tiny
from tests.support.oracle import apart, total_norm
from tests.support.trainers import Pad, attached, config, draws, texts, trainer_for, watch, without_dropout

# Factors 1 / labels, and the cross entropy of Transformers' causal models, are float32 even where the model is float64.
ROUNDING = 4 * float(torch.finfo(torch.float32).eps)
FLOAT64 = 1e-12


def coupling(model: Any, path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Strategy = "auto") -> float:
    """|sum(a and b) - sum(a) - sum(b)| / |sum(a and b)| for units of 3 and of 9 labels: 0 where neither sees the other."""
    data = texts(12)
    data[8], data[9] = (texts(1, shortest=n, longest=n, seed=n)[0] for n in (3, 9))
    seen = watch(monkeypatch)
    draws(monkeypatch, [8, 9], [8], [9])
    trainer = trainer_for(model, path, data, max_steps=3)
    DPCallback(config(max_grad_norm=100.0, target_delta=1e-2), strategy=strategy).attach(trainer)
    trainer.train()
    both, a, b = seen.sums
    return apart(both, {n: a[n] + b[n] for n in a}) / total_norm(both)


def model_mean(self: UnitLoss, batch: Any) -> Tensor:
    return self.model_loss(dict(batch), None)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_ragged_labels_do_not_couple_units(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3: no unit's gradient depends on how many labels others have (gpt2 sums and divides, bert takes a mean)."""
    assert coupling(name, tmp_path, monkeypatch) <= (FLOAT64 if name == "bert" else ROUNDING)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_would_fail_with_the_models_own_mean_and_preflight_sees_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UnitLoss, "__call__", model_mean)
    with pytest.raises(PrivacyError, match="couples units"):
        coupling(name, tmp_path, monkeypatch)
    monkeypatch.setattr(ClippingEngine, "check", lambda *args, **kwargs: None)
    for check in ("check_training_mode", "check_alone", "check_interaction"):
        monkeypatch.setattr(preflight_module, check, lambda *args, **kwargs: None)
    assert coupling(name, tmp_path, monkeypatch) > 0.1


def test_sees_it_where_long_units_are_computed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight's batch holds the longest text; shorter ones are computed in one pass."""
    monkeypatch.setattr(UnitLoss, "__call__", model_mean)
    monkeypatch.setattr(cost_model, "microbatch_is_faster", lambda *args: True)
    with pytest.raises(PrivacyError, match="couples units"):
        coupling("gpt2", tmp_path, monkeypatch)


class MeanOfRows(nn.Module):
    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return x + self.strength * x.mean(0, keepdim=True)


class AttentionAcrossRows(MeanOfRows):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)
        return x + self.strength * (torch.softmax(rows @ rows.T / rows.shape[1], 1) @ rows).view_as(x)


class BatchStatistics(MeanOfRows):
    """As batch normalisation: what the batch holds in training mode only, a constant otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.strength * x.mean((0, 1)) if self.training else x


class RunningStatistics(MeanOfRows):
    """Isolates units, but keeps a running mean of the data in the checkpoint."""

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.register_buffer("running_mean", torch.zeros(16, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.strength:
            self.get_buffer("running_mean").lerp_(x.detach().mean((0, 1)), self.strength)
        return x


class Contrastive(hf.Trainer):
    """InfoNCE between the rows of a batch."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = model.transformer(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        first, last = hidden[:, 0], hidden.mean(1)
        return nn.functional.cross_entropy(first @ last.T, torch.arange(len(first)))


def built_in(module: nn.Module) -> Any:
    model = without_dropout(tiny("gpt2"))
    model.transformer.drop = module
    return model


COUPLED = [MeanOfRows(0.01), MeanOfRows(0.0001), BatchStatistics(0.1), RunningStatistics(0.1)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("module", COUPLED, ids=lambda module: f"{type(module).__name__} {module.strength}")
def test_refuses_layers_that_couple_units(module: MeanOfRows, tmp_path: Path) -> None:
    """Promise 3: proved on the user's own model before any step; with the coupling off, the same model trains."""
    model = built_in(module)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trainer = trainer_for(model, tmp_path, learning_rate=1.0)
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match=r"unit|buffers"):
        trainer.train()
    assert dp.mechanism.account.steps == 0
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    strength, module.strength = module.strength, 0.0
    try:
        trainer.train()
    finally:
        module.strength = strength
    assert dp.mechanism.account.steps == 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("module", COUPLED, ids=lambda module: f"{type(module).__name__} {module.strength}")
def test_would_train_such_layers_without_preflight(module: MeanOfRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClippingEngine, "check", lambda *args, **kwargs: None)
    for check in ("check_training_mode", "check_alone", "check_interaction"):
        monkeypatch.setattr(preflight_module, check, lambda *args, **kwargs: None)
    trainer = trainer_for(built_in(module), tmp_path)
    dp = attached(trainer)
    if isinstance(module, RunningStatistics):  # whose buffers are watched as well
        with pytest.raises(PrivacyError, match="buffers or frozen parameters changed"):
            trainer.train()
    else:
        trainer.train()
        assert dp.mechanism.account.steps == 2


def test_attention_across_rows_is_refused_or_sees_one_unit_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rules find that a unit's rows are not its own, each unit is computed by itself, and then it is isolated."""
    with pytest.warns(UserWarning, match="computed by itself"):
        assert coupling(built_in(AttentionAcrossRows(0.1)), tmp_path, monkeypatch) <= ROUNDING
    with pytest.raises(PrivacyError, match="no rule covers"):
        coupling(built_in(AttentionAcrossRows(0.1)), tmp_path, monkeypatch, "bookkeeping")


def test_refuses_a_contrastive_loss(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, cls=Contrastive)
    dp = attached(trainer)
    with pytest.raises((PrivacyError, UnsupportedError), match="units"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


def test_refuses_a_collator_that_mixes_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were mixed before the model saw them hold two units each, which no check of the model can find."""

    def mixing(examples: Any) -> Any:
        batch = Pad()(examples)
        return {**batch, "labels": batch["labels"].flip(0)}

    trainer = trainer_for("gpt2", tmp_path, collator=mixing)
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match="collator mixes"):
        trainer.train()
    for check in ("check_collator", "check_alone"):
        monkeypatch.setattr(preflight_module, check, lambda *args, **kwargs: None)
    trainer.train()
    assert dp.mechanism.account.steps == 2


class Mixing(hf.Trainer):
    """Mixes on the device, after the collator."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        batch = super()._prepare_inputs(inputs)
        return {**batch, "labels": batch["labels"].flip(0)}


def test_refuses_inputs_that_are_mixed_after_the_collator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for("gpt2", tmp_path, cls=Mixing)
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match="mixes examples: 'labels'"):
        trainer.train()
    for check in ("check_collator", "check_alone"):
        monkeypatch.setattr(preflight_module, check, lambda *args, **kwargs: None)
    trainer.train()
    assert dp.mechanism.account.steps == 2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_refuses_padding_that_units_feel(name: str, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 counts positions from the padding, so on the left a unit's gradient follows the longest text of its batch."""

    def padded(examples: Any) -> Any:
        batch = Pad()(examples)
        if side == "right":
            return batch
        batch["labels"][:, 0] = -100  # else padding would predict it, where there is any
        shifts = (batch["attention_mask"] == 0).sum(1)
        return {key: torch.stack([row.roll(int(n)) for row, n in zip(x, shifts, strict=True)]) for key, x in batch.items()}

    coupled = side == "left" and name == "gpt2"
    trainer = trainer_for(name, tmp_path, collator=padded)
    dp = attached(trainer)
    if coupled:
        with pytest.raises(PrivacyError, match="depends on the others' lengths"):
            trainer.train()
        assert dp.mechanism.account.steps == 0
        monkeypatch.setattr(preflight_module, "check_alone", lambda *args, **kwargs: None)
    trainer.train()
    assert dp.mechanism.account.steps == 2


def test_looks_at_data_from_beginning_to_end() -> None:
    chance = random.Random()
    spread = spread_units(1000, chance)
    assert len(spread) == 64
    assert all(stretch * 1000 // 64 <= unit < (stretch + 1) * 1000 // 64 for stretch, unit in enumerate(spread))
    chosen = choose_units({unit: {"input_ids": [0] * 9} for unit in spread})
    assert len(set(chosen)) == 4
    assert max(chosen) - min(chosen) > 500
    assert choose_units({unit: {} for unit in spread_units(2, chance)}) == [0, 1]
    longest, shortest, *_ = choose_units({unit: {"input_ids": [0] * unit} for unit in spread})
    assert (longest, shortest) == (max(spread), min(spread))


def test_random_masking_is_no_mixing(tmp_path: Path) -> None:
    """The masks of a collator are random, and differ from call to call, but not by what the others hold."""

    def masking(examples: Any) -> Any:
        batch = Pad()(examples)
        hidden = (torch.rand(batch["input_ids"].shape) < 0.3) & (batch["attention_mask"] == 1)
        hidden[:, 0] = False
        return {
            **batch,
            "input_ids": batch["input_ids"].masked_fill(hidden, 2),
            "labels": batch["labels"].masked_fill(~hidden, -100),
        }

    trainer = trainer_for("bert", tmp_path, collator=masking)
    dp = attached(trainer)
    trainer.train()
    assert dp.mechanism.account.steps == 2
