"""Whether rows to evaluate on were taken out of the training data: results on them are private, and have no noise."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dp_flash_hf.accounting.dataset_fingerprint import row_hash
from dp_flash_hf.mechanisms.fresh_randomness import same_randomness
from dp_flash_hf.training.columns import as_stored

_TRAINING_ROWS, _EVALUATION_ROWS = 8192, 2048  # read at most, at random
_SECONDS, _LEAST = 5.0, 64  # for each dataset, but so many rows are read however slow they are
_BY_CHANCE = 0.01  # of evaluation rows, that equal a training row though they were not taken from there


def rows_in_training(training: Any, evaluated: Any) -> tuple[int, int]:
    """How many evaluation rows are among those for training, where they are more than chance puts there.

    Rows are compared by a keyed hash of all columns that both datasets have, as they are stored: whatever format or transform
    they are read through. What is read is a random sample of large datasets.

    Found are datasets of which all or many rows were taken from the training data. Not found are:

    - a few rows among many: 1 % may be equal by chance, and twice the share of training rows that occur there more than once;
    - rows that were changed, were tokenised in another way, have another number or name in a column, or that a dataset makes
      anew every time they are read;
    - rows of datasets without a length and random access, or without a column in common;
    - a few hundred rows out of several millions, of which the sample holds none.

    Args:
        training: with a length and random access.
        evaluated: anything; None for no dataset.

    Returns:
        (rows found among the training rows that were read, evaluation rows read); (0, 0) where there is no sign of any taken.
    """
    if not all(hasattr(data, "__len__") and hasattr(data, "__getitem__") and len(data) for data in (training, evaluated)):
        return 0, 0
    stored = as_stored(training), as_stored(evaluated)
    with same_randomness(training), same_randomness(evaluated):
        columns = _common_columns(stored[0][0], stored[1][0])
        if columns is not None and not columns:
            return 0, 0
        key = os.urandom(32)
        known = Counter(_hashes(stored[0], columns, key, _TRAINING_ROWS))
        asked = _hashes(stored[1], columns, key, _EVALUATION_ROWS)
    read = known.total()
    twins = sum(times for times in known.values() if times > 1) / read
    share = read / len(stored[0])  # of what was taken from there, as much is found
    found = sum(row in known for row in asked)
    by_chance = len(asked) * (share * _BY_CHANCE + 2 * twins) + (share < 1)
    return (found, len(asked)) if found > by_chance else (0, 0)


def _common_columns(row: Any, other: Any) -> list[str] | None:
    """Names of the columns that rows have in common; None for rows that are no mappings, and compared as a whole."""
    if not isinstance(row, Mapping) or not isinstance(other, Mapping):
        return None
    return sorted(row.keys() & other.keys())


def _hashes(data: Any, columns: Sequence[str] | None, key: bytes, most: int) -> list[bytes]:
    """Of rows at random: a sample that no generator's state shows."""
    end, hashes = time.monotonic() + _SECONDS, []
    for place in random.SystemRandom().sample(range(len(data)), min(most, len(data))):
        row = data[place]
        hashes.append(row_hash(row if columns is None else {name: row.get(name) for name in columns}, key))
        if len(hashes) >= _LEAST and time.monotonic() > end:
            break
    return hashes
