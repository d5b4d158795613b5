"""Squared norms of per-unit gradients, from what a layer saw and what came back to it (torch implementation).

Everything is stored in *unit order*: the rows of unit 0, then those of unit 1, ..., with `sizes[u]` rows for unit u.
Sums run in float32, or float64 for float64 inputs, whatever the dtype of the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of the smallest Gram blocks. On CPU 16 to 64 are alike (within 4 % at 128 and 512 rows), 128 and more are slower.
SMALLEST_BLOCK = 32

# Below this fraction of its bound (sum_t |a_t| |g_t|)^2 a Gram sum has cancelled so far that float32 rounding (2^-24 of the
# bound per term) could hide a norm; such a unit is computed anew from its gradient itself, whose squares cannot cancel.
CANCELLED = 2.0**-16


def upcast(x: Tensor) -> Tensor:
    """x in the dtype sums run in: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def is_uniform(sizes: Sequence[int]) -> bool:
    """Whether all units have the same number of rows, at least one."""
    return len(sizes) > 0 and sizes[0] > 0 and all(size == sizes[0] for size in sizes)


def hidden_by_rounding(bound: Tensor, rows: int | Tensor) -> Tensor:
    """Square of the norm that rounding may hide in a sum of so many rows whose norms add up to `bound`.

    Added to the squared norm of a sum that has cancelled: the clipped sum rounds in another order than its norm did, and a unit
    made to cancel would otherwise leave more than C there. rows^(1/2) eps is the usual growth of rounding (Higham and Mary
    2019, doi 10.1137/18M1226312); the factor keeps what is left below 2 % of C.
    """
    return torch.as_tensor(rows, dtype=bound.dtype, device=bound.device) * (32 * torch.finfo(bound.dtype).eps * bound).square()


class InputGram:
    """Gram matrices of the last inputs asked for: projections that share an input (q, k, v; gate, up) follow one another."""

    def __init__(self) -> None:
        self._inputs: Tensor | None = None
        self._gram: Gram | None = None

    def __call__(self, a: Tensor) -> Gram:
        """a (units, k, d) -> `gram(a)`."""
        kept = self._inputs
        if (
            kept is None
            or self._gram is None
            or kept.data_ptr() != a.data_ptr()
            or kept.shape != a.shape
            or kept.stride() != a.stride()
        ):
            # Holding the inputs themselves keeps their memory from being given to another tensor of the same address.
            self._inputs, self._gram = a, gram(a)
        assert self._gram is not None
        return self._gram

    def clear(self) -> None:
        """Let go of the tensors."""
        self._inputs = self._gram = None


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


def linear_squared_norms(a: Tensor, g: Tensor, sizes: Sequence[int], shared: InputGram | None = None) -> Tensor:
    """||sum_{t in u} g_t a_t^T||_F^2 for every unit u.

    a: (rows, d) inputs, g: (rows, p) output gradients, both in unit order. Returns (units,).

    sum_{t,s in u} (a_t . a_s)(g_t . g_s): the ghost norm (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679).
    """
    a, g = upcast(a), upcast(g)
    if is_uniform(sizes):
        return _gram_form(a.unflatten(0, (len(sizes), -1)), g.unflatten(0, (len(sizes), -1)), shared)
    out = torch.zeros(len(sizes), dtype=a.dtype, device=a.device)
    for unit, (a_u, g_u) in enumerate(zip(a.split(list(sizes)), g.split(list(sizes)), strict=True)):
        if _gram_is_cheaper(len(a_u), a_u.shape[1], g_u.shape[1]):
            out[unit] = _gram_form(a_u[None], g_u[None], None)[0] if len(a_u) else 0.0
        else:
            out[unit] = _direct_form(a_u, g_u, (a_u.norm(dim=1) * g_u.norm(dim=1)).sum())
    return out


def _gram_is_cheaper(k: int, d: int, p: int) -> bool:
    return k * (d + p) < d * p


def _gram_form(a: Tensor, g: Tensor, shared: InputGram | None) -> Tensor:
    inputs, outputs = shared(a) if shared is not None else gram(a), gram(g)
    norms = inputs.dot(outputs, len(a))
    bound = (inputs.lengths(len(a)) * outputs.lengths(len(a))).sum(1)
    for unit in (norms < CANCELLED * bound.square()).nonzero().flatten().tolist():
        norms[unit] = _direct_form(a[unit], g[unit], bound[unit])
    return norms


def _direct_form(a: Tensor, g: Tensor, bound: Tensor) -> Tensor:
    return (g.mT @ a).square().sum() + hidden_by_rounding(bound, len(a))


def embedding_squared_norms(ids: Tensor, g: Tensor, sizes: Sequence[int]) -> Tensor:
    """Squared norm of each unit's embedding gradient: rows of equal (unit, id) are one row of the table, and add first.

    ids: LongTensor (rows,), g: (rows, d) output gradients, both in unit order. Returns (units,).
    """
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
