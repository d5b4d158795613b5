"""What the tests of attention share: calls of the function and the oracle, small models of many families, and their batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dp_flash_hf.attention import registration
from dp_flash_hf.attention.function import dp_flash_attention

registration.register()

EPS64 = torch.finfo(torch.float64).eps
NAN = math.nan

# --- calls of the function, and of the oracle ---------------------------------------------------------------------------------

B, H, G, S, D, E = 2, 4, 2, 9, 8, 6


def tensors(batch: int = B, q: int = S, k: int = S, heads: int = H, kv_heads: int = G, e: int = E) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = (batch, heads, q, D), (batch, kv_heads, k, D), (batch, kv_heads, k, e)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def layer(is_causal: bool = True) -> nn.Module:
    module = nn.Module()
    module.is_causal = is_causal  # type: ignore[assignment]
    return module


def run(qkv: list[Tensor], mask: Tensor | None = None, causal: bool = True, **kwargs: Any) -> Tensor:
    query, key, value = qkv
    out, weights = dp_flash_attention(layer(causal), query, key, value, mask, **kwargs)
    assert weights is None
    return out.transpose(1, 2)  # (B, H, Q, E), as the oracle has it


def assert_same(ours: Tensor, oracle: Tensor, inputs: list[Tensor], eps: float = EPS64) -> None:
    """Equal outputs and gradients. Errors are those of sums of at most 64 products of values below 8, one after another."""
    atol = 64 * 8 * eps
    torch.testing.assert_close(ours, oracle, rtol=0, atol=atol)
    seed = torch.randn(ours.shape, dtype=ours.dtype)
    grads = [torch.autograd.grad(out, inputs, seed, retain_graph=True) for out in (ours, oracle)]
    torch.testing.assert_close(*grads, rtol=0, atol=atol)


def causal_mask(n: int, window: int | None = None) -> Tensor:
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    return mask if window is None else mask.triu(1 - window)


def padding(lengths: list[int], side: str = "right", size: int = S) -> Tensor:
    rows = [[1] * n + [0] * (size - n) for n in lengths]
    return torch.tensor(rows if side == "right" else [row[::-1] for row in rows]).bool()


EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {},
    "scaled": lambda: {"scaling": 0.2},
    "softcap": lambda: {"softcap": 1.3},
    "sinks": lambda: {"s_aux": torch.randn(H, dtype=torch.float64, requires_grad=True)},
    "bias": lambda: {"position_bias": torch.randn(1, H, S, S, dtype=torch.float64, requires_grad=True)},
    "all": lambda: EXTRAS["softcap"]() | EXTRAS["sinks"]() | EXTRAS["bias"](),
}
ORACLE_NAMES = {"scaling": "scale", "softcap": "softcap", "s_aux": "sinks", "position_bias": "bias"}


def for_oracle(extra: dict[str, Any]) -> dict[str, Any]:
    return {ORACLE_NAMES[name]: value for name, value in extra.items()}


def trainable(qkv: list[Tensor], extra: dict[str, Any]) -> list[Tensor]:
    return [*qkv, *(value for value in extra.values() if isinstance(value, Tensor))]


CUTS = [0, 3, 4, S]

# --- models -------------------------------------------------------------------------------------------------------------------

TEXT = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
}
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2}
ENCDEC = {
    **{"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "gpt2": GPT2,
    "qwen3": GQA,
    "mistral": {**GQA, "sliding_window": 4},
    "phi3": GQA,
    "opt": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gemma2": {**GQA, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.5},
    "gemma3_text": {**GQA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": MOE,
    "gpt_oss": {**MOE, "sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "roberta": {**TEXT, "max_position_embeddings": 66},
    "distilbert": {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    "albert": {**TEXT, "embedding_size": 16},
    "modernbert": {**TEXT, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {
        **{"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
        **{"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8},
    },
    "bart": ENCDEC,
}


def build(auto: Any, model_type: str, fields: dict[str, Any], name: str = "dp_flash", **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **fields, **more)
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=name).eval()  # eval: no dropout; gradients flow all the same
    for p in model.parameters():  # initialisers leave biases, sinks and relative positions at zero, which tests nothing
        nn.init.normal_(p, std=0.2) if p.ndim == 1 or "relative_attention_bias" in str(p.shape) else None
    return model


def logits_and_gradients(model: Any, real: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    output = model(**inputs)
    kept = output[0][real]
    kept.square().mean().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [kept.detach(), *(g.clone() for g in grads)]


def assert_models_agree(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Two orders of the same sums: a few hundred roundings of values up to the largest one in each tensor."""
    largest = max(x.abs().max().item() for x in theirs[1:])
    for a, b in zip(ours, theirs, strict=True):
        scale = max(b.abs().max().item(), 1e-3 * largest)
        assert (a - b).abs().max().item() <= 300 * torch.finfo(dtype).eps * scale


IDS = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(5))


def padded(side: str) -> tuple[Tensor, dict[str, Any]]:
    real = padding([12, 7, 9], side, 12) if side != "none" else torch.ones(3, 12).bool()
    return real, {"input_ids": IDS.where(real, 0), "attention_mask": real.long()}


def packed_inputs(lengths: list[int]) -> tuple[dict[str, Any], list[Tensor]]:
    rows = [IDS[i % 3, :n] for i, n in enumerate(lengths)]
    inputs = {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    return inputs, rows


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())
