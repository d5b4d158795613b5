"""LiLT: a text and a layout stream whose logits are added to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, register_attention


@register_attention("transformers.models.lilt.modeling_lilt.LiltSelfAttention")
class FlashLiltAttention:
    """Replaces the whole forward: the sum of two products is the product of queries and keys side by side."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        layout_inputs: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        size = self.attention_head_size
        small = size // self.channel_shrink_ratio
        query, key, value = (heads(layer(hidden_states), size) for layer in (self.query, self.key, self.value))
        where = [heads(layer(layout_inputs), small) for layer in (self.layout_query, self.layout_key, self.layout_value)]
        query = torch.cat([query * size**-0.5, where[0] * small**-0.5], -1)
        key = torch.cat([key, where[1]], -1)
        context, layout = (
            dp_flash_attention(
                *(self, query, key, states, attention_mask),
                dropout=self.dropout.p if self.training else 0.0,
                scaling=1.0,
                is_causal=False,
                output_attentions=output_attentions,
                **kwargs,
            )[0].flatten(2)
            for states in (value, where[2])
        )
        return context, layout
