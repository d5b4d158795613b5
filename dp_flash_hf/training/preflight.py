"""What is learnt and proved on the user's own data and model before the first step.

Each check computes the same units in two ways that must agree if a unit's gradient depends on that unit alone. Values of four
units are compared, chosen from all over the data: a check finds what couples units by the way model, loss and collator are
made, and not what only happens to others of the data. Training itself clips whatever comes; what these checks add is that what
is clipped is the gradient of one unit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_flash_hf.distributed import accelerators
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.layout_probing import training_mode
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.mechanisms.fresh_randomness import same_randomness
from dp_flash_hf.training.adapter import TrainingAdapter, prepared
from dp_flash_hf.training.batches import units_of, without_trailing_padding
from dp_flash_hf.training.losses import UnitLoss, learn_loss
from dp_flash_hf.training.unit_reader import Key, UnitReader
from dp_flash_hf.units import IGNORED, Units, leading_shape, select_items, select_unit, text_starts

_COMPUTED = 4  # units in the preflight's batch, computed as one batch and one by one
_LOOKED_AT = 64  # units they are chosen from


def preflight(engine: ClippingEngine, adapter: TrainingAdapter, reader: UnitReader, *, cut_padding: bool) -> UnitLoss:
    """Learn how the loss divides, and prove isolation and exactness, on units chosen from all over the data.

    In this order: the collator leaves the rows of others alone (`check_collator`); the loss is a mean or a sum over labels,
    and is made a sum over units (`learn_loss`); each chosen unit has a finite loss; texts of a packed row do not see each other
    (`check_packing`); gradients of the batch are those of every unit alone (`ClippingEngine.check`); none depends on how far it
    is padded (`check_alone`); and in training mode none depends on the others either (`check_training_mode`).

    What no check can see: coupling that appears only on other inputs than the ones tried, as of a router that overflows in
    larger batches; and what the user's code keeps between batches.

    Forward and backward passes run; weights, buffers and `.grad` stay as they were.

    Args:
        engine: attached to the model that is trained.
        adapter: of the integration.
        reader: of the training data.
        cut_padding: whether trailing padding will be cut off physical batches, as with `max_tokens`.

    Returns:
        The loss as a sum over units, for `ClippingEngine.backward`.

    Raises:
        PrivacyError: units are coupled, or a value is not finite.
        UnsupportedError: the loss or the batch's layout is none of those known.
    """
    chosen = choose_units(reader.n_units, reader.first_example)
    batch, units = reader.batch(chosen)
    check_collator(reader, reader.keys(chosen))
    reduced_precision = adapter.reduced_precision or engine.reduces_precision
    loss = _learnt(engine, adapter, batch, units, chosen, tolerance=1e-2 if reduced_precision else 1e-4)
    reduced_precision = adapter.reduced_precision or engine.reduces_precision  # known once layers have run
    tolerance = 0.05 if reduced_precision else 1e-3
    with_equal_shapes = 1e-3 if reduced_precision else 1e-5  # when there is little rounding to allow for
    scale = loss.scale(batch, units)
    if units.kind == "tokens":
        with engine.eagerly():
            check_packing(engine.model, loss, batch, units, tolerance=tolerance, with_equal_shapes=with_equal_shapes)

    def alone(number: int) -> dict[str, Any]:
        own = reader.batch([chosen[number]])[0]
        return without_trailing_padding(own) if cut_padding else own

    with engine.without_microbatching():
        engine.check(loss, batch, units, scale, tolerance=tolerance)
        with engine.eagerly():
            check_alone(engine, loss, batch, units, scale, alone, tolerance=tolerance)
        check_training_mode(engine, loss, batch, units, scale, tolerance=with_equal_shapes)
    return loss


def _learnt(
    engine: ClippingEngine,
    adapter: TrainingAdapter,
    batch: dict[str, Any],
    units: Units,
    chosen: Sequence[int],
    *,
    tolerance: float,
) -> UnitLoss:
    """The loss as a sum over units. Raises PrivacyError where that of one of them is not finite."""
    model = engine.model
    with training_mode(model, False), engine.eagerly():  # it tries many shapes, and looks at values only
        loss = learn_loss(
            adapter.model_loss,
            batch,
            units,
            n_classes=getattr(getattr(model, "config", None), "num_labels", None),
            rows_per_example=adapter.rows_per_example,
            tolerance=tolerance,
        )
        with torch.no_grad():
            for number, unit in enumerate(chosen):
                if not math.isfinite(alone := float(loss(select_unit(batch, units, number)))):
                    raise PrivacyError(
                        f"the loss of unit {unit} (counted from 0) is {alone}: look for NaN among its inputs and labels. "
                        "While training, a unit without a finite gradient adds zero; repair the data or leave such units out"
                    )
    return loss


def choose_units(n_units: int, example_of: Callable[[int], Any]) -> list[int]:
    """Up to four units spread over the data, which may be sorted.

    Of the 64 looked at, the longest and the shortest text come first: between them there is padding to find.

    Args:
        n_units: of the whole data.
        example_of: unit -> its first example.
    """
    spread = sorted({unit * n_units // _LOOKED_AT for unit in range(_LOOKED_AT)})
    lengths = {unit: length_of(example_of(unit)) for unit in spread}
    longest, shortest = max(spread, key=lengths.__getitem__), min(spread, key=lengths.__getitem__)
    extremes = [longest, shortest] if lengths[longest] > lengths[shortest] else []
    evenly = spread[:: max(1, len(spread) // _COMPUTED)]
    return list(dict.fromkeys([*extremes, *evenly]))[:_COMPUTED]


def length_of(example: Any) -> int:
    """Tokens of an example: of its longest field, if it has several (a chosen and a rejected answer, say)."""
    sequences = [
        field
        for field in (example.values() if isinstance(example, Mapping) else ())
        if (isinstance(field, (Tensor, np.ndarray)) and field.ndim == 1)
        or (isinstance(field, list) and len(field) > 0 and isinstance(field[0], int))
    ]
    return max(map(len, sequences), default=0)


def check_collator(reader: UnitReader, keys: Sequence[Key]) -> None:
    """Raise PrivacyError where the collator lets one example change the rows of others, as mixup and packing do.

    The last example is exchanged for each of the others in turn, with random numbers repeated, and nothing but its own rows may
    change. The longest one is among them, so that padding stays. Rows whose shape changes with the exchange are not compared:
    `check_alone` is about lengths. What a collator does only rarely, it may not do here.

    Args:
        reader: of the training data.
        keys: of the examples of one batch; fewer than two are nothing to compare.
    """
    if len(keys) < 2:
        return
    examples = reader.examples(keys)
    *others, (_, unit) = examples
    batches = []
    for last in (*(example for example, _ in others), examples[-1][0]):
        collate = _copy_of(reader.collate)
        with same_randomness(collate):
            collated = collate([*copy.deepcopy(others), (copy.deepcopy(last), unit)])
            batches.append(prepared(reader.adapter, collated)[0])
    rows_per_example = reader.adapter.rows_per_example
    *exchanged, whole = (_of_others(batch, len(keys), rows_per_example) for batch in batches)
    for name, value in whole.items():
        for other in exchanged:
            if name in other and other[name].shape == value.shape and not torch.equal(other[name], value):
                raise PrivacyError(
                    f"the collator mixes examples: {name!r} of the others changes with the last one, so a unit would reach "
                    "more than its own rows; mix and sort nothing in the collator, nor in _prepare_inputs"
                )


def _of_others(batch: Mapping[str, Any], n_examples: int, rows_per_example: int) -> dict[str, Tensor]:
    """What a collated batch holds of all its examples but the last."""
    units = units_of(batch, torch.arange(n_examples), rows_per_example)
    kept = units.of_item != n_examples - 1
    out = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if units.kind == "tokens" and tuple(value.shape[:2]) == units.shape:
            out[name] = value.flatten(0, 1)[kept]
        elif units.kind == "rows" and len(value) == units.n_items:
            out[name] = value[kept]
    return out


def _copy_of(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """So that a collator with random numbers of its own draws the same ones again, where it can be copied."""
    try:
        return copy.deepcopy(collate)
    except Exception:
        return collate


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
        alone: unit -> what the collator makes of it by itself; only shapes and position ids are used: what it masks
            may be random.
        tolerance: relative difference of norms.
    """
    with training_mode(engine.model, False):
        engine.backward(loss, batch, units, scale)
        norms = engine.norms
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
            if not abs(norm - float(norms[unit])) <= tolerance * max(norm, 1e-12):
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
    engine: ClippingEngine, loss: UnitLoss, batch: dict[str, Any], units: Units, scale: Tensor, *, tolerance: float
) -> None:
    """Raise PrivacyError where, in training mode, units see each other or the data change a buffer: batch statistics do both.

    Every unit must keep its gradient norm when all other rows, or texts of a packed row, become copies of its own, with the
    random numbers of dropout repeated. Buffers are put back. A layer that couples units without changing any norm, by their
    order, say, is not seen here; `ClippingEngine.check` compares sums as well.

    Args:
        engine: attached to the model; `.grad` is emptied.
        loss: a sum over units.
        batch: of all units.
        units: of its rows or tokens.
        scale: float32 (units,), the factor of each unit's loss.
        tolerance: relative difference of norms.
    """
    buffers = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}

    def norms_of(chosen: dict[str, Any]) -> Tensor:
        with training_mode(engine.model, True), same_randomness(engine.model, accelerators(engine.parameters)):
            engine.backward(loss, chosen, units, scale)
        engine.model.zero_grad()
        return engine.norms.double()

    try:
        among_others = norms_of(batch)
        among_copies = [norms_of(_among_copies(batch, units, unit))[unit] for unit in range(units.n)]
        changed = [name for name, buffer in engine.model.named_buffers() if not torch.equal(buffer, buffers[name])]
    finally:
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(buffers[name])
    if changed:
        raise PrivacyError(
            f"training changes the buffers {changed[:8]}, without noise; freeze these statistics or replace their layers"
        )
    for before, after in zip(among_others.tolist(), among_copies, strict=True):
        if not abs(before - float(after)) <= tolerance * max(before, 1e-12):
            raise PrivacyError(
                f"in training mode a unit's gradient norm changes from {before:.6g} to {float(after):.6g} with the other units "
                "of its batch; look for batch statistics"
            )


def _among_copies(batch: dict[str, Any], units: Units, unit: int) -> dict[str, Any]:
    """The batch with copies of one unit's rows in place of all others; in a packed row, of its tokens in others' texts."""
    own, others = units.items(unit), units.of_item != unit
    items = torch.arange(units.n_items)
    items[others] = own[torch.arange(int(others.sum())) % len(own)]
    if units.kind == "rows":
        return select_items(batch, units, items)
    ids = batch["input_ids"]
    return {**batch, "input_ids": ids.flatten()[items.to(ids.device)].view(ids.shape)}
