"""Tokenised texts as the causal trainers of frameworks take them, the tiny model that they train, and a tiny encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.models import VOCABULARY, tiny
from tests.support.trainers import texts


def table() -> Dataset:
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in texts()]
    return Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])


def tokenizer() -> Any:
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, **{f"w{word}": word for word in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)  # type: ignore[no-untyped-call]


def model() -> Any:
    return tiny("gpt2").float()


def collator() -> Any:
    return hf.DataCollatorForSeq2Seq(tokenizer(), label_pad_token_id=-100)


def save_encoder(path: Path) -> None:
    """Write an encoder with its tokenizer, the same each time."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(1)
    hf.BertModel(hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).save_pretrained(path)
    tokenizer().save_pretrained(path)
