"""Checks on the user's own data and model before the first step, beside those of `ClippingEngine.check`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_flash_hf.engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.losses import UnitLoss
from dp_flash_hf.units import Units, select_items


def check_collator(dataset: Any, collate: Callable[[Any], Any], keys: list[tuple[int, int]]) -> None:
    """Raise PrivacyError where the collator lets the last example of a batch change other rows, as mixup and packing do.

    It is exchanged for the longest other one, so that padding stays, and random numbers are repeated.
    """
    if len(keys) < 2:
        return
    examples = dataset.__getitems__(keys)
    *others, (_, unit) = examples
    batches = []
    for last in (*(example for example, _ in others), examples[-1][0]):
        with torch.random.fork_rng([]):
            state, numpy_state = random.getstate(), np.random.get_state()
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            batches.append(collate([*copy.deepcopy(others), (copy.deepcopy(last), unit)]))
            random.setstate(state)
            np.random.set_state(numpy_state)
    *exchanged, whole = batches
    for name, value in whole.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != len(keys):
            continue
        for other in exchanged:
            if other[name].shape == value.shape and not torch.equal(other[name][:-1], value[:-1]):
                raise PrivacyError(
                    f"the collator mixes examples: {name!r} of the others changes with the last one, so a unit would reach "
                    "more than its own rows; mix and sort nothing in the collator"
                )


def check_training_mode(
    engine: ClippingEngine, loss: UnitLoss, batch: dict[str, Any], units: Units, scale: Tensor, *, tolerance: float
) -> None:
    """Raise PrivacyError where, in training mode, units see each other or the data change a buffer: batch statistics do both.

    The first unit must keep its norm when all other rows become copies of its own, with the random numbers of dropout repeated.
    """
    own = units.items(0)
    items = torch.arange(units.n_items)
    others = units.of_item != 0
    items[others] = own[torch.arange(int(others.sum())) % len(own)]
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    modes = [(module, module.training) for module in engine.model.modules()]
    norms = []
    try:
        engine.model.train()
        for chosen in (batch, select_items(batch, units, items)):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                engine.backward(loss, chosen, units, scale)
            norms.append(float(engine.norms[0]))
            engine.model.zero_grad()
        changed = [name for name, buffer in engine.model.named_buffers() if not torch.equal(buffer, buffers[name])]
    finally:
        for module, mode in modes:
            module.training = mode
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(buffers[name])
    if changed:
        raise PrivacyError(
            f"training changes the buffers {changed[:8]}, without noise; freeze these statistics or replace their layers"
        )
    if not abs(norms[0] - norms[1]) <= tolerance * max(norms[0], 1e-12):
        raise PrivacyError(
            f"in training mode a unit's gradient norm changes from {norms[0]:.6g} to {norms[1]:.6g} with the other units of "
            "its batch; look for batch statistics"
        )
