"""Whether a dataset is the one that an earlier run drew from, known by a keyed hash of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_EXAMPLES_READ = 1024  # for a dataset's fingerprint
_READ_TWICE = 8  # of them, to find out whether reading is random


def fingerprint_of(dataset: Any, key: str, examples: int = _EXAMPLES_READ) -> str:
    """A keyed hash of a dataset's size, columns, and up to so many examples from all over it.

    Numbers hash by value, whether a row of them is a list, a tensor or an array. Of a dataset that reads differently every time
    (random crops, say) only size and columns are hashed, and of unknown things in an example only their type. Equal datasets
    have equal hashes; of two datasets that differ only in examples that are not read, the hashes are equal too.

    The hash is of private data: whoever has it and the key can check guesses at the data.

    >>> key = "00" * 16
    >>> fingerprint_of([{"ids": [1, 2]}], key) == fingerprint_of([{"ids": torch.tensor([1, 2])}], key)
    True
    >>> fingerprint_of([{"ids": [1, 2]}], key) == fingerprint_of([{"ids": [1, 3]}], key)
    False

    Args:
        dataset: With a length and random access by row; of a `datasets.Dataset`, what it holds without format and transforms.
        key: Hexadecimal, of an even number of digits, at most 128.
        examples: Most examples read, at equal distances.

    Returns:
        32 hexadecimal digits.
    """
    raw = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset  # before transforms, which may be random
    n = len(raw)
    rows = sorted({row * n // examples for row in range(examples)}) if n > examples else list(range(n))
    columns = getattr(raw, "column_names", None)
    total = hashlib.blake2b(key=bytes.fromhex(key), digest_size=16)
    total.update(repr((n, sorted(columns) if isinstance(columns, list) else None)).encode())
    twice = rows[:: max(1, len(rows) // _READ_TWICE)][:_READ_TWICE]
    if all(_encoded(raw[row]) == _encoded(raw[row]) for row in twice):
        for row in rows:
            total.update(_encoded(raw[row]))
    return total.hexdigest()


def row_hash(row: Any, key: bytes) -> bytes:
    """A keyed hash of one row, equal for equal rows, as `fingerprint_of` reads them; key: at most 64 bytes."""
    return hashlib.blake2b(_encoded(row), key=key, digest_size=16).digest()


def _encoded(value: Any) -> bytes:
    """The same bytes for equal data, and with its length in front, so that parts cannot run into each other."""
    if isinstance(value, Mapping):
        body = b"{" + b"".join(_encoded(str(name)) + _encoded(value[name]) for name in sorted(value, key=str))
    elif isinstance(value, (str, bytes)):
        body = b"s" + (value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)
    elif isinstance(value, (bool, int, float, np.generic, np.ndarray, Tensor)) or _is_plain_list(value):
        body = _encoded_values(value)
    elif isinstance(value, Sequence):
        body = b"[" + b"".join(map(_encoded, value))
    elif value is None:
        body = b"0"
    elif hasattr(value, "__array_interface__"):  # pictures
        body = _encoded_values(np.asarray(value))
    elif dataclasses.is_dataclass(value):
        body = _encoded({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    else:
        body = b"?" + type(value).__qualname__.encode()
    return len(body).to_bytes(8, "little") + body


def _is_plain_list(value: Any) -> bool:
    """Whether this is a list of Python's own floats or ints, which can be hashed at once."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(type(item) is float for item in value) or all(type(item) is int and abs(item) < 2**63 for item in value)


def _encoded_values(value: Any) -> bytes:
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype).numpy()
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        array = array.astype(np.int64)
    elif array.dtype.kind == "f":
        array = array.astype(np.float64)
    else:
        return b"o" + repr(array.tolist()).encode()
    return array.dtype.kind.encode() + repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
