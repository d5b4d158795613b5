"""A physical batch that does not fit in memory is computed in two halves, and those in halves of theirs: the same sum."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dp_flash_hf.engine.clipper import Clipper
from dp_flash_hf.engine.gradient_buffer import GradientBuffer
from dp_flash_hf.engine.physical_batch import PhysicalBatch
from dp_flash_hf.errors import PrivacyError


def add_in_halves_if_needed(
    add: Callable[[PhysicalBatch], Tensor], batch: PhysicalBatch, buffer: GradientBuffer, clipper: Clipper
) -> Tensor:
    """Add a batch, or where memory runs out, one half of its units after the other. Returns the loss of all of it.

    add: adds one batch to `buffer`, sets the norms in `clipper`, and returns the loss.

    Raises what `add` raises for anything else, and for one unit alone. Raises PrivacyError where a half could be added and the
    rest could not: the sums are then dropped, because what is in them cannot be taken out again.
    """
    held, dropped = buffer.holds, clipper.dropped_units
    try:
        return add(batch)
    except (RuntimeError, MemoryError) as error:
        owners = [unit for unit, size in enumerate(batch.units.sizes) if size]
        if not _is_out_of_memory(error) or not batch.divisible or len(owners) < 2:
            raise
        if buffer.interrupted and held:
            raise _dropped(buffer) from error
    # Here, not in the except block: there the traceback keeps what the attempt had allocated.
    if buffer.interrupted:
        buffer.drop()
    clipper.recount_from(dropped)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(
        "out of memory in a physical batch: it is computed again in two halves. Smaller physical batches "
        "(per_device_train_batch_size with more accumulation, or max_tokens_per_device) save that time.",
        stacklevel=4,
    )
    total, norms, added = torch.zeros(()), torch.zeros(batch.units.n), False
    try:
        for half in (owners[: len(owners) // 2], owners[len(owners) // 2 :]):
            loss = add_in_halves_if_needed(add, batch.part(half), buffer, clipper)
            added = True
            norms = norms.to(clipper.norms)
            norms[half] = clipper.norms
            total = total.to(loss.device) + loss
    except Exception as error:
        if added:  # the first half is in the sums, and cannot be taken out again
            raise _dropped(buffer) from error
        raise
    clipper.set_norms(norms)
    return total


def _dropped(buffer: GradientBuffer) -> PrivacyError:
    buffer.drop()
    return PrivacyError(
        "a batch that ran out of memory could be added in part only, so the whole step's sums were dropped, and nothing "
        "was released; begin the step again with smaller physical batches, or resume from the last checkpoint with them"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    marks = ("can't allocate memory", "out of memory", "not enough memory")  # of torch's allocators: CPU, CUDA, CPU on Windows
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(mark in str(error).lower() for mark in marks)
