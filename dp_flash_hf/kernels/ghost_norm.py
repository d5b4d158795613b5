"""Squared norms of per-unit gradients, from what a layer saw and what came back to it.

CUDA tensors in bfloat16, float16 and float32 go to `ghost_norm_triton` where triton is installed; everything else, and all that
has no kernel there, is computed here with torch.

Everything is stored in *unit order*: the rows of unit 0, then those of unit 1, ..., with `sizes[u]` rows for unit u.
Sums run in float32, or float64 for float64 inputs, whatever the dtype of the records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dp_flash_hf.kernels.numerics import CANCELLED, hidden_by_rounding, is_uniform, runs_on_triton, upcast

# Rows of the smallest Gram blocks. On CPU 16 to 64 are alike (within 4 % at 128 and 512 rows), 128 and more are slower.
SMALLEST_BLOCK = 32


class Gram(NamedTuple):
    """X X^T of every unit in blocks: those on its diagonal, and those below it, which stand for the ones above too."""

    diagonal: list[Tensor]  # each (units * m, s, s)
    below: list[Tensor]  # each (units * m, s, t)

    def lengths(self, n_units: int) -> Tensor:
        """(units, k): norms of the rows of X."""
        squares = [block.diagonal(dim1=1, dim2=2).reshape(n_units, -1) for block in self.diagonal]
        return torch.cat(squares, 1).clamp(min=0).sqrt()

    def dot(self, other: Gram, n_units: int) -> Tensor:
        """(units,): sum over all pairs of rows of this Gram matrix times the other."""
        total = self.diagonal[0].new_zeros(n_units)
        for weight, xs, ys in ((1, self.diagonal, other.diagonal), (2, self.below, other.below)):
            for x, y in zip(xs, ys, strict=True):
                total += weight * (x * y).view(n_units, -1).sum(1)
        return total


def gram(x: Tensor) -> Gram:
    """x (units, k, d) -> X X^T of each unit, halved again and again so that nearly half of the products are never formed."""
    parts, below = [x.contiguous()], []  # contiguous, so that equal k means equal blocks
    while parts[0].shape[1] > SMALLEST_BLOCK:
        halves = []
        for part in parts:
            size = part.shape[1] // 2
            first, second = part[:, :size], part[:, size:]
            below.append(torch.bmm(second, first.mT))
            # Halves of one size are again one batch, which is what makes small blocks as fast as large ones.
            one_batch = part.is_contiguous() and part.shape[1] == 2 * size
            halves += [part.view(-1, size, part.shape[2])] if one_batch else [first, second]
        parts = halves
    return Gram([torch.bmm(part, part.mT) for part in parts], below)


def linear_squared_norms(a: Tensor, gs: Sequence[Tensor], sizes: Sequence[int], longest_gram: float = math.inf) -> Tensor:
    """||sum_{t in u} g_t a_t^T||_F^2 for every unit u and every output gradient g of layers that share the input a.

    a: (rows, d) inputs, gs: (rows, p) output gradients, p as it is in each, all in unit order. Returns (len(gs), units).
    longest_gram: units of at most so many rows are computed from Gram matrices, longer ones from the gradient itself.

    sum_{t,s in u} (a_t . a_s)(g_t . g_s): the ghost norm (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679).
    """
    if runs_on_triton(a, *gs):
        from dp_flash_hf.kernels import ghost_norm_triton

        return ghost_norm_triton.linear_squared_norms(a, gs, tuple(sizes), longest_gram)
    a, gs = upcast(a), [upcast(g) for g in gs]
    if is_uniform(sizes) and sizes[0] <= longest_gram:
        batch = [g.unflatten(0, (len(sizes), -1)) for g in gs]
        return _gram_form(a.unflatten(0, (len(sizes), -1)), batch)
    out = torch.zeros(len(gs), len(sizes), dtype=a.dtype, device=a.device)
    for unit, (a_u, *gs_u) in enumerate(zip(*(x.split(list(sizes)) for x in (a, *gs)), strict=True)):
        if 0 < len(a_u) <= longest_gram:
            out[:, unit] = _gram_form(a_u[None], [g_u[None] for g_u in gs_u])[:, 0]
        elif len(a_u):
            out[:, unit] = torch.stack([_direct_form(a_u, g_u, (a_u.norm(dim=1) * g_u.norm(dim=1)).sum()) for g_u in gs_u])
    return out


def _gram_form(a: Tensor, gs: Sequence[Tensor]) -> Tensor:
    inputs = gram(a)
    lengths = inputs.lengths(len(a))
    out = []
    for g in gs:
        outputs = gram(g)
        norms, bound = inputs.dot(outputs, len(a)), (lengths * outputs.lengths(len(a))).sum(1)
        for unit in (norms < CANCELLED * bound.square()).nonzero().flatten().tolist():
            norms[unit] = _direct_form(a[unit], g[unit], bound[unit])
        out.append(norms)
    return torch.stack(out)


def _direct_form(a: Tensor, g: Tensor, bound: Tensor) -> Tensor:
    return (g.mT @ a).square().sum() + hidden_by_rounding(bound, len(a))


def unit_gradients(a: Tensor, g: Tensor, sizes: Sequence[int], out: Tensor | None = None) -> Tensor:
    """G_u = sum_{t in u} g_t a_t^T of every unit: (units, p, d), added to `out` where it is given.

    a: (rows, d), g: (rows, p), both in unit order.
    """
    if runs_on_triton(a, g) and (out is None or out.dtype == torch.float32):
        from dp_flash_hf.kernels import ghost_norm_triton

        return ghost_norm_triton.unit_gradients(a, g, tuple(sizes), out)
    a, g = upcast(a), upcast(g)
    if is_uniform(sizes):
        left, right = g.unflatten(0, (len(sizes), -1)).mT, a.unflatten(0, (len(sizes), -1))
        return torch.bmm(left, right) if out is None else out.baddbmm_(left, right)
    if out is None:
        out = torch.zeros(len(sizes), g.shape[1], a.shape[1], dtype=a.dtype, device=a.device)
    for own, a_u, g_u in zip(out, a.split(list(sizes)), g.split(list(sizes)), strict=True):
        own.addmm_(g_u.mT, a_u)
    return out


def row_sums(g: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows g (rows, p), in unit order, summed over each unit: (units, p). A bias has these for per-unit gradients."""
    if runs_on_triton(g):
        from dp_flash_hf.kernels import ghost_norm_triton

        return ghost_norm_triton.row_sums(g, tuple(sizes))
    g = upcast(g)
    if is_uniform(sizes):
        sums: Tensor = g.unflatten(0, (len(sizes), -1)).sum(1)
        return sums
    return torch.stack([own.sum(0) for own in g.split(list(sizes))])


def embedding_squared_norms(ids: Tensor, g: Tensor, sizes: Sequence[int]) -> Tensor:
    """Squared norm of each unit's embedding gradient: rows of equal (unit, id) are one row of the table, and add first.

    ids: LongTensor (rows,), g: (rows, d) output gradients, both in unit order. Returns (units,).
    """
    if runs_on_triton(g):
        from dp_flash_hf.kernels import ghost_norm_triton

        return ghost_norm_triton.embedding_squared_norms(ids, g, tuple(sizes))
    g = upcast(g)
    unit = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes))).to(ids.device)
    table_size = int(ids.max()) + 1 if ids.numel() else 1
    keys, row = torch.unique(unit * table_size + ids, return_inverse=True)
    summed = torch.zeros(len(keys), g.shape[1], dtype=g.dtype, device=g.device).index_add_(0, row, g)
    bound = torch.zeros(len(keys), dtype=g.dtype, device=g.device).index_add_(0, row, torch.linalg.vector_norm(g, dim=1))
    times = torch.bincount(row, minlength=len(keys))
    out = torch.zeros(len(sizes), dtype=g.dtype, device=g.device)
    return out.index_add_(0, keys // table_size, summed.square().sum(1) + hidden_by_rounding(bound, times))


def tied_cross_terms(
    a: Tensor, g: Tensor, ids: Tensor, g_rows: Tensor, sizes: Sequence[int], row_sizes: Sequence[int]
) -> Tensor:
    """<G_head, G_embedding>_F of each unit, for one matrix used as output layer and as embedding table.

    a: (rows, d), g: (rows, V): records of the linear layer, `sizes` rows per unit. ids: LongTensor (looked up,), g_rows:
    (looked up, d): records of the embedding, `row_sizes` per unit. Returns (units,): sum_{t,s in u} g_t[id_s] (a_t . g_rows_s).
    """
    a, g, g_rows = upcast(a), upcast(g), upcast(g_rows)
    out = torch.zeros(len(sizes), dtype=a.dtype, device=a.device)
    parts = zip(
        a.split(list(sizes)), g.split(list(sizes)), ids.split(list(row_sizes)), g_rows.split(list(row_sizes)), strict=True
    )
    for unit, (a_u, g_u, ids_u, rows_u) in enumerate(parts):
        out[unit] = (g_u.index_select(1, ids_u) * (a_u @ rows_u.mT)).sum()
    return out
