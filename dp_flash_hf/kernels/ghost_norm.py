"""Squared norms of per-unit gradients, from what a layer saw and what came back to it.

CUDA tensors in bfloat16, float16 and float32 go to `ghost_norm_triton` where triton is installed; everything else, and all that
has no kernel there, is computed here with torch.

Everything is stored in *unit order*: the rows of unit 0, then those of unit 1, ..., with `sizes[u]` rows for unit u. A unit may
have no row. Sums run in float32, or float64 for float64 inputs, whatever the dtype of the records.

Where a unit's terms cancel each other so far that float32 could have lost its norm, the norm is computed again from the
gradient itself, and what rounding may still hide is added to it: a unit made to cancel cannot hide a gradient from clipping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from dp_flash_hf.kernels.numerics import CANCELLED, hidden_by_rounding, is_uniform, runs_on_triton, upcast

# Rows of the smallest Gram blocks. On CPU 16 to 64 are alike (within 4 % at 128 and 512 rows), 128 and more are slower.
SMALLEST_BLOCK = 64
_LONGEST_STEP = 32  # between the lengths that units are padded to, see `_padded`


class Gram(NamedTuple):
    """``X X^T`` of every unit in blocks: those on its diagonal, and those below it, which stand for the ones above too."""

    diagonal: list[Tensor]  # each (units * m, s, s)
    below: list[Tensor]  # each (units * m, s, t)

    def squares(self, n_units: int) -> Tensor:
        """(units, k): squared norms of the rows of X."""
        squares = [block.diagonal(dim1=1, dim2=2).reshape(n_units, -1) for block in self.diagonal]
        return squares[0] if len(squares) == 1 else torch.cat(squares, 1)

    def dot(self, other: Gram, n_units: int) -> Tensor:
        """(units,): sum over all pairs of rows of this Gram matrix times the other."""
        total, below = (
            [(x * y).view(n_units, -1).sum(1) for x, y in zip(xs, ys, strict=True)]
            for xs, ys in ((self.diagonal, other.diagonal), (self.below, other.below))
        )
        for part in total[1:]:
            total[0].add_(part)
        for part in below:
            total[0].add_(part, alpha=2)
        return total[0]


def gram(x: Tensor) -> Gram:
    """The Gram matrices of x (units, k, d), halved again and again so that nearly half of the products are never formed."""
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
    """Squared norms of per-unit gradients of linear layers that share an input, without forming the gradients: ghost norms.

    The weight gradient of unit u is G_u = sum_{t in u} g_t a_t^T, and ::

        ||G_u||_F^2 = sum_{t,s in u} (a_t . a_s)(g_t . g_s)

    (Goodfellow 2015, arXiv 1510.01799, for one row of each unit; Li et al. 2022, arXiv 2110.05679, for several). The Gram
    matrix of the inputs is formed once for all layers.

    Example:
        >>> a, g = torch.randn(5, 3), torch.randn(5, 2)
        >>> norms = linear_squared_norms(a, [g], sizes=(2, 3))
        >>> torch.allclose(norms[0, 0], (g[:2].T @ a[:2]).square().sum())
        True

    Args:
        a: (rows, d), the inputs, in unit order; any floating dtype.
        gs: Each (rows, p), the gradients of one layer's outputs, in unit order; p may differ from layer to layer.
        sizes: The number of rows of each unit, 0 allowed.
        longest_gram: Units of at most so many rows are computed from Gram matrices, longer ones from the gradient itself; see
            `cost_model.longest_gram` for where the one becomes slower than the other. The result is the same.

    Returns:
        (layers, units), float32, or float64 where `a` is. 0 for a unit without rows. Not finite for a unit whose rows are not,
        and for no other.
    """
    if runs_on_triton(a, *gs):
        from dp_flash_hf.kernels import ghost_norm_triton

        return ghost_norm_triton.linear_squared_norms(a, gs, tuple(sizes), longest_gram)
    a, gs = upcast(a), [upcast(g) for g in gs]
    if is_uniform(sizes) and sizes[0] <= longest_gram:
        return _by_gram(a, gs, [(sizes[0], len(sizes))])
    out = torch.zeros(len(gs), len(sizes), dtype=a.dtype, device=a.device)
    padded = _padded(tuple(sizes), longest_gram if max(sizes, default=0) > longest_gram else math.inf)
    if padded.units:
        a_rows, *gs_rows = (x.index_select(0, padded.rows).index_fill_(0, padded.empty, 0.0) for x in (a, *gs))
        out[:, padded.units] = _by_gram(a_rows, gs_rows, padded.batches)
    for unit, (a_u, *gs_u) in enumerate(zip(*(x.split(list(sizes)) for x in (a, *gs)), strict=True)):
        if len(a_u) > longest_gram:
            out[:, unit] = torch.stack([_by_gradient(a_u, g_u, (a_u.norm(dim=1) * g_u.norm(dim=1)).sum()) for g_u in gs_u])
    return out


class _Padded(NamedTuple):
    """Units of like lengths made equally long, so that they are batches: one call for several, and blocks of even sizes.

    Args:
        units: In the order of the batches.
        batches: Of each batch the length, and how many units it has.
        rows: int64, the row that comes at each place of all batches.
        empty: int64, the places that are padding, and have to be set to zero.
    """

    units: list[int]
    batches: list[tuple[int, int]]
    rows: Tensor
    empty: Tensor


@lru_cache(maxsize=32)  # the layers of a model ask for the same again
def _padded(sizes: tuple[int, ...], longest: float) -> _Padded:
    """The batches of units of at most `longest` rows; units without rows are in none."""
    by_length: dict[int, list[int]] = {}
    for unit, size in enumerate(sizes):
        if 0 < size <= longest:
            by_length.setdefault(_padded_length(size), []).append(unit)
    starts = [0, *accumulate(sizes)]
    rows: list[int] = []
    empty: list[int] = []
    for length, units in by_length.items():
        for unit in units:
            rows += range(starts[unit], starts[unit + 1])
            missing = length - sizes[unit]
            empty += range(len(rows), len(rows) + missing)
            rows += [starts[unit]] * missing
    batches = [(length, len(units)) for length, units in by_length.items()]
    return _Padded([*chain(*by_length.values())], batches, torch.tensor(rows), torch.tensor(empty, dtype=torch.long))


def _padded_length(size: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, ..., 64, 96, 128, 160, ...: the first that is not below this size. These halve to even blocks."""
    step = min(1 << max((size - 1).bit_length() - 2, 0), _LONGEST_STEP)
    return -(-size // step) * step


def _by_gram(a: Tensor, gs: Sequence[Tensor], batches: Sequence[tuple[int, int]]) -> Tensor:
    """(layers, units), of rows that are batches: each so many rows long, and of so many units."""
    layers = [a, *gs]
    parts = [x.split([length * n for length, n in batches]) for x in layers]
    squares: list[list[Tensor]] = [[] for _ in layers]
    norms: list[list[Tensor]] = [[] for _ in gs]
    for number, (_, n) in enumerate(batches):
        inputs, *outputs = (gram(own[number].unflatten(0, (n, -1))) for own in parts)
        for own, matrix in zip(squares, (inputs, *outputs), strict=True):
            own.append(matrix.squares(n).flatten())
        for found, matrix in zip(norms, outputs, strict=True):
            found.append(inputs.dot(matrix, n))
    lengths = torch.stack([torch.cat(own) for own in squares]).clamp(min=0).sqrt()
    terms = (lengths[:1] * lengths[1:]).split([length * n for length, n in batches], 1)
    bound = torch.cat([own.unflatten(1, (n, -1)).sum(2) for own, (_, n) in zip(terms, batches, strict=True)], 1)
    out = torch.stack([torch.cat(found) for found in norms])
    starts = [0, *accumulate(length for length, n in batches for _ in range(n))]
    for layer, unit in (out < CANCELLED * bound.square()).nonzero().tolist():
        rows = slice(starts[unit], starts[unit + 1])
        out[layer, unit] = _by_gradient(a[rows], gs[layer][rows], bound[layer, unit])
    return out


def _by_gradient(a: Tensor, g: Tensor, bound: Tensor) -> Tensor:
    return (g.mT @ a).square().sum() + hidden_by_rounding(bound, len(a))


def unit_gradients(a: Tensor, g: Tensor, sizes: Sequence[int], out: Tensor | None = None) -> Tensor:
    """The weight gradient G_u = sum_{t in u} g_t a_t^T of every unit, formed.

    Args:
        a: (rows, d), a linear layer's inputs in unit order; any floating dtype.
        g: (rows, p), the gradients of its outputs.
        sizes: The number of rows of each unit.
        out: float32 or float64 (units, p, d) to which the gradients are added, in place of new tensors.

    Returns:
        `out`, or a new (units, p, d) in float32 or float64.
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
    """Rows summed over each unit: the per-unit gradients of a bias.

    Args:
        g: (rows, p) in unit order; any floating dtype.
        sizes: The number of rows of each unit.

    Returns:
        (units, p), float32 or float64; zeros for a unit without rows.
    """
    if runs_on_triton(g):
        from dp_flash_hf.kernels import ghost_norm_triton

        return ghost_norm_triton.row_sums(g, tuple(sizes))
    g = upcast(g)
    if is_uniform(sizes):
        sums: Tensor = g.unflatten(0, (len(sizes), -1)).sum(1)
        return sums
    return torch.stack([own.sum(0) for own in g.split(list(sizes))])


def embedding_squared_norms(ids: Tensor, g: Tensor, sizes: Sequence[int]) -> Tensor:
    """Squared norm of each unit's gradient of an embedding table.

    Rows of equal (unit, id) are gradients of one row of the table: they are added before they are squared, so that a token that
    a text repeats counts as it does in the gradient. Nothing of the table's size is formed.

    Args:
        ids: int64 (rows,), what was looked up, in unit order.
        g: (rows, d), the gradients of what was found; any floating dtype.
        sizes: The number of rows of each unit.

    Returns:
        (units,), float32 or float64.
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
    """Inner products of the two gradients of a matrix that is both output layer and embedding table (tied weights).

    The squared norm of their sum is ``|head|^2 + |table|^2 + 2 <head, table>``, and the last term is ::

        sum_{t,s in u} g_t[id_s] (a_t . g_rows_s)

    Args:
        a: (rows, d), inputs of the output layer, in unit order; any floating dtype.
        g: (rows, V), gradients of its outputs.
        ids: int64 (looked up,), what was looked up, in unit order.
        g_rows: (looked up, d), gradients of what was found.
        sizes: The number of `rows` of each unit.
        row_sizes: The number of each unit's lookups.

    Returns:
        (units,), float32 or float64.
    """
    a, g, g_rows = upcast(a), upcast(g), upcast(g_rows)
    out = torch.zeros(len(sizes), dtype=a.dtype, device=a.device)
    parts = zip(
        a.split(list(sizes)), g.split(list(sizes)), ids.split(list(row_sizes)), g_rows.split(list(row_sizes)), strict=True
    )
    for unit, (a_u, g_u, ids_u, rows_u) in enumerate(parts):
        out[unit] = (g_u.index_select(1, ids_u) * (a_u @ rows_u.mT)).sum()
    return out
