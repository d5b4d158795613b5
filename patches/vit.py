"""ViT: class token and position table are parameters of the embedding module itself, shared by all rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dp_flash_hf.layers import recorder_of, register_rule
from dp_flash_hf.layers.norm import per_item


@register_rule("transformers.models.vit.modeling_vit.ViTEmbeddings")
class PrivateViTEmbeddings:
    """Rule that gives every row its own copy of the two parameters. Input: pixels (rows, channels, height, width)."""

    def forward(self: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: D102
        recorder = recorder_of(self)
        original = {name: self._parameters[name] for name in ("cls_token", "position_embeddings")}
        layout = recorder.layout(self, pixel_values, feature_dims=3) if any(map(recorder.tracks, original.values())) else None
        if layout is None:
            return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc, no-any-return]
        try:
            for name, parameter in original.items():
                self._parameters[name] = per_item(parameter, recorder, layout, batch_dim=True)
            return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc, no-any-return]
        finally:
            self._parameters.update(original)
