"""Fine-tune a text classifier privately, all weights or a LoRA adapter, and measure its accuracy.

One row is one privacy unit. The set of labels is treated as public: it is read from the data. With `private: false` the same
training runs without privacy, for comparison.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from dp_flash_hf import DPCallback, PrivacyConfig
from dp_flash_hf.cli.common import run
from dp_flash_hf.errors import invalid
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
    """The model and the data."""

    model: str = field(metadata={"help": "Hub name or folder of any model that transformers can put a classifier on"})
    dataset: str = field(metadata={"help": "Hub name, folder, or csv, json, jsonl or parquet file"})
    eval_dataset: str = field(metadata={"help": "as dataset, to measure the accuracy on"})
    split: str = field(default="train", metadata={"help": "split of a Hub name or folder"})
    eval_split: str = field(default="test", metadata={"help": "split of eval_dataset"})
    text_column: str = field(default="text", metadata={"help": "what is classified"})
    label_column: str = field(default="label", metadata={"help": "strings or integers; each different one is a class"})
    max_length: int = field(default=128, metadata={"help": "tokens kept of each text"})
    lora_rank: int = field(
        default=0, metadata={"help": "0: train all weights; above: an adapter of this rank, and the classifier"}
    )
    private: bool = field(default=True, metadata={"help": "false: train without privacy, for comparison"})
    attn_implementation: str = field(default="dp_flash", metadata={"help": "attention in which no unit can see another"})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of rows whose most likely class is the right one."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def encode(rows: Dataset, ids: dict[str, int], tokenizer: Any, options: Options, unit: str | None = None) -> Dataset:
    """Tokens and class ids, and the column `unit` if there is one. Raises ValueError for a label that is not in `ids`."""
    unknown = sorted({str(label) for label in rows[options.label_column]} - ids.keys())
    if unknown:
        raise invalid(
            options.label_column, expected="labels of the training data", actual=unknown[0], remedy="fix eval_dataset"
        )

    def one(row: dict[str, Any]) -> dict[str, Any]:
        tokens = tokenizer(row[options.text_column], truncation=True, max_length=options.max_length)
        return {**tokens, "labels": ids[str(row[options.label_column])]}

    return encoded(rows, one, unit)


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of classification.yaml."""
    options, privacy, args = read_options(__file__, overrides, Options, PrivacyConfig, TrainingArguments)

    train, held_out = load_rows(options.dataset, options.split), load_rows(options.eval_dataset, options.eval_split)
    for rows in (train, held_out):
        require_columns(rows, options.text_column, options.label_column)
    names = sorted({str(label) for label in train[options.label_column]})
    ids = {name: index for index, name in enumerate(names)}

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train = encode(train, ids, tokenizer, options, privacy.privacy_unit)
    held_out = encode(held_out, ids, tokenizer, options)

    model = AutoModelForSequenceClassification.from_pretrained(
        options.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id=ids,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=options.attn_implementation,
    )
    if options.lora_rank:
        from peft import LoraConfig, get_peft_model  # only needed here: pip install dp-flash-hf[peft]

        adapter = LoraConfig(
            r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="SEQ_CLS"
        )
        model = get_peft_model(model, adapter)
        model.print_trainable_parameters()

    dp = None
    with leaving_nothing_behind(args.output_dir):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=accuracy,
        )
        if options.private:
            dp = DPCallback(privacy).attach(trainer)
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=checkpoint(args))

    save(trainer, dp)
    print("NOT private: trained with private=false, no guarantee of any kind." if dp is None else dp.report().to_text())
    print(f"\naccuracy on {len(held_out)} held-out rows: {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
