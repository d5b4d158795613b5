"""MPNet: attention code of its own, with a bias for the distance of two tokens that is computed once for all layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, register_attention


@register_attention("transformers.models.mpnet.modeling_mpnet.MPNetSelfAttention")
class FlashMPNetAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        query, key, value = (heads(layer(hidden_states), self.attention_head_size) for layer in (self.q, self.k, self.v))
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.dropout.p if self.training else 0.0,
            is_causal=False,
            position_bias=position_bias,
            output_attentions=output_attentions,
            **kwargs,
        )
        return (self.o(context.flatten(2)),)
