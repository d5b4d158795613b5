"""Perceiver: attention code of its own, of latents to inputs and to each other; keys and values may differ in size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, register_attention


@register_attention("transformers.models.perceiver.modeling_perceiver.PerceiverSelfAttention")
class FlashPerceiverAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        inputs_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        states = self.layernorm1(hidden_states)
        source = states if inputs is None else self.layernorm2(inputs)
        query, key = (heads(layer(x), self.qk_channels_per_head) for layer, x in ((self.query, states), (self.key, source)))
        context, _ = dp_flash_attention(
            *(self, query, key, heads(self.value(source), self.v_channels_per_head)),
            attention_mask if inputs is None else inputs_mask,
            dropout=self.dropout.p if self.training else 0.0,
            is_causal=False,
            output_attentions=output_attentions,
            **kwargs,
        )
        return (context.flatten(2),)
