"""`make_private` in a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator

from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.accelerate import make_private
from dp_flash_hf.integrations.trainer import DPCallback
from tests.support.frameworks import STEPS, TOLERANCE
from tests.support.models import tiny
from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import Pad, config, draws, texts, watch, without_dropout

pytest.importorskip("lightning")

import lightning

FRAMEWORK = "lightning"


class Module(lightning.LightningModule):  # type: ignore[misc]
    """Steps by hand, or lets Lightning do it; through Lightning's wrapper of the optimizer, or not."""

    def __init__(self, model: Any, private: Any, optimizer: Any, *, by_hand: bool = True, wrapped: bool = False) -> None:
        super().__init__()
        self.model, self.private, self.optimizer, self.wrapped = model, private, optimizer, wrapped
        self.automatic_optimization = not by_hand

    def configure_optimizers(self) -> Any:
        return self.optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        self.private.backward(batch)
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
        optimizer.step()
        optimizer.zero_grad()
        return None


def trainer() -> Any:
    return lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def private_loop(model: Any, *, bound: float = 1.0, loss_fn: Any = None) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    private = make_private(
        model=model,
        optimizer=optimizer,
        train_dataset=texts(),
        collate_fn=Pad(),
        accelerator=Accelerator(cpu=True),
        config=config(max_grad_norm=bound),
        expected_batch_size=4,
        steps=len(STEPS),
        max_rows_per_device=4,
        loss_fn=loss_fn,
    )
    return private, optimizer


def test_sums_are_those_of_single_texts(monkeypatch: pytest.MonkeyPatch, row: Callable[..., None]) -> None:
    model, data = without_dropout(tiny("gpt2").float()).train(), texts()

    def alone(rows: Sequence[int]) -> Any:
        return unit_gradients(model, lambda batch: model(**batch).loss, [Pad()([data[one]]) for one in rows])

    bound = float(clipped_sum(alone(STEPS[0]), 1.0)[1].median())
    wanted = [clipped_sum(alone(rows), bound)[0] for rows in STEPS]
    seen = watch(monkeypatch)
    draws(monkeypatch, *STEPS)
    private, optimizer = private_loop(model, bound=bound)
    trainer().fit(Module(model, private, optimizer), private.loader)
    assert private.report().steps == len(STEPS)
    assert private.report().epsilon > 0
    found = max(distance(got, sums) for got, sums in zip(seen.sums, wanted, strict=True))
    assert found < TOLERANCE
    row("`make_private`, manual optimization", "exact", figure=found)


@pytest.mark.parametrize("by_hand", [True, False], ids=["wrapped", "automatic"])
def test_steps_that_lightning_takes_are_refused(by_hand: bool, row: Callable[..., None]) -> None:
    model = tiny("gpt2").float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    private, optimizer = private_loop(model)
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(PrivacyError) as refusal:
        trainer().fit(Module(model, private, optimizer, by_hand=by_hand, wrapped=True), private.loader)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    named = "manual optimization, Lightning's wrapper of the optimizer" if by_hand else "automatic optimization"
    row(named, "refused", str(refusal.value))


def of_the_batch(model: Any, batch: Any) -> Any:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.mean(1)
    return (logits / logits.std(0, unbiased=False).clamp(min=1e-3)).square().mean()


def test_a_loss_that_normalises_over_the_batch_is_refused(row: Callable[..., None]) -> None:
    model = tiny("gpt2").float()
    private, optimizer = private_loop(model, loss_fn=of_the_batch)
    with pytest.raises((PrivacyError, UnsupportedError)) as refusal:
        trainer().fit(Module(model, private, optimizer), private.loader)
    row("a loss that normalises over the batch", "refused", str(refusal.value).partition(", so units would share")[0])


def test_lightnings_trainer_is_none_of_transformers(row: Callable[..., None]) -> None:
    with pytest.raises(UnsupportedError, match="make_private") as refusal:
        DPCallback(config()).attach(trainer())
    row("`DPCallback.attach(lightning.Trainer)`", "refused", str(refusal.value))


def test_the_guide(run_guide: Callable[..., dict[str, Any]]) -> None:
    names = run_guide("lightning")
    assert names["private"].report().steps == 5
    assert 0 < names["private"].report().epsilon <= 8
