"""Train a small language model from scratch on public text, WITHOUT privacy, for private fine-tuning to start from.

The text is on any machine: docstrings of Python's standard library and of the installed packages, the packages' descriptions,
and whatever else you name. It must be public: the model and its tokenizer keep what they read, with no guarantee of any kind.
Give the folder that this leaves as `model=` to another recipe, whose private data then teaches no tokenizer.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dp_flash_hf.cli.common import run
from dp_flash_hf.recipes.common import (
    checkpoint,
    docstrings,
    leaving_nothing_behind,
    load_rows,
    read_options,
    require_columns,
    save,
    show_progress,
)

EVERY = 64  # one text in this many is held out


@dataclass
class Options:
    """The model's size and the public text."""

    texts: list[str] = field(
        default_factory=list, metadata={"help": "more PUBLIC text: txt or md files, or rows, as of other recipes"}
    )
    text_column: str = field(default="text", metadata={"help": "column of those of the texts that have columns"})
    packages: bool = field(default=True, metadata={"help": "read the installed packages; false if any of them is not public"})
    vocab_size: int = field(default=4096, metadata={"help": "tokens of the byte-level BPE tokenizer"})
    hidden_size: int = field(default=192, metadata={"help": "width of the decoder"})
    num_layers: int = field(default=4, metadata={"help": "decoder layers"})
    num_heads: int = field(default=6, metadata={"help": "attention heads"})
    max_length: int = field(default=256, metadata={"help": "tokens of a block, and the longest text that the model can read"})
    prompt: str = field(default="This function returns the", metadata={"help": "how the sample begins"})


def read_texts(options: Options) -> list[str]:
    """Every text once, in a fixed order."""
    found = docstrings(Path(sysconfig.get_path("stdlib")))
    if options.packages:
        for folder in dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))):
            found += docstrings(Path(folder))
        packages: Any = distributions()
        found += sorted(str(package.metadata.get_payload()) for package in packages)
    for source in options.texts:
        path = Path(source).expanduser()
        if path.suffix in {".txt", ".md"}:
            found.append(path.read_text(encoding="utf-8"))
        else:
            rows = load_rows(source, "train")
            require_columns(rows, options.text_column)
            found += map(str, rows[options.text_column])
    return [text for text in dict.fromkeys(found) if text.strip()]


def learnt_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, to which no text is unknown."""
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")


def packed(texts: Sequence[str], tokenizer: Any, length: int) -> Dataset:
    """Blocks of `length` tokens, texts one after the other: right for public text, and never for private units."""

    def blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = [token for ids in tokenizer(batch["text"])["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
        return {"input_ids": [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]}

    rows = Dataset.from_dict({"text": texts})
    return rows.map(blocks, batched=True, remove_columns=["text"], desc="tokenizing and packing")


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of pretrain_tiny.yaml."""
    options, args = read_options(__file__, overrides, Options, TrainingArguments)

    texts = read_texts(options)
    learnt, held_out = [text for index, text in enumerate(texts) if index % EVERY], texts[::EVERY]
    tokenizer = learnt_tokenizer(learnt, options.vocab_size)
    train, test = (packed(part, tokenizer, options.max_length) for part in (learnt, held_out))
    print(
        f"{len(texts)} texts, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(train)} blocks of {options.max_length} tokens"
    )

    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        max_position_embeddings=options.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")

    with leaving_nothing_behind(args.output_dir):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=checkpoint(args, private=False))

    save(trainer, None)
    warning = "NOT private: trained on text taken to be public, no guarantee of any kind."
    sources = ", ".join(["the standard library", *["the installed packages"] * options.packages, *map(repr, options.texts)])
    card = f"# {Path(args.output_dir).name}\n\n{warning}\n\nText: {sources}.\n"
    (Path(args.output_dir) / "README.md").write_text(card, encoding="utf-8")
    print(warning)
    print(f"\nloss per token on {len(test)} held-out blocks: {trainer.evaluate()['eval_loss']:.3f}")
    prompt = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    sample = model.generate(**prompt, do_sample=True, temperature=0.5, max_length=min(64, options.max_length))
    print(f"sample: {tokenizer.decode(sample[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
