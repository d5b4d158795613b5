"""GPT-Neo: a class table from before the attention interface; logits are not scaled; local layers see a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.masks import is_made_here, mark_made_here
from dp_flash_hf.attention.patching import keys_and_values, register_attention, register_guard
from dp_flash_hf.attention.segments import is_packed
from dp_flash_hf.attention.tensor_cache import once


@register_attention("transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention")
class FlashGPTNeoAttention:
    """Replaces the whole forward; logits in the dtype of the values, where the family's own are in float32."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (
            self._split_heads(layer(hidden_states), self.num_heads, self.head_dim)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = keys_and_values(layer_past, self.layer_id, lambda: (key, value))
        window = self.config.window_size if self.attention_type == "local" else None
        if window is not None and key.shape[2] > window:
            if attention_mask is not None:
                attention_mask, window = once(attention_mask, _within, window), None
            elif query.shape[2] == 1:  # the newest token, which sees the keys at the end
                key, value = key[:, :, -window:], value[:, :, -window:]
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=1.0,
            is_causal=True,
            sliding_window=window if attention_mask is None else None,
            output_attentions=output_attentions,
            **kwargs,
        )
        return self.resid_dropout(self.out_proj(context.flatten(2))), None


@register_guard("gpt_neo")
def no_cache_of_packed_rows(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The model tells units of one row apart in its mask, and does so only without a cache."""
    return (
        (args, {**kwargs, "use_cache": False}) if is_packed(kwargs.get("position_ids"), kwargs.get("attention_mask")) else None
    )


def _within(mask: Tensor, window: int) -> Tensor:
    """A bool mask (B, 1, Q, K), less the keys that are not among the last `window` up to the query."""
    queries, keys = mask.shape[-2:]
    seen = mask & torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries + 1 - window)
    return mark_made_here(seen, window) if is_made_here(mask) else seen
