"""LoRA and its relatives from PEFT, through the real `Trainer`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.support.models import loss_of, tiny
from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import Pad, attached, draws, texts, trainer_for, watch, without_dropout

ROUNDING = 4 * float(torch.finfo(torch.float32).eps)  # of factors 1 / labels and of causal models' losses, both float32
DRAWN = [0, 3, 4, 9, 11]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
FAST = ("lora", "rslora", "all-linear", "modules_to_save", "saved embedding", "bias")


def adapted(variant: dict[str, Any], *, dropout: float = 0.0, kind: str = "llama") -> Any:
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": dropout, **variant}
    model = peft.get_peft_model(without_dropout(tiny(kind)), peft.LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "lora_B" in name or "lora_embedding_A" in name
            ):  # zero at first, which leaves the other factor without a gradient
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.double()


def base_weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_get_their_units_clipped_sum(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast where every trained parameter has a rule; else unit by unit, which says so. Exact in any case."""
    seen = watch(monkeypatch)
    draws(monkeypatch, DRAWN)
    model, data = adapted(VARIANTS[variant]), texts()
    loss = loss_of("llama", model)

    def mean(batch: dict[str, Tensor]) -> Tensor:
        return loss(batch) / (batch["labels"][:, 1:] != -100).sum()

    singles = unit_gradients(model.eval(), mean, [Pad()([data[row]]) for row in DRAWN])
    bound = float(clipped_sum(singles, 1.0)[1].median())
    wanted, _ = clipped_sum(singles, bound)
    trainer = trainer_for(model, tmp_path, data, max_steps=1)
    dp = attached(trainer, max_grad_norm=bound)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert distance(seen.sums[0], wanted) <= ROUNDING
    assert dp.engine is not None
    assert set(dp.engine.parameters.values()) == {name for name, p in model.named_parameters() if p.requires_grad}
    alone = [str(warning.message) for warning in caught if "computed by itself" in str(warning.message)]
    assert (set(dp.engine.norm_methods().values()) == {"microbatch"}) == bool(alone)
    if variant in FAST:
        assert not alone


def test_only_the_adapter_is_trained_and_saved_as_ever(tmp_path: Path) -> None:
    model = adapted({}, dropout=0.1)
    base = base_weights(model)
    trainer = trainer_for(
        model, tmp_path, max_steps=3, learning_rate=0.1, optim="adamw_torch", save_strategy="steps", save_steps=3
    )
    dp = attached(trainer)
    trainer.train()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    in_optimizer = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert dp.engine is not None
    assert in_optimizer == set(dp.engine.parameters)
    assert all("lora_" in name for name in dp.engine.parameters.values())
    batch = {k: v for k, v in Pad()(texts()).items() if k != "labels"}
    logits = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    for saved in (tmp_path / "adapter", tmp_path / "checkpoint-3"):
        files = {file.name for file in saved.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert "model.safetensors" not in files
        again = peft.PeftModel.from_pretrained(without_dropout(tiny("llama")), saved).double().eval()
        # Adapters are saved in the precision they are trained in.
        torch.testing.assert_close(again(**batch).logits, logits, rtol=1e-6, atol=1e-6)


def test_an_adapter_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    for resume in (None, str(tmp_path / "checkpoint-1")):
        trainer = trainer_for(adapted({}), tmp_path, save_strategy="steps", save_steps=1)
        dp = attached(trainer)
        trainer.train(resume_from_checkpoint=resume)
    assert dp.report().steps == 3  # one of them after the checkpoint, and lost
    assert dp.report().lost_steps == 1


def test_dropout_in_the_adapter_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensitivity holds with dropout, and the two factors of an adapter see the same mask: LoRA of rank r keeps its rank."""
    seen = watch(monkeypatch)
    draws(monkeypatch, [5], [5], DRAWN)
    trainer = trainer_for(adapted({"target_modules": ["v_proj"]}, dropout=0.5), tmp_path, max_steps=3)
    attached(trainer, max_grad_norm=0.5)
    trainer.train()
    assert distance(seen.sums[0], seen.sums[1]) > 0.01  # the masks differ from step to step
    total = [sum(float(value.square().sum()) for value in sums.values()) ** 0.5 for sums in seen.sums]
    assert all(norm <= 0.5 * n * (1 + ROUNDING) for norm, n in zip(total, (1, 1, len(DRAWN)), strict=True))


def test_gpt2_adapters_on_conv1d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, kind="gpt2")
    base = base_weights(model)
    trainer = trainer_for(model, tmp_path, learning_rate=0.1)
    dp = attached(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fall-back would announce itself
        trainer.train()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert dp.mechanism.account.steps == 2


def test_lora_before_and_after_making_the_trainer(tmp_path: Path) -> None:
    """An adapter added after the optimizer exists would not be trained at all, while epsilon is spent (opacus#820)."""
    model = without_dropout(tiny("llama"))
    trainer = trainer_for(model, tmp_path)
    trainer.create_optimizer()
    trainer.model = trainer.model_wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    dp = attached(trainer)
    with pytest.raises(Exception, match="the optimizer must update exactly the trained parameters"):
        trainer.train()
    assert dp.mechanism.account.steps == 0


def test_labels_are_counted_as_without_an_adapter(tmp_path: Path) -> None:
    """PEFT wraps forward in one that takes anything, so what the model accepts cannot be read off its signature."""
    for model in (without_dropout(tiny("llama")), adapted({})):
        trainer = trainer_for(model, tmp_path)
        dp = attached(trainer)
        trainer.train()
        assert dp.training._loss is not None
        assert (dp.training._loss.divides, dp.training._loss.counted) == ("sum", "shifted labels")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_virtual_tokens_are_trained_unit_by_unit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up once for all rows and then repeated: no rule can tell the rows apart, and none has to."""
    configs = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    seen = watch(monkeypatch)
    draws(monkeypatch, DRAWN)
    data = texts()
    model = peft.get_peft_model(without_dropout(tiny("llama")), configs[kind]).double()
    trainer = trainer_for(model, tmp_path, data, max_steps=1)
    dp = attached(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*computed by itself")
        trainer.train()

    def mean(batch: dict[str, Tensor]) -> Tensor:
        predicted = batch["labels"][:, 1:] if kind == "prefix" else batch["labels"]  # a prompt predicts the first token too
        loss: Tensor = model(**batch, num_items_in_batch=1).loss / (predicted != -100).sum()
        return loss

    singles = unit_gradients(model.eval(), mean, [Pad()([data[row]]) for row in DRAWN])
    assert dp.engine is not None
    wanted, _ = clipped_sum(singles, 1.0)
    assert distance(seen.sums[0], wanted) <= ROUNDING


def test_a_regulariser_of_the_adapter_is_part_of_every_units_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaLoRA adds one to the loss in training mode, which depends on its weights alone."""
    torch.manual_seed(0)
    setting = peft.AdaLoraConfig(
        target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, total_step=10, lora_dropout=0.0, orth_reg_weight=0.5
    )
    model: Any = peft.get_peft_model(without_dropout(tiny("llama")), setting).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    data = texts()
    draws(monkeypatch, DRAWN)
    seen = watch(monkeypatch)
    trainer = trainer_for(model, tmp_path, data, max_steps=1)
    singles = unit_gradients(model.train(), lambda batch: model(**batch).loss, [Pad()([data[row]]) for row in DRAWN])
    bound = float(clipped_sum(singles, 1.0)[1].median())
    wanted, _ = clipped_sum(singles, bound)
    model.zero_grad()
    attached(trainer, max_grad_norm=bound)
    trainer.train()
    assert distance(seen.sums[0], wanted) <= ROUNDING
