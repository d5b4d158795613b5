"""Falcon: a class table from before the attention interface; rotary positions or alibi; few key heads or one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import keys_and_values, register_attention
from dp_flash_hf.attention.tensor_cache import once


@register_attention("transformers.models.falcon.modeling_falcon.FalconAttention")
class FlashFalconAttention:
    """Replaces the whole forward. Alibi counts once, as under `sdpa`; the family's eager code adds it twice."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (states.transpose(1, 2) for states in _split(self, self.query_key_value(hidden_states)))
        dropout = 0.0  # the family drops attention weights only with alibi
        bias = None
        if alibi is None:
            assert position_embeddings is not None
            query, key = (_rotated(states, *position_embeddings) for states in (query, key))
        else:
            dropout = self.attention_dropout.p if self.training else 0.0
            bias = alibi.view(len(query), self.num_heads, 1, -1) / math.sqrt(self.head_dim)
        key, value = keys_and_values(layer_past, self.layer_idx, lambda: (key, value))
        if attention_mask is not None and bias is not None:
            attention_mask = once(attention_mask, _seen)
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=dropout,
            is_causal=True,
            position_bias=bias,
            position_ids=position_ids,
            output_attentions=output_attentions,
            **kwargs,
        )
        return self.dense(context.flatten(2)), None


def _split(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, S, H, D), key and value (B, S, G, D) of the fused projection."""
    if module.new_decoder_architecture:  # groups, each of its queries, a key and a value
        grouped = fused.unflatten(-1, (module.num_kv_heads, -1, module.head_dim))
        return grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    if not module.multi_query:
        grouped = fused.unflatten(-1, (module.num_heads, 3, module.head_dim))
        return grouped[..., 0, :], grouped[..., 1, :], grouped[..., 2, :]
    parts = fused.unflatten(-1, (-1, module.head_dim))
    return parts[..., :-2, :], parts[..., -2:-1, :], parts[..., -1:, :]


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, S, D) rotated by halves; `cos` and `sin` are (B, S, D)."""
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def _seen(mask: Tensor) -> Tensor:
    """(B, 1, Q, K) bool of the (B, H, Q, K) sum of alibi and mask that the model makes: alibi is never that low."""
    return mask[:, :1] > torch.finfo(mask.dtype).min / 2
