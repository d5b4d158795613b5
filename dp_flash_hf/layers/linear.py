"""Linear layers: `nn.Linear`, and the transposed `Conv1D` of GPT-2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.layers import recorder_of, register_rule, tracked
from dp_flash_hf.layouts import Layout
from dp_flash_hf.records import Recorder


class RecordedLinear(torch.autograd.Function):
    """y = x W^T + b, whose backward gives the gradient of x and records those of W (p, d) and b (p,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, recorder: Recorder, layout: Layout
    ) -> Tensor:
        """transposed: the weight is stored as (d, p)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what autocast itself multiplies, and keeps for backward
        ctx.save_for_backward(x, weight)
        ctx.parameters = tracked(recorder, weight, bias)
        ctx.transposed, ctx.recorder, ctx.layout = transposed, recorder, layout
        return F.linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: (*lead, p)."""
        x, weight = ctx.saved_tensors
        weight_parameter, bias_parameter = ctx.parameters
        if weight_parameter is not None:
            a, b = (g, x) if ctx.transposed else (x, g)
            ctx.recorder.linear(weight_parameter, a, b, ctx.layout)
        if bias_parameter is not None:
            ctx.recorder.bias(bias_parameter, g, ctx.layout)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        w = weight.to(g.dtype)
        return (g @ (w.T if ctx.transposed else w), *(None,) * 5)


def _recorded_linear(module: nn.Module, x: Tensor, weight: Any, bias: Any, transposed: bool) -> Tensor | None:
    """The recorded product, or None when autograd must see the parameters themselves."""
    recorder = recorder_of(module)
    trainable = [p for p in (weight, bias) if isinstance(p, Tensor) and p.requires_grad]
    if not trainable or not all(recorder.tracks(p) for p in trainable):
        return None
    layout = recorder.layout(module, x)
    if layout is None:
        return None
    return RecordedLinear.apply(x, weight, bias, transposed, recorder, layout)  # type: ignore[no-any-return, no-untyped-call]


@register_rule(nn.Linear)
class PrivateLinear(nn.Linear):
    """Rule for `nn.Linear`. Input (*lead, d)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        out = _recorded_linear(self, input, self.weight, self.bias, transposed=False)
        return super().forward(input) if out is None else out


@register_rule("transformers.pytorch_utils.Conv1D")
class PrivateConv1D:
    """Rule for GPT-2's `Conv1D`, a linear layer with weight (d, p). Input (*lead, d)."""

    def forward(self: Any, x: Tensor) -> Tensor:  # noqa: D102
        out = _recorded_linear(self, x, self.weight, self.bias, transposed=True)
        return super().forward(x) if out is None else out  # type: ignore[misc]
