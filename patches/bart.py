"""XGLM, TrOCR and MVP: attention code as BART had it, in the decoder, across, and in MVP's encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, keys_and_values, register_attention


@register_attention(
    "transformers.models.xglm.modeling_xglm.XGLMAttention",
    "transformers.models.trocr.modeling_trocr.TrOCRAttention",
    "transformers.models.mvp.modeling_mvp.MvpAttention",
)
class FlashBartAttention:
    """Replaces the whole forward. MVP's prompts are keys in front of a row's own, which all its tokens see."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        attn_prompt: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        source = hidden_states if key_value_states is None else key_value_states
        cross, causal = key_value_states is not None, self.is_decoder and key_value_states is None
        query = heads(self.q_proj(hidden_states), self.head_dim)
        key, value = keys_and_values(
            past_key_values,
            self.layer_idx,
            lambda: (heads(self.k_proj(source), self.head_dim), heads(self.v_proj(source), self.head_dim)),
            cross=cross,
        )
        if attn_prompt is not None:
            if causal and attention_mask is None and query.shape[2] > 1:
                attention_mask = torch.ones(1, 1, *[query.shape[2]] * 2, dtype=torch.bool, device=query.device).tril()
            if attention_mask is not None:
                seen = attention_mask.new_ones(*attention_mask.shape[:3], attn_prompt[0].shape[1])
                attention_mask = torch.cat([seen, attention_mask], -1)
            key, value = (
                torch.cat([prompt.expand(len(query), -1, -1, -1), states], 2)
                for prompt, states in zip(attn_prompt, (key, value), strict=True)
            )
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=causal,
            **kwargs,
        )
        return self.out_proj(context.flatten(2)), None
