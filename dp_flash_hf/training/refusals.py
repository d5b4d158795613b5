"""What cannot be trained privately, whichever loop runs it: settings of Accelerate, and data that cannot be sampled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sized
from contextlib import suppress
from typing import Any, cast

from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import DistributedType, DynamoBackend
from torch.utils.data import IterableDataset

from dp_flash_hf.errors import UnsupportedError

_SCHEDULES = 100  # looked at, where they wrap each other


def accelerator_refusals(accelerator: Accelerator) -> dict[str, bool]:
    """Settings of Accelerate under which the guarantee would not hold.

    Args:
        accelerator: of the loop, as it is now.

    Returns:
        For each of them, what is wrong with it and what to do instead, and whether it is set; for `refuse`.
    """
    kind = accelerator.distributed_type
    return {
        f"{kind}: its engine owns backward and adds gradients up before they are clipped; use FSDP2 (fsdp_version 2), or DDP": (
            kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        ),
        "FSDP version 1: it flattens parameters, so their per-unit norms cannot be separated; use FSDP2 (fsdp_version: 2)": (
            kind == DistributedType.FSDP and not accelerator.is_fsdp2
        ),
        f"{kind}: not supported; use DDP or FSDP2 on GPUs or CPUs": kind in (DistributedType.XLA, DistributedType.MULTI_SDAA),
        "tensor, context or sequence parallelism: no rank sees a unit's whole gradient; use FSDP2 or HSDP (dp_shard_size, "
        "dp_replicate_size)": any(
            getattr(accelerator.parallelism_config, f"{way}_size", 1) != 1 for way in ("tp", "cp", "sp", "ep")
        ),
        f"mixed_precision={accelerator.mixed_precision!r}: its scaling depends on other units; use 'bf16' or 'no'": (
            accelerator.mixed_precision not in ("no", "bf16")
        ),
        "torch_compile on several processes: not supported; leave it off, or use one process": (
            accelerator.num_processes > 1 and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        ),
        "use_regional_compilation: not yet supported; compile the whole model": bool(
            accelerator.state.dynamo_plugin.use_regional_compilation
        ),
    }


def takes_metrics(scheduler: Any) -> bool:
    """Whether a learning rate schedule, or one that it wraps or holds, steps by results: its `step` takes a metric.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> takes_metrics(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    True
    >>> takes_metrics(torch.optim.lr_scheduler.ConstantLR(optimizer))
    False
    """
    waiting, seen = [scheduler], list[Any]()
    while waiting and len(seen) < _SCHEDULES:
        one = waiting.pop()
        if one is None or any(one is other for other in seen):  # wrappers may hold each other
            continue
        seen.append(one)
        step = getattr(one, "step", None)
        with suppress(TypeError, ValueError):  # nothing that can be called, or in C
            names = inspect.signature(step).parameters if step is not None else ()
            if any("metric" in name or name in ("loss", "val_loss", "score") for name in names):
                return True
        for name in ("scheduler", "lr_scheduler", "_scheduler", "schedulers", "_schedulers"):
            held = getattr(one, name, None)
            waiting += held if isinstance(held, (list, tuple)) else [held]
    return bool(waiting)  # of a wrapper that makes a new one whenever it is asked nothing can be said


def refuse(reasons: dict[str, bool]) -> None:
    """Raise UnsupportedError for all that is present, in one message.

    >>> refuse({"fp16: use bf16": False})
    >>> refuse({"fp16: use bf16": True, "packing: set packing=False": True})
    Traceback (most recent call last):
    dp_flash_hf.errors.UnsupportedError: private training is not possible with fp16: use bf16; and packing: set packing=False
    """
    found = [message for message, present in reasons.items() if present]
    if found:
        raise UnsupportedError("private training is not possible with " + "; and ".join(found))


def refuse_data(dataset: Any) -> None:
    """Raise UnsupportedError for data of which no units can be drawn: streams, several sets, rows of several units' texts."""
    if isinstance(dataset, Mapping):
        raise UnsupportedError(
            f"train_dataset is {len(dataset)} data sets by name ({', '.join(map(str, dataset))}), and each step draws from all "
            "rows at one rate: give it one data set. If they have the same columns and loss, datasets.concatenate_datasets("
            "list(train_dataset.values())) makes them one; if not, train on one after the other, and add their epsilons up"
        )
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        raise UnsupportedError(
            "Poisson sampling needs a train_dataset with a length and random access: load it whole, not streaming"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None and len(dataset):
        first = cast(Any, dataset)[0]
        columns = first if isinstance(first, Mapping) else ()
    if columns and "seq_lengths" in columns:
        raise UnsupportedError(
            "train_dataset holds packed rows (a column 'seq_lengths'): several texts of different units each. Give it one text "
            "per row, and let the collator flatten those drawn: padding_free=True of TRL's SFTConfig, or "
            "DataCollatorWithFlattening"
        )
