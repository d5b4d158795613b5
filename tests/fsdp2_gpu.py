"""Trainer with FSDP2 by Accelerate, which needs a GPU: `torchrun --nproc-per-node N tests/fsdp2_gpu.py`.

Trains twice, whole and split up, without noise and with the same draws, and prints how far the parameters are apart.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.models import tiny
from tests.ranks import fresh, noise_if
from tests.test_distributed import whole
from tests.trainers import attached, trainer_for, without_dropout

SEED, C = 5, 4.5  # some units are clipped, and some are not


def trained(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
    fresh()
    trainer = trainer_for(
        without_dropout(tiny("llama", torch.float32)), Path(folder), use_cpu=False, learning_rate=0.5, max_steps=3, **settings
    )
    dp = attached(trainer, seed=SEED, max_grad_norm=C)
    with noise_if(False):
        trainer.train()
    assert dp.report().steps == 3
    split = any(type(p).__name__ == "DTensor" for p in trainer.model.parameters())
    assert split == ("fsdp" in settings), "FSDP2 did not split the model up"
    return {name: whole(p.detach()).float().cpu() for name, p in trainer.model.named_parameters()}


def main() -> None:
    wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "activation checkpointing": {"activation_checkpointing": True},
        "resharding": {"reshard_after_forward": True},
        "offload": {"offload_params": True},
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted = trained(f"{folder}/whole")
        for name, more in variants.items():
            found = trained(f"{folder}/{name}", fsdp="full_shard", fsdp_config={**wrap, **more})
            apart = max(float((found[key] - wanted[key]).abs().max()) for key in wanted)
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"{name}: {apart:.2e}", flush=True)
            if apart > 1e-4:  # float32 products of three steps, in another order
                sys.exit(f"{name}: parameters are {apart} apart")


if __name__ == "__main__":
    main()
