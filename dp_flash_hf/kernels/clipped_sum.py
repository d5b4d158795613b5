"""Sums of per-unit gradients weighted by clip factors: sum over units u of f_u G_u, accumulated in float32 or float64.

A unit of factor 0 adds exactly nothing, also where its gradient is NaN or infinite; that is how a unit whose norm is not finite
is dropped. Records are in unit order, as in `ghost_norm`.

Records on a CUDA device in bfloat16, float16 and float32, added to float32 sums, go to `clipped_sum_triton` where triton is
installed; everything else is computed here with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_flash_hf.kernels.numerics import is_uniform, runs_on_triton, upcast


def _takes(out: Tensor, factors: Tensor) -> bool:
    """Whether the Triton kernels take this sum and these factors."""
    return out.dtype == factors.dtype == torch.float32 and out.stride(-1) == 1


def weighted_rows(x: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows times the factor of their unit; exactly 0 where the factor is 0.

    The select, not the product, clears a unit of factor 0: its rows may hold NaN or infinity.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [torch.nan]])
        >>> weighted_rows(x, torch.tensor([0.5, 0.0]), sizes=(2, 1)).flatten()
        tensor([0.5000, 1.0000, 0.0000])

    Args:
        x: (rows, d) in unit order.
        factors: (units,); cast to the dtype of `x`.
        sizes: The number of rows of each unit.

    Returns:
        Shape and dtype of `x`.
    """
    if is_uniform(sizes):
        rows, per_row = x.unflatten(0, (len(sizes), -1)), factors.to(x.dtype).view(-1, 1, 1)
    else:
        repeats = torch.tensor(list(sizes), device=factors.device)
        rows, per_row = x, torch.repeat_interleave(factors, repeats, output_size=sum(sizes)).to(x.dtype).unsqueeze(1)
    weighted = torch.where(per_row == 0, 0.0, rows * per_row) if bool((factors == 0).any()) else rows * per_row
    return weighted.view(x.shape)


def linear_clipped_sum(a: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    """The clipped sum of a linear layer's weight gradients, sum_u f_u sum_{t in u} g_t a_t^T, without forming any of them.

    Factors multiply float32 or float64 values only: rounding a product of factor and half-precision gradient could let a unit
    exceed its bound.

    Args:
        a: (rows, d), the layer's inputs in unit order; any floating dtype.
        g: (rows, p), the gradients of its outputs.
        factors: (units,), finite; float32, or float64 for float64 records.
        sizes: The number of rows of each unit.

    Returns:
        (p, d), float32 or float64.
    """
    if runs_on_triton(a, g) and factors.dtype == torch.float32:
        from dp_flash_hf.kernels import clipped_sum_triton

        out = torch.empty(g.shape[1], a.shape[1], device=a.device)
        return clipped_sum_triton.add_linear_(out, a, g, factors, tuple(sizes), replace=True)
    left, right = _weighted(a, g, factors, sizes)
    return left.mT @ right


def add_linear_(out: Tensor, a: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> None:
    """Add `linear_clipped_sum` to a sum, in place.

    Args:
        out: (p, d), float32 or float64.
        a: As of `linear_clipped_sum`, as are the others.
        g: See there.
        factors: See there.
        sizes: See there.
    """
    if runs_on_triton(a, g) and _takes(out, factors):
        from dp_flash_hf.kernels import clipped_sum_triton

        clipped_sum_triton.add_linear_(out, a, g, factors, tuple(sizes))
        return
    left, right = _weighted(a, g, factors, sizes)
    out.addmm_(left.mT, right)


def _weighted(a: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """g and a, the smaller of them weighted."""
    a, g = upcast(a), upcast(g)
    clean = (factors != 0).to(a.dtype)
    keep = (lambda x: x) if bool(clean.all()) else (lambda x: weighted_rows(x, clean, sizes))  # 0 * NaN is NaN
    if a.shape[1] < g.shape[1]:
        return keep(g), weighted_rows(a, factors, sizes)
    return weighted_rows(g, factors, sizes), keep(a)


def add_embedding_(out: Tensor, ids: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> None:
    """Add the clipped sum of an embedding table's gradients, in place.

    Args:
        out: (V, d), float32 or float64.
        ids: int64 (rows,), what was looked up, in unit order.
        g: (rows, d), the gradients of what was found; any floating dtype.
        factors: (units,), float32 or float64.
        sizes: The number of rows of each unit.
    """
    if runs_on_triton(g) and _takes(out, factors):
        from dp_flash_hf.kernels import clipped_sum_triton

        clipped_sum_triton.add_embedding_(out, ids, g, factors, tuple(sizes))
        return
    out.index_add_(0, ids, weighted_rows(upcast(g), factors, sizes).to(out.dtype))


def add_per_unit_(out: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """Add the clipped sum of gradients that were formed for each unit, in place.

    Args:
        out: ``(*shape)``, float32 or float64.
        gradients: ``(units, *shape)``, float32 or float64.
        factors: (units,), float32 or float64.
    """
    if runs_on_triton(gradients) and gradients.dtype == torch.float32 and _takes(out.view(-1), factors):
        from dp_flash_hf.kernels import clipped_sum_triton

        clipped_sum_triton.add_per_unit_(out, gradients, factors)
        return
    for gradient, factor in zip(gradients, factors.tolist(), strict=True):
        if factor != 0.0:
            out.add_(gradient, alpha=factor)
