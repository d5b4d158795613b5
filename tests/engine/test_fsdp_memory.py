"""What a rank of a model that FSDP2 shards is estimated to hold, against what it holds, and what ranks choose by it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from accelerate.accelerator import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

from dp_flash_hf.benchmarks import methods as bench
from dp_flash_hf.benchmarks.methods import Work
from dp_flash_hf.benchmarks.timing import resident_peak
from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine import fsdp_memory, memory
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.memory import NON_PRIVATE, MemoryEstimate, estimate
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.integrations.accelerate import make_private
from dp_flash_hf.training import session as training
from tests.support import ROOT
from tests.support.models import tiny
from tests.support.ranks import fresh, mesh_of, world
from tests.support.trainers import Pad, config, texts, without_dropout

pytestmark = pytest.mark.estimates_memory

WORK = Work(device="cpu", autocast=False, layers=4, width=384, vocabulary=4096, batch=8, lengths=(192,), threads=1)


def loss_of(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch, num_items_in_batch=1).loss
    return loss


class Block(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.layer = nn.Linear(256, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.layer(x), (0, 256 - self.layer.out_features))


class Blocks(nn.Module):
    """Four matrices of the same size, each gathered by itself; beside them nothing takes memory.

    again: with checkpointing, in torch's older way (reentrant) or the usual one.
    """

    _no_split_modules = ("Block",)

    def __init__(self, rows: int, again: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(rows) for _ in range(4))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(bool(self.again))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.again == "older") if self.again else block(x)
        return x.sum()


def of_blocks(rows: int, frozen: tuple[int, ...] = (), ranks: int = 2, again: str = "") -> dict[str, float]:
    """What a step holds beside a rank's own part, in gathered matrices."""
    model = Blocks(rows, again)
    for block in frozen:
        model.blocks[block].requires_grad_(False)
    found = estimate(model, {"x": torch.ones(1, 256)}, 1, loss_fn=lambda model, batch: model(**batch), ranks=ranks)
    matrix = 4 * 256 * ranks * -(-rows // ranks)
    return {e.strategy: (e.activations + e.records) / matrix for e in found}


@pytest.mark.parametrize(
    ("settings", "plain", "bookkeeping", "two_pass"),
    [
        # In the second of four backward passes: a matrix, the next on its way, its gradient, and the one before being added up.
        # In the third, privately: a matrix, the next, its sum, this rank's half of that and of the two sums before.
        ({"rows": 256}, 4.0, 2.0, 4.5),
        # Over four ranks they are quarters.
        ({"rows": 256, "ranks": 4}, 4.0, 2.0, 3.75),
        # Sums are padded before they are split: once more as much while that is done, for book-keeping the most of all.
        ({"rows": 255}, 4.0, 2.5, 5.5),
        # Of frozen matrices there is nothing but themselves: the last one, the next on its way, and its gradient or sum.
        ({"rows": 256, "frozen": (0, 1, 2)}, 3.0, 2.0, 3.0),
        # What is computed again is gathered already.
        ({"rows": 256, "again": "usual"}, 4.0, 2.0, 4.5),
        ({"rows": 256, "again": "older"}, 4.0, 2.0, 4.5),
    ],
    ids=["even", "four ranks", "odd", "frozen", "checkpointing", "reentrant checkpointing"],
)
def test_what_a_rank_holds_whole(settings: Any, plain: float, bookkeeping: float, two_pass: float) -> None:
    assert of_blocks(**settings) == pytest.approx(
        {NON_PRIVATE: plain, "bookkeeping": bookkeeping, "two_pass": two_pass}, abs=0.1
    )


class Odd(nn.Module):
    """Rows that no number of ranks divides, fewer of them than ranks, a scalar, a frozen table and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 7).requires_grad_(False)
        self.middle, self.head, self.scale = nn.Linear(7, 5), nn.Linear(5, 1), nn.Parameter(torch.ones(()))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.table(ids))).sum() * self.scale
        return out


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_rank_holds_as_many_rows_as_the_first(ranks: int) -> None:
    model = Odd()
    found, *private = estimate(
        model,
        {"ids": torch.ones(2, 3, dtype=torch.long)},
        2,
        loss_fn=lambda model, batch: model(**batch),
        ranks=ranks,
    )
    own = {name: 4 * (p.chunk(ranks)[0] if p.dim() else p).numel() for name, p in model.named_parameters()}
    trained = sum(size for name, size in own.items() if name != "table.weight")
    for e in (found, *private):
        assert e.parameters == sum(own.values()) + model.mask.nbytes
        assert e.gradients == trained
        assert e.optimizer == 2 * trained


def test_adapters_of_a_split_model() -> None:
    """All weights are gathered, what is trained is small."""
    from peft import LoraConfig, get_peft_model

    whole = bench.model_of(replace(WORK, device="meta"), 192, "sdpa")
    ids = torch.zeros(1, 8, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    with torch.device("meta"):
        adapted = get_peft_model(whole, LoraConfig(r=4, target_modules="all-linear"))
    alone, split = (estimate(adapted, batch, 1, loss_fn=loss_of, ranks=ranks) for ranks in (1, 4))
    layer = WORK.width * 16 * WORK.width  # elements of one: four square matrices, and three four times as wide
    for one, part in zip(alone, split, strict=True):
        assert part.parameters == pytest.approx(one.parameters / 4, rel=0.01)
        assert part.gradients == one.gradients / 4
        assert 2 * 4 * layer < part.activations + part.records - one.activations < 4 * 4 * layer


def wrapped(model: Any, kind: str = "fsdp", **settings: Any) -> Any:
    """The model as Accelerate splits it up over all ranks, or with "hsdp" over half of them."""
    mesh = mesh_of(kind)
    for modules, stays in fsdp_memory.modules_to_wrap(model):
        if model not in modules:
            settings["reshard_after_forward"] = not stays
        else:
            settings.pop("reshard_after_forward", None)
        fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh, **settings)
    return model


def decoder(family: str, checkpointing: bool = False, *, small: bool = False) -> Any:
    """A decoder of three large layers: 58.7 M parameters with a head of its own (llama), or 46.3 M with a tied one (gpt2)."""
    torch.manual_seed(0)
    layers, width, length = (1, 64, 8) if small else (3, 1024, 64)
    if family == "llama":
        work = replace(WORK, layers=layers, width=width, vocabulary=4 * width, checkpointing=checkpointing)
        return bench.model_of(work, length, "sdpa")
    settings = hf.GPT2Config(
        vocab_size=8 * width,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        n_positions=length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = hf.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def two_rows(small: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 8 if small else 64))
    return {"input_ids": ids, "labels": ids}


def estimates_of_split(family: str, kind: str, variant: str) -> tuple[list[MemoryEstimate], list[MemoryEstimate], bool]:
    """Of a sharded model, and of the same whole, over as many ranks; whether it was left alone."""
    plain, batch = decoder(family, small=True), two_rows(small=True)
    settings: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if variant == "bf16" else {}
    model = wrapped(decoder(family, small=True), kind, **settings)
    if variant == "kept":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False)
    engine = ClippingEngine(model, max_grad_norm=1.0)
    classes = [type(module) for module in model.modules()]
    held = [(id(p), p.to_local().clone()) for p in model.parameters()]
    with CommDebugMode() as communicated:
        found = estimate(model, batch, 2, loss_fn=loss_of)
    again = [(id(p), p.to_local()) for p in model.parameters()]
    unchanged = (
        communicated.get_total_counts() == 0
        and classes == [type(module) for module in model.modules()]
        and all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(held, again, strict=True))
    )
    engine.backward(lambda batch: loss_of(model, batch), batch)
    engine.detach()
    wanted = estimate(plain, batch, 2, loss_fn=loss_of, ranks=2)
    return found, wanted, unchanged


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "size"), [("fsdp", 2), ("hsdp", 4)])
def test_a_split_model_is_estimated_as_it_is_split(family: str, kind: str, size: int) -> None:
    """Just as the whole model would be over so many ranks, an engine's or not, and nothing of it is touched."""
    for found, wanted, unchanged in world(size).run(estimates_of_split, family, kind, ""):
        assert found == wanted
        assert unchanged


@pytest.mark.parametrize("variant", ["bf16", "kept"])
def test_settings_of_fsdp2_count(variant: str) -> None:
    for found, wanted, _ in world(2).run(estimates_of_split, "llama", "fsdp", variant):
        for ours, usual in zip(found, wanted, strict=True):
            assert ours.parameters == usual.parameters
            held, before = ours.activations + ours.records, usual.activations + usual.records
            assert held < 0.9 * before if variant == "bf16" else held > before


def chosen(free: list[int], broken: list[bool]) -> tuple[str, list[str], int]:
    """What strategy="auto" chooses where so much is free on each rank, or it cannot be estimated; what is said, steps taken."""
    fresh()
    rank = Ranks().rank
    said: list[str] = []

    def fails(*args: Any, **settings: Any) -> Any:
        raise UnsupportedError("memory cannot be estimated")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda device: free[rank])
        patch.setattr(training.logger, "warning", said.append)
        if broken[rank]:
            patch.setattr(memory, "estimate", fails)
        model = wrapped(without_dropout(tiny("llama", torch.float32)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        private = make_private(
            model=model,
            optimizer=optimizer,
            train_dataset=texts(),
            collate_fn=Pad(),
            accelerator=Accelerator(cpu=True),
            config=config(),
            expected_batch_size=4,
            steps=1,
        )
        for drawn in private.loader:
            private.backward(drawn)
            optimizer.step()
            optimizer.zero_grad()
        engine = private._training.engine
        assert engine is not None
        private.stop()
    return engine.chosen, said, private.report().steps


@pytest.mark.complete
@pytest.mark.parametrize(
    ("free", "broken", "strategy", "says"),
    [
        ([2**40, 2**40], [False, False], "bookkeeping", "beside its part of the model, a step needs about 0.00 GiB"),
        (
            [2**40, 2**10],
            [False, False],
            "two_pass",
            "on every rank (book-keeping has to fit with 15% to spare)",
        ),
        ([2**40, 2**40], [False, True], "two_pass", "memory cannot be estimated"),
    ],
    ids=["fits", "not on one rank", "not to be estimated on one rank"],
)
def test_ranks_of_a_sharded_model_choose_the_same(free: list[int], broken: list[bool], strategy: str, says: str) -> None:
    for whole, said, steps in world(2).run(chosen, free, broken):
        assert whole == strategy
        (line,) = said
        assert line.startswith(f"strategy='auto' chose {strategy}: ")
        assert says in line
        assert steps == 1


def measure_split(family: str, strategy: str, checkpointing: bool) -> None:
    """Print the peak of a step's second physical batch on this rank, beyond what the process held before it made the model."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def step(small: bool) -> None:
        model = wrapped(decoder(family, checkpointing, small=small))
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        batch = two_rows(small)
        engine = None if strategy == NON_PRIVATE else ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)  # type: ignore[arg-type]
        for _ in range(2):
            if engine is None:
                loss_of(model, batch).backward()
            else:
                engine.backward(lambda batch: loss_of(model, batch), batch)

    step(True)  # what libraries load when they are first used
    before = resident_peak()
    step(False)
    print(resident_peak() - before)
    dist.destroy_process_group()


def measured_split(family: str, strategy: str, checkpointing: bool, ranks: int = 2) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        f"from tests.engine.test_fsdp_memory import measure_split; measure_split({family!r}, {strategy!r}, {checkpointing})"
    )
    shared = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank)},
            cwd=ROOT,
        )
        for rank in range(ranks)
    ]
    return [int(process.communicate()[0]) for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_estimates_of_a_rank_are_what_is_measured(family: str, checkpointing: bool) -> None:
    """Within 15 %, on each of two ranks. Not in the estimate: gloo gathers into a copy, and splits sums up from one."""
    found = estimate(decoder(family, checkpointing), two_rows(), 2, loss_fn=loss_of, ranks=2)
    for e in found:
        for peak in measured_split(family, e.strategy, checkpointing):
            print(f"{family}, checkpointing {checkpointing}, {e.strategy}: {e.total / 2**20:.0f} of {peak / 2**20:.0f} MiB")
            assert 0.85 <= e.total / peak <= 1.15
