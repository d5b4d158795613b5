"""Teach a causal language model to answer, privately: TRL's SFTTrainer, a LoRA adapter, no padding.

One row of the dataset is one privacy unit: a prompt and its answer, or just a text where no prompt is named. Models with a chat
template get them as the turns of a user and an assistant; the loss is over the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from dp_flash_hf import DPCallback, PrivacyConfig
from dp_flash_hf.cli import run
from dp_flash_hf.recipes.common import encoded, leaving_nothing_behind, load_rows, read_options, require_columns, save


@dataclass
class Options:
    """The model, the adapter and the data."""

    model: str = field(metadata={"help": "Hub name or folder of a causal language model"})
    dataset: str = field(metadata={"help": "Hub name, folder, or csv, json, jsonl or parquet file"})
    split: str = field(default="train", metadata={"help": "split of a Hub name or folder"})
    text_column: str = field(default="text", metadata={"help": "what the model learns to write"})
    prompt_column: str | None = field(default=None, metadata={"help": "what it answers; no loss on it"})
    eval_dataset: str | None = field(default=None, metadata={"help": "as dataset, for the loss on held-out data"})
    eval_split: str = field(default="validation", metadata={"help": "split of eval_dataset"})
    max_length: int = field(default=1024, metadata={"help": "tokens kept of each row"})
    max_tokens: int = field(default=16384, metadata={"help": "tokens computed at once; changes speed and memory only"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter's output is scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    attn_implementation: str = field(default="dp_flash", metadata={"help": "attention in which no unit can see another"})


def as_turns(rows: Dataset, options: Options, *, chat: bool, unit: str | None) -> Dataset:
    """Rows as SFTTrainer reads them: of a prompt and a completion, or of a text."""
    require_columns(rows, options.text_column, *([] if options.prompt_column is None else [options.prompt_column]))

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        answer = row[options.text_column]
        if options.prompt_column is None:
            return {"text": answer}
        prompt = row[options.prompt_column]
        if chat:
            return {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": answer}]}
        return {"prompt": f"{prompt}\n", "completion": answer}

    return encoded(rows, encode, unit)


def truncated(rows: Dataset, max_length: int) -> Dataset:
    """Each row cut to `max_length` tokens by itself, which SFTTrainer leaves to others where nothing is padded."""
    return rows.map(lambda row: {name: row[name][:max_length] for name in ("input_ids", "labels")}, desc="truncating")


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of sft_lora.yaml."""
    options, privacy, args = read_options(__file__, overrides, Options, PrivacyConfig, SFTConfig)
    args.padding_free, args.max_length, args.packing = True, None, False

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chat = tokenizer.chat_template is not None
    train = as_turns(load_rows(options.dataset, options.split), options, chat=chat, unit=privacy.privacy_unit)
    held_out = None
    if options.eval_dataset is not None:
        held_out = as_turns(load_rows(options.eval_dataset, options.eval_split), options, chat=chat, unit=None)

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
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, peft_config=adapter
        )
        trainer.train_dataset = truncated(trainer.train_dataset, options.max_length)
        if held_out is not None:
            trainer.eval_dataset = truncated(trainer.eval_dataset, options.max_length)
        dp = DPCallback(privacy, max_tokens_per_device=options.max_tokens).attach(trainer)
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    save(trainer, dp)
    print(dp.report().to_text())
    if held_out is not None:
        print(f"\nloss per token on {len(held_out)} held-out rows: {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
