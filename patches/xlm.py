"""XLM and FlauBERT: attention code of their own; the mask is (B, K), or (B, Q, K) in a decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, keys_and_values, register_attention
from dp_flash_hf.attention.tensor_cache import once


@register_attention(
    "transformers.models.flaubert.modeling_flaubert.MultiHeadAttention",
    "transformers.models.xlm.modeling_xlm.MultiHeadAttention",
)
class FlashXLMAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any,
        input: Tensor,
        mask: Tensor,
        kv: Tensor | None = None,
        cache: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        source = input if kv is None else kv
        query = heads(self.q_lin(input), self.head_dim)
        key, value = keys_and_values(
            cache,
            self.layer_id,
            lambda: (heads(self.k_lin(source), self.head_dim), heads(self.v_lin(source), self.head_dim)),
            cross=kv is not None,
        )
        context, _ = dp_flash_attention(
            *(self, query, key, value, once(mask, _four_dimensions)),
            dropout=self.dropout if self.training else 0.0,
            is_causal=False,  # the mask says it
            output_attentions=output_attentions,
            **kwargs,
        )
        return (self.out_lin(context.flatten(2)),)


def _four_dimensions(mask: Tensor) -> Tensor:
    return (mask != 0)[:, None] if mask.ndim == 3 else (mask != 0)[:, None, None]
