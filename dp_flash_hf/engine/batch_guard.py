"""What is known to make units depend on each other, refused by name: in a model, and in the batches it is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.units import Batch, leading_shape

# In the configuration of a model, the tokens that stand for something which lies in a tensor of its own.
_PLACEHOLDERS = tuple(f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index"))


def refuse_model(model: nn.Module) -> None:
    """Refuse models that couple units whatever the batch.

    Those are layers that mix all rows of a batch (batch normalisation, running statistics) or change their parameters in a
    forward pass (embeddings with `max_norm`), and wrappers that add gradients up before they are clipped (DDP, DataParallel,
    the first FSDP, DeepSpeed).

    >>> refuse_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    >>> refuse_model(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dp_flash_hf.errors.UnsupportedError: 1: batch normalisation and running statistics mix all units; ...

    Raises:
        UnsupportedError: with the name of the module, and what to use.
    """
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise UnsupportedError("DistributedDataParallel adds gradients up before they are clipped; give its .module")
        if isinstance(module, (nn.DataParallel, FullyShardedDataParallel)) or type(module).__name__ == "DeepSpeedEngine":
            raise UnsupportedError(
                f"{type(module).__name__} adds gradients up before they are clipped; use DDP with one process for each device, "
                "or FSDP2 (torch's fully_shard, fsdp_version 2 of Accelerate)"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False):
            raise UnsupportedError(
                f"{name}: batch normalisation and running statistics mix all units; replace it by GroupNorm or LayerNorm"
            )
        if isinstance(module, nn.Embedding) and module.max_norm is not None and module.weight.requires_grad:
            raise UnsupportedError(
                f"{name}: an embedding with max_norm rewrites its rows without noise in every forward; set max_norm=None"
            )


class BatchGuard:
    """Refuses the batches in which a model that keeps units apart otherwise would couple them.

    It is called with every batch. What it knows of is pictures and sounds of all rows in one tensor, where rows do not hold the
    same number of them, and rotary frequencies that follow the longest text of the batch. Anything else that couples units is
    for `ClippingEngine.check` to find.

    Args:
        model: whose configuration names the tokens that stand for pictures and sounds, and whose modules have rotary
            frequencies.
    """

    def __init__(self, model: nn.Module) -> None:
        self._longest = _longest_fixed_rope(model)
        config = getattr(model, "config", None)
        tokens = {getattr(config, name, None) for name in _PLACEHOLDERS}
        self._placeholders = sorted(token for token in tokens if isinstance(token, int))

    def __call__(self, batch: Batch) -> None:
        """Look at one batch.

        Raises:
            UnsupportedError: for rows with unequal numbers of pictures, and where the longest text sets the frequencies.
        """
        ids, positions = batch.get("input_ids"), batch.get("position_ids")
        # Without numbers that could be pictures, such a token is a word like any other.
        if (
            isinstance(ids, Tensor)
            and ids.dim() == 2
            and any(isinstance(x, Tensor) and x.is_floating_point() for x in batch.values())
        ):
            for token in self._placeholders:
                counts = (ids == token).sum(1)
                if len(counts) and bool((counts != counts[0]).any()):
                    raise UnsupportedError(
                        f"rows hold {sorted(set(counts.tolist()))} tokens {token} each: pictures and sounds of all rows lie in "
                        "one tensor, and nothing says which are whose; give every row of a batch the same number"
                    )
        if self._longest is not None:
            length = (
                int(positions.max()) + 1 if isinstance(positions, Tensor) and positions.numel() else leading_shape(batch)[-1]
            )
            if length > self._longest:
                raise UnsupportedError(
                    f"{length} positions: beyond {self._longest} this model's rotary frequencies follow the longest text of "
                    f"the batch, and so would every gradient; cut texts to {self._longest} tokens, or use another rope_type"
                )


def _longest_fixed_rope(model: nn.Module) -> int | None:
    """Up to how many positions the rotary frequencies are the same whatever else is in the batch; None: always."""
    limits = []
    for module in model.modules():
        rope: Any = module
        kinds = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "longrope":
                parameters = rope.config.rope_parameters
                limits.append(int((parameters if layer is None else parameters[layer])["original_max_position_embeddings"]))
            elif kind is not None and "dynamic" in kind:
                limits.append(int(rope.original_max_seq_len))
    return min(limits, default=None)
