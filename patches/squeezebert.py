"""SqueezeBERT: attention code of its own on (B, C, S) states, projected by grouped convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, register_attention


@register_attention("transformers.models.squeezebert.modeling_squeezebert.SqueezeBertSelfAttention")
class FlashSqueezeBertAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None, output_attentions: bool, **kwargs: Any
    ) -> dict[str, Tensor]:
        query, key, value = (
            heads(layer(hidden_states).transpose(1, 2), self.attention_head_size)
            for layer in (self.query, self.key, self.value)
        )
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.dropout.p if self.training else 0.0,
            is_causal=False,
            output_attentions=output_attentions,
            **kwargs,
        )
        return {"context_layer": context.flatten(2).transpose(1, 2)}
