"""The rule for torch functions that have none of their own: backward repeats the function for every unit's part of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.kernels.numerics import upcast
from dp_flash_hf.layers.chain import once, record
from dp_flash_hf.layers.tracking import Call, Tracked, autocast_dtype, changes_its_argument, operation
from dp_flash_hf.layers.unit_layout import Layout


class RecordedOperation(torch.autograd.Function):
    """Any function of data and parameters, whose backward repeats it, for all data and for every unit's part of them."""

    @staticmethod
    def forward(ctx: Any, call: Call, layouts: list[Layout | None], out: Tensor, plain: Tensor, *data: Tensor) -> Tensor:
        """out: the result. layouts: of call.tensors, and of `out`. plain: something that requires a gradient."""
        ctx.save_for_backward(*data)
        ctx.call, ctx.layouts, ctx.autocast = call.emptied(), layouts, autocast_dtype(plain.device)
        return out.clone()  # it may be a view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """g: as the result."""
        once(ctx)
        call, units = ctx.call, ctx.call.recorder.units
        *layouts, out_layout = ctx.layouts
        out_whole = Layout(units, (), ())
        values = {id(t): x.detach() for t, x in zip(call.data, ctx.saved_tensors, strict=True)}
        values |= {id(t): (t.plain if isinstance(t, Tracked) else t).detach() for t in call.tensors if id(t) not in values}
        gradients = [torch.zeros(units.n, *t.shape, dtype=upcast(g).dtype, device=g.device) for t in call.tracked]
        with torch.enable_grad(), torch.autocast(g.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            needed = [t for t, need in zip(call.data, ctx.needs_input_grad[4:], strict=True) if need]
            found = iter(_vjp(call, values, needed, g) if needed else ())
            inputs = [next(found) if need else None for need in ctx.needs_input_grad[4:]]
            for unit in (unit for unit in range(units.n) if units.sizes[unit]):
                parts = {
                    id(t): values[id(t)] if layout is None else layout.take(values[id(t)], unit)
                    for t, layout in zip(call.tensors, layouts, strict=True)
                }
                own = _vjp(call, parts, call.tracked, out_layout.take(g, unit))
                of_tracked = [layout for t, layout in zip(call.tensors, layouts, strict=True) if isinstance(t, Tracked)]
                for out, layout, gradient in zip(gradients, of_tracked, own, strict=True):
                    if gradient is not None:
                        (layout or out_whole).put_(out[unit], gradient, unit)
        for t, gradient in zip(call.tracked, gradients, strict=True):
            record(t, gradient)
        return (None, None, None, None, *inputs)


def _vjp(call: Call, values: dict[int, Tensor], of: list[Tensor], g: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of some arguments of a call made with these values."""
    leaves = {id(t): values[id(t)].detach().requires_grad_() for t in of}
    out = call.run(*((t, leaves.get(id(t), values[id(t)])) for t in call.tensors))
    return torch.autograd.grad(out, [leaves[id(t)] for t in of], g, allow_unused=True)


@operation(default=True)
def any_operation(call: Call, *args: Any, **kwargs: Any) -> Tensor | None:
    """A function whose result for one unit's part of its arguments is that unit's part of its result."""
    if changes_its_argument(call.func) or call.recorder.units.kind == "tokens":
        return None
    if any(isinstance(t, torch.nn.Parameter) for t in call.data):
        return None
    units = call.recorder.units
    layouts: list[Layout | None] = []
    for t in call.tensors:
        dims = call.dims(t)
        if dims is None or (len(dims) > 1):
            return None
        layouts.append(Layout(units, tuple(t.shape), dims) if dims else None)
    with torch.no_grad():
        out, random = call.run_once()
    if random or not isinstance(out, Tensor):
        return None
    dims = call.output_dims(out)
    if dims is None or (not dims and not units.is_single):
        return None
    layouts.append(Layout(units, tuple(out.shape), dims))
    return RecordedOperation.apply(call, layouts, out, call.tracked[0].plain, *call.data)  # type: ignore[no-any-return, no-untyped-call]
