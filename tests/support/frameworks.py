"""Trainers of frameworks beside a loop over single units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import nn

from dp_flash_hf.integrations.trainer import DPCallback
from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import config, draws, watch, without_dropout

STEPS = ([0, 3, 4, 9, 11, 17, 20], [2], [1, 5, 8, 13, 21, 22])
TOLERANCE = 1e-5  # of sums in float32


def trained(trainer: Any, **changes: Any) -> DPCallback:
    """What trained it privately. Raises what refuses it."""
    dp = DPCallback(config(**changes)).attach(trainer)
    trainer.train()
    return dp


def difference(
    make: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    steps: Sequence[Sequence[int]] = STEPS,
    *,
    alone_by: Callable[[], Any] | None = None,
    **changes: Any,
) -> tuple[float, DPCallback]:
    """The largest relative difference of these steps' clipped sums from a loop over single rows, and what trained.

    Args:
        make: a new trainer with the same weights each time, learning rate 0, and at least as many `max_steps`.
        monkeypatch: undoes what decides the draws.
        steps: the rows that each step draws.
        alone_by: makes the trainer of the loop, if it has other data.
        changes: of the privacy configuration.

    The loop goes through the framework's own data loader's rows and collator, and its own loss. The bound is the norm in the
    middle of the first step's, so that some units are clipped.
    """
    trainer = (alone_by or make)()
    loader, model = trainer.get_train_dataloader(), without_dropout(trainer.model).train()
    beside = getattr(trainer, "loss", None)  # which may have weights of its own
    whole = model
    if isinstance(beside, nn.Module) and set(beside.parameters()) - set(model.parameters()):
        whole = nn.ModuleDict({"model": model, "loss": beside})

    def alone(rows: Sequence[int]) -> Any:
        parts = [trainer._prepare_inputs(loader.collate_fn([loader.dataset[row]])) for row in rows]
        return unit_gradients(whole, lambda batch: trainer.compute_loss(model, dict(batch)), parts)

    bound = float(clipped_sum(alone(steps[0]), 1.0)[1].median())
    wanted = [clipped_sum(alone(rows), bound)[0] for rows in steps]
    with monkeypatch.context() as patch:
        seen = watch(patch)
        draws(patch, *steps)
        trainer = make()
        without_dropout(trainer.model)
        dp = trained(trainer, max_grad_norm=bound, **changes)
    assert dp.report().steps == len(steps)
    for got, sums in zip(seen.sums, wanted, strict=True):
        for name in [name for name in sums if name not in got]:
            assert not sums.pop(name).any(), f"{name} is left out, and has a gradient"
    return max(distance(got, sums) for got, sums in zip(seen.sums, wanted, strict=True)), dp
