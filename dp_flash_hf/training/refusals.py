"""training.refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, cast

from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import DistributedType, DynamoBackend
from torch.utils.data import IterableDataset

from dp_flash_hf.errors import UnsupportedError


def accelerator_refusals(accelerator: Accelerator) -> dict[str, bool]:
    """What of Accelerate's settings cannot be private, and whether it is set."""
    kind = accelerator.distributed_type
    return {
        f"{kind}: its engine owns backward and adds gradients up before they are clipped; use FSDP2 (fsdp_version 2), or DDP": (
            kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        ),
        "FSDP version 1: it flattens parameters, so their per-unit norms cannot be told apart; use FSDP2 (fsdp_version: 2)": (
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


def refuse(reasons: dict[str, bool]) -> None:
    """Raise UnsupportedError for all that is present, in one message."""
    found = [message for message, present in reasons.items() if present]
    if found:
        raise UnsupportedError("private training is not possible with " + "; and ".join(found))


def _refuse_data(dataset: Any) -> None:
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
