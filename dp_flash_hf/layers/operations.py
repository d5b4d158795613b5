"""Rules for torch operations: how per-unit gradients arise where a parameter is combined with data."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from dp_flash_hf.kernels.ghost_norm import row_sums
from dp_flash_hf.kernels.numerics import nonzero_rows, upcast
from dp_flash_hf.layers import cost_model
from dp_flash_hf.layers.chain import once, per_item, record, unexpanded
from dp_flash_hf.layers.gradient_records import LinearUse
from dp_flash_hf.layers.logits import Origins, Values, deferred
from dp_flash_hf.layers.tracking import (
    Call,
    Tracked,
    derived,
    operation,
    while_learning,
)
from dp_flash_hf.layers.unit_layout import Layout

_SAMPLE = 8  # columns that are looked at first: where they have few rows of zeros, so has the whole

# --- products with a matrix -----------------------------------------------------------------------------------------------


class RecordedLinear(torch.autograd.Function):
    """y = x W^T + b, whose backward returns the gradient of x and records those of W (p, d) and b (p,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tracked: Origins, layout: Layout) -> Tensor:
        """x: ``(*lead, d)``. weight and bias: plain values; `tracked` says where they come from."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what autocast itself multiplies, and keeps for backward
        ctx.save_for_backward(x, weight)
        ctx.tracked, ctx.layout = tracked, layout
        out = F.linear(x, weight, bias)
        # Models may change it in place, which a view made here would forbid.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: ``(*lead, p)``."""
        once(ctx)
        x, weight = ctx.saved_tensors
        w, b = ctx.tracked
        if b is not None:
            record_bias(b, g, ctx.layout)
        layout, shape, kept = ctx.layout, x.shape, _rows_with_gradient(g, x)
        if kept is not None:
            g = g.reshape(-1, g.shape[-1]).index_select(0, kept)
        if w is not None:
            if kept is not None:
                x, layout = w.recorder.selected(x, layout, kept)
            record_product(w, x, g, layout)
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        back = g @ weight.to(g.dtype)
        if kept is not None:
            back = back.new_zeros(shape).view(-1, shape[-1]).index_copy_(0, kept, back).view(shape)
        return (back, *(None,) * 4)


def _rows_with_gradient(g: Tensor, x: Tensor) -> Tensor | None:
    """Rows of g ``(*lead, p)`` that are not all zeros, int64; None where leaving out the others would save no time.

    The others are padding and what ignored labels leave: they add nothing to any gradient. How long a step takes therefore
    depends on them, as it does on how far texts are padded.

    Whether rows are left out depends on the whole batch. So no result may: where a value of the input is not finite, zero times
    it is NaN, for which its unit is dropped, and nothing is left out.

    Args:
        g: The gradient of a layer's output.
        x: Its input ``(*lead, d)``.
    """
    if g.device.type != "cpu":
        return None  # the host would have to wait for their number
    g, d = g.reshape(-1, g.shape[-1]), x.shape[-1]
    speed = cost_model.speed_of(g.device, g.dtype)

    def pays(zero: int) -> bool:
        return cost_model.leaves_out_zero_rows(zero, len(g), d, g.shape[1], speed)

    if not pays(len(g)) or not pays(len(g) - int(nonzero_rows(g[:, :_SAMPLE]).sum())):
        return None
    kept = nonzero_rows(g).nonzero().squeeze(1)
    return kept if len(kept) and pays(len(g) - len(kept)) and bool(x.sum().isfinite()) else None


def record_product(weight: Tracked, a: Tensor, g: Tensor, layout: Layout) -> None:
    """For rules: record the gradients of W in y = a W^T.

    A unit's gradient is the sum of g_t a_t^T over its rows t. It is not formed where its norm is cheaper from Gram matrices of
    inputs and output gradients (`kernels.ghost_norm`).

    Args:
        weight: W (p, d), a parameter or what was computed of parameters alone.
        a: ``(*lead, d)``, the layer's input, in the dtype in which it was multiplied.
        g: ``(*lead, p)``, the gradient of its output.
        layout: Of the leading dimensions, as `layout_of` returned it in forward.

    Raises:
        PrivacyError: Outside `engine.backward`.
    """
    rows = weight.rows
    if rows is None:
        use = LinearUse(layout.arrange(a), layout.arrange(g), layout.sizes)
        gradients = torch.zeros(layout.units.n, *weight.shape, dtype=upcast(g).dtype, device=g.device)
        use.add_to_units_(gradients)
        record(weight, gradients)
        return
    (parameter,) = weight.parameters
    if not weight.plain.is_contiguous():  # stored the other way round
        a, g = g, a
    weight.recorder.linear(parameter, a, g, layout, rows)


def record_bias(bias: Tracked, g: Tensor, layout: Layout) -> None:
    """For rules: record the gradients of b in y = x + b, sums over each unit's rows.

    Any parameter whose gradient adds up over rows like that of a bias can be recorded so, as the scale of a norm with
    ``g * normalised``.

    Args:
        bias: b (p,), a parameter or what was computed of parameters alone.
        g: ``(*lead, p)``, the gradient of the output.
        layout: Of the leading dimensions, as `layout_of` returned it in forward.

    Raises:
        PrivacyError: Outside `engine.backward`.
    """
    record(bias, row_sums(layout.arrange(g), layout.sizes))


@operation(F.linear)
def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """input W^T + b. input: ``(*lead, d)``, weight: (p, d)."""
    layout = None if isinstance(input, Tracked) or weight.dim() != 2 else call.layout(input)
    found = None if layout is None else _sorted(weight, bias)
    if layout is None or found is None:
        return None
    values, origins = found

    def compute(x: Tensor) -> Tensor:
        return RecordedLinear.apply(x, *values, origins, layout)  # type: ignore[no-any-return, no-untyped-call]

    return deferred(input, values, origins, layout, compute)


@while_learning(F.linear)
def learnt_linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Deferred where it would be while recording: forming it would take as much memory."""
    found = None if isinstance(input, Tracked) or weight.dim() != 2 else _sorted(weight, bias)
    if found is None:
        return call.run()  # type: ignore[no-any-return]
    values, origins = found
    return deferred(input, values, origins, None, lambda x: F.linear(x, *values))


@operation("matmul", "__matmul__", "mm")
def matmul(call: Call, input: Tensor, other: Tensor) -> Tensor | None:
    """input W. input: ``(*lead, d)``, other: (d, p)."""
    if isinstance(input, Tracked) or other.dim() != 2 or input.dim() < 2:
        return None
    layout = call.layout(input)
    return None if layout is None else _recorded(input, derived(torch.transpose, other, -1, -2), None, layout)


@operation("addmm")
def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:
    """b + mat1 W. mat1: (rows, d), mat2: (d, p)."""
    if scales or isinstance(mat1, Tracked) or input.dim() != 1 or (not isinstance(input, Tracked) and input.requires_grad):
        return None
    layout = call.layout(mat1)
    return None if layout is None else _recorded(mat1, derived(torch.transpose, mat2, -1, -2), input, layout)


def _recorded(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor | None:
    found = _sorted(weight, bias)
    return None if found is None else RecordedLinear.apply(x, *found[0], found[1], layout)  # type: ignore[no-untyped-call]


def _sorted(weight: Tensor, bias: Tensor | None) -> tuple[Values, Origins] | None:
    """The values of weight and bias, and what is tracked of them; None if one needs a gradient and is not tracked."""
    if any(t is not None and not isinstance(t, Tracked) and t.requires_grad for t in (weight, bias)):
        return None
    origins = (weight if isinstance(weight, Tracked) else None, bias if isinstance(bias, Tracked) else None)
    return (_plain(weight), None if bias is None else _plain(bias)), origins


def _plain(t: Tensor) -> Tensor:
    return t.plain if isinstance(t, Tracked) else t


# --- lookups --------------------------------------------------------------------------------------------------------------


class RecordedEmbedding(torch.autograd.Function):
    """y = E[ids], whose backward records the gradient of E (V, d)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding_idx: int | None, tracked: Tracked, layout: Layout) -> Tensor:
        """ids: LongTensor ``(*lead,)``."""
        ctx.save_for_backward(ids)
        ctx.tracked, ctx.padding_idx, ctx.layout = tracked, padding_idx, layout
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        """g: ``(*lead, d)``."""
        once(ctx)
        (ids,) = ctx.saved_tensors
        ctx.tracked.recorder.embedding(ctx.tracked.plain, ids, g, ctx.layout, ctx.padding_idx)
        return (None,) * 5


@operation(F.embedding)
def embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """weight[input]. input: ``(*lead,)``, weight: (V, d)."""
    if max_norm is not None or scale_grad_by_freq or not isinstance(weight, Tracked) or weight.how is not None:
        return None  # scale_grad_by_freq counts input over all units
    layout = call.layout(input, feature_dims=0)
    if layout is None:
        return None
    if padding_idx is not None:
        padding_idx %= len(weight.plain)
    return RecordedEmbedding.apply(weight.plain, input, padding_idx, weight, layout)  # type: ignore[no-any-return, no-untyped-call]


@operation("__getitem__")
def getitem(call: Call, table: Tensor, ids: Any) -> Tensor | None:
    """table[ids] with whole numbers ids ``(*lead,)``, table: (V, d)."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or table.dim() != 2:
        return None
    if not isinstance(table, Tracked) or table.how is not None:
        return None
    layout = call.layout(ids, feature_dims=0)
    if layout is None:
        return None
    return RecordedEmbedding.apply(table.plain, ids % len(table.plain), None, table, layout)  # type: ignore[no-any-return, no-untyped-call]


# --- normalisation --------------------------------------------------------------------------------------------------------


class RecordedLayerNorm(torch.autograd.Function):
    """`F.layer_norm`, whose backward records per-unit gradients of weight and bias (d,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        tracked: Origins,
        layout: Layout,
    ) -> Tensor:
        """x: ``(*lead, d)``."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # autocast runs layer_norm in float32
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.bias, ctx.tracked, ctx.layout = bias, tracked, layout
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: ``(*lead, d)``."""
        once(ctx)
        x, mean, rstd, weight = ctx.saved_tensors
        w, b = ctx.tracked
        if w is not None:
            record_bias(w, g * (x - mean) * rstd, ctx.layout)  # d/dw of w * x_hat + b sums as a bias does
        if b is not None:
            record_bias(b, g, ctx.layout)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        backward = torch.ops.aten.native_layer_norm_backward
        return (backward(g.contiguous(), x, weight.shape, mean, rstd, weight, ctx.bias, [True, False, False])[0], *(None,) * 5)


@operation(F.layer_norm)
def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Layer norm over the last dimension. input: ``(*lead, d)``."""
    if isinstance(input, Tracked) or len(normalized_shape) != 1 or weight is None:
        return None
    layout = call.layout(input)
    found = _sorted(weight, bias)
    if layout is None or found is None:
        return None
    return RecordedLayerNorm.apply(input, *found[0], eps, found[1], layout)  # type: ignore[no-any-return, no-untyped-call]


@operation(F.rms_norm)
def rms_norm(
    call: Call, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    """RMS norm over the last dimension. input: ``(*lead, d)``."""
    if isinstance(input, Tracked) or len(normalized_shape) != 1 or not isinstance(weight, Tracked):
        return None
    layout = call.layout(input)
    if layout is None:
        return None
    spread = Layout(layout.units, (*layout.lead, input.shape[-1]), layout.dims)
    return F.rms_norm(input, normalized_shape, None, eps) * per_item(weight, spread)


# --- convolutions ---------------------------------------------------------------------------------------------------------


class RecordedConv(torch.autograd.Function):
    """`F.conv2d`, whose backward records the gradients of weight (p, c / groups, h, w) and bias (p,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: dict[str, Any],
        groups: int,
        tracked: Origins,
        layout: Layout,
    ) -> Tensor:
        """x: (rows, c, H, W)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.groups, ctx.tracked, ctx.layout = geometry, groups, tracked, layout
        return F.conv2d(x, weight, bias, **geometry, groups=groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: (rows, p, H', W')."""
        once(ctx)
        x, weight = ctx.saved_tensors
        outputs = g.flatten(2).mT  # (rows, H' W', p)
        layout = Layout(ctx.layout.units, tuple(outputs.shape[:2]), ctx.layout.dims)
        w, b = ctx.tracked
        if w is not None:
            patches = F.unfold(x.to(g.dtype), weight.shape[2:], **ctx.geometry)  # (rows, c h w, H' W')
            if ctx.groups == 1 and w.rows is not None and w.plain.is_contiguous():
                w.recorder.linear(w.parameters[0], patches.mT, outputs, layout, w.rows)
            else:
                grouped = upcast(patches).unflatten(1, (ctx.groups, -1)), upcast(g.flatten(2)).unflatten(1, (ctx.groups, -1))
                result = "gpd" if layout.whole else "ngpd"
                record(w, layout.sums(torch.einsum(f"ngdl,ngpl->{result}", *grouped)).view(layout.units.n, *w.shape))
        if b is not None:
            record_bias(b, outputs, layout)
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        return (conv2d_input(x.shape, weight.to(g.dtype), g, **ctx.geometry, groups=ctx.groups), *(None,) * 6)


@operation(F.conv1d, F.conv2d)
def conv(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Convolution, zeros as padding. input: (rows, c, H, W), or (rows, c, length), a picture of one line."""
    line = call.func is F.conv1d
    if isinstance(input, Tracked) or isinstance(padding, str) or input.dim() != (3 if line else 4):
        return None
    layout = call.layout(input, feature_dims=input.dim() - 1)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    if line:
        single = {"stride": 1, "padding": 0, "dilation": 1}
        geometry = {name: (single[name], *(v if isinstance(v, tuple) else (v,))) for name, v in geometry.items()}
        input, weight = input.unsqueeze(2), derived(torch.unsqueeze, weight, 2)
    found = _sorted(weight, bias)
    if layout is None or found is None:
        return None
    out: Tensor = RecordedConv.apply(input, *found[0], geometry, groups, found[1], layout)  # type: ignore[no-untyped-call]
    return out.squeeze(2) if line else out


# --- everything else ------------------------------------------------------------------------------------------------------

_PAIRS = ("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "where", "lerp", "addcmul")
_DUNDERS = [f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow") for side in ("", "r", "i")]


@operation(*_PAIRS, *(f"{name}_" for name in _PAIRS), *_DUNDERS, "rsub")
def broadcast(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Elementwise operations: each item gets a copy of the parameter of its own, and autograd does the rest."""
    layout = call.broadcast_layout()
    if layout is None:
        return None
    before = [unexpanded(t) for t in call.tracked]
    if torch.broadcast_shapes(*(t.shape for t in (*before, *call.data))) != layout.lead:
        before = call.tracked
    out = call.run(*((t, per_item(b, layout)) for t, b in zip(call.tracked, before, strict=True)))
    wide = [x.dtype for x in (*call.data, *(t.plain for t in call.tracked)) if x.dim() and x.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, wide, wide[0]) if wide else out.dtype
    # A scalar does not widen the result; expanded, it does.
    return out.to(dtype) if any(t.dim() == 0 for t in call.tracked) and out.dtype != dtype else out


@operation(F.scaled_dot_product_attention)
def attention(call: Call, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A trained bias, added to the logits: each row gets a copy of its own. query: (rows, heads, queries, d)."""
    if not isinstance(attn_mask, Tracked) or len(call.tracked) > 1 or query.dim() != 4 or attn_mask.dim() > 4:
        return None
    layout = call.layout(query)
    if layout is None or call.dims(attn_mask) != ():
        return None
    logits = Layout(layout.units, (*query.shape[:3], key.shape[2]), layout.dims)
    return call.run((attn_mask, per_item(attn_mask, logits)))
