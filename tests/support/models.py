"""Tiny models of every family, batches for them, and losses that are sums over units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 61
PADDING = {"roberta": 1}  # 0 for all others

Batch = dict[str, Any]
Loss = Callable[[Any], Tensor]

_DECODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
_OPT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
    "pad_token_id": 0,
}
_DISTILBERT: dict[str, Any] = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}
_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}

BUILDERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gpt2_untied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2, tie_word_embeddings=False)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_DECODER, head_dim=8, sliding_window=4)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_DECODER)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER)),
    "bert_classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**{**_ENCODER, "num_labels": 3})),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**{**_ENCODER, "pad_token_id": 1})),
    "distilbert": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**_DISTILBERT)),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**_ENCODER, embedding_size=8)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**{**_DECODER, "num_local_experts": 4, "experts_implementation": "eager"})
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4)
    ),
}
CLASSIFIERS = ("vit", "bert_classifier")
UNSHIFTED = ("bert", "roberta", "distilbert", "albert", "t5")


def tiny(name: str, dtype: torch.dtype = torch.float64, *, seed: int = 1, attention: str | None = None) -> Any:
    """A family's smallest model, in eval mode (no dropout), with norm scales and biases that are not ones and zeros."""
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    if attention is not None:
        model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def batch_of(name: str, rows: int = 5, length: int = 7, dtype: torch.dtype = torch.float64, *, seed: int = 2) -> Batch:
    """Rows of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator, dtype=dtype), "labels": labels}
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row % 4 :] = 0
    ids[mask == 0] = PADDING.get(name, 0)
    if name == "bert_classifier":
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed_batch(lengths: tuple[int, ...] = (4, 1, 6, 3), *, seed: int = 2) -> tuple[Batch, Tensor]:
    """One row of several sequences, and their boundaries as int32 cumulative lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}, boundaries


def loss_of(name: str, model: Any) -> Loss:
    """The sum over units of their losses, so that a part of the batch gives that part's terms."""
    if name in CLASSIFIERS:
        return lambda batch: F.cross_entropy(
            model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"], reduction="sum"
        )

    def loss(batch: Batch) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        labels = batch["labels"]
        if name == "t5":
            inputs["labels"] = labels
        elif name not in (*UNSHIFTED, "mamba"):
            inputs["use_cache"] = False
        logits = model(**inputs).logits
        if name not in UNSHIFTED:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    return loss


class Toy(nn.Module):
    """Embedding, two linear layers and a norm over rows (rows, length): the smallest model with a layer of each usual kind."""

    def __init__(self, width: int = 6, classes: int = 11, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, width)
        self.inner = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes, bias=False)
        self.to(dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.norm(self.inner(self.table(input_ids)))))
        return logits


def toy_batch(rows: int = 4, length: int = 5, classes: int = 11, *, seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, classes, (rows, length), generator=generator)}


def toy_loss(model: nn.Module) -> Loss:
    """Sum over tokens of the cross entropy of each token's own id."""

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["input_ids"].flatten(), reduction="sum")

    return loss
