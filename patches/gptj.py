"""GPT-J and CodeGen: a class table from before the attention interface; rotary positions on neighbouring pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import keys_and_values, register_attention


@register_attention("transformers.models.gptj.modeling_gptj.GPTJAttention")
class FlashGPTJAttention:
    """Replaces the whole forward; logits in the dtype of the values, where the family's own are in float32."""

    def _projected(self: Any, states: Tensor) -> list[Tensor]:
        """Query, key and value, each (B, S, H, D)."""
        shape = (self.num_attention_heads, self.head_dim)
        return [layer(states).unflatten(-1, shape) for layer in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = self._projected(hidden_states)
        sin, cos = (
            table.repeat_interleave(2, -1)[:, :, None]
            for table in self.embed_positions.to(value)[position_ids.to(value.device)].chunk(2, -1)  # type: ignore[union-attr]
        )
        query, key = (_rotated(states, sin, cos).transpose(1, 2) for states in (query, key))
        key, value = keys_and_values(layer_past, self.layer_idx, lambda: (key, value.transpose(1, 2)))
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.attn_dropout.p if self.training else 0.0,
            is_causal=True,
            position_ids=position_ids,
            output_attentions=output_attentions,
            **kwargs,
        )
        return self.resid_dropout(self.out_proj(context.flatten(2))), None


@register_attention("transformers.models.codegen.modeling_codegen.CodeGenAttention")
class FlashCodeGenAttention(FlashGPTJAttention):
    """GPT-J's, with one projection laid out in four parts of query, value and key."""

    def _projected(self: Any, states: Tensor) -> list[Tensor]:
        query, value, key = self.qkv_proj(states).unflatten(-1, (4, -1)).chunk(3, -1)
        shape = (self.num_attention_heads, self.head_dim)
        return [part.flatten(-2).unflatten(-1, shape) for part in (query, key, value)]


def _rotated(states: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """(B, S, H, D) with the first features of each head rotated in pairs, as many as `sin` and `cos` (B, S, 1, R) have."""
    turned, rest = states.split([sin.shape[-1], states.shape[-1] - sin.shape[-1]], -1)
    across = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat((turned * cos + across * sin, rest), -1)
