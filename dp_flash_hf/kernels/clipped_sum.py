"""Sums of per-unit gradients weighted by clip factors, accumulated in float32 or float64 (torch implementation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_flash_hf.kernels.ghost_norm import upcast


def weighted_rows(x: Tensor, factors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows of x (rows, d), in unit order, times the factor (units,) of their unit; exactly 0 where the factor is 0.

    The select, not the product, clears a unit of factor 0: its rows may hold NaN or infinity.
    """
    repeats = torch.tensor(list(sizes), device=factors.device)
    per_row = torch.repeat_interleave(factors, repeats, output_size=sum(sizes)).to(x.dtype).unsqueeze(1)
    return torch.where(per_row == 0, 0.0, x * per_row) if bool((factors == 0).any()) else x * per_row


def add_linear_(out: Tensor, a: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> None:
    """out (p, d) += sum_u factors[u] sum_{t in u} g_t a_t^T, with a (rows, d) and g (rows, p) in unit order."""
    a, g = upcast(a), upcast(g)
    weigh_a = a.shape[1] < g.shape[1]
    weighted, other = weighted_rows(a if weigh_a else g, factors, sizes), g if weigh_a else a
    if bool((factors == 0).any()):  # 0 * NaN is NaN: both sides of the product must be clean
        other = weighted_rows(other, (factors != 0).to(other.dtype), sizes)
    out.addmm_(other.mT, weighted) if weigh_a else out.addmm_(weighted.mT, other)


def add_embedding_(out: Tensor, ids: Tensor, g: Tensor, factors: Tensor, sizes: Sequence[int]) -> None:
    """out (V, d) rows at ids (rows,) += factor of the unit times g (rows, d), in unit order."""
    out.index_add_(0, ids, weighted_rows(upcast(g), factors, sizes).to(out.dtype))


def add_per_unit_(out: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """out (*shape) += sum_u factors[u] gradients[u], with gradients (units, *shape)."""
    for gradient, factor in zip(gradients, factors.tolist(), strict=True):
        if factor != 0.0:
            out.add_(gradient, alpha=factor)
