"""Checks on the user's own data and model before the first step, beside those of `ClippingEngine.check`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_flash_hf.engine import ClippingEngine, training_mode
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.losses import UnitLoss
from dp_flash_hf.units import Units, leading_shape, select_items, select_unit

_COMPUTED = 4  # units in the preflight's batch, computed together and one by one
_LOOKED_AT = 64  # units they are chosen from


def choose_units(n_units: int, example_of: Callable[[int], Any]) -> list[int]:
    """Units spread over the data, which may be sorted; the longest and the shortest text of those looked at come first.

    example_of: unit -> its first example.
    """

    def length(unit: int) -> int:
        example = example_of(unit)
        return len(example["input_ids"]) if isinstance(example, Mapping) and "input_ids" in example else 0

    spread = sorted({unit * n_units // _LOOKED_AT for unit in range(_LOOKED_AT)})
    lengths = {unit: length(unit) for unit in spread}
    longest, shortest = max(spread, key=lengths.__getitem__), min(spread, key=lengths.__getitem__)
    extremes = [longest, shortest] if lengths[longest] > lengths[shortest] else []
    evenly = spread[:: max(1, len(spread) // _COMPUTED)]
    return list(dict.fromkeys([*extremes, *evenly]))[:_COMPUTED]


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
            batches.append(_copy_of(collate)([*copy.deepcopy(others), (copy.deepcopy(last), unit)]))
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


def _copy_of(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """So that a collator with random numbers of its own draws the same ones again, where it can be copied."""
    try:
        return copy.deepcopy(collate)
    except Exception:
        return collate


def check_padding(
    engine: ClippingEngine,
    loss: UnitLoss,
    batch: dict[str, Any],
    units: Units,
    scale: Tensor,
    alone: Callable[[int], dict[str, Any]],
    *,
    tolerance: float,
) -> None:
    """Raise PrivacyError where a unit's gradient depends on how far it is padded, and so on the longest of its batch.

    alone: unit -> what the collator makes of that unit by itself, of which only the shapes are used: masks may be random.
    Each unit's rows are cut to that length, on the side where they are padded, and must keep their norm.
    """
    mask = batch.get("attention_mask")
    on_the_left = isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())

    def cut(whole: Tensor, part: Any) -> Tensor:
        if not isinstance(part, Tensor) or whole.dim() < 2 or part.shape[2:] != whole.shape[2:]:
            return whole
        length = part.shape[1]
        if length >= whole.shape[1]:
            return whole
        return (whole[:, -length:] if on_the_left else whole[:, :length]).contiguous()

    with training_mode(engine.model, False):
        engine.backward(loss, batch, units, scale)
        norms = engine.norms
        engine.model.zero_grad()
        for unit in range(units.n):
            own, shapes = select_unit(batch, units, unit), alone(unit)
            short = {name: cut(value, shapes.get(name)) if isinstance(value, Tensor) else value for name, value in own.items()}
            if all(value is own[name] for name, value in short.items()):
                continue
            engine.backward(loss, short, Units.of(torch.zeros(units.sizes[unit], dtype=torch.long), leading_shape(short)))
            norm = float(engine.norms[0]) * float(scale[unit])
            engine.model.zero_grad()
            if not abs(norm - float(norms[unit])) <= tolerance * max(norm, 1e-12):
                raise PrivacyError(
                    f"a unit's gradient norm is {norm:.6g} alone and {float(norms[unit]):.6g} padded to the longest of its "
                    "batch, so it depends on the others' lengths; pad on the right (tokenizer.padding_side), or pad every row "
                    "to one length (padding='max_length')"
                )


def check_training_mode(
    engine: ClippingEngine, loss: UnitLoss, batch: dict[str, Any], units: Units, scale: Tensor, *, tolerance: float
) -> None:
    """Raise PrivacyError where, in training mode, units see each other or the data change a buffer: batch statistics do both.

    Every unit must keep its norm when all other rows become copies of its own, with the random numbers of dropout repeated.
    """
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}

    def norms_of(chosen: dict[str, Any]) -> Tensor:
        with training_mode(engine.model, True), torch.random.fork_rng():
            torch.manual_seed(0)
            engine.backward(loss, chosen, units, scale)
        engine.model.zero_grad()
        return engine.norms.double()

    try:
        together, among_copies = norms_of(batch), []
        for unit in range(units.n):
            own = units.items(unit)
            items = torch.arange(units.n_items)
            others = units.of_item != unit
            items[others] = own[torch.arange(int(others.sum())) % len(own)]
            among_copies.append(norms_of(select_items(batch, units, items))[unit])
        changed = [name for name, buffer in engine.model.named_buffers() if not torch.equal(buffer, buffers[name])]
    finally:
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(buffers[name])
    if changed:
        raise PrivacyError(
            f"training changes the buffers {changed[:8]}, without noise; freeze these statistics or replace their layers"
        )
    for before, after in zip(together.tolist(), among_copies, strict=True):
        if not abs(before - float(after)) <= tolerance * max(before, 1e-12):
            raise PrivacyError(
                f"in training mode a unit's gradient norm changes from {before:.6g} to {float(after):.6g} with the other units "
                "of its batch; look for batch statistics"
            )
