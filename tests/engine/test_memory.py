"""What a step needs is known before it runs: estimates beside measured peaks, in processes of their own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.benchmarks import methods as bench
from dp_flash_hf.benchmarks.methods import Work
from dp_flash_hf.engine import memory
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.memory import NON_PRIVATE, MemoryEstimate, _left_in_container, estimate, free_memory, moments_of, widest
from dp_flash_hf.engine.model_loss import model_loss
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.units import Units
from tests.support.models import batch_of, tiny

pytestmark = pytest.mark.estimates_memory

WORK = Work(device="cpu", autocast=False, layers=4, width=384, vocabulary=4096, batch=8, lengths=(192,), threads=1)
LARGE_HEAD = replace(WORK, layers=6, width=256, vocabulary=16384, batch=4, lengths=(256,))

# The peak of a step's second physical batch, beyond what the process held before it made the model.
MEASURED = """
import json, sys
from dataclasses import replace
import torch
from dp_flash_hf.benchmarks import methods as bench
from dp_flash_hf.benchmarks.timing import resident_peak, work_from_json
from dp_flash_hf.engine.clipping_engine import ClippingEngine

work, strategy = work_from_json(sys.argv[1]), sys.argv[2]
torch.set_num_threads(work.threads)

def step(work, length):
    model, tokens = bench.model_of(work, length, "sdpa"), bench.tokens_of(work, length)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {"input_ids": tokens, "labels": tokens}
    loss_fn = lambda batch: model(**batch, num_items_in_batch=1).loss
    engine = None if strategy == "non-private" else ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)
    for _ in range(2):
        for _ in range(2):
            loss_fn(batch).backward() if engine is None else engine.backward(loss_fn, batch)
        optimizer.step()
        optimizer.zero_grad()

step(replace(work, layers=1, width=64, vocabulary=64, batch=2), 8)  # what libraries load when they are first used
before = resident_peak()
step(work, work.lengths[0])
print(resident_peak() - before)
"""


def loss_of(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch, num_items_in_batch=1).loss
    return loss


def estimated(work: Work) -> dict[str, MemoryEstimate]:
    (length,) = work.lengths
    ids = torch.zeros(work.batch, length, dtype=torch.long)
    model = bench.model_of(replace(work, device="meta"), length, "dp_flash")
    return {e.strategy: e for e in estimate(model, {"input_ids": ids, "labels": ids}, work.batch, loss_fn=loss_of)}


def measured(work: Work, strategy: str) -> int:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, json.dumps(asdict(work)), strategy]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("work", [WORK, LARGE_HEAD], ids=["wide", "large head"])
def test_estimates_are_what_is_measured(work: Work, checkpointing: bool) -> None:
    """Within 15 %: temporaries of norms and sums, and some 10 MiB that libraries take, are in no estimate."""
    work = replace(work, checkpointing=checkpointing)
    peaks = {strategy: measured(work, strategy) for strategy in (NON_PRIVATE, *memory.STRATEGIES)}
    found = {strategy: e.total / peaks[strategy] for strategy, e in estimated(work).items()}
    assert all(0.85 <= ratio <= 1.15 for ratio in found.values()), found
    if checkpointing:
        assert peaks["two_pass"] <= 1.10 * peaks[NON_PRIVATE]


def test_parts_are_what_they_are() -> None:
    (found, *private), work = estimated(WORK).values(), WORK
    elements = sum(p.numel() for p in bench.model_of(replace(work, device="meta"), 192, "sdpa").parameters())
    assert found.gradients == 4 * elements
    assert 4 * elements <= found.parameters < 4.1 * elements
    assert found.optimizer == 8 * elements
    assert [e.gradients for e in private] == [4 * elements] * 2
    assert found.records == 0
    assert found.total == found.parameters + found.gradients + found.optimizer + found.activations


def test_checkpointing_saves_activations_and_book_keeping_gives_them_back() -> None:
    usual, less = estimated(WORK), estimated(replace(WORK, checkpointing=True))
    assert less[NON_PRIVATE].activations < 0.5 * usual[NON_PRIVATE].activations
    assert less["two_pass"].total < 1.05 * less[NON_PRIVATE].total
    rows = WORK.batch * WORK.lengths[0]
    layer = (
        rows * 4 * (4 * WORK.width + 2 * 4 * WORK.width + 4 * WORK.width)
    )  # output gradients of its seven products, at least
    assert less["bookkeeping"].records > 0.5 * WORK.layers * layer


def test_estimating_changes_nothing() -> None:
    model = bench.model_of(replace(WORK, layers=1, width=64), 8, "sdpa")
    ids = torch.zeros(2, 8, dtype=torch.long)
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    classes = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    found = estimate(model, {"input_ids": ids, "labels": ids}, 2, loss_fn=loss_of)
    assert torch.equal(torch.get_rng_state(), state)
    engine.backward(lambda batch: loss_of(model, batch), {"input_ids": ids, "labels": ids})
    model.zero_grad()
    engine.detach()
    assert classes == [type(module) for module in model.modules()]
    assert found == estimate(model, {"input_ids": ids, "labels": ids}, 2, loss_fn=loss_of)  # with an engine and without
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
    assert torch.autocast is torch.amp.autocast_mode.autocast


def test_narrow_weights_have_wide_sums_beside_their_gradients() -> None:
    model = bench.model_of(replace(WORK, layers=1, width=64, device="meta"), 8, "sdpa").bfloat16()
    ids = torch.zeros(2, 8, dtype=torch.long)
    usual, *private = estimate(model, {"input_ids": ids, "labels": ids}, 2, loss_fn=loss_of)
    assert [e.gradients for e in private] == [3 * usual.gradients] * 2


def test_a_model_that_cannot_do_without_numbers_is_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x[x.sum(1).nonzero().flatten()]).sum()
            return out

    with pytest.raises(UnsupportedError, match=r"from shapes alone.*choose a strategy by name"):
        estimate(Routed(), {"x": torch.ones(2, 3)}, 2, loss_fn=lambda model, batch: model(**batch))


def test_moments_of_optimizers() -> None:
    parameters = [nn.Parameter(torch.ones(1))]
    assert moments_of(torch.optim.AdamW(parameters)) == 2
    assert moments_of(torch.optim.SGD(parameters, lr=0.1)) == 0
    assert moments_of(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)) == 1


@pytest.mark.parametrize(
    ("limit", "left"), [("max", math.inf), ("1000", 1000 - 700 + 150), (None, math.inf)], ids=["none", "some", "no cgroups"]
)
def test_a_container_leaves_what_its_limit_leaves(limit: str | None, left: float, tmp_path: Path) -> None:
    if limit is not None:
        stat = "anon 500\ninactive_file 150\nactive_file 50"
        for name, content in (("memory.max", limit), ("memory.current", "700"), ("memory.stat", stat)):
            (tmp_path / name).write_text(f"{content}\n")
    assert _left_in_container(tmp_path) == left


def test_free_memory_is_what_the_device_has() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_the_widest_physical_batch() -> None:
    """As many units like this one as fit: of rows, of padded tokens, of tokens without padding."""
    padded = {
        "input_ids": torch.ones(2, 7, dtype=torch.long),
        "attention_mask": torch.ones(2, 7),
        "pixels": torch.ones(2, 3, 4),
    }
    of_two = Units.of(torch.zeros(2, dtype=torch.long), (2, 7))
    flat = {"input_ids": torch.ones(1, 7, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 7])}
    one_text = Units.of(torch.zeros(1, 7, dtype=torch.long), (1, 7))
    for batch, units, most, n_units, shape in (
        (padded, of_two, (9, None), 4, (8, 7)),
        (padded, of_two, (1, None), 1, (2, 7)),
        (padded, of_two, (9, 30), 2, (4, 7)),
        (flat, one_text, (9, None), 9, (1, 63)),
        (flat, one_text, (9, 30), 4, (1, 28)),
    ):
        wide, times = widest(batch, units, max_rows=most[0], max_tokens=most[1])
        assert times == n_units
        assert {name: tuple(x.shape[:2]) for name, x in wide.items() if x.dim() == 2} == dict.fromkeys(
            {"input_ids", "attention_mask"} & batch.keys(), shape
        )
        assert "cu_seq_lens_q" not in wide
        assert "pixels" not in wide or tuple(wide["pixels"].shape) == (shape[0], 3, 4)


_QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(**_QV),
    "lora on embeddings": lambda: peft.LoraConfig(**{**_QV, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora": lambda: peft.LoraConfig(**_QV, use_dora=True),
    "ia3": lambda: peft.IA3Config(**{**_QV, "target_modules": ["k_proj", "down_proj"]}, feedforward_modules=["down_proj"]),
    "lokr": lambda: peft.LoKrConfig(**_QV, r=2),
    "loha": lambda: peft.LoHaConfig(**_QV, r=2),
    "boft": lambda: peft.BOFTConfig(**_QV, boft_block_size=4),
    "oft": lambda: peft.OFTConfig(**_QV, oft_block_size=4, r=0),
    "hra": lambda: peft.HRAConfig(**_QV, r=2),
    "adalora": lambda: peft.AdaLoraConfig(**_QV, init_r=4, target_r=2, total_step=10),
    "vera": lambda: peft.VeraConfig(**_QV, r=2),
    "fourierft": lambda: peft.FourierFTConfig(**_QV, n_frequency=5),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def chosen(model: Any, batch: dict[str, Any]) -> str:
    """Why a strategy is chosen for this model."""
    one = {name: value[:1] for name, value in batch.items()}
    engine = ClippingEngine(model, max_grad_norm=1.0)
    said = memory.choose_by_memory(engine, one, Units.rows(1), loss_fn=model_loss, max_rows=4, max_tokens=None)[1]
    engine.detach()
    return said


@pytest.mark.sampled(9)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_kind_of_adapter_is_estimated(adapter: str) -> None:
    model = peft.get_peft_model(tiny("llama", torch.float32), ADAPTERS[adapter]())
    plain, *private = estimate(model, batch_of("llama"), 5, loss_fn=model_loss)
    assert all(found.total >= found.parameters + found.activations > 0 for found in (plain, *private))
    assert "a step needs about" in chosen(model, batch_of("llama"))


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "t5", "mamba"])
def test_families_are_estimated(name: str) -> None:
    said = chosen(tiny(name, torch.float32), batch_of(name, dtype=torch.float32))
    assert "a step needs about" in said
    assert "the memory of the loss" not in said


class OnlyLogits(nn.Module):
    def __init__(self, outputs: str) -> None:
        super().__init__()
        self.body, self.outputs = nn.Linear(4, 64), outputs

    def forward(self, values: Tensor) -> Any:
        logits: Tensor = self.body(values)
        return {"tensor": logits, "tuple": (logits, logits.sum()), "dict": {"logits": logits}}[self.outputs]


@pytest.mark.parametrize("key", ["values", "x"])
@pytest.mark.parametrize("outputs", ["tensor", "tuple", "dict"])
def test_a_loss_of_ones_own_has_a_stand_in(outputs: str, key: str) -> None:
    """Two copies of the outputs in float32 at least, as a cross entropy keeps."""
    said = chosen(OnlyLogits(outputs), {key: torch.zeros(4, 4), "label": torch.zeros(4, dtype=torch.long)})
    assert "a step needs about" in said
    assert "the memory of the loss is that of a cross entropy of all outputs" in said


def test_connectionist_losses_have_a_stand_in() -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions: dict[str, Any] = {"conv_dim": (16,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
    positions: dict[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    setting = hf.Wav2Vec2Config(**shape, **convolutions, **positions, vocab_size=12, feat_extract_norm="layer")
    batch = {"input_values": torch.randn(4, 200), "labels": torch.randint(1, 12, (4, 6))}
    assert "the memory of the loss is that of a cross entropy" in chosen(hf.Wav2Vec2ForCTC(setting), batch)
