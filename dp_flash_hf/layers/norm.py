"""Normalisation layers and other elementwise parameters: their per-unit gradients are small and formed directly."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.layers import recorder_of, register_rule, tracked
from dp_flash_hf.layouts import Layout
from dp_flash_hf.records import Recorder
from dp_flash_hf.units import Units


class PerItem(torch.autograd.Function):
    """A parameter expanded so that every item of the batch has its own; backward records one gradient per unit."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shape: tuple[int, ...], recorder: Recorder, layout: Layout) -> Tensor:
        """Returns the parameter as a view of this shape."""
        ctx.parameter, ctx.recorder, ctx.layout = parameter, recorder, layout
        return parameter.expand(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        """g: of the expanded shape."""
        ctx.recorder.per_unit(ctx.parameter, ctx.layout.reduce(g, ctx.parameter.shape))
        return (None,) * 4


def per_item(parameter: Any, recorder: Recorder, layout: Layout, *, batch_dim: bool = False) -> Any:
    """The parameter with one copy per item of the batch if it is being trained, else as it is.

    It is expanded to broadcast against (*lead, *parameter.shape). batch_dim: its first dimension, of size 1, already stands for
    the rows.
    """
    if not recorder.tracks(parameter):
        return parameter
    shape = layout.parameter_shape(parameter.shape[1:] if batch_dim else parameter.shape)
    return PerItem.apply(parameter, shape, recorder, layout)  # type: ignore[no-untyped-call]


class RecordedLayerNorm(torch.autograd.Function):
    """`F.layer_norm`, whose backward records per-unit gradients of weight and bias (d,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, recorder: Recorder, layout: Layout
    ) -> Tensor:
        """x: (*lead, d)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # autocast runs layer_norm in float32
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.parameters = tracked(recorder, weight, bias)
        ctx.bias, ctx.recorder, ctx.layout = bias, recorder, layout
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: (*lead, d)."""
        x, mean, rstd, weight = ctx.saved_tensors
        weight_parameter, bias_parameter = ctx.parameters
        if weight_parameter is not None:
            ctx.recorder.bias(weight_parameter, g * (x - mean) * rstd, ctx.layout)  # d/dw of w * x_hat + b sums as a bias does
        if bias_parameter is not None:
            ctx.recorder.bias(bias_parameter, g, ctx.layout)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        backward = torch.ops.aten.native_layer_norm_backward
        return (backward(g.contiguous(), x, weight.shape, mean, rstd, weight, ctx.bias, [True, False, False])[0], *(None,) * 5)


@register_rule(nn.LayerNorm)
class PrivateLayerNorm(nn.LayerNorm):
    """Rule for `nn.LayerNorm` over the last dimension. Input (*lead, d)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        recorder = recorder_of(self)
        trainable = [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]
        if len(self.normalized_shape) == 1 and self.weight is not None and trainable and all(map(recorder.tracks, trainable)):
            layout = recorder.layout(self, input)
            if layout is not None:
                return RecordedLayerNorm.apply(input, self.weight, self.bias, self.eps, recorder, layout)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(input)


@register_rule(nn.RMSNorm)
class PrivateRMSNorm(nn.RMSNorm):
    """Rule for `nn.RMSNorm` over the last dimension. Input (*lead, d)."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        recorder = recorder_of(self)
        if len(self.normalized_shape) == 1 and recorder.tracks(self.weight):
            layout = recorder.layout(self, x)
            if layout is not None:
                return F.rms_norm(x, self.normalized_shape, None, self.eps) * per_item(self.weight, recorder, layout)  # type: ignore[no-any-return]
        return super().forward(x)


class Elementwise:
    """Rule for any layer of one input (*lead, d) whose parameters are vectors broadcast against it.

    The layer's own forward runs, with every parameter replaced by one copy per item of the batch: RMS norms with weight w or
    1 + w, layer scales and biases need no formula of their own. `fits_elementwise` proves it on the layer itself.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        recorder = recorder_of(self)
        if len(args) != 1 or kwargs:  # a gate, a residual: not the layer that was tried
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        (x,) = args
        original = dict(self._parameters)
        trainable = {name: p for name, p in original.items() if p is not None and p.requires_grad}
        layout = recorder.layout(self, x) if trainable and all(map(recorder.tracks, trainable.values())) else None
        if layout is None:
            return super().forward(x)  # type: ignore[misc]
        try:
            for name, parameter in trainable.items():
                self._parameters[name] = per_item(parameter, recorder, layout)
            return super().forward(x)  # type: ignore[misc]
        finally:
            self._parameters.update(original)


def fits_elementwise(module: nn.Module) -> bool:
    """Whether `Elementwise` is exact for this layer, tried on numbers: same output and same per-unit gradients in float64."""
    from dp_flash_hf.layers import attach

    parameters = dict(module.named_parameters(recurse=False))
    if not parameters or next(module.children(), None) is not None or any(p.dim() != 1 for p in parameters.values()):
        return False
    sizes = {p.numel() for p in parameters.values()}
    if len(sizes) != 1 or any(p.is_meta for p in parameters.values()):
        return False
    generator = torch.Generator().manual_seed(0)
    try:
        copied = copy.deepcopy(module).cpu().double().requires_grad_(True)
        for parameter in copied.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        x = torch.randn(2, 3, sizes.pop(), generator=generator, dtype=torch.float64)
        rows = [copied(row) for row in x.split(1)]
        weights = torch.randn(rows[0].shape, generator=generator, dtype=torch.float64)
        alone = [torch.autograd.grad((row * weights).sum(), list(copied.parameters())) for row in rows]
        recorder = Recorder(dict.fromkeys(copied.parameters(), 0))
        attach(copied, Elementwise, recorder)
        units = Units.rows(2)
        recorder.start("learn", units)
        recorder.layouts.observe(units)
        copied(x)
        for unit in range(units.n):
            recorder.layouts.compare(unit)
            copied(x[unit : unit + 1])
        recorder.layouts.settle()
        recorder.start("record", units)
        out = copied(x)
        (out * weights).sum().backward()
        recorded = [recorder.records[p].per_unit for p in copied.parameters()]
    except Exception:  # whatever a layer of unknown kind does with the trial input, it is not an elementwise layer
        return False
    return torch.allclose(out, torch.cat(rows), rtol=1e-10, atol=1e-10) and all(
        got is not None and torch.allclose(got, torch.stack(want), rtol=1e-10, atol=1e-10)
        for got, want in zip(recorded, map(list, zip(*alone, strict=True)), strict=True)
    )
