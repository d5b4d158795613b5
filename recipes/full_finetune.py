"""Fine-tune all weights of a causal language model privately, on any text data.

One row of the dataset is one privacy unit. The model learns to continue `prompt_column` by `text_column`, or just
`text_column` where no prompt is named; the loss is over the tokens of the text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from dp_flash_hf import DPCallback, PrivacyConfig
from dp_flash_hf.cli.common import run
from dp_flash_hf.recipes.common import (
    checkpoint,
    leaving_nothing_behind,
    load_rows,
    read_options,
    save,
    show_progress,
    tokenize_texts,
)


@dataclass
class Options:
    """The model and the data."""

    model: str = field(metadata={"help": "Hub name or folder of a causal language model"})
    dataset: str = field(metadata={"help": "Hub name, folder, or csv, json, jsonl or parquet file"})
    split: str = field(default="train", metadata={"help": "split of a Hub name or folder"})
    text_column: str = field(default="text", metadata={"help": "what the model learns to write"})
    prompt_column: str | None = field(default=None, metadata={"help": "what it reads before; no loss on it"})
    eval_dataset: str | None = field(default=None, metadata={"help": "as dataset, for the loss on held-out data"})
    eval_split: str = field(default="validation", metadata={"help": "split of eval_dataset"})
    max_length: int = field(default=512, metadata={"help": "tokens kept of each row"})
    attn_implementation: str = field(default="dp_flash", metadata={"help": "attention in which no unit can see another"})


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of full_finetune.yaml."""
    options, privacy, args = read_options(__file__, overrides, Options, PrivacyConfig, TrainingArguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    columns = {"text": options.text_column, "prompt": options.prompt_column}
    rows = load_rows(options.dataset, options.split)
    train = tokenize_texts(rows, tokenizer, options.max_length, unit=privacy.privacy_unit, **columns)
    held_out = None
    if options.eval_dataset is not None:
        held_out = tokenize_texts(load_rows(options.eval_dataset, options.eval_split), tokenizer, options.max_length, **columns)

    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=options.attn_implementation)

    with leaving_nothing_behind(args.output_dir):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        dp = DPCallback(privacy).attach(trainer)
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=checkpoint(args))

    save(trainer, dp)
    print(dp.report().to_text())
    if held_out is not None:
        print(f"\nloss per token on {len(held_out)} held-out rows: {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
