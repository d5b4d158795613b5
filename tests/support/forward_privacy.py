"""What the tests of privatised forward passes share: a single private layer, and small privatised models with their batches."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from dp_flash_hf.attention import release
from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.forward_privacy.scope import Scope
from dp_flash_hf.forward_privacy.sites import AttentionSite
from tests.support.models import VOCABULARY

EPS64 = torch.finfo(torch.float64).eps
# What a model's output calls its cache.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
SILENT = 1e-30  # a noise multiplier that leaves float64 outputs as they are


def private_layer(
    privacy: AttentionPrivacy, *, causal: bool = True, rows: int | None = None
) -> tuple[nn.Module, AttentionLedger]:
    """A module with a site on it, as in a model that was given a batch of `rows` rows; and its ledger."""
    module, ledger = nn.Module(), AttentionLedger()
    scope = Scope(module, privacy, ["layer"], ledger, [])
    if rows is not None:
        scope.enter(module, (), {"input": torch.zeros(rows, 1)})
    module.is_causal = causal  # type: ignore[assignment]
    release.put_on(module, AttentionSite("layer", scope))
    return module, ledger


def call(module: nn.Module, qkv: list[Tensor], mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """(B, H, Q, E)."""
    query, key, value = qkv
    output, _ = dp_flash_attention(module, query, key, value, mask, **kwargs)
    return output.transpose(1, 2)


def random_qkv(
    batch: int, heads: int, groups: int, tokens: int, d: int = 3, e: int = 2, keys: int | None = None
) -> list[Tensor]:
    shapes = (batch, heads, tokens, d), (batch, groups, keys or tokens, d), (batch, groups, keys or tokens, e)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def band(n: int, window: int, causal: bool) -> Tensor:
    away = torch.arange(n)[:, None] - torch.arange(n)
    return (away.abs() < window) & (away >= 0 if causal else torch.ones(n, n, dtype=torch.bool))


def clipped(value: Tensor, norms: list[float]) -> Tensor:
    limits = torch.tensor(norms, dtype=value.dtype)[:, None, None]
    factors: Tensor = (limits / torch.linalg.vector_norm(value, dim=-1, keepdim=True)).clamp(max=1)
    return value * factors


GOOD: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 2.0, "max_length": 8}


def cost(privacy: AttentionPrivacy, factor: float) -> float:
    """mu^2 of a call with this factor."""
    assert privacy.noise_multiplier is not None
    return factor / privacy.factor / privacy.noise_multiplier**2


# --- models -------------------------------------------------------------------------------------------------------------------

NOISE: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 2.0}
ATTENTION = AttentionPrivacy(**NOISE, max_length=32)
RESIDUAL = AttentionPrivacy(**NOISE)
TOKEN = AttentionPrivacy(**NOISE, max_length=32, unit="token", logit_cap=1.0)

_SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": VOCABULARY}
_BART: dict[str, Any] = {
    **{
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("ffn_dim", 24), ("attention_heads", 2))
    },
    **{"d_model": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0, "dropout": 0.0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}


def build(model_class: Any, config: Any, *, trained: bool = False) -> Any:
    torch.manual_seed(1)
    model = model_class._from_config(config, attn_implementation="dp_flash").double().eval()
    return model.requires_grad_(trained)


def llama(**changes: Any) -> Any:
    config = hf.LlamaConfig(
        **_SIZES, num_hidden_layers=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return build(hf.LlamaForCausalLM, config, **changes)


def bart(layers: int = 2, **changes: Any) -> Any:
    return build(hf.BartForConditionalGeneration, hf.BartConfig(**{**_BART, "decoder_layers": layers}), **changes)


def texts(lengths: tuple[int, ...] = (6, 3, 5), **others: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, **others}


def pairs(**others: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return texts(decoder_input_ids=torch.randint(3, VOCABULARY, (3, 4), generator=generator), use_cache=False, **others)


def plain_output(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


ACROSS: dict[str, Any] = {"private": ("input_ids",), "released": ("logits",)}
