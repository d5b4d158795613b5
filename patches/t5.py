"""T5: the relative-position bias is looked up once for all rows and added to every row's scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.layers import recorder_of, register_rule


@register_rule("transformers.models.t5.modeling_t5.T5Attention")
class PrivateT5Attention:
    """Rule that gives every row its own lookup, so that the table's gradient is known per row."""

    def compute_bias(
        self: Any, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: int = 0
    ) -> Tensor:
        """Bias (rows, heads, queries, keys); equal for all rows."""
        table = self.relative_attention_bias
        device = device or table.weight.device
        queries = torch.arange(query_length, device=device) + past_seen_tokens
        buckets = self._relative_position_bucket(
            torch.arange(key_length, device=device)[None] - queries[:, None],
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        recorder = recorder_of(self)
        ids = (
            recorder.per_item_rows(table, buckets[None], self.relative_attention_num_buckets)
            if recorder.tracks(table.weight)
            else buckets[None]
        )
        return table(ids).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
