"""Private training on several ranks is private training on one: the same draws, sums, noise and books."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from dp_flash_hf import mechanism
from dp_flash_hf.distributed import Ranks, checksum, local, part_of
from dp_flash_hf.private import make_private
from tests.models import tiny
from tests.ranks import world
from tests.test_distributed import split, whole
from tests.trainers import Pad, attached, config, texts, trainer_for, without_dropout

SEED = 5


def fresh() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def without_noise(tensors: Any, *, std: float, generator: torch.Generator) -> None:
    list(tensors)


def model_of(kind: str, family: str = "llama", dtype: torch.dtype = torch.float32, *, lora: bool = False) -> Any:
    model: Any = without_dropout(tiny(family, dtype))
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return split(model, kind) if kind in ("fsdp", "hsdp") else model


def loop(
    kind: str, *, lora: bool = False, rows: int = 3, batch: int = 9, steps: int = 3, noise: bool = False
) -> dict[str, Tensor]:
    """The parameters after some steps of a loop with Accelerate; draws by a fixed seed, the same for all numbers of ranks."""
    fresh()
    model = model_of(kind, lora=lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    accelerator = Accelerator(cpu=True)
    if kind == "ddp":
        model, optimizer = accelerator.prepare(model, optimizer)
    private = make_private(
        model=model,
        optimizer=optimizer,
        train_dataset=texts(),
        collate_fn=Pad(),
        accelerator=accelerator,
        config=config(seed=SEED),
        expected_batch_size=batch,
        steps=steps,
        max_rows_per_device=rows,
    )
    usual = mechanism.add_gaussian_noise_
    mechanism.add_gaussian_noise_ = usual if noise else without_noise
    try:
        for drawn in private.loader:
            private.backward(drawn)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        mechanism.add_gaussian_noise_ = usual
    private.stop()
    assert private.report().steps == steps
    named = (model.module if kind == "ddp" else model).named_parameters()
    return {name: whole(p.detach()).clone() for name, p in named if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
@pytest.mark.parametrize("batch", [2, 9], ids=["empty shares", "ragged shares"])
def test_a_loop_on_ranks_is_a_loop_in_one_process(kind: str, size: int, batch: int, lora: bool) -> None:
    wanted = loop("none", lora=lora, batch=batch)
    for found in world(size).run(_loop, kind, lora, batch):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def _loop(kind: str, lora: bool, batch: int) -> dict[str, Tensor]:
    return loop(kind, lora=lora, batch=batch)


def trained(path: str, accumulation: int, changes: dict[str, Any], noise: bool = False) -> dict[str, Tensor]:
    """The parameters after three steps of a Trainer with 6 units expected in each, on however many ranks there are."""
    fresh()
    trainer = trainer_for(
        model_of("none"),
        Path(path),
        per_device_train_batch_size=6 // accumulation // Ranks().size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.5,
        max_steps=3,
        **({"ddp_backend": "gloo"} if Ranks().size > 1 else {}),
    )
    dp = attached(trainer, seed=SEED, **changes)
    usual = mechanism.add_gaussian_noise_
    mechanism.add_gaussian_noise_ = usual if noise else without_noise
    try:
        trainer.train()
    finally:
        mechanism.add_gaussian_noise_ = usual
    assert dp.report().expected_batch_size == 6
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_device": 30}], ids=["rows", "tokens"])
def test_a_trainer_on_ranks_is_a_trainer_in_one_process(accumulation: int, changes: dict[str, Any], tmp_path: Path) -> None:
    wanted = trained(str(tmp_path / "one"), accumulation, changes)
    for found in world(2).run(trained, str(tmp_path / "two"), accumulation, changes):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def noisy_loop(kind: str) -> list[int]:
    """What 20 noisy steps leave in the parameters of this rank, in a few numbers."""
    return [checksum(p) for p in loop(kind, steps=20, noise=True).values()]


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_ranks_hold_the_same_parameters_after_noisy_steps(kind: str, size: int) -> None:
    first, *others = world(size).run(noisy_loop, kind)
    assert all(other == first for other in others)


def released_noise(kind: str, steps: int) -> list[dict[str, Tensor]]:
    """This rank's part of the gradients of each step, of a loss without gradient: noise and nothing else."""
    fresh()
    model = model_of(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accelerator = Accelerator(cpu=True)
    if kind == "ddp":
        model, optimizer = accelerator.prepare(model, optimizer)
    private = make_private(
        model=model,
        optimizer=optimizer,
        train_dataset=texts(),
        collate_fn=Pad(),
        accelerator=accelerator,
        config=config(noise_multiplier=NOISE, max_grad_norm=BOUND),
        expected_batch_size=EXPECTED,
        steps=steps,
        max_rows_per_device=2,
        loss_fn=lambda model, batch: 1e-9 * model(**batch).loss,  # unclipped, its gradients are far below the noise
    )
    found = []
    for drawn in private.loader:
        private.backward(drawn)
        named = (model.module if kind == "ddp" else model).named_parameters()
        found.append({f"{name} {part_of(p)}": local(p.grad).clone() for name, p in named})
        optimizer.step()
        optimizer.zero_grad()
    private.stop()
    return found


NOISE, BOUND, EXPECTED = 1.5, 0.7, 4


@pytest.mark.parametrize(("kind", "size"), [("none", 1), ("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_noise_over_ranks_and_shards(kind: str, size: int) -> None:
    """Of the right size, the same on replicas, uncorrelated between shards and between steps."""
    steps = 12
    by_rank = [released_noise(kind, steps)] if size == 1 else world(size).run(released_noise, kind, steps)
    parts: dict[tuple[int, str], Tensor] = {}
    for rank in by_rank:
        for step, released in enumerate(rank):
            for name, noise in released.items():
                other = parts.setdefault((step, name), noise.flatten())
                assert torch.equal(other, noise.flatten())  # replicas
    every = torch.cat(list(parts.values())).double()
    wanted = NOISE * BOUND / EXPECTED
    assert abs(float(every.std()) / wanted - 1) < 0.02
    assert abs(float(every.mean())) < 4 * wanted / math.sqrt(len(every))
    # The 99 % bound on a correlation of n independent pairs is 2.58 / sqrt(n).
    shards: dict[str, list[Tensor]] = {}
    for (_, name), noise in parts.items():
        shards.setdefault(name.rpartition(" ")[2], []).append(noise)
    streams = [torch.cat(shard) for _, shard in sorted(shards.items())]
    for first, second in itertools.combinations(streams, 2):
        n = min(len(first), len(second))
        assert abs(correlation(first[:n], second[:n])) < 2.58 / math.sqrt(n)
    early = torch.cat([noise for (step, _), noise in parts.items() if step < steps - 1])
    late = torch.cat([noise for (step, _), noise in parts.items() if step > 0])
    assert abs(correlation(early, late)) < 2.58 / math.sqrt(len(early))


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1])
