"""How per-unit gradients of what a model computed of parameters alone become those of the parameters.

A rule calls `record` with the per-unit gradients of a `Tracked` tensor. Those of a parameter itself are recorded as they are;
those of a slice, a cast or any other function of parameters are taken back through it first.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.layers.tracking import Tracked, replaced
from dp_flash_hf.layers.unit_layout import Layout
from dp_flash_hf.units import Units


def per_item(tracked: Tracked, layout: Layout) -> Tensor:
    """The tracked values, expanded against a broadcast result so that every item has its own; backward records them."""
    shape = list((1,) * (len(layout.lead) - tracked.dim()) + tuple(tracked.shape))
    for dim in layout.dims:
        shape[dim] = layout.lead[dim]
    out: Tensor = _PerItem.apply(tracked.plain, tuple(shape), tracked, layout)  # type: ignore[no-untyped-call]
    return out


class _PerItem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Tensor, shape: tuple[int, ...], tracked: Tracked, layout: Layout) -> Tensor:
        ctx.tracked, ctx.layout = tracked, layout
        return plain.expand(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        once(ctx)
        tracked, layout = ctx.tracked, ctx.layout
        own = tuple(dim - len(layout.lead) + tracked.dim() for dim in layout.dims)
        if any(dim >= 0 and tracked.shape[dim] > 1 for dim in own):  # the rows of a unit are already its own
            gradients = Layout(layout.units, tuple(g.shape), layout.dims).parts(g)
        else:
            gradients = Layout(layout.units, tuple(g.shape), layout.dims).sums(g)
        record(tracked, gradients.reshape(layout.units.n, *tracked.shape))
        return (None,) * 4


def once(ctx: Any) -> None:
    """Raise PrivacyError where a backward pass arrives for the second time: what it recorded would count twice."""
    if getattr(ctx, "recorded", False):
        raise PrivacyError(
            "gradients were taken twice through one forward pass, as for a saliency or a penalty, and would be recorded twice; "
            "use engine.backward(loss_fn, batch) with strategy='auto'"
        )
    ctx.recorded = True


def unexpanded(tracked: Tracked) -> Tracked:
    """What a tracked tensor was before it was repeated for all rows."""
    while tracked.how is not None and getattr(tracked.how.func, "__name__", "") in ("expand", "expand_as"):
        tracked = tracked.how.args[0]
    return tracked


def record(tracked: Any, gradients: Tensor) -> None:
    """For rules: record per-unit gradients that the rule has formed itself.

    Call it in a backward pass, once for every use of the tensor. A parameter that is used several times, or that several
    tracked tensors were computed from, gets their sum.

    Args:
        tracked: A `Tracked` tensor: what an attached module hands out as a trained parameter, or what was computed of such
            parameters alone.
        gradients: ``(units, *shape)`` with the shape of `tracked`, float32 or float64, as `Layout.sums` returns them.

    Raises:
        PrivacyError: Outside `engine.backward`; or what the model computed of the parameters could not be repeated, because it
            drew random numbers.
    """
    recorder, how = tracked.recorder, tracked.how
    if how is None:
        recorder.per_unit(tracked.plain, gradients)
    elif how.func is F.embedding and len(how.args) in (2, 3) and not how.kwargs and how.args[1].how is None:
        # A lookup for all rows: as many rows of the table for every unit, not whole tables.
        ids, table, padding_idx = (*how.args, None)[:3]
        padding_idx = None if padding_idx is None else padding_idx % len(table.plain)
        units, n = recorder.units, ids.numel()
        layout = Layout(Units.rows(units.n), (units.n, n), (0,))
        recorder.embedding(table.plain, ids.reshape(1, n).expand(units.n, n), gradients.flatten(1, -2), layout, padding_idx)
    else:
        for parameter, own in chain(tracked, gradients).items():
            recorder.per_unit(parameter, own)


def chain(tracked: Tracked, gradients: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-unit gradients of the parameters that a tracked tensor was computed from.

    The computation is repeated rather than kept: checkpointing allows what it saved to be read once only.

    Args:
        tracked: What was computed of parameters alone.
        gradients: Its per-unit gradients, ``(units, *shape)``.

    Returns:
        ``(units, *shape)`` of each parameter, float32 or float64, contiguous.

    Raises:
        PrivacyError: The computation gave other values than before.
    """
    with torch.enable_grad():
        leaves = {p: p.detach().requires_grad_() for p in tracked.parameters}
        again = _rebuild(tracked, leaves, {})
    if not torch.equal(again.detach(), tracked.plain.detach()) and not bool(again.isnan().any()):
        names = [tuple(p.shape) for p in leaves]
        raise PrivacyError(
            f"parameters of shapes {names} gave other values when what the model computes of them alone was repeated; freeze "
            "them, or use strategy='microbatch'"
        )
    wanted = gradients.to(again.dtype)
    try:
        found = torch.autograd.grad(again, list(leaves.values()), wanted, retain_graph=True, is_grads_batched=True)
    except RuntimeError:  # an operation that vmap cannot batch
        each = [torch.autograd.grad(again, list(leaves.values()), g, retain_graph=True) for g in wanted]
        found = tuple(torch.stack(own) for own in zip(*each, strict=True))
    # Autograd hands out broadcast views, and one tensor for several parameters, to which nothing could be added.
    wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in found]
    copied = [g.clone(memory_format=torch.contiguous_format) for g in wide]
    return dict(zip(leaves, copied, strict=True))


def _rebuild(tracked: Tracked, leaves: dict[nn.Parameter, Tensor], made: dict[int, Tensor]) -> Tensor:
    if tracked.how is None:
        return leaves[tracked.plain]  # type: ignore[index]
    if id(tracked) not in made:
        func, args, kwargs, part, autocast = tracked.how

        def swap(value: Any) -> Any:
            return _rebuild(value, leaves, made) if isinstance(value, Tracked) else value

        args, kwargs = replaced(swap, args, kwargs)
        with _autocast(tracked.device, autocast):
            out = func(*args, **kwargs)
        made[id(tracked)] = out if part is None else out[part]
    return made[id(tracked)]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
