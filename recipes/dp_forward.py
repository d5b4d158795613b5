"""Classify texts that leave their owners only with noise: each text is released once, and nothing else sees it.

As in DP-Forward (Du et al., CCS 2023, arXiv:2309.06746), noise is added inside the forward pass, for training and at inference
alike, and the classifier behind it is trained on noised values, so that it knows how to read them. Before the noise stands
only what is public: a frozen encoder, and the names of the labels. The fewer directions a text can go, the less of it drowns,
so what is released is not every token's hidden state but how near the text is to each label's name.

Each text is released once and that is kept, so the classifier may take as many epochs as it likes: they are post-processing.
(A fresh release in every epoch costs as much privacy as it tells: n releases at sqrt(n) times the noise say what one says.)

What is promised differs from the other recipes. There, whether a training example was used hardly changes the model (add or
remove one, in the centre's hands). Here any other text of the same length could stand in a text's place, test texts included,
and whoever sees what was released learns which it was only as well as epsilon allows: no one has to be trusted with texts. That
costs far more noise, and is why epsilon is so large here. At 64 it protects little against whoever wonders which of two given
texts it was: of texts that are as unlike as can be, the better guess is right 99.996 times in 100, and of texts near two
different labels 99.7 times. At 8 it is right 80 times, and 72.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from dp_flash_hf import AttentionPrivacy, Privatized, privatize, verify_cut
from dp_flash_hf.cli.common import run
from dp_flash_hf.mechanisms.config import Noise
from dp_flash_hf.recipes.classification import accuracy, encode
from dp_flash_hf.recipes.common import leaving_nothing_behind, load_rows, read_options, require_columns, show_progress

GIVEN = ("input_ids", "attention_mask")  # what a text is released of


@dataclass
class Options:
    """The model, the data and the promise."""

    model: str = field(metadata={"help": "Hub name or folder of an encoder"})
    dataset: str = field(metadata={"help": "Hub name, folder, or csv, json, jsonl or parquet file"})
    eval_dataset: str = field(metadata={"help": "as dataset, to measure the accuracy on; its texts are released as well"})
    target_epsilon: float = field(metadata={"help": "of every text, whoever sees what is released of it"})
    target_delta: float = field(metadata={"help": "well below 1 / number of texts"})
    split: str = field(default="train", metadata={"help": "split of a Hub name or folder"})
    eval_split: str = field(default="test", metadata={"help": "split of eval_dataset"})
    text_column: str = field(default="text", metadata={"help": "what is classified; private"})
    label_column: str = field(default="label", metadata={"help": "strings or integers; each different one is a class; public"})
    max_length: int = field(default=128, metadata={"help": "tokens kept of each text"})
    sharpness: float = field(default=20.0, metadata={"help": "of the likeness to labels: softmax(sharpness * cosine)"})
    release_batch_size: int = field(default=64, metadata={"help": "texts whose scores are computed at a time"})
    noise: Noise = field(default="secure", metadata={"help": "secure: from a cryptographic keystream; fast: from Philox"})


class Likeness(nn.Module):
    """How near a text is to each label's name, (B, 1, labels): what is clipped to norm 1 and noised."""

    names: Tensor

    def __init__(self, names: Tensor, sharpness: float) -> None:
        super().__init__()
        self.register_buffer("names", names)
        self.sharpness = sharpness

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled: (B, width), of length 1. The scores, without their mean, have length 1 too: clipping never bites."""
        scores = torch.softmax(self.sharpness * pooled @ self.names.T, -1)
        return nn.functional.normalize(scores - scores.mean(-1, keepdim=True), dim=-1).unsqueeze(1)


class Owner(nn.Module):
    """What runs where the texts are: the encoder, its mean over tokens, and the likeness to labels."""

    def __init__(self, encoder: nn.Module, names: dict[str, Tensor], sharpness: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.likeness = Likeness(self.pooled(**names), sharpness)

    def pooled(self, **batch: Tensor) -> Tensor:
        """The mean of the hidden states of real tokens, of length 1: (B, width)."""
        real = batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((self.encoder(**batch).last_hidden_state * real).sum(1), dim=-1)

    def forward(self, **batch: Tensor) -> Tensor:
        """(B, labels)."""
        scores: Tensor = self.likeness(self.pooled(**batch))
        return scores.squeeze(1)


class Classifier(nn.Module):
    """A linear classifier of released features (B, labels), which begins by taking the label of the nearest name."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(labels, labels)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Logits (B, labels), and their mean cross entropy with the labels (B,)."""
        logits = self.linear(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def release(privatized: Privatized, rows: Dataset, name: str, collate: Any, device: torch.device, batch_size: int) -> Dataset:
    """The noised features of every row, each released once."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    released: list[Tensor] = []
    for start in track(range(0, len(rows), batch_size), f"releasing {name}", disable=not sys.stderr.isatty()):
        places = by_length[start : start + batch_size]
        batch = collate([{key: rows[i][key] for key in GIVEN} for i in places])
        with torch.no_grad(), privatized.ledger.units([(name, i) for i in places]):
            released += privatized.model(**batch.to(device)).cpu()
    features = torch.stack(released)[torch.tensor(by_length).argsort()]
    # Of one scale whatever the noise, so that one learning rate does; what follows a release is free.
    return Dataset.from_dict({"features": features / features.std(), "labels": rows["labels"]}).with_format("torch")


def main(overrides: Sequence[str]) -> None:
    """Run the recipe with `key=value` overrides of dp_forward.yaml."""
    options, args = read_options(__file__, overrides, Options, TrainingArguments)

    train, held_out = load_rows(options.dataset, options.split), load_rows(options.eval_dataset, options.eval_split)
    for rows in (train, held_out):
        require_columns(rows, options.text_column, options.label_column)
    ids = {name: index for index, name in enumerate(sorted({str(label) for label in train[options.label_column]}))}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, held_out = (encode(rows, ids, tokenizer, options) for rows in (train, held_out))

    encoder = AutoModel.from_pretrained(options.model).eval().requires_grad_(False).to(args.device)
    names = tokenizer([label.replace("_", " ") for label in ids], padding=True, return_tensors="pt").to(args.device)
    privacy = AttentionPrivacy(
        clip_norm=1.0,
        target_epsilon=options.target_epsilon,
        target_delta=options.target_delta,
        noise=options.noise,
    )
    owner = Owner(encoder, names, options.sharpness)
    privatized = privatize(owner, privacy, layers=["likeness"], placement="residual")
    collate = DataCollatorWithPadding(tokenizer)
    verify_cut(privatized, {key: names[key] for key in GIVEN}, private=("input_ids",))
    train = release(privatized, train, "train", collate, args.device, options.release_batch_size)
    held_out = release(privatized, held_out, "test", collate, args.device, options.release_batch_size)

    with leaving_nothing_behind(args.output_dir):
        trainer = Trainer(
            model=Classifier(len(ids)),
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            compute_metrics=accuracy,
        )
    show_progress(trainer)
    trainer.train()
    trainer.save_model()
    report = privatized.report()
    (Path(args.output_dir) / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    print(report.to_text())
    print(f"\naccuracy on {len(held_out)} held-out rows: {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
