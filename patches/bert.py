"""RemBERT, Megatron-BERT, RoFormer, GIT, TAPAS and LayoutLMv3: attention code as BERT had it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, keys_and_values, register_attention


def _projected(module: Any, layer: Any, states: Tensor) -> Tensor:
    return heads(layer(states), module.attention_head_size)


def _attend(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    encoder_hidden_states: Tensor | None = None,
    cache: Any = None,
    rotate: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
    **kwargs: Any,
) -> Tensor:
    """(B, Q, H * D): self-attention, causal in a decoder, or cross-attention. `rotate` takes query, key and value."""
    cross = encoder_hidden_states is not None
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query = _projected(module, module.query, hidden_states)

    def project() -> tuple[Tensor, Tensor]:
        nonlocal query
        key, value = _projected(module, module.key, source), _projected(module, module.value, source)
        if rotate is not None:
            query, key, value = rotate(query, key, value)
        return key, value

    key, value = keys_and_values(cache, getattr(module, "layer_idx", 0), project, cross=cross)
    context, _ = dp_flash_attention(
        *(module, query, key, value, attention_mask),
        dropout=module.dropout.p if module.training else 0.0,
        is_causal=getattr(module, "is_decoder", False) and not cross,
        **kwargs,
    )
    return context.flatten(2)


@register_attention(
    "transformers.models.megatron_bert.modeling_megatron_bert.MegatronBertSelfAttention",
    "transformers.models.rembert.modeling_rembert.RemBertSelfAttention",
)
class FlashBertAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        return _attend(self, hidden_states, attention_mask, encoder_hidden_states, past_key_values, **kwargs), None


@register_attention("transformers.models.roformer.modeling_roformer.RoFormerSelfAttention")
class FlashRoFormerAttention:
    """Replaces the whole forward; rotary positions on neighbouring pairs, of values too if the config says so."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sinusoidal_pos: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def rotate(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            turned = (query, key, value) if self.rotary_value else (query, key)
            return (*self.apply_rotary_position_embeddings(sinusoidal_pos, *turned), value)[:3]

        rotated = rotate if encoder_hidden_states is None and sinusoidal_pos is not None else None
        return _attend(self, hidden_states, attention_mask, encoder_hidden_states, past_key_values, rotated, **kwargs), None


@register_attention("transformers.models.git.modeling_git.GitSelfAttention")
class FlashGitAttention:
    """Replaces the whole forward; the mask lets an image's patches see each other."""

    is_decoder = True

    def forward(  # noqa: D102
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return _attend(self, hidden_states, attention_mask, cache=past_key_values, **kwargs), None


@register_attention("transformers.models.tapas.modeling_tapas.TapasSelfAttention")
class FlashTapasAttention:
    """Replaces the whole forward; a decoder's cache comes back with the output."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        context = _attend(self, hidden_states, attention_mask, encoder_hidden_states, past_key_values, **kwargs)
        return (context, past_key_values) if self.is_decoder else (context,)


@register_attention("transformers.models.layoutlmv3.modeling_layoutlmv3.LayoutLMv3SelfAttention")
class FlashLayoutLMv3Attention:
    """Replaces the whole forward; a bias for the distance in the text, and for that on the page."""

    def forward(  # noqa: D102
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        rel_2d_pos: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        bias = rel_pos if self.has_relative_attention_bias else None
        if bias is not None and rel_2d_pos is not None and self.has_spatial_attention_bias:
            bias = bias + rel_2d_pos
        if bias is not None:
            bias = bias * self.attention_head_size**-0.5
        return _attend(self, hidden_states, attention_mask, position_bias=bias, **kwargs), None
