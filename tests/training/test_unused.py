"""Parameters that a model computes with for nothing stay as they are; those of modules that run now and then are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dp_flash_hf.engine.self_check import UnusedParametersError
from tests.support.models import tiny
from tests.support.trainers import attached, trainer_for, without_dropout


def always(ids: Any) -> bool:
    return True


def for_some(ids: Any) -> bool:
    return bool(ids[0, 1] % 2)


def never(ids: Any) -> bool:
    return False


def with_spare(runs: Callable[[Any], bool], path: Path) -> Any:
    """A trainer whose model has a layer that nothing reads."""
    model = without_dropout(tiny("gpt2"))
    model.spare = torch.nn.Linear(2, 2).double()

    def run(module: Any, args: Any, kwargs: Any) -> None:
        if runs(kwargs["input_ids"]):
            module.spare(torch.ones(1, 2, dtype=torch.float64))

    model.register_forward_pre_hook(run, with_kwargs=True)
    return trainer_for(model, path, learning_rate=0.1)


def test_what_is_computed_for_nothing_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = with_spare(always, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    dp = attached(trainer)
    trainer.train()
    assert dp.report().steps == 2
    same = {name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])}
    assert same == {"spare.weight", "spare.bias"}
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert "spare.bias, spare.weight: the loss does not depend" in caplog.text


@pytest.mark.parametrize("runs", [for_some, never])
def test_what_runs_for_some_units_or_none_is_refused(runs: Any, tmp_path: Path) -> None:
    trainer = with_spare(runs, tmp_path)
    dp = attached(trainer)
    with pytest.raises(UnusedParametersError, match=r"does not depend on them: \['spare.weight', 'spare.bias'\]; freeze them"):
        trainer.train()
    assert dp.mechanism.account.steps == 0
    assert all(p.requires_grad for p in trainer.model.parameters())
