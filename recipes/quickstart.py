"""Train a small language model privately on the docstrings of Python's standard library: no download, minutes on two cores.

Every docstring is one privacy unit. The tokenizer is bytes, so that no vocabulary is learnt from the private data, and the
model starts from random weights. One docstring in sixteen is held out, to measure the loss without spending any budget.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dp_flash_hf import DPCallback, PrivacyConfig, PrivacyReport
from dp_flash_hf.cli.common import run
from dp_flash_hf.recipes.common import command, docstrings, leaving_nothing_behind, read_options, save, show_progress, show_rows

EVERY = 16  # one docstring in this many is held out


@dataclass
class Model:
    """The model's size and what it reads."""

    hidden_size: int = field(default=128, metadata={"help": "width of the decoder"})
    num_layers: int = field(default=2, metadata={"help": "decoder layers"})
    num_heads: int = field(default=4, metadata={"help": "attention heads"})
    max_length: int = field(default=64, metadata={"help": "bytes read of each docstring"})
    attn_implementation: str = field(default="dp_flash", metadata={"help": "attention in which no unit can see another"})
    prompt: str = field(default="Return the ", metadata={"help": "how the sample begins"})


LIBRARY = Path(sysconfig.get_path("stdlib"))


def read_docstrings() -> list[str]:
    """The docstrings of the standard library, in the order of files and lines."""
    return docstrings(LIBRARY)


def introduce(count: int, model: Any, privacy: PrivacyConfig, plan: PrivacyReport) -> None:
    """Say what is about to happen."""
    print(
        f"Data     {count:,} docstrings of {LIBRARY}; one in {EVERY} is held out\n"
        f"Model    a Llama decoder of {model.num_parameters() / 1e6:.2f} M parameters that reads bytes, from random weights\n"
        f"Privacy  epsilon {privacy.target_epsilon:g} at delta {privacy.target_delta:g}: the model would be much the same "
        "without any one docstring\n"
        f"Steps    {plan.planned_steps}, of about {plan.expected_batch_size:g} docstrings each; some minutes on two cores\n"
    )


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of quickstart.yaml."""
    options, privacy, args = read_options(__file__, overrides, Model, PrivacyConfig, TrainingArguments)
    print("Training a small language model with differential privacy.\n")

    # Data: bytes of each docstring; the loss is over all of them.
    tokenizer = ByT5Tokenizer(extra_ids=0)
    encoded = tokenizer(read_docstrings(), truncation=True, max_length=options.max_length)["input_ids"]
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded]
    train = Dataset.from_list([row for index, row in enumerate(rows) if index % EVERY])
    held_out = Dataset.from_list(rows[::EVERY])

    # Model: a Llama of this size, from random weights.
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=options.max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=options.attn_implementation)

    # Training: a Trainer, and the line that makes it private.
    with leaving_nothing_behind(args.output_dir):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        dp = DPCallback(privacy, strategy="bookkeeping").attach(trainer)
    show_progress(trainer)
    introduce(len(rows), model, privacy, dp.report())
    before = trainer.evaluate()["eval_loss"]
    begun = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begun
    after = trainer.evaluate()["eval_loss"]
    save(trainer, dp)

    report = dp.report()
    prompt = tokenizer(options.prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    sample = model.generate(**prompt, do_sample=True, temperature=0.5, max_length=options.max_length)
    show_rows(
        {
            "loss per byte": f"{before:.3f} before training, {after:.3f} after, held out",
            "epsilon": f"{report.epsilon:.3f} at delta {report.delta:g}",
            "steps": f"{report.steps} in {seconds:.0f} s",
            "sample": repr(tokenizer.decode(sample[0], skip_special_tokens=True)),
            "model": args.output_dir,
            "privacy report": f"{args.output_dir}/report.json, and README.md for a model card",
        }
    )
    dp_flash = command()
    print("Next, with more privacy, or with data of your own:")
    print(f"  {dp_flash} train quickstart target_epsilon=1 output_dir=runs/more_private")
    print(f"  {dp_flash} recipes ls")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
