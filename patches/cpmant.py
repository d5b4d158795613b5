"""CPM-Ant: attention code of its own, with a bias for positions and segments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, keys_and_values, register_attention
from dp_flash_hf.attention.tensor_cache import once


@register_attention("transformers.models.cpmant.modeling_cpmant.CpmAntAttention")
class FlashCpmAntAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any,
        hidden_q: Tensor,
        hidden_kv: Tensor,
        attention_mask: Tensor,
        position_bias: Tensor,
        output_attentions: bool | None = False,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query = heads(self.project_q(hidden_q), self.dim_head)
        key, value = keys_and_values(
            past_key_values,
            self.layer_idx,
            lambda: (heads(self.project_k(hidden_kv), self.dim_head), heads(self.project_v(hidden_kv), self.dim_head)),
        )
        context, _ = dp_flash_attention(
            *(self, query, key, value, once(attention_mask, _four_dimensions)),
            dropout=self.dropout.p if self.dropout is not None and self.training else 0.0,
            is_causal=False,  # the mask says it
            position_bias=position_bias,
            output_attentions=output_attentions,
            **kwargs,
        )
        return self.attention_out(context.flatten(2)), None


def _four_dimensions(mask: Tensor) -> Tensor:
    return (mask != 0)[:, None]
