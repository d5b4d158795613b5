"""Align a causal language model with preferences, privately: TRL's DPOTrainer and a LoRA adapter.

One row of the dataset, a prompt with a chosen and a rejected answer, is one privacy unit. The reference is the model without
its adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dp_flash_hf import DPCallback, PrivacyConfig
from dp_flash_hf.cli.common import run
from dp_flash_hf.recipes.common import (
    checkpoint,
    encoded,
    leaving_nothing_behind,
    load_rows,
    read_options,
    require_columns,
    save,
    show_progress,
)


@dataclass
class Options:
    """The model, the adapter and the data."""

    model: str = field(metadata={"help": "Hub name or folder of a causal language model, instructed already"})
    dataset: str = field(metadata={"help": "Hub name, folder, or csv, json, jsonl or parquet file"})
    split: str = field(default="train", metadata={"help": "split of a Hub name or folder"})
    prompt_column: str | None = field(default="prompt", metadata={"help": "null: both answers begin with the prompt"})
    chosen_column: str = field(default="chosen", metadata={"help": "the better answer"})
    rejected_column: str = field(default="rejected", metadata={"help": "the worse answer"})
    eval_dataset: str | None = field(default=None, metadata={"help": "as dataset, for the accuracy on held-out data"})
    eval_split: str = field(default="test", metadata={"help": "split of eval_dataset"})
    max_tokens: int = field(default=16384, metadata={"help": "tokens computed at once; changes speed and memory only"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter's output is scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    attn_implementation: str = field(default="dp_flash", metadata={"help": "attention in which no unit can see another"})


def as_pairs(rows: Dataset, options: Options, unit: str | None) -> Dataset:
    """Rows as DPOTrainer reads them."""
    columns = {"prompt": options.prompt_column, "chosen": options.chosen_column, "rejected": options.rejected_column}
    names = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    require_columns(rows, *names.values())
    return encoded(rows, lambda row: {ours: row[theirs] for ours, theirs in names.items()}, unit)


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of dpo_lora.yaml."""
    options, privacy, args = read_options(__file__, overrides, Options, PrivacyConfig, DPOConfig)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = as_pairs(load_rows(options.dataset, options.split), options, privacy.privacy_unit)
    held_out = None
    if options.eval_dataset is not None:
        held_out = as_pairs(load_rows(options.eval_dataset, options.eval_split), options, None)

    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=options.attn_implementation)
    adapter = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )

    # Training: TRL's trainer, and the line that makes it private.
    with leaving_nothing_behind(args.output_dir):
        trainer = DPOTrainer(
            model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, peft_config=adapter
        )
        dp = DPCallback(privacy, max_tokens_per_device=options.max_tokens).attach(trainer)
    trainer.model.print_trainable_parameters()
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=checkpoint(args))

    save(trainer, dp)
    print(dp.report().to_text())
    if held_out is not None:
        accuracy = trainer.evaluate()["eval_rewards/accuracies"]
        print(f"\nthe chosen answer is preferred in {accuracy:.3f} of {len(held_out)} held-out pairs")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
