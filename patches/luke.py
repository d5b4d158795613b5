"""LUKE: words and entities in one attention, with queries that depend on which of the two the key is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dp_flash_hf.attention.function import dp_flash_attention
from dp_flash_hf.attention.patching import heads, register_attention


@register_attention("transformers.models.luke.modeling_luke.LukeSelfAttention")
class FlashLukeAttention:
    """Replaces the whole forward."""

    def forward(  # noqa: D102
        self: Any,
        word_hidden_states: Tensor,
        entity_hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        words, size = word_hidden_states.shape[1], self.attention_head_size
        entities = [] if entity_hidden_states is None else [entity_hidden_states]
        states = torch.cat([word_hidden_states, *entities], 1)
        key, value = heads(self.key(states), size), heads(self.value(states), size)
        if self.use_entity_aware_attention and entities:
            # (query for words, query for entities) . (key, 0) for a word, and . (0, key) for an entity
            to_words = torch.cat([self.query(word_hidden_states), self.e2w_query(entities[0])], 1)
            to_entities = torch.cat([self.w2e_query(word_hidden_states), self.e2e_query(entities[0])], 1)
            query = torch.cat([heads(to_words, size), heads(to_entities, size)], -1)
            of_word, of_entity = key.split([words, key.shape[2] - words], 2)
            key = torch.cat([F.pad(of_word, (0, size)), F.pad(of_entity, (size, 0))], 2)
        else:
            query = heads(self.query(states), size)
        context, _ = dp_flash_attention(
            *(self, query, key, value, attention_mask),
            dropout=self.dropout.p if self.training else 0.0,
            scaling=size**-0.5,
            is_causal=False,
            output_attentions=output_attentions,
            **kwargs,
        )
        of_words, of_entities = context.flatten(2).split([words, states.shape[1] - words], 1)
        return of_words, of_entities if entities else None
