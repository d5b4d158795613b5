"""A loop of one's own on a tiny model, made private."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.accelerator import Accelerator

from dp_flash_hf import make_private
from dp_flash_hf.integrations.accelerate import PrivateLoop
from tests.support.models import tiny
from tests.support.trainers import Pad, config, texts, without_dropout


def loop(
    model: Any = "gpt2", *, optimizer: Any = None, accelerator: Accelerator | None = None, privacy: Any = None, **changes: Any
) -> tuple[PrivateLoop, Any, Any]:
    model = without_dropout(tiny(model)) if isinstance(model, str) else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    settings: dict[str, Any] = {
        "train_dataset": texts(),
        "collate_fn": Pad(),
        "accelerator": accelerator or Accelerator(cpu=True),
        "config": privacy or config(),
        "expected_batch_size": 4,
        "max_rows_per_device": 4,
        **changes,
    }
    if "epochs" not in settings:
        settings.setdefault("steps", 3)
    return make_private(model=model, optimizer=optimizer, **settings), model, optimizer


def run(private: PrivateLoop, optimizer: Any) -> int:
    steps = 0
    for batch in private.loader:
        private.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps
