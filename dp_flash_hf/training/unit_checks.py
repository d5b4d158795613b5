"""Does what is computed of a unit depend on that unit alone? One way of asking in each function.

Each computes the same units in two ways that must agree if no unit sees another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.layout_probing import training_mode
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.training.untraced import Repeated
from dp_flash_hf.units import IGNORED, Units, leading_shape, select_items, select_unit, text_starts

# Norms below this share of the batch's largest are compared as if they were as large: what is left of them is rounding.
_SMALL = 1e-2


def check_interaction(
    engine: ClippingEngine,
    loss: UnitLoss,
    batches: Sequence[dict[str, Any]],
    units: Units,
    chance: random.Random,
    rounds: Iterator[int],
    *,
    tolerance: float,
) -> int:
    """Raise PrivacyError where the loss, in training mode, is no sum over units: where one changes what another one adds.

    A sum over units is what it is whether one of them, or the others, or both are exchanged: L(u, others) - L(v, others)
    - L(u, others') + L(v, others') is 0, for any u, v, others and others' (the interaction contrast of a two-by-two design).
    Each round takes another of the batches, another unit and secret random numbers, the same ones four times. Values only are
    compared, so a round costs four forward passes; coupling that no value of the loss shows is for `check_training_mode` and
    `ClippingEngine.check`. Mixing that happens with probability p is found with probability 1 - (1 - p)^rounds.

    Args:
        engine: attached to the model.
        loss: a sum over units.
        batches: of the units tried, of equal shapes, with labels of several kinds; one that the loss refuses is passed over.
        units: of their rows or tokens, two at least.
        chance: which units and numbers.
        rounds: one more round for each.
        tolerance: relative to the largest of the four losses; of equal shapes, so there is little rounding to allow for.

    Returns:
        In how many rounds the four losses said something: not where all of them were zero or one not finite, nor where other
        data drew other random numbers.
    """
    told, again = 0, Repeated(engine)
    with training_mode(engine.model, True), torch.no_grad():
        for number in rounds:
            batch, seed = batches[number % len(batches)], chance.getrandbits(63)
            one, other = chance.sample(range(units.n), 2)
            found, stands, rounding = [], [], 0.0
            for own, company in ((one, None), (other, None), (one, one), (other, one)):
                tried = _exchanged(batch, units, {unit: own if unit == one else company for unit in range(units.n)})
                with again.from_seed(seed) as generators:
                    try:
                        value = loss(tried)
                        rounding = 2 * torch.finfo(value.dtype).eps  # of four values, each by half of it
                        found.append(float(value))
                    except (ValueError, IndexError, RuntimeError):
                        if number % len(batches) == 0:  # on labels of the data themselves
                            raise
                        found.append(math.nan)
                    stands.append(generators())
            size = max(map(abs, found))
            if size == 0.0 or not all(map(math.isfinite, found)) or any(stand != stands[0] for stand in stands):
                continue
            told += 1
            apart = abs(found[0] - found[1] - found[2] + found[3])
            if not apart <= max(tolerance, rounding) * max(size, _SMALL * loss.count(batch)):
                raise PrivacyError(
                    f"the loss couples units: what one adds to it changes by {apart:.3g} of {size:.3g} with the other units of "
                    "its batch, in training mode; look for terms that compare rows, weights or statistics taken from the "
                    "batch, and rows that are mixed at random"
                )
    return told


def _exchanged(batch: dict[str, Any], units: Units, by: Mapping[int, int | None]) -> dict[str, Any]:
    """The batch with one unit's items in place of another's; None leaves a unit as it is. Of packed rows, the tokens only."""
    items = torch.arange(units.n_items)
    for unit, other in by.items():
        if other is not None and other != unit:
            own, theirs = units.items(unit), units.items(other)
            items[own] = theirs[torch.arange(len(own)) % len(theirs)]
    if units.kind == "rows":
        return select_items(batch, units, items)
    ids = batch["input_ids"]
    return {**batch, "input_ids": ids.flatten()[items.to(ids.device)].view(ids.shape)}


def check_packing(
    model: Any, loss: UnitLoss, batch: dict[str, Any], units: Units, *, tolerance: float, with_equal_shapes: float
) -> None:
    """Raise PrivacyError where the texts of a packed row see each other.

    Every unit's loss is taken where it stands, with the labels of all others ignored, then by itself, and among copies of its
    tokens, which leaves the shapes equal and little rounding to allow for. Attention that crosses from text to text changes one
    of them. Losses only are compared: `ClippingEngine.check` compares gradients.

    Args:
        model: in any mode; it is computed in evaluation mode.
        loss: a sum over units.
        batch: one packed row, with a label for every token.
        units: of its tokens.
        tolerance: relative, for a unit by itself.
        with_equal_shapes: relative, for a unit among its copies.

    Raises:
        PrivacyError: a loss differs.
        UnsupportedError: the batch has no label for every token.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or tuple(labels.shape) != units.shape:
        raise UnsupportedError("a flattened batch without a label for every token: its texts' losses cannot be separated")
    with training_mode(model, False), torch.no_grad():
        for unit in range(units.n):
            own = (units.of_item == unit).view(units.shape).to(labels.device)
            within = {**batch, "labels": labels.masked_fill(~own, IGNORED)}
            among_others = float(loss(within))
            for company, other, allowed in (
                ("alone", select_unit(batch, units, unit), tolerance),
                ("among copies of itself", _among_copies(within, units, unit), with_equal_shapes),
            ):
                found = float(loss(other))
                if not abs(among_others - found) <= allowed * max(abs(found), 1e-3):
                    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
                    raise PrivacyError(
                        f"the texts of a flattened batch see each other: one has loss {among_others:.6g} among others and "
                        f"{found:.6g} {company} (attention is {attention!r}); load the model with "
                        "attn_implementation='dp_flash', which keeps them apart, and let the collator return position_ids, or "
                        "use a collator that pads"
                    )


def check_alone(
    engine: ClippingEngine,
    loss: UnitLoss,
    batch: dict[str, Any],
    units: Units,
    scale: Tensor,
    alone: Callable[[int], dict[str, Any]],
    *,
    tolerance: float,
) -> None:
    """Raise PrivacyError where a unit's gradient depends on its padding, and so on the longest text of its batch.

    Each unit's rows are cut to the length they have by themselves, on the side where they are padded, and must keep their
    gradient norm. So must a text that is taken out of its packed row and given to the model as an ordinary one, or numbered as
    by itself. Computed in evaluation mode; rows that are as long by themselves have nothing to compare.

    Args:
        engine: attached to the model; `.grad` is emptied.
        loss: a sum over units.
        batch: of all units.
        units: of its rows or tokens.
        scale: float32 (units,), the factor of each unit's loss.
        alone: unit -> what the collator makes of it by itself; only shapes and position ids are used, for what it masks may be
            random.
        tolerance: relative difference of norms.
    """
    with training_mode(engine.model, False):
        engine.backward(loss, batch, units, scale)
        norms, largest = engine.norms, float(engine.norms.max())
        engine.model.zero_grad()
        for unit in range(units.n):
            own = select_unit(batch, units, unit)
            by_itself = alone(unit)
            if units.kind == "tokens":
                single: dict[str, Any] | None = _unpacked(own, by_itself)
            else:
                single = _cut_to(own, by_itself, _padded_on_the_left(batch))
            if single is None:
                continue
            shape = leading_shape(single)
            engine.backward(loss, single, Units.of(torch.zeros(shape[0], dtype=torch.long), shape))
            norm = float(engine.norms[0]) * float(scale[unit])
            engine.model.zero_grad()
            if not abs(norm - float(norms[unit])) <= tolerance * max(norm, _SMALL * largest):
                raise PrivacyError(
                    f"a unit's gradient norm is {norm:.6g} alone and {float(norms[unit]):.6g} "
                    + (
                        "flattened with others; let the collator number every text's position_ids from its own start, as the "
                        "model does by itself (RoBERTa and its kin begin at pad_token_id + 1: DataCollatorWithFlattening("
                        "position_ids_start=2)), or use one that pads"
                        if units.kind == "tokens"
                        else "padded to the longest of its batch, so it depends on the others' lengths; pad on the right "
                        "(tokenizer.padding_side), or pad every row to one length (padding='max_length')"
                        + ", without max_tokens, which cuts it off again"
                    )
                )


def _padded_on_the_left(batch: dict[str, Any]) -> bool:
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())


def _cut_to(own: dict[str, Any], shapes: Mapping[str, Any], on_the_left: bool) -> dict[str, Any] | None:
    """One unit's rows as long as `shapes` has them; None where they are so already."""

    def cut(whole: Tensor, part: Any) -> Tensor:
        if not isinstance(part, Tensor) or whole.dim() < 2 or part.shape[2:] != whole.shape[2:]:
            return whole
        length = part.shape[1]
        if length >= whole.shape[1]:
            return whole
        return (whole[:, -length:] if on_the_left else whole[:, :length]).contiguous()

    short = {name: cut(value, shapes.get(name)) if isinstance(value, Tensor) else value for name, value in own.items()}
    return None if all(value is own[name] for name, value in short.items()) else short


def _unpacked(own: dict[str, Any], by_itself: Mapping[str, Any]) -> dict[str, Any]:
    """One unit's part of a packed row, numbered as by itself; an ordinary row if it is one text that models number so."""
    starts, positions = text_starts(own), by_itself.get("position_ids")
    renumbered = own if positions is None else {**own, "position_ids": positions}
    counts_from_0 = positions is None or bool((positions.cpu() == torch.arange(positions.shape[-1])).all())
    if (starts is not None and int(starts.sum()) > 1) or not counts_from_0:
        return renumbered
    packing = ("position_ids", "seq_idx", "cu_seq_lens", "max_length")
    return {name: value for name, value in renumbered.items() if not name.startswith(packing)}


def check_training_mode(
    engine: ClippingEngine,
    loss: UnitLoss,
    batch: dict[str, Any],
    units: Units,
    scale: Tensor,
    chance: random.Random,
    *,
    tolerance: float,
) -> None:
    """Raise PrivacyError where, in training mode, units see each other or the data change a buffer: batch statistics do both.

    Every unit must keep its gradient norm when all other rows, or texts of a packed row, become copies of its own, with the
    random numbers of dropout repeated; where other data draw other numbers, nothing is compared. Buffers are put back. A layer
    that couples units without changing any norm, by their order, say, is not seen here; `ClippingEngine.check` compares sums as
    well.

    Args:
        engine: attached to the model; `.grad` is emptied.
        loss: a sum over units.
        batch: of all units.
        units: of its rows or tokens.
        scale: float32 (units,), the factor of each unit's loss.
        chance: the secret random numbers that are repeated.
        tolerance: relative difference of norms.
    """
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
    seed, again = chance.getrandbits(63), Repeated(engine)

    def norms_of(chosen: dict[str, Any]) -> tuple[Tensor, list[bytes]]:
        with training_mode(engine.model, True), again.from_seed(seed) as generators:
            engine.backward(loss, chosen, units, scale)
            stand = generators()
        engine.model.zero_grad()
        return engine.norms.double(), stand

    try:
        among_others, stand = norms_of(batch)
        among_copies = [norms_of(_among_copies(batch, units, unit)) for unit in range(units.n)]
        changed = [name for name, buffer in engine.model.named_buffers() if not torch.equal(buffer, buffers[name])]
    finally:
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(buffers[name])
    if changed:
        raise PrivacyError(
            f"training changes the buffers {changed[:8]}, without noise; freeze these statistics or replace their layers"
        )
    largest = float(among_others.max())
    for unit, (norms, stands) in enumerate(among_copies):
        before, after = float(among_others[unit]), float(norms[unit])
        if stands == stand and not abs(before - after) <= tolerance * max(before, _SMALL * largest):
            raise PrivacyError(
                f"in training mode a unit's gradient norm changes from {before:.6g} to {after:.6g} with the other units "
                "of its batch; look for batch statistics"
            )


def _among_copies(batch: dict[str, Any], units: Units, unit: int) -> dict[str, Any]:
    """The batch with copies of one unit in place of all others; of packed rows, in others' texts."""
    return _exchanged(batch, units, dict.fromkeys(range(units.n), unit))
