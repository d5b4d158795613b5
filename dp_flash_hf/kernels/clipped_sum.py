"""Sums of per-unit gradients weighted by clip factors, accumulated in float32 or float64 (torch implementation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_flash_hf.kernels.ghost_norm import is_uniform, upcast


def weighted_rows(x: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows of x (rows, d), in unit order, times the factor (units,) of their unit; exactly 0 where the factor is 0.

    The select, not the product, clears a unit of factor 0: its rows may hold NaN or infinity.
    """
    if is_uniform(sizes):
        rows, per_row = x.unflatten(0, (len(sizes), -1)), factors.to(x.dtype).view(-1, 1, 1)
    else:
        repeats = torch.tensor(list(sizes), device=factors.device)
        rows, per_row = x, torch.repeat_interleave(factors, repeats, output_size=sum(sizes)).to(x.dtype).unsqueeze(1)
    weighted = torch.where(per_row == 0, 0.0, rows * per_row) if bool((factors == 0).any()) else rows * per_row
    return weighted.view(x.shape)


def row_sums(g: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows g (rows, p), in unit order, summed over each unit: (units, p)."""
    if is_uniform(sizes):
        sums: Tensor = g.unflatten(0, (len(sizes), -1)).sum(1)
        return sums
    return torch.stack([own.sum(0) for own in g.split(list(sizes))])


def linear_clipped_sum(a: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    """sum_u factors[u] sum_{t in u} g_t a_t^T, (p, d), with a (rows, d) and g (rows, p) in unit order."""
    left, right = _weighted(a, g, factors, sizes)
    return left.mT @ right


def add_linear_(out: Tensor, a: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> None:
    """out (p, d) += `linear_clipped_sum`, without forming it."""
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
    """out (V, d) rows at ids (rows,) += factor of the unit times g (rows, d), in unit order."""
    out.index_add_(0, ids, weighted_rows(upcast(g), factors, sizes).to(out.dtype))


def add_per_unit_(out: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """out (*shape) += sum_u factors[u] gradients[u], with gradients (units, *shape)."""
    for gradient, factor in zip(gradients, factors.tolist(), strict=True):
        if factor != 0.0:
            out.add_(gradient, alpha=factor)
