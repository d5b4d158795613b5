"""MPT: attention code of its own; alibi, the same for all rows; a mask that is True where a query may not see a key."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.masks import is_made_here
from dp_flash_hf.attention.patching import heads, keys_and_values, register_attention
from dp_flash_hf.errors import UnsupportedError


@register_attention("transformers.models.mpt.modeling_mpt.MptAttention")
class FlashMptAttention:
    """Replaces the whole forward. Refuses masks that `dp_flash_mask` did not make: what True means is not known."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and not is_made_here(attention_mask):
            raise UnsupportedError("MPT turns a 4-D attention_mask around; pass a mask of shape (batch, tokens)")
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = (heads(part, self.head_dim) for part in mixed.chunk(3, -1))
        key, value = keys_and_values(past_key_values, self.layer_idx, lambda: (key, value))
        if position_bias is not None:  # (H, 1, longest): the last entry belongs to the last key
            position_bias = position_bias[None, :, :, -key.shape[2] :]
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.attn_dropout_p if self.training else 0.0,
            scaling=self.softmax_scale,
            is_causal=True,
            position_bias=position_bias,
            **kwargs,
        )
        return self.out_proj(context.flatten(2)), None
