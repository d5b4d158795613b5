"""FSDP2 as Accelerate sets it up, from the Trainer's `fsdp` settings or a plugin: training in one process, sharded.

Accelerate offers it on GPUs only; `tests.support.ranks.fsdp_on_cpu` lifts that, and all else that runs here is its own.
`tests/support/fsdp2_gpu.py` runs the same on GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.integrations.accelerate import make_private
from dp_flash_hf.integrations.trainer import DPCallback
from tests.support import ROOT
from tests.support.models import tiny
from tests.support.ranks import fresh, fsdp_on_cpu, noise_if, whole, world
from tests.support.trainers import Pad, attached, config, texts, trainer_for, without_dropout

SEED, FULL, ADAPTER = 5, 4.5, 1.5  # bounds near the median norms: some units are clipped and some are not
WRAP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def plain_names(model: Any) -> dict[str, Tensor]:
    """Trained parameters, whole, as a model without wrappers calls them."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): whole(p.detach()).float().cpu()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def trainer_of(path: str, lora: bool, on_cpu: bool, **settings: Any) -> tuple[Any, DPCallback]:
    fresh()
    model: Any = without_dropout(tiny("llama", torch.float32, attention="dp_flash"))
    if lora:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    place = {"use_cpu": True, "ddp_backend": "gloo"} if on_cpu and Ranks().size > 1 else {"use_cpu": on_cpu}
    share = 12 // Ranks().size // settings.get("gradient_accumulation_steps", 1)
    chosen = {"learning_rate": 0.5, "per_device_train_batch_size": share, **place, **settings}
    trainer = trainer_for(model, Path(path), **chosen)
    return trainer, attached(trainer, seed=SEED, max_grad_norm=ADAPTER if lora else FULL)


def trained(
    path: str,
    lora: bool = False,
    more: dict[str, Any] | None = None,
    accumulation: int = 1,
    replicas: int = 1,
    *,
    on_cpu: bool = True,
) -> dict[str, Tensor]:
    """Parameters after three steps without noise, of 12 units expected in each, on however many ranks there are.

    more: what `fsdp_config` says besides; None: not sharded.
    """
    with fsdp_on_cpu():
        settings: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": accumulation}
        if more is not None:
            settings |= {"fsdp": True, "fsdp_config": {**WRAP, **more}}
        if replicas > 1:
            shards = Ranks().size // replicas
            settings["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
        trainer, dp = trainer_of(path, lora, on_cpu, **settings)
        with noise_if(False):
            trainer.train()
    assert (dp.report().steps, dp.report().expected_batch_size) == (3, 12)
    assert any(isinstance(p, DTensor) for p in trainer.model.parameters()) == (more is not None)
    return plain_names(trainer.model)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "kept whole after forward": {"reshard_after_forward": False},
    "offload": {"offload_params": True},
}


@pytest.mark.gpu
def test_a_trainer_on_gpus() -> None:
    """One is enough for all but communication."""
    n = torch.cuda.device_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run(
        [*command, "-m", "tests.support.fsdp2_gpu"], capture_output=True, text=True, check=False, cwd=ROOT, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("variant", "lora", "accumulation", "replicas"),
    [
        ("plain", False, 1, 1),
        ("activation checkpointing", True, 1, 1),
        *(
            pytest.param(*case, marks=pytest.mark.coverage)
            for case in (
                ("offload", False, 1, 1),
                ("plain", True, 3, 2),
                ("activation checkpointing", False, 1, 1),
                ("kept whole after forward", False, 1, 1),
                ("plain", True, 1, 1),
                ("plain", False, 3, 1),
                ("plain", True, 3, 1),
                ("plain", False, 1, 2),
                ("plain", True, 1, 2),
                ("plain", False, 3, 2),
            )
        ),
    ],
)
def test_a_trainer_is_a_trainer_in_one_process(
    variant: str, lora: bool, accumulation: int, replicas: int, tmp_path: Path
) -> None:
    wanted = trained(str(tmp_path / "one"), lora)
    ranks = world(2 * replicas)
    for found in ranks.run(trained, str(tmp_path / "two"), lora, VARIANTS[variant], accumulation, replicas):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def saved_and_resumed(path: str, resume: bool) -> tuple[dict[str, Tensor], int, float]:
    """Four noisy steps with a sharded checkpoint after the second, or the latter two again, from there."""
    with fsdp_on_cpu():
        settings: dict[str, Any] = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "learning_rate": 0.01,
        }
        fsdp = {"fsdp": True, "fsdp_config": {**WRAP, "state_dict_type": "SHARDED_STATE_DICT"}}
        trainer, dp = trainer_of(path, False, True, **settings, **fsdp)
        with noise_if(False):
            trainer.train(resume_from_checkpoint=f"{path}/checkpoint-2" if resume else None)
    report = dp.report()
    return plain_names(trainer.model), report.steps, report.epsilon


@pytest.mark.complete
def test_a_sharded_checkpoint_of_a_trainer_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    wanted, steps, epsilon = world(2).run(saved_and_resumed, str(tmp_path), False)[0]
    assert steps == 4
    assert list((tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))
    for size in (4, 2):
        for found, steps, spent in world(size).run(saved_and_resumed, str(tmp_path), True):
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
            assert steps == {4: 6, 2: 8}[size]  # two steps after the checkpoint were lost each time, and count
            assert spent > epsilon


def looped(replicas: int = 0, precision: str | None = None, strategy: Strategy = "auto") -> dict[str, Tensor]:
    """Parameters after three steps of a loop with Accelerate, without noise. replicas: of what is sharded; 0: it is whole."""
    fresh()
    with fsdp_on_cpu():
        settings: dict[str, Any] = {"cpu": True, "mixed_precision": precision}
        if replicas:
            settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
            )
        if replicas > 1:
            settings["parallelism_config"] = ParallelismConfig(
                dp_replicate_size=replicas, dp_shard_size=Ranks().size // replicas
            )
        accelerator: Any = Accelerator(**settings)
        model: Any = without_dropout(tiny("llama", torch.float32, attention="dp_flash"))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
        private = make_private(
            model=model,
            optimizer=optimizer,
            train_dataset=texts(),
            collate_fn=Pad(),
            accelerator=accelerator,
            config=config(seed=SEED, max_grad_norm=FULL),
            expected_batch_size=9,
            steps=3,
            max_rows_per_device=3,
            strategy=strategy,
        )
        with noise_if(False):
            for batch in private.loader:
                private.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
        private.stop()
    assert any(isinstance(p, DTensor) for p in model.parameters()) == (replicas > 0)
    return plain_names(model)


@pytest.mark.complete
@pytest.mark.parametrize(
    ("size", "replicas", "strategy"),
    [
        (2, 1, "two_pass"),
        (4, 2, "bookkeeping"),
        pytest.param(2, 1, "bookkeeping", marks=pytest.mark.complete),
        pytest.param(4, 2, "two_pass", marks=pytest.mark.complete),
    ],
)
def test_a_loop_with_the_plugin_is_a_loop_in_one_process(size: int, replicas: int, strategy: str) -> None:
    wanted = looped()
    for found in world(size).run(looped, replicas, None, strategy):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.complete
def test_mixed_precision_of_the_plugin() -> None:
    """Sums and parameters stay float32; what is left are roundings of bfloat16, of which an update has a few hundred."""
    before = plain_names(without_dropout(tiny("llama", torch.float32)))
    wanted = looped()
    for found in world(2).run(looped, 1, "bf16"):
        moved = sum(float((found[name] - before[name]).square().sum()) for name in wanted) ** 0.5
        apart = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5
        assert 0 < apart < 0.03 * moved
