"""Private training on several ranks is private training on one: the same draws, sums, noise and ledgers."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed.configuration_utils import DistributedConfig

from dp_flash_hf.accounting.spend_log import SpendLog
from dp_flash_hf.distributed import Ranks, checksum, local, part_of
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support import trl_trainers
from tests.support.models import tiny
from tests.support.ranks import begun, fails, fresh, noise_if, split, whole, world
from tests.support.trainers import attached, config, texts, trainer_for, without_dropout

SEED = 5
# About the median norms, full and LoRA: some units are clipped and some are not, so that every scale of a loss shows.
FULL, ADAPTER = 4.5, 1.5


def model_of(kind: str, family: str = "llama", dtype: torch.dtype = torch.float32, *, lora: bool = False) -> Any:
    model: Any = without_dropout(tiny(family, dtype))
    if lora:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return split(model, kind) if kind in ("fsdp", "hsdp") else model


def loop(
    kind: str, *, lora: bool = False, rows: int = 3, batch: int = 9, steps: int = 3, noise: bool = False
) -> dict[str, Tensor]:
    """The parameters after some steps of a loop with Accelerate; draws by a fixed seed, the same for however many ranks."""
    model = model_of(kind, lora=lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    private, model, optimizer = begun(
        model,
        optimizer,
        ddp=kind == "ddp",
        privacy=config(seed=SEED, max_grad_norm=ADAPTER if lora else FULL),
        expected_batch_size=batch,
        steps=steps,
        max_rows_per_device=rows,
    )
    with noise_if(noise):
        for drawn in private.loader:
            private.backward(drawn)
            optimizer.step()
            optimizer.zero_grad()
    private.stop()
    assert private.report().steps == steps
    named = (model.module if kind == "ddp" else model).named_parameters()
    return {name: whole(p.detach()).clone() for name, p in named if p.requires_grad}


FOUR_RANKS = pytest.param("hsdp", 4, marks=pytest.mark.complete)  # on two cores they wait for each other most of the time


@pytest.mark.sampled(4)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp", 2), FOUR_RANKS])
@pytest.mark.parametrize("batch", [2, 9], ids=["empty shares", "ragged shares"])
def test_a_loop_on_ranks_is_a_loop_in_one_process(kind: str, size: int, batch: int, lora: bool) -> None:
    wanted = loop("none", lora=lora, batch=batch)
    for found in world(size).run(_loop, kind, lora, batch):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def _loop(kind: str, lora: bool, batch: int) -> dict[str, Tensor]:
    return loop(kind, lora=lora, batch=batch)


def gloo() -> dict[str, Any]:
    return {"ddp_backend": "gloo"} if Ranks().size > 1 else {}


def trained(path: str, accumulation: int, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters after three steps of a Trainer with 6 units expected in each, on however many ranks there are."""
    fresh()
    trainer = trainer_for(
        model_of("none"),
        Path(path),
        per_device_train_batch_size=6 // accumulation // Ranks().size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.5,
        max_steps=3,
        **gloo(),
    )
    dp = attached(trainer, seed=SEED, max_grad_norm=FULL, **changes)
    with noise_if(False):
        trainer.train()
    assert dp.report().expected_batch_size == 6
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_device": 30}], ids=["rows", "tokens"])
def test_a_trainer_on_ranks_is_a_trainer_in_one_process(accumulation: int, changes: dict[str, Any], tmp_path: Path) -> None:
    wanted = trained(str(tmp_path / "one"), accumulation, changes)
    for found in world(2).run(trained, str(tmp_path / "two"), accumulation, changes):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def noisy_loop(kind: str) -> list[int]:
    """What 20 noisy steps leave in the parameters of this rank, in a few values."""
    return [int(checksum(p)) for p in loop(kind, steps=20, noise=True).values()]


@pytest.mark.complete
@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp", 2), FOUR_RANKS])
def test_ranks_hold_the_same_parameters_after_noisy_steps(kind: str, size: int) -> None:
    first, *others = world(size).run(noisy_loop, kind)
    assert all(other == first for other in others)


def released_noise(kind: str, steps: int) -> list[dict[str, Tensor]]:
    """This rank's part of the gradients of each step, of a loss without gradient: noise and nothing else."""
    model = model_of(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    private, model, optimizer = begun(
        model,
        optimizer,
        ddp=kind == "ddp",
        privacy=config(noise_multiplier=NOISE, max_grad_norm=BOUND),
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "size"), [("none", 1), ("ddp", 2), ("fsdp", 2), FOUR_RANKS])
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
    print(f"{kind}: standard deviation of the noise {float(every.std()) / wanted:.4f} of sigma C / expected batch size")
    assert abs(float(every.std()) / wanted - 1) < 0.02
    assert abs(float(every.mean())) < 4 * wanted / math.sqrt(len(every))
    # A correlation of n independent pairs is beyond 5 / sqrt(n) once in 1.7 million times (beyond 2.58 once in a hundred).
    shards: dict[str, list[Tensor]] = {}
    for (_, name), noise in parts.items():
        shards.setdefault(name.rpartition(" ")[2], []).append(noise)
    streams = [torch.cat(shard) for _, shard in sorted(shards.items())]
    for first, second in itertools.combinations(streams, 2):
        n = min(len(first), len(second))
        found = correlation(first[:n], second[:n])
        print(f"{kind}: correlation between shards {found * math.sqrt(n):.2f} / sqrt({n})")
        assert abs(found) < 5 / math.sqrt(n)
    early = torch.cat([noise for (step, _), noise in parts.items() if step < steps - 1])
    late = torch.cat([noise for (step, _), noise in parts.items() if step > 0])
    assert abs(correlation(early, late)) < 5 / math.sqrt(len(early))


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1])


def sharded_checkpoint(folder: str, save: bool) -> tuple[list[int], int, float]:
    """Three noisy steps and a checkpoint, or the checkpoint and two steps more: parameters and moments when saved or loaded."""
    model = model_of("fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    private, _, _ = begun(
        model,
        optimizer,
        steps=5,
    )

    def train(steps: int) -> None:
        for _, drawn in zip(range(steps), private.loader, strict=False):
            private.backward(drawn)
            optimizer.step()
            optimizer.zero_grad()

    saved = Path(folder, "spent.json")
    if save:
        train(3)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        save_sharded({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        if Ranks().first:
            saved.write_text(json.dumps(private.state_dict()))
        dist.barrier()
    else:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        load_sharded(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        private.load_state_dict(json.loads(saved.read_text()))
        assert private.steps_left == 2
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    found = [int(checksum(whole(t.detach()))) for t in (*model.parameters(), *moments)]
    if not save:
        train(2)
    private.stop()
    return found, private.report().steps, private.report().spent_epsilon


@pytest.mark.complete
def test_a_sharded_checkpoint_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    saved, *others = world(2).run(sharded_checkpoint, str(tmp_path), True)
    assert all(other == saved for other in others)
    for size in (4, 2):
        for found, steps, epsilon in world(size).run(sharded_checkpoint, str(tmp_path), False):
            assert found == saved[0]
            assert steps == 5
            assert epsilon > saved[2]


def trl_trained(name: str, path: str) -> tuple[dict[str, Tensor], list[str]]:
    """A TRL trainer's parameters after two steps without noise, and the names of what it logged."""
    fresh()
    make: Any = {"sft": trl_trainers.sft, "dpo": partial(trl_trainers.dpo, ref_model=trl_trainers.llama(2))}[name]
    settings: dict[str, Any] = {
        "max_steps": 2,
        "learning_rate": 0.5,
        "per_device_train_batch_size": 4 // Ranks().size,
        "logging_steps": 1,
    }
    if Ranks().size > 1:
        settings["ddp_backend"] = "gloo"
    trainer = make(Path(path), **settings)
    attached(trainer, seed=SEED, max_grad_norm=1e3)  # nothing is clipped
    with noise_if(False):
        trainer.train()
    logged = sorted({key for entry in trainer.state.log_history for key in entry})
    return {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}, logged


@pytest.mark.complete
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_trl_on_ranks(name: str, tmp_path: Path) -> None:
    """Their losses gather metrics from all ranks, of which some here compute more physical batches than others."""
    wanted, logged = trl_trained(name, str(tmp_path / "one"))
    for found, logged_there in world(2).run(trl_trained, name, str(tmp_path / "two")):
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-6)
        assert logged_there in ([], logged)


def trained_split(path: str, fsdp: int, replicas: int, lora: bool) -> dict[str, Tensor]:
    """As `trained`, of a saved model that Transformers splits up by FSDP2 while it is loaded, or of the same whole."""
    fresh()
    settings: dict[str, Any] = {}
    if Ranks().size > 1:
        settings["distributed_config"] = DistributedConfig(fsdp_size=fsdp, dp_replicate_size=replicas)
    model: Any = without_dropout(hf.AutoModelForCausalLM.from_pretrained(path, attn_implementation="dp_flash", **settings))
    if lora:  # adapters that are not sharded, on a model that is
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        for p in model.parameters():
            if p.requires_grad and Ranks().first:  # the others begin with other values, and are given these
                p.data = torch.linspace(-1, 1, p.numel()).view(p.shape)
    share = 8 // Ranks().size
    trainer = trainer_for(
        model, Path(path, f"out {Ranks().size}"), learning_rate=0.5, per_device_train_batch_size=share, max_steps=3, **gloo()
    )
    dp = attached(trainer, seed=SEED, max_grad_norm=ADAPTER if lora else FULL)
    with noise_if(False):
        trainer.train()
    assert Ranks().size == 1 or any(isinstance(p, DTensor) for p in model.parameters())
    assert dp.report().steps == 3
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.complete
@pytest.mark.parametrize(
    ("fsdp", "replicas", "lora"),
    [(2, 1, False), (2, 1, True), pytest.param(2, 2, False, marks=pytest.mark.complete)],
    ids=["FSDP2", "FSDP2 and LoRA", "HSDP"],
)
def test_a_trainer_with_fsdp2(fsdp: int, replicas: int, lora: bool, tmp_path: Path) -> None:
    tiny("llama", torch.float32).save_pretrained(tmp_path)
    wanted = trained_split(str(tmp_path), 1, 1, lora)
    for found in world(fsdp * replicas).run(trained_split, str(tmp_path), fsdp, replicas, lora):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def recorded(path: str, steps: int, failing: bool) -> tuple[str, int, int, bool, bool, list[str]]:
    """Of a loop with a spend log: error, steps counted, lost ones, if weights changed, if all are in the log, writers."""
    model = model_of("none")
    before = int(checksum(model.lm_head.weight))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, _, optimizer = begun(
        model,
        optimizer,
        ddp=True,
        steps=steps,
        spend_log=path,
    )

    def full(self: SpendLog) -> None:
        raise PrivacyError("no space left on device")

    def goes_on(self: Ranks, tensors: Any) -> Any:  # it would wait for the others in vain
        raise AssertionError("this rank goes on to release a step that another one refused")

    def train() -> None:
        for drawn in private.loader:
            private.backward(drawn)
            optimizer.step()
            optimizer.zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        if failing:
            patch.setattr(SpendLog, "append", full)
            patch.setattr(Ranks, "added_up", goes_on)
        error = fails(train)
    private.stop()
    report = private.report()
    return (
        error,
        report.steps,
        report.lost_steps,
        int(checksum(model.lm_head.weight)) != before,
        private._training.mechanism.account.recorded,
        list(private.state_dict()["ledgers"]),
    )


@pytest.mark.complete
def test_a_record_of_several_ranks(tmp_path: Path) -> None:
    """The first rank writes it, all release only what is in it, and all go on from what it holds."""
    path = str(tmp_path / "record")
    first, second = world(2).run(recorded, path, 2, True)
    assert first[0] == "PrivacyError: no space left on device"
    assert second[0].startswith("PrivacyError: another rank stopped here")
    assert not first[3]
    assert not second[3]
    for lost in (0, 3):  # what an earlier training in this folder took is not in the weights of the next
        for error, steps, found, changed, on_record, writers in world(2).run(recorded, path, 3, False):
            assert error == ""
            assert (steps, found) == (3 + lost, lost)
            assert changed
            assert on_record
            record = SpendLog(path)
            record.close()
            assert writers == list(record.ledgers)
    assert [own.steps for own in record.ledgers.values()] == [3, 3]


def alike(what: str) -> str:
    """What ranks say that were given different weights, noise or optimizers."""
    model = model_of("none")
    if what == "weights" and not Ranks().first:
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-6
    sigma = 1.0 if what != "noise" or Ranks().first else 0.9
    data = texts()
    if what in ("order", "content") and not Ranks().first:
        data = data[::-1] if what == "order" else [{**e, "input_ids": e["input_ids"][::-1]} for e in data]
    trained = list(model.parameters())
    optimizer = torch.optim.SGD(trained[1:] if what == "optimizer" and not Ranks().first else trained, lr=0.1)
    return fails(
        lambda: begun(
            model,
            optimizer,
            train_dataset=data,
            privacy=config(noise_multiplier=sigma),
            steps=2,
        )
    )


def test_ranks_that_differ_are_refused() -> None:
    assert all("ranks hold different parameters" in said for said in world(2).run(alike, "weights"))
    for what in ("order", "content"):
        assert all("ranks were given different training data" in said for said in world(2).run(alike, what))
    assert all("ranks have different privacy parameters" in said for said in world(2).run(alike, "noise"))
    first, second = world(2).run(alike, "optimizer")
    assert "another rank stopped here" in first
    assert "the optimizer must update exactly" in second


def diverging() -> str:
    """What ranks say when one of them changes a parameter between steps."""
    model = model_of("none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private, _, _ = begun(
        model,
        optimizer,
        steps=2 * len(list(model.parameters())),
    )

    def train() -> None:
        for step, drawn in enumerate(private.loader):
            private.backward(drawn)
            optimizer.step()
            optimizer.zero_grad()
            if step == 1 and Ranks().first:
                optimizer.param_groups[0]["lr"] *= 1.001

    said = fails(train)
    private.stop()
    return said


def test_ranks_that_drift_apart_are_noticed() -> None:
    assert all("ranks hold different parameters after a step" in said for said in world(2).run(diverging))


def traffic(path: str) -> list[tuple[str, float]]:
    """What a Trainer with DDP adds up over ranks in two steps of three physical batches: where, and what share of a model."""
    fresh()
    trainer = trainer_for(
        model_of("none"), Path(path), per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=2, **gloo()
    )
    attached(trainer)
    size = sum(p.numel() for p in trainer.model.parameters())
    seen: list[tuple[str, int]] = []
    inside = ["between steps"]
    release, reduce = DPSGD.release, dist.all_reduce

    def within(self: DPSGD) -> None:
        inside.append("release")
        release(self)
        inside.pop()

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((inside[-1], tensor.numel()))
        return reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPSGD, "release", within)
        patch.setattr(dist, "all_reduce", counted)
        # DDP's own reducer works below Python: it would start here.
        patch.setattr(DistributedDataParallel, "forward", lambda *args, **kwargs: pytest.fail("DDP's forward was called"))
        trainer.train()
    return [(where, values / size) for where, values in seen]


def test_gradients_are_added_up_once_a_step(tmp_path: Path) -> None:
    """When the step's clipped sum is complete; what else is communicated is small."""
    for seen in world(2).run(traffic, str(tmp_path)):
        assert sum(share for where, share in seen if where == "release") == pytest.approx(2.0)
        assert sum(share for where, share in seen if where != "release") < 0.01
