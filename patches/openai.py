"""The first GPT: attention code of its own; the causal mask is a buffer of each layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, register_attention
from dp_flash_hf.attention.tensor_cache import once


@register_attention("transformers.models.openai.modeling_openai.Attention")
class FlashOpenAIGPTAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any, x: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False, **kwargs: Any
    ) -> list[Tensor]:
        size = self.split_size // self.n_head
        query, key, value = (heads(part, size) for part in self.c_attn(x).split(self.split_size, -1))
        context, _ = dp_flash_attention(
            *(self, query, key, value, None if attention_mask is None else once(attention_mask, _seen)),
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=size**-0.5 if self.scale else 1.0,
            is_causal=True,
            output_attentions=output_attentions,
            **kwargs,
        )
        return [self.resid_dropout(self.c_proj(context.flatten(2)))]


def _seen(mask: Tensor) -> Tensor:
    """(B, 1, S, S) bool of the model's (B, 1, 1, S) mask, which is added to logits and knows of padding only."""
    real = mask > torch.finfo(mask.dtype).min / 2
    return (real & real.mT).tril()
