"""Embedding tables, their subclasses with scales and offsets included."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.layers import recorder_of, register_rule
from dp_flash_hf.layouts import Layout
from dp_flash_hf.records import Recorder


class RecordedEmbedding(torch.autograd.Function):
    """y = E[ids], whose backward records the gradient of E (V, d)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, recorder: Recorder, layout: Layout) -> Tensor:
        """ids: LongTensor (*lead,)."""
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx, ctx.recorder, ctx.layout = weight, padding_idx, recorder, layout
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        """g: (*lead, d)."""
        (ids,) = ctx.saved_tensors
        ctx.recorder.embedding(ctx.weight, ids, g, ctx.layout, ctx.padding_idx)
        return (None,) * 5


@register_rule(nn.Embedding)
class PrivateEmbedding(nn.Embedding):
    """Rule for `nn.Embedding`. Input: ids (*lead,). Tables looked up once for all rows, (1, length), are looked up per row."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        recorder = recorder_of(self)
        if not recorder.tracks(self.weight):
            return super().forward(input)
        if self.max_norm is not None:
            raise UnsupportedError(
                "an embedding with max_norm rewrites its rows without noise in every forward; set max_norm=None"
            )
        ids = recorder.per_item_rows(self, input, self.num_embeddings)
        layout = None if self.scale_grad_by_freq else recorder.layout(self, ids, feature_dims=0)
        if layout is None:  # scale_grad_by_freq counts ids over all units: exact one unit at a time only
            return super().forward(ids)
        return RecordedEmbedding.apply(self.weight, ids, self.padding_idx, recorder, layout)  # type: ignore[no-any-return, no-untyped-call]
