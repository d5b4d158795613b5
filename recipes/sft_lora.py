"""Teach a causal language model to answer, privately: TRL's SFTTrainer, a LoRA adapter, no padding.

One row of the dataset is one privacy unit: a prompt and its answer, or just a text where no prompt is named. Models with a chat
template get them as the turns of a user and an assistant; the loss is over the answer. What is held out to measure that loss,
and to show answers, is not protected. With `private: false` the same training runs without privacy, for comparison.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

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
    """The model, the adapter and the data."""

    model: str = field(metadata={"help": "Hub name or folder of a causal language model"})
    dataset: str = field(metadata={"help": "Hub name, folder, or csv, json, jsonl or parquet file"})
    split: str = field(default="train", metadata={"help": "split of a Hub name or folder"})
    text_column: str = field(default="text", metadata={"help": "what the model learns to write"})
    prompt_column: str | None = field(default=None, metadata={"help": "what it answers; no loss on it"})
    eval_dataset: str | None = field(default=None, metadata={"help": "as dataset, for the loss on held-out data"})
    eval_split: str = field(default="validation", metadata={"help": "split of eval_dataset"})
    held_out: float = field(default=0.0, metadata={"help": "without eval_dataset: the share of the prompts that is held out"})
    samples: int = field(default=0, metadata={"help": "answers to held-out prompts that are shown, from before and after"})
    max_new_tokens: int = field(default=128, metadata={"help": "where such an answer is cut"})
    max_length: int = field(default=1024, metadata={"help": "tokens kept of each row"})
    max_tokens: int = field(default=16384, metadata={"help": "tokens computed at once; changes speed and memory only"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "the adapter's output is scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapter"})
    private: bool = field(default=True, metadata={"help": "false: train without privacy, for comparison"})
    attn_implementation: str = field(default="dp_flash", metadata={"help": "attention in which no unit can see another"})


def held_out_apart(rows: Dataset, column: str, share: float) -> tuple[Dataset, Dataset]:
    """The rows to learn and those held out; all rows with the same value of `column` go to one side.

    Where a row goes depends on its own value alone: to add or remove a row moves no other, as privacy accounting assumes.
    """
    require_columns(rows, column)
    hashed = (int.from_bytes(sha256(str(value).encode()).digest()[:4]) / 2**32 for value in rows[column])
    apart = [value < share for value in hashed]
    parts = tuple(rows.select([row for row, held in enumerate(apart) if held is part]) for part in (False, True))
    return parts[0], parts[1]


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


def asked(rows: Dataset, count: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of `count` different prompts with one of their answers each, spread over the rows."""
    pairs: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        prompt = tuple(token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)
        pairs.setdefault(prompt, [label for label in row["labels"] if label != -100])
    found = list(pairs.items())
    return [(list(prompt), answer) for prompt, answer in found[:: max(1, len(found) // max(1, count))][:count]]


def answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, taking the likeliest token every time."""
    model.eval()
    written = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
        )
        written.append(tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True))
    return written


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of sft_lora.yaml."""
    options, privacy, args = read_options(__file__, overrides, Options, PrivacyConfig, SFTConfig)
    args.padding_free, args.max_length, args.packing = True, None, False

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chat = tokenizer.chat_template is not None
    rows, other = load_rows(options.dataset, options.split), None
    if options.eval_dataset is not None:
        other = load_rows(options.eval_dataset, options.eval_split)
    elif options.held_out:
        column = privacy.privacy_unit or options.prompt_column or options.text_column
        rows, other = held_out_apart(rows, column, options.held_out)
    if options.samples and (other is None or options.prompt_column is None):
        raise invalid(
            "samples", expected="0 without held-out prompts", actual=options.samples, remedy="give prompt_column, held_out"
        )
    train = as_turns(rows, options, chat=chat, unit=privacy.privacy_unit)
    held_out = None if other is None else as_turns(other, options, chat=chat, unit=None)

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
        dp = None
        if options.private:
            dp = DPCallback(privacy, max_tokens_per_device=options.max_tokens).attach(trainer)
    trainer.model.print_trainable_parameters()
    examples = asked(trainer.eval_dataset, options.samples) if options.samples else []
    prompts = [prompt for prompt, _ in examples]
    before = answers(trainer.model, tokenizer, prompts, options.max_new_tokens)
    loss_before = None if held_out is None else trainer.evaluate()["eval_loss"]
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=checkpoint(args))
    loss_after = None if held_out is None else trainer.evaluate()["eval_loss"]
    after = answers(trainer.model, tokenizer, prompts, options.max_new_tokens)

    save(trainer, dp)
    print("NOT private: trained with private=false, no guarantee of any kind." if dp is None else dp.report().to_text())
    for (prompt, answer), old, new in zip(examples, before, after, strict=True):
        print(f"\nprompt: {tokenizer.decode(prompt, skip_special_tokens=True)}".rstrip())
        print(f"answer in the data: {tokenizer.decode(answer, skip_special_tokens=True)}")
        print(f"before training: {old}\nafter training: {new}")
    if held_out is not None:
        count = len(held_out)
        print(f"\nloss per token on {count} held-out rows: {loss_before:.3f} before training, {loss_after:.3f} after")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
