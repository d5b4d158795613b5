"""Does what the collator makes of an example depend on that example alone?"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.fresh_randomness import fresh_randomness, own_generators
from dp_flash_hf.training.adapter import prepared
from dp_flash_hf.training.batches import units_of
from dp_flash_hf.training.tried_units import length_of
from dp_flash_hf.training.unit_reader import Key, UnitReader
from dp_flash_hf.units import Units, select_items

Collate = Callable[[Any], Any]
Example = tuple[Any, int]  # and the number of its unit

_ALONE = 8  # examples that are collated by themselves, at most


def check_collator(reader: UnitReader, keys: Sequence[Key], chance: random.Random, *, rounds: int) -> None:
    """Raise PrivacyError where the collator lets an example change the rows of others: in its batch, or in later ones.

    Mixing, and memory: two copies of the collator are given the same examples round by round, but for one that is exchanged,
    under the same secret random numbers. The rows of all others must be equal, and so must all rows of the next batch, of
    equal examples again. The collator itself, whose memory copies may hide, is given examples, others, and the first ones
    again. Length: what it makes of an example alone must be what it makes of it among others, but for padding; so a text that
    is cut to the shortest is found.

    Mixing with probability p is found with probability 1 - (1 - p)^rounds, if it shows in the rows of others whenever it
    happens. A collator that mixes a few rows of large batches only, or on a condition that these examples do not meet, is not
    found.

    Args:
        reader: of the training data.
        keys: of the examples of one batch; fewer than two are nothing to compare.
        chance: the secret order and numbers of each round.
        rounds: how many pairs of batches of all examples; there are half as many of two examples.
    """
    if len(keys) < 2:
        return
    examples = reader.examples(keys)
    copies = _copies(reader.collate)
    longest = max(examples, key=_length)  # among the others, so that shapes stay
    for number in range(rounds + rounds // 2):
        if number < rounds:
            *others, last = chance.sample(examples, len(examples))
            instead = chance.choice(others)
            others.insert(chance.randrange(len(examples)), longest)
        elif len(examples) > 2:  # what is collected over a batch differs most in pairs: classes to choose among, say
            *others, last, instead = sorted(chance.sample(examples, 3), key=_length, reverse=True)
        else:
            break
        seed = chance.getrandbits(63)
        one, other = (
            _of_others(_collated(reader, collate, [*others, (example, last[1])], seed), len(others) + 1, reader)
            for collate, (example, _) in zip(copies, (last, instead), strict=True)
        )
        _require_equal(one, other, same_examples=False)
        seed = chance.getrandbits(63)
        _require_equal(*(_collated(reader, collate, examples, seed) for collate in copies), same_examples=True)
    _check_memory(reader, examples, chance)
    _check_alone(reader, examples, chance)


def _length(example: Example) -> int:
    return length_of(example[0])


def _require_equal(one: Mapping[str, Any], other: Mapping[str, Any], *, same_examples: bool) -> None:
    for name, value in one.items():
        found = other.get(name)
        if not isinstance(value, Tensor) or not isinstance(found, Tensor):
            continue
        if found.shape != value.shape and not same_examples:
            continue  # as long as the longest: `_check_alone` looks at lengths
        if found.shape != value.shape or not _equal(found, value):
            what = (
                "the others changes with the last one" if not same_examples else "the same examples changes with earlier ones"
            )
            raise PrivacyError(
                f"the collator mixes examples: {name!r} of {what}, so a unit would reach more than its own rows; mix, sort and "
                "remember nothing in the collator, nor in _prepare_inputs, and draw random numbers from torch's, numpy's or "
                "Python's global generators, or from one that the collator holds"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)


def _check_memory(reader: UnitReader, examples: list[Example], chance: random.Random) -> None:
    """The collator itself, whose memory a copy may hide."""
    seed = chance.getrandbits(63)
    first = _collated(reader, reader.collate, examples, seed)
    for place in range(len(examples)):  # others, of as many shapes as there are examples
        _collated(reader, reader.collate, [examples[place]], seed)
    again = _collated(reader, reader.collate, examples, seed)
    _require_equal(first, again, same_examples=True)


def _check_alone(reader: UnitReader, examples: list[Example], chance: random.Random) -> None:
    """What is drawn at random differs alone and among others: of it only sizes are compared, of all else the values."""
    seeds = [chance.getrandbits(63) for _ in range(2)]
    collate = _copies(reader.collate)[0]
    whole = [_collated(reader, collate, examples, seed) for seed in seeds]
    units = units_of(whole[0], torch.arange(len(examples)), reader.adapter.rows_per_example)
    for place in chance.sample(range(len(examples)), min(_ALONE, len(examples))):
        alone = [_collated(reader, collate, [(examples[place][0], 0)], seed) for seed in seeds]
        # Otherwise select_items would take any tensor with one row for the whole batch's.
        within = select_items(_by_item(whole[0], units), units, units.items(place))
        for name, value in within.items():
            own = alone[0].get(name)
            if not isinstance(own, Tensor) or not isinstance(value, Tensor) or own.dim() != value.dim():
                continue
            drawn = any(not _same(a.get(name), b.get(name)) for a, b in (whole, alone))
            if not _made_alike(name, value, own, drawn=drawn):
                raise PrivacyError(
                    f"the collator makes another {name!r} of an example alone ({tuple(own.shape)}) than among others "
                    f"({tuple(value.shape)}), and not by padding: cut texts to a fixed length (truncation=True, "
                    "max_length=...), and let no row depend on the others of its batch"
                )


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and _equal(a, b)


def _by_item(batch: Mapping[str, Any], units: Units) -> dict[str, Tensor]:
    """What of a batch is laid out by its rows; of a packed row, what each token is and is to become."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    if units.kind == "tokens":
        texts = ("input_ids", "labels")
        return {name: value for name, value in tensors.items() if name in texts and tuple(value.shape[:2]) == units.shape}
    counted = torch.arange(units.n_items)  # the number of a row in its batch is no unit's data
    return {
        name: value
        for name, value in tensors.items()
        if len(value) == units.n_items
        and not (value.shape == counted.shape and torch.equal(value.cpu(), counted.to(value.dtype)))
    }


def _made_alike(name: str, within: Tensor, alone: Tensor, *, drawn: bool) -> bool:
    """Whether rows among others are those made alone and padding, at either end."""
    if within.shape[0] != alone.shape[0] or any(own > most for own, most in zip(alone.shape, within.shape, strict=True)):
        return False
    if drawn:
        return True
    for at_end in (False, True):
        places = tuple(
            slice(most - own, None) if at_end else slice(own) for own, most in zip(alone.shape, within.shape, strict=True)
        )
        if _equal(within[places], alone):
            rest = torch.ones(within.shape, dtype=torch.bool, device=within.device)
            rest[places] = False
            # Positions may go on counting, and masks of pairs of tokens have no one value.
            return name == "position_ids" or within.dim() > 2 or len(within[rest].unique()) <= 1
    return False


def _collated(reader: UnitReader, collate: Collate, examples: Sequence[Example], seed: int) -> dict[str, Any]:
    """One batch under repeated random numbers, of copies of the examples: collators change what they are given."""
    with fresh_randomness(own=own_generators(collate), seed=seed, stream="a check of the collator"):
        return prepared(reader.adapter, collate(copy.deepcopy(list(examples))))[0]


def _of_others(batch: Mapping[str, Any], n_examples: int, reader: UnitReader) -> dict[str, Tensor]:
    """What a collated batch holds of all its examples but the last."""
    units = units_of(batch, torch.arange(n_examples), reader.adapter.rows_per_example)
    kept = units.of_item != n_examples - 1
    out = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if units.kind == "tokens" and tuple(value.shape[:2]) == units.shape:
            out[name] = value.flatten(0, 1)[kept.to(value.device)]
        elif units.kind == "rows" and len(value) == units.n_items:
            out[name] = value[kept.to(value.device)]
    return out


def _copies(collate: Collate) -> tuple[Collate, Collate]:
    """Two collators in the same state, where it can be copied; functions share theirs."""
    try:
        return copy.deepcopy(collate), copy.deepcopy(collate)
    except Exception:
        return collate, collate
