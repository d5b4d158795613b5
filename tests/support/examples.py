"""What the code blocks of README and docs take as given, and what must be true after them.

A page names one of these in a comment before a block, `<!-- setup: NAME -->`; blocks without a comment go on where the one
before them ended. A setup yields the names that its blocks start with, and then what they printed is sent to it.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate.accelerator import Accelerator

from dp_flash_hf import PrivacyConfig, make_private

Names = dict[str, Any]
Setup = Callable[[Path], Generator[Names, str, None]]
SETUPS: dict[str, Setup] = {}
VOCABULARY, PADDING = 31, 0


def setup(function: Setup) -> Setup:
    """Decorator: pages may name this function."""
    SETUPS[function.__name__] = function
    return function


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Padded rows of a language model."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PADDING)
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": ids.masked_fill(ids == PADDING, -100)}


def collate_examples(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The same, for a Trainer's rows."""
    return collate([example["input_ids"] for example in examples])


def rows() -> list[list[int]]:
    """96 short texts of unequal length."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (3 + row % 5,), generator=generator).tolist() for row in range(96)]


def decoder() -> Any:
    """A language model small enough to train in a second."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PADDING,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config)


def changed(before: list[torch.Tensor], model: Any) -> bool:
    """Whether training has moved every parameter."""
    return not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@setup
def nothing(folder: Path) -> Generator[Names, str, None]:
    """Blocks that import all they need."""
    yield {"__name__": "example"}


@setup
def trainer(folder: Path) -> Generator[Names, str, None]:
    """A saved model, data, a collator, and a Trainer's arguments; the blocks train three steps and report as `dp`."""
    decoder().save_pretrained(folder / "model")
    names: Names = {
        "AutoModelForCausalLM": hf.AutoModelForCausalLM,
        "Trainer": hf.Trainer,
        "name": str(folder / "model"),
        "args": hf.TrainingArguments(
            str(folder / "out"),
            per_device_train_batch_size=16,
            max_steps=3,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
        ),
        "data": [{"input_ids": row, "labels": row} for row in rows()],
        "collator": collate_examples,
    }
    printed = yield names
    assert "epsilon <= " in printed
    report = names["dp"].report()
    assert report.steps == 3
    assert 0 < report.epsilon <= 8


@setup
def adapter(folder: Path) -> Generator[Names, str, None]:
    """The same; the blocks train an adapter and save it in the working folder."""
    blocks = trainer(folder)
    names = next(blocks)
    with contextlib.chdir(folder):
        yield names
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert names["dp"].report().steps == 3


def _loop() -> Names:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {
        "model": model,
        "dataset": rows(),
        "collate": collate,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "accelerator": Accelerator(cpu=True),
    }


@setup
def accelerate_loop(folder: Path) -> Generator[Names, str, None]:
    """Model, optimizer, scheduler, data and Accelerator of a loop with `make_private`, which trains to the end of its plan."""
    names = _loop()
    before = [p.detach().clone() for p in names["model"].parameters()]
    printed = yield names
    assert "epsilon <= " in printed
    assert names["private"].report().steps == names["private"].report().planned_steps == 15
    assert changed(before, names["model"])


@setup
def opacus_loop(folder: Path) -> Generator[Names, str, None]:
    """The same for the loop of the other library, whose plan is as long."""
    names = _loop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own: hooks on tensors, orders of Renyi divergence
        printed = yield names
    ((_, rate, steps),) = names["engine"].accountant.history
    assert (rate, steps) == (32 / 96, 15)
    assert 7 < float(printed) <= 8


@setup
def own_model(folder: Path) -> Generator[Names, str, None]:
    """A model that is not of Transformers, an optimizer, an Accelerator and rows of tensors; the blocks train four steps."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    before = [p.detach().clone() for p in model.parameters()]
    names: Names = {
        "PrivacyConfig": PrivacyConfig,
        "make_private": make_private,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "dataset": [{"features": torch.randn(5), "label": torch.tensor(row % 3)} for row in range(96)],
        "collate": torch.utils.data.default_collate,
        "accelerator": Accelerator(cpu=True),
    }
    yield names
    assert names["private"].report().steps == 4
    assert changed(before, model)


@setup
def loop_from_the_parts(folder: Path) -> Generator[Names, str, None]:
    """The same for a loop made of `ClippingEngine` and `DPSGD`."""
    names = _loop()
    before = [p.detach().clone() for p in names["model"].parameters()]
    printed = yield names
    assert "epsilon <= " in printed
    assert names["mechanism"].account.steps == names["plan"].steps == 20
    assert changed(before, names["model"])


def _encoder_decoder() -> Names:
    """A frozen encoder-decoder and a batch of it."""
    sizes = {
        f"{side}_{what}": 2
        for side, what in itertools.product(("encoder", "decoder"), ("layers", "attention_heads", "ffn_dim"))
    }
    config = hf.BartConfig(**sizes, d_model=16, vocab_size=VOCABULARY, max_position_embeddings=16, use_cache=False)  # type: ignore[arg-type]
    model: Any = hf.BartForConditionalGeneration(config)
    model.eval().requires_grad_(False)
    model.set_attn_implementation("dp_flash")
    ids = torch.randint(4, VOCABULARY, (3, 9))
    return {"model": model, "batch": {"input_ids": ids, "decoder_input_ids": ids[:, :5]}}


@setup
def encoder_decoder(folder: Path) -> Generator[Names, str, None]:
    """One privatised call is reported."""
    printed = yield _encoder_decoder()
    assert "epsilon <= 1.9" in printed  # 5 of 64 rows


@setup
def generating(folder: Path) -> Generator[Names, str, None]:
    """Privatised generation is reported."""
    printed = yield _encoder_decoder()
    assert "generate(input_ids)" in printed
