"""Bloom: attention code of its own; alibi."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import keys_and_values, register_attention
from dp_flash_hf.errors import UnsupportedError


@register_attention("transformers.models.bloom.modeling_bloom.BloomAttention")
class FlashBloomAttention:
    """Replaces the whole forward. Refuses `slow_but_exact`, which reads the weight of `dense` without calling it."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if self.pretraining_tp > 1 and self.slow_but_exact:
            raise UnsupportedError('dp_flash attention does not implement slow_but_exact; use attn_implementation="eager"')
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        key, value = keys_and_values(layer_past, self.layer_idx, lambda: (key, value))
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            is_causal=True,
            position_bias=self.beta * alibi.view(len(query), self.num_heads, 1, -1),
            output_attentions=output_attentions,
            **kwargs,
        )
        return residual + F.dropout(self.dense(context.flatten(2)), self.hidden_dropout, self.training), None
