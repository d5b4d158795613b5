"""PEFT's adapters beyond the `nn.Linear` halves of LoRA, which need no rule of their own: the magnitude of DoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.layers import recorder_of, register_rule
from dp_flash_hf.layers.norm import per_item


@register_rule("peft.tuners.lora.dora.DoraLinearLayer")
class PrivateDoraLinear:
    """Rule for the magnitude vector m (p,) of DoRA on a linear layer (Liu et al. 2024, arXiv 2402.09353).

    The layer returns m z - base with z = (base + update) / ||W + dW||, so its slope in m is (output + base) / m. The layer's
    own forward runs with m held constant, and m re-enters through that slope, one copy per item of the batch.
    """

    def forward(self: Any, x: Tensor, *, base_layer: Any, base_result: Tensor | None = None, **kwargs: Any) -> Tensor:
        """x: (*lead, d); returns (*lead, p)."""
        recorder, magnitude = recorder_of(self), self.weight
        linear = self._dp_original.__name__ == "DoraLinearLayer"  # convolutions inherit from it, with another layout
        layout = recorder.layout(self, x) if linear and recorder.tracks(magnitude) else None
        if layout is None:
            return super().forward(x, base_layer=base_layer, base_result=base_result, **kwargs)  # type: ignore[misc, no-any-return]
        try:
            self._parameters["weight"] = magnitude.detach()
            out: Tensor = super().forward(x, base_layer=base_layer, base_result=base_result, **kwargs)  # type: ignore[misc]
        finally:
            self._parameters["weight"] = magnitude
        with torch.no_grad():
            base = base_layer(x) if base_result is None else base_result
            bias = getattr(base_layer, "bias", None)
            slope = (out + (base if bias is None else base - bias)) / magnitude
        result: Tensor = out + (per_item(magnitude, recorder, layout) - magnitude.detach()) * slope
        return result
