"""Which units the checks compute with, and what else their labels are made to be."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_flash_hf.mechanisms.fresh_randomness import same_randomness
from dp_flash_hf.training.batches import text_lengths
from dp_flash_hf.training.columns import column
from dp_flash_hf.units import IGNORED, Units

TRIED = 4  # units in a batch of the checks, computed as one batch and one by one
LOOKED_AT = 64  # units they are chosen from
_KEPT = 64  # different values of a label that are remembered
# What is in the name of a model's input. Every other column of a batch is taken for a label, whatever it is called.
_INPUTS = ("ids", "mask", "pixel", "image", "video", "audio", "input", "embeds", "features", "bbox", "logps", "length")
# How a loss may compare labels: two that differ among equal ones, all of them different, and the first the other way round.
_PLANS = ("pairs", "apart", "turned")


def spread_units(n_units: int, chance: random.Random, most: int = LOOKED_AT) -> list[int]:
    """Units from all over the data, ascending, at random one of each of `most` equal stretches: data may be sorted."""
    edges = [stretch * n_units // most for stretch in range(most + 1)]
    return [chance.randrange(a, b) for a, b in pairwise(edges) if b > a]


def choose_units(examples: Mapping[int, Any]) -> list[int]:
    """Up to four of these units, which differ in as many of their columns as can be.

    The longest and the shortest text come first: between them there is padding to find. Each further one is the unit whose
    values are rarest among those chosen, counted over all columns, so that a label with two values has both of them though one
    is rare; of several, the one farthest away. Units of which nothing is labelled come last.

    >>> choose_units({unit: {"text": [1, 2], "label": int(unit == 7)} for unit in range(9)})
    [0, 7, 3, 5]

    Args:
        examples: unit -> its first example.
    """
    lengths = {unit: length_of(example) for unit, example in examples.items()}
    columns = {unit: _values_of(example) for unit, example in examples.items()}
    free = [unit for unit in examples if _is_labelled(examples[unit])]
    chosen: list[int] = []
    if free:
        longest, shortest = max(free, key=lengths.__getitem__), min(free, key=lengths.__getitem__)
        chosen = [longest, shortest] if lengths[longest] > lengths[shortest] else free[:1]
    while len(chosen) < min(TRIED, len(examples)):

        def rarity(unit: int) -> tuple[float, int]:
            of = [columns[other] for other in chosen]
            equal = [sum(other.get(name) == value for other in of) for name, value in columns[unit].items()]
            return sum(1 / (1 + n) for n in equal), min((abs(unit - other) for other in chosen), default=0)

        left = [unit for unit in free if unit not in chosen] or [unit for unit in examples if unit not in chosen]
        chosen.append(max(left, key=rarity))
    return chosen


def length_of(example: Any) -> int:
    """Tokens of an example: of its longest field, if it has several (a chosen and a rejected answer, say)."""
    sequences = [
        field
        for field in (example.values() if isinstance(example, Mapping) else ())
        if (isinstance(field, (Tensor, np.ndarray)) and field.ndim == 1)
        or (isinstance(field, list) and len(field) > 0 and isinstance(field[0], int))
    ]
    return max(map(len, sequences), default=0)


def lengths_of_units(dataset: Any, rows: Sequence[Tensor] | None, name: str) -> Tensor:
    """Tokens of the longest row of each unit: int64 (units,).

    Args:
        dataset: of the training.
        rows: for every unit, the int64 (rows,) that it owns; None where unit i is row i.
        name: of a column that holds lengths; without it they are counted.
    """
    with same_randomness(dataset):
        given = name in getattr(dataset, "column_names", ())
        of_row = torch.tensor(column(dataset, name) if given else [length_of(dataset[row]) for row in range(len(dataset))])
    return of_row if rows is None else torch.stack([of_row[own].max() for own in rows])


def known_values(examples: Iterable[Any]) -> dict[str, list[float]]:
    """The different numbers that each column of the examples holds, ascending, `IGNORED` left out: up to 64 of them."""
    found: dict[str, set[float]] = {}
    for example in examples:
        for name, field in _fields(example):
            values = found.setdefault(name, set())
            if len(values) < _KEPT and isinstance(field, (bool, int, float, list, tuple, np.ndarray, np.generic, Tensor)):
                flat = np.asarray(field).ravel() if not isinstance(field, Tensor) else field.detach().cpu().numpy().ravel()
                if flat.dtype.kind in "biuf":
                    values.update(float(value) for value in flat[:_KEPT] if value != IGNORED and np.isfinite(value))
    return {name: sorted(values) for name, values in found.items()}


def relabelled(
    batch: dict[str, Any],
    units: Units,
    known: Mapping[str, Sequence[float]],
    n_classes: int | None,
    chance: random.Random,
) -> list[dict[str, Any]]:
    """The batch with other labels, of every kind and under whatever key: once so that units share two labels, once all apart.

    A loss may compare units only where their labels differ (rankings, margins, weights by the classes of the batch) or only
    where they are the same (distances to the centre of a class), and the units tried may all have one label. Whole numbers
    become others that the data hold, or that a classifier knows; 0 and 1 change places where only one of them is known.
    Fractions are moved between the smallest and the largest that the data hold; where there is one only, its sign is turned, or
    it is replaced by 0 or 1. Positions of answers stay inside the shortest text. What is ignored (`IGNORED`) stays so.

    Args:
        batch: of the units tried.
        units: of its rows or tokens.
        known: see `known_values`.
        n_classes: of a classifier.
        chance: which values.

    Returns:
        Batches of the same shapes, in which nothing but labels differs; none where there are no labels.
    """
    labels = {name: value for name, value in batch.items() if _is_label(name, value, units)}
    out = []
    for plan in _PLANS if labels else ():
        made = dict(batch)
        for name, value in labels.items():
            levels = _levels(name, value, batch, known, n_classes)
            made[name] = _changed(value, units, levels, plan, chance)
        out.append(made)
    return out


def _is_label(name: str, value: Any, units: Units) -> bool:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.is_complex():
        return False
    if units.kind == "tokens":
        return "label" in name and tuple(value.shape[:2]) == units.shape
    if len(value) != units.n_items or value.dim() > 3:
        return False
    return "label" in name or not any(part in name for part in _INPUTS)


def _levels(
    name: str, value: Tensor, batch: Mapping[str, Any], known: Mapping[str, Sequence[float]], n_classes: int | None
) -> list[float]:
    """Values that this label may have, ascending, two at least."""
    if "position" in name and not value.is_floating_point():
        return [0.0, float(max(1, int(text_lengths(batch).min()) - 1))]
    own = value[(value != IGNORED) & value.isfinite()].double().unique()[:_KEPT].tolist()
    # Collators rename a label that the data hold under a name of its own.
    elsewhere = [known[alias] for alias in (name, name.removesuffix("s"), "label", "label_ids") if known.get(alias)][:1]
    levels = {*own, *(elsewhere[0] if elsewhere else ())}
    if not value.is_floating_point():
        levels = {level for level in levels if level == round(level)}
        if n_classes is not None and n_classes > 1 and max(levels, default=0) < n_classes:
            levels |= {float(label) for label in range(min(n_classes, _KEPT))}
    only = min(levels, default=0.0)
    if len(levels) < 2:
        levels = {only, {0.0: 1.0, 1.0: 0.0}.get(only, -only if value.is_floating_point() else only - 1)}
    return sorted(levels)


def _changed(value: Tensor, units: Units, levels: Sequence[float], plan: str, chance: random.Random) -> Tensor:
    """One label of all units as the plan says; all values of a unit alike, but for the columns of a narrow matrix."""
    number = units.of_item.clamp(min=0)
    if units.kind == "tokens":
        number = number.view(units.shape)
    number = number.reshape(*number.shape, *[1] * (value.dim() - number.dim())).expand(value.shape)
    if units.kind == "rows" and value.dim() == 2 and value.shape[1] <= len(levels) * units.n:
        number = number + torch.arange(value.shape[1])  # one of several labels of a row after the other
    low, high = levels[0], levels[-1]
    if plan != "apart":
        made = torch.where((number + (plan == "turned")) % 2 == 0, low, high)
    elif value.is_floating_point():
        moved = torch.tensor([chance.random() for _ in range(value.numel())]).view(value.shape)
        made = low + (high - low) * (number % units.n + moved) / units.n
    else:
        made = torch.tensor(levels)[(number + chance.randrange(len(levels))) % len(levels)]
    made = made.to(value.device, value.dtype)
    return made if value.is_floating_point() else torch.where(value == IGNORED, value, made)


def _fields(example: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(example, Mapping):
        return ((str(name), field) for name, field in example.items())
    if isinstance(example, (list, tuple)):
        return ((str(place), field) for place, field in enumerate(example))
    return ()


def _values_of(example: Any) -> dict[str, Any]:
    """What tells one example's columns from another's: numbers and short texts themselves, all else by their bytes."""
    out: dict[str, Any] = {}
    for name, field in _fields(example):
        if isinstance(field, Tensor):
            field = field.detach().cpu().numpy() if field.dtype != torch.bfloat16 else field.detach().cpu().float().numpy()
        out[name] = field if isinstance(field, (bool, int, float, str)) else hash(_bytes_of(field))
    return out


def _bytes_of(field: Any) -> bytes:
    return field.tobytes() if isinstance(field, (np.ndarray, np.generic)) else repr(field).encode()


def _is_labelled(example: Any) -> bool:
    """Whether something in `labels` is not ignored, or there is no such column to look at."""
    labels = example.get("labels") if isinstance(example, Mapping) else None
    if labels is None or not isinstance(labels, (list, tuple, np.ndarray, Tensor)):
        return True
    return bool((np.asarray(labels) != IGNORED).any()) if not isinstance(labels, Tensor) else bool((labels != IGNORED).any())
