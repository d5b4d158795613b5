"""Convolutions as linear layers over patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from dp_flash_hf.layers import recorder_of, register_rule, tracked
from dp_flash_hf.layouts import Layout
from dp_flash_hf.records import Recorder


class RecordedConv2d(torch.autograd.Function):
    """`F.conv2d` without groups, whose backward records the gradients of weight (p, c, h, w) and bias (p,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: dict[str, Any], recorder: Recorder, layout: Layout
    ) -> Tensor:
        """x: (rows, c, H, W)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, weight)
        ctx.parameters = tracked(recorder, weight, bias)
        ctx.geometry, ctx.recorder, ctx.layout = geometry, recorder, layout
        return F.conv2d(x, weight, bias, **geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: (rows, p, H', W')."""
        x, weight = ctx.saved_tensors
        outputs = g.flatten(2).mT  # (rows, H' W', p)
        layout = Layout(ctx.layout.units, tuple(outputs.shape[:2]), ctx.layout.dims)
        weight_parameter, bias_parameter = ctx.parameters
        if weight_parameter is not None:
            patches = F.unfold(x, weight.shape[2:], **ctx.geometry).mT  # (rows, H' W', c h w)
            ctx.recorder.linear(weight_parameter, patches, outputs, layout)
        if bias_parameter is not None:
            ctx.recorder.bias(bias_parameter, outputs, layout)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        geometry = ctx.geometry
        return (conv2d_input(x.shape, weight.to(g.dtype), g, **geometry), *(None,) * 5)


@register_rule(nn.Conv2d)
class PrivateConv2d(nn.Conv2d):
    """Rule for `nn.Conv2d` without groups and with zero padding given as numbers. Input (rows, c, H, W)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        recorder = recorder_of(self)
        trainable = [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]
        plain = self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str) and input.dim() == 4
        if plain and trainable and all(map(recorder.tracks, trainable)):
            layout = recorder.layout(self, input, feature_dims=3)
            if layout is not None:
                geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
                return RecordedConv2d.apply(input, self.weight, self.bias, geometry, recorder, layout)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(input)
