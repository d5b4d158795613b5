"""One draw, one release: every part of a draw knows which one it is, and is added once, as it was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_flash_hf.errors import PrivacyError

DRAW = "dp_draw"  # key of a batch under which its tag stands: see `tagged`
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(list[Any]):
    """The row keys of one part of a draw: a list that knows which part it is.

    Args:
        items: the keys.
        number: of the draw, counted from the beginning of the training.
        part: which one of it, from 0.
        parts: how many it has.
    """

    def __init__(self, items: Iterable[Any] = (), number: int = 0, part: int = 0, parts: int = 1) -> None:
        super().__init__(items)
        self.number, self.part, self.parts = number, part, parts


def tagged(batch: dict[str, Any], part: Part) -> dict[str, Any]:
    """The collated batch with a tag, int64 (4,): the draw's number, the part, how many there are, and a fingerprint."""
    return {**batch, DRAW: torch.tensor([part.number, part.part, part.parts, fingerprint(batch)])}


class DrawInProgress:
    """Which parts of a draw were added to the step so far.

    Whatever code handles batches between the draw and the step (an overridden `get_batch_samples`, a callback, one's own
    loop) may repeat, drop, exchange or change them, or go on after an error. Then `arrive` or `require_whole` raises, and
    nothing is released.
    """

    def __init__(self) -> None:
        self._arrived: set[int] = set()
        self._added = 0  # of them; the others could not be computed, and which those are may depend on one unit
        self._parts = 1
        self._units = 0

    def arrive(self, batch: Mapping[str, Any], due: int) -> None:
        """A part is about to be added.

        Args:
            batch: of `tagged`, on any device.
            due: the number of the draw that is the next to be released.

        Raises:
            PrivacyError: it is none of that draw, was added before, or is not as it was drawn.
        """
        if DRAW not in batch:
            raise PrivacyError(
                "the batch was not drawn by the private data loader, or lost its entry 'dp_draw' on the way, so its sampling "
                "is not what is accounted: add each batch of the loader once, and change none"
            )
        number, part, parts, content = batch[DRAW].tolist()
        if number != due or part in self._arrived:
            raise PrivacyError(
                f"part {part + 1} of draw {number} was given where parts of draw {due} are due"
                + (" and this one was added already" if number == due else "")
                + ": each batch of the loader has to be added once, in order, an empty one too. Does something repeat, drop or "
                "read ahead batches (an overridden get_batch_samples, a callback that ends an epoch early while "
                "dataloader_num_workers > 0), or change gradient_accumulation_steps during training?"
            )
        if fingerprint({name: value for name, value in batch.items() if name != DRAW}) != content:
            raise PrivacyError(
                "the batch was changed after it was drawn: one unit's data could then be in many rows. Change examples or "
                "batches in the dataset or the collator; to move them to a device is fine"
            )
        self._arrived.add(part)
        self._parts = parts

    @property
    def began(self) -> bool:
        """Whether what arrived is the first part of a draw."""
        return len(self._arrived) == 1

    def count(self, units: int) -> None:
        """So many units were added."""
        self._units += units

    def added(self) -> None:
        """All of the part that arrived last was added."""
        self._added += 1

    def require_whole(self, units: int | None) -> None:
        """Raise PrivacyError unless all parts were added, and nothing else.

        Args:
            units: how many are in the sums; None where that is not known.
        """
        if self._added < len(self._arrived):
            raise PrivacyError(
                f"{len(self._arrived) - self._added} of {self._parts} parts of a draw could not be computed, and an optimizer "
                "step is due: without them one unit could keep others out of the sum. Let the error end the training, and "
                "mend its cause (smaller batches, if memory ran out)"
            )
        if self._added != self._parts:
            raise PrivacyError(
                f"{self._added} of {self._parts} parts of a draw were added, and an optimizer step is due: give every "
                "batch of the loader to the step, an empty one too, and leave gradient_accumulation_steps as it was when "
                "training began"
            )
        if units is not None and units != self._units:
            raise PrivacyError(
                f"the sums hold {units} units and {self._units} were drawn: something else ran the engine, or emptied it, "
                "during the step. Use an engine of its own for that, outside of private training"
            )

    def end(self) -> None:
        """The draw was released, or given up: nothing of it is in the sums."""
        self._arrived, self._added, self._parts, self._units = set(), 0, 1, 0


def fingerprint(batch: Mapping[str, Any]) -> int:
    """A hash of what a batch holds, wherever it lies; of private data, and as secret.

    Of tensors with more than two dimensions only sums over all but the first two are hashed: they show whose rows or tokens
    changed, in one pass. Of unknown things only the type is.

    >>> fingerprint({"x": torch.tensor([1, 2])}) == fingerprint({"x": torch.tensor([2, 1])})
    False
    """
    total = hashlib.blake2b(digest_size=8)
    _hash(total, batch)
    return int.from_bytes(total.digest(), "little", signed=True)


def _hash(total: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        total.update(b"{%d" % len(value))
        for name in sorted(value, key=str):
            total.update(repr(name).encode())
            _hash(total, value[name])
    elif isinstance(value, Tensor):
        _hash_tensor(total, value.detach())
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        _hash_tensor(total, torch.as_tensor(np.ascontiguousarray(value)))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        total.update(b"[%d" % len(value))
        for item in value:
            _hash(total, item)
    elif isinstance(value, (str, bytes, bool, int, float, type(None))):
        total.update(repr(value).encode())
    else:
        total.update(type(value).__qualname__.encode())


def _hash_tensor(total: Any, value: Tensor) -> None:
    total.update(f"{tuple(value.shape)}{value.dtype}".encode())
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        return
    value = torch.view_as_real(value) if value.is_complex() else value
    bits = value.contiguous().view(_BITS[value.element_size()])
    if bits.dim() > 2:
        bits = bits.flatten(2).sum(2, dtype=torch.int64)
    total.update(bits.cpu().numpy().tobytes())
