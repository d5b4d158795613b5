"""One private training: the strategy it chooses, its checks, and what it shows; through `make_private`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.accelerator import Accelerator

from dp_flash_hf.engine import memory
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.training import session as training_module
from tests.support.loops import loop, run
from tests.support.models import tiny
from tests.support.oracle import distance, total_norm
from tests.support.trainers import Pad, config, draws, texts, watch, without_dropout

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.sampled(4)
@pytest.mark.estimates_memory
@pytest.mark.parametrize("collate", [Pad(), hf.DataCollatorWithFlattening()])  # type: ignore[no-untyped-call]
@pytest.mark.parametrize(("free", "whole"), [(2**40, "bookkeeping"), (2**10, "two_pass")])
def test_auto_chooses_by_memory_and_says_so(free: int, whole: str, collate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both train alike; what is printed once names the choice, both estimates and what is free."""
    said: list[str] = []
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(training_module.logger, "warning", said.append)
    weights = []
    for strategy in ("auto", whole):
        torch.manual_seed(0)
        private, model, optimizer = loop(
            strategy=strategy, privacy=config(seed=3), steps=2, collate_fn=collate, max_rows_per_device=8
        )
        assert run(private, optimizer) == 2
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        engine = private._training.engine
        assert engine is not None
        assert engine.chosen == (whole if strategy == "auto" else "bookkeeping")
    (line,) = said
    assert f"chose {whole}:" in line
    assert "free on cpu" in line
    assert distance(*weights) < 1e-6


@pytest.mark.estimates_memory
def test_auto_estimates_under_autocast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**10)
    model = without_dropout(tiny("gpt2")).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(model, optimizer)  # type: ignore[no-untyped-call]
    private, _, optimizer = loop(model, optimizer=optimizer, accelerator=accelerator, steps=1)
    assert run(private, optimizer) == 1
    engine = private._training.engine
    assert engine is not None
    assert engine.chosen == "two_pass"


@pytest.mark.estimates_memory
def test_what_cannot_be_estimated_uses_bookkeeping_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(training_module.logger, "warning", said.append)

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("from shapes alone")

    monkeypatch.setattr(memory, "estimate", failing)
    private, _, optimizer = loop(steps=1)
    assert run(private, optimizer) == 1
    assert said == ["strategy='auto' chose bookkeeping: from shapes alone"]


def test_users_are_units(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{**example, "user": row // 3} for row, example in enumerate(texts())]
    seen = watch(monkeypatch)
    draws(monkeypatch, [0, 2, 7])
    privacy = config(privacy_unit="user", max_examples_per_unit=3, max_grad_norm=1e-3)
    private, _, optimizer = loop(train_dataset=data, privacy=privacy, steps=1, expected_batch_size=2)
    run(private, optimizer)
    assert total_norm(seen.sums[0]) <= 3e-3 * (1 + 1e-6)  # of nine rows
    assert private.report().n_units == 8
    assert private.report().unit == "all rows with the same 'user'"


def test_the_loss_shown_is_the_mean_over_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    draws(monkeypatch, [1, 2, 6], [])
    private, model, optimizer = loop("bert", steps=2, max_rows_per_device=2)
    wanted = float(model(**Pad()([texts()[row] for row in (1, 2, 6)])).loss.detach())
    shown = []
    for batch in private.loader:
        shown.append(float(private.backward(batch)))
        optimizer.step()
        optimizer.zero_grad()
    assert shown == [pytest.approx(wanted), 0.0]


def test_the_checks_are_needed_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr("dp_flash_hf.training.preflight.check_training_mode", lambda *args, **kwargs: checked.append(1))
    private, _, optimizer = loop()
    run(private, optimizer)
    assert checked == [1]
