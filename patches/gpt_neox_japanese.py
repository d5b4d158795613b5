"""GPT-NeoX-Japanese: attention code of its own, which does in float32 what GPT-NeoX does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, keys_and_values, register_attention


@register_attention("transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention")
class FlashGPTNeoXJapaneseAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        layer_past: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Tensor | None]:
        query, key, value = heads(self.query_key_value(hidden_states), 3 * self.head_size).chunk(3, -1)
        assert position_embeddings is not None
        query, key = (_rotated(states, *position_embeddings) for states in (query, key))
        key, value = keys_and_values(layer_past, self.layer_idx, lambda: (key, value))
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.attention_dropout.p if self.training else 0.0,
            is_causal=True,
            position_ids=position_ids,
            output_attentions=output_attentions,
            **kwargs,
        )
        return self.dense(context.flatten(2)), None, self.dense_bias


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, S, D) with the first features of each head rotated by halves, as many as `cos` and `sin` (B, S, R) have."""
    turned, rest = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None], rest), -1)
