"""Squared norms of per-unit gradients on the GPU (Triton): what `ghost_norm.py` computes with torch.

Rows are in unit order. Units differ in length, so programs do not index rows: tables made on the host from the sizes say which
rows each program has, and no program reads a row of a unit that is not its own. Every program writes a result of its own and
these are added in a fixed order: no atomics, the same bits every time. Sums run in float32; products of float32 values are
float32 products (no TF32).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_hf.kernels.numerics import CANCELLED, HIDDEN
from dp_flash_hf.kernels.triton_common import (
    SUM_OPTIONS,
    dot,
    fitted,
    on_device,
    on_its_device,
    product_options,
    product_tiles,
    rowwise,
    run_ends,
    unit_of_row,
    unit_offsets,
)

# Launch options by bytes per element, see `triton_common`. BLOCK: rows on a side of a Gram tile at most, smaller where units
# are shorter. Two tiles of 128 x 128 float32 sums, of inputs and output gradients, take 128 registers a thread of 8 warps.
# CHUNK of 32 makes float32 products spill.
GRAM_OPTIONS = {
    2: {"BLOCK": 128, "CHUNK": 64, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK": 64, "CHUNK": 16, "num_warps": 8, "num_stages": 3},
}
REDUCE_OPTIONS = {"BLOCK": 256, "num_warps": 4}  # of decide_kernel and finish_kernel

EPS = torch.finfo(torch.float32).eps
SHARING = 3  # output gradients that one launch takes for one input: q, k, v
PROGRAMS = 128  # of direct_kernel for each unit: where there is one unit only, about one for each multiprocessor of a large GPU

# Read and written one element at a time: how they are aligned is no reason to compile a kernel again.
UNALIGNED = [
    *("tile_rows", "tile_columns", "tile_ends", "tile_starts", "direct", "offsets", "run_ends"),
    *("norm_parts", "bound_parts", "norms", "bounds", "redo", "parts"),
]


@triton.jit
def _gram_tile(x, stride, width, first, second, end, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """X_first X_second^T (BLOCK, BLOCK) float32, of the rows from `first` and from `second` on that come before `end`."""
    rows = first + tl.arange(0, BLOCK)
    columns = second + tl.arange(0, BLOCK)
    row_starts = x + rows.to(tl.int64)[:, None] * stride
    column_starts = x + columns.to(tl.int64)[None, :] * stride
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, CHUNK):
        k = start + tl.arange(0, CHUNK)
        left = tl.load(row_starts + k[None, :], mask=(rows < end)[:, None] & (k < width)[None, :], other=0.0)
        right = tl.load(column_starts + k[:, None], mask=(columns < end)[None, :] & (k < width)[:, None], other=0.0)
        sums = dot(left, right, sums)
    return sums


@triton.jit
def _diagonal(tile, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    return tl.sum(tl.where(index[:, None] == index[None, :], tl.abs(tile), 0.0), 1)


@triton.jit
def _store_gram(
    inputs, lengths, g, stride, width, first, second, end, norm_part, bound_part, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    outputs = _gram_tile(g, stride, width, first, second, end, BLOCK, CHUNK)
    on_diagonal = first == second
    tl.store(norm_part, tl.sum(tl.sum(inputs * outputs, 1), 0) * tl.where(on_diagonal, 1.0, 2.0))
    bound = tl.sum(lengths * tl.sqrt(_diagonal(outputs, BLOCK)), 0)
    tl.store(bound_part, tl.where(on_diagonal, bound, 0.0))


@triton.jit(do_not_specialize=["n_tiles"], do_not_specialize_on_alignment=UNALIGNED)
def gram_kernel(
    a,
    g0,
    g1,
    g2,
    a_stride,
    g0_stride,
    g1_stride,
    g2_stride,
    d,
    p0,
    p1,
    p2,
    tile_rows,
    tile_columns,
    tile_ends,
    norm_parts,
    bound_parts,
    n_tiles,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of one pair of blocks of a unit's rows: sum of (A A^T) o (G G^T) for each of COUNT output gradients, A A^T formed once.

    Pairs off the diagonal stand for two. On the diagonal also ``sum_t |a_t| |g_t|``. Grid: (tiles,).
    """
    tile = tl.program_id(0)
    first = tl.load(tile_rows + tile)
    second = tl.load(tile_columns + tile)
    end = tl.load(tile_ends + tile)
    inputs = _gram_tile(a, a_stride, d, first, second, end, BLOCK, CHUNK)
    lengths = tl.sqrt(_diagonal(inputs, BLOCK))
    norm, bound = norm_parts + tile, bound_parts + tile
    _store_gram(inputs, lengths, g0, g0_stride, p0, first, second, end, norm, bound, BLOCK, CHUNK)
    if COUNT > 1:
        norm += n_tiles
        bound += n_tiles
        _store_gram(inputs, lengths, g1, g1_stride, p1, first, second, end, norm, bound, BLOCK, CHUNK)
    if COUNT > 2:
        norm += n_tiles
        bound += n_tiles
        _store_gram(inputs, lengths, g2, g2_stride, p2, first, second, end, norm, bound, BLOCK, CHUNK)


@triton.jit(do_not_specialize=["n_tiles", "n_units"], do_not_specialize_on_alignment=UNALIGNED)
def decide_kernel(
    norm_parts, bound_parts, tile_starts, direct, norms, bounds, redo, n_tiles, n_units, cancelled, BLOCK: tl.constexpr
):
    """Norm and bound of a unit from its tiles, and whether its gradient has to be formed. Grid: (units, output gradients)."""
    unit, which = tl.program_id(0), tl.program_id(1)
    stop = tl.load(tile_starts + unit + 1)
    norm = tl.zeros((BLOCK,), tl.float32)
    bound = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.load(tile_starts + unit), stop, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        norm += tl.load(norm_parts + which * n_tiles + tiles, mask=tiles < stop, other=0.0)
        bound += tl.load(bound_parts + which * n_tiles + tiles, mask=tiles < stop, other=0.0)
    total = tl.sum(norm, 0)
    limit = tl.sum(bound, 0)
    out = which * n_units + unit
    tl.store(norms + out, total)
    tl.store(bounds + out, limit)
    tl.store(redo + out, ((tl.load(direct + unit) != 0) | (total < cancelled * limit * limit)).to(tl.int32))


@triton.jit
def _unit_tile(
    a, g, a_stride, g_stride, d, p, begin, end, tile, P_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """One tile of sum_t g_t a_t^T over rows from `begin` to `end`: its rows, its columns, and (P_BLOCK, D_BLOCK) float32."""
    across = tl.cdiv(d, D_BLOCK)
    outputs = tile // across * P_BLOCK + tl.arange(0, P_BLOCK)
    inputs = tile % across * D_BLOCK + tl.arange(0, D_BLOCK)
    sums = tl.zeros((P_BLOCK, D_BLOCK), tl.float32)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        index = rows.to(tl.int64)
        left = tl.load(
            g + index[None, :] * g_stride + outputs[:, None], mask=(rows < end)[None, :] & (outputs < p)[:, None], other=0.0
        )
        right = tl.load(
            a + index[:, None] * a_stride + inputs[None, :], mask=(rows < end)[:, None] & (inputs < d)[None, :], other=0.0
        )
        sums = dot(left, right, sums)
    return outputs, inputs, sums


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def direct_kernel(
    a,
    g,
    a_stride,
    g_stride,
    d,
    p,
    offsets,
    redo,
    parts,
    P_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum of squares of some tiles of G_u = sum_t g_t a_t^T, each formed in registers. Grid: (programs, units).

    Programs of units that need not be done again end at once.
    """
    program, unit = tl.program_id(0), tl.program_id(1)
    if tl.load(redo + unit) != 0:
        begin = tl.load(offsets + unit)
        end = tl.load(offsets + unit + 1)
        squares = tl.zeros((D_BLOCK,), tl.float32)
        for tile in range(program, tl.cdiv(d, D_BLOCK) * tl.cdiv(p, P_BLOCK), tl.num_programs(0)):
            _, _, sums = _unit_tile(a, g, a_stride, g_stride, d, p, begin, end, tile, P_BLOCK, D_BLOCK, ROWS)
            squares += tl.sum(sums * sums, 0)
        tl.store(parts + unit * tl.num_programs(0) + program, tl.sum(squares, 0))


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def unit_gradients_kernel(
    a,
    g,
    a_stride,
    g_stride,
    d,
    p,
    offsets,
    out,
    unit_stride,
    out_stride,
    ADD: tl.constexpr,
    P_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of G_u = sum_t g_t a_t^T, stored, or added to what is there. Grid: (tiles, units)."""
    tile, unit = tl.program_id(0), tl.program_id(1)
    begin = tl.load(offsets + unit)
    end = tl.load(offsets + unit + 1)
    outputs, inputs, sums = _unit_tile(a, g, a_stride, g_stride, d, p, begin, end, tile, P_BLOCK, D_BLOCK, ROWS)
    places = out + unit.to(tl.int64) * unit_stride + outputs.to(tl.int64)[:, None] * out_stride + inputs[None, :]
    mask = (outputs < p)[:, None] & (inputs < d)[None, :]
    if ADD:
        sums += tl.load(places, mask=mask, other=0.0)
    tl.store(places, sums, mask=mask)


@triton.jit(do_not_specialize=["n_units"], do_not_specialize_on_alignment=UNALIGNED)
def finish_kernel(norms, bounds, redo, parts, offsets, n_units, programs, hidden, BLOCK: tl.constexpr):
    """Norms of units that were done again: sum of their parts, and what rounding may hide. Grid: (units, output gradients)."""
    unit = tl.program_id(0)
    out = tl.program_id(1) * n_units + unit
    if tl.load(redo + out) != 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(parts + out * programs + index, mask=index < programs, other=0.0)
        rows = (tl.load(offsets + unit + 1) - tl.load(offsets + unit)).to(tl.float32)
        lost = hidden * tl.load(bounds + out)
        tl.store(norms + out, tl.sum(total, 0) + rows * lost * lost)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def row_sums_kernel(x, stride, width, offsets, out, ROWS: tl.constexpr, D_BLOCK: tl.constexpr):
    """Some columns of a unit's rows, added. Grid: (units, blocks of columns)."""
    unit = tl.program_id(0)
    columns = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    end = tl.load(offsets + unit + 1)
    sums = tl.zeros((ROWS, D_BLOCK), tl.float32)
    for start in range(tl.load(offsets + unit), end, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        sums += tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + unit.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=columns < width)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def table_rows_kernel(g, stride, width, order, run_ends, lengths, parts, hidden, ROWS: tl.constexpr, D_BLOCK: tl.constexpr):
    """Squares of one row of a unit's embedding gradient: rows of equal (unit, id), added. Grid: (rows, blocks of columns).

    The program of a run's first row does the run; the others write 0.
    """
    first, block = tl.program_id(0), tl.program_id(1)
    columns = block * D_BLOCK + tl.arange(0, D_BLOCK)
    square = 0.0
    if tl.load(run_ends + tl.maximum(first, 1) - 1, mask=first > 0, other=0) <= first:
        end = tl.load(run_ends + first)
        sums = tl.zeros((ROWS, D_BLOCK), tl.float32)
        bound = tl.zeros((ROWS,), tl.float32)
        for start in range(first, end, ROWS):
            places = start + tl.arange(0, ROWS)
            rows = tl.load(order + places, mask=places < end, other=0)
            mask = (places < end)[:, None] & (columns < width)[None, :]
            sums += tl.load(g + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            bound += tl.load(lengths + rows, mask=places < end, other=0.0)
        summed = tl.sum(sums, 0)
        lost = tl.where(block == 0, hidden, 0.0) * tl.sum(bound, 0)
        square = tl.sum(summed * summed, 0) + (end - first).to(tl.float32) * lost * lost
    tl.store(parts + first.to(tl.int64) * tl.num_programs(1) + block, square)


class _Tiles(NamedTuple):
    rows: Tensor  # int32 (tiles,): first row of the first block
    columns: Tensor  # int32 (tiles,): first row of the second
    ends: Tensor  # int32 (tiles,): end of their unit
    starts: Tensor  # int32 (units + 1,): tiles before each unit's first
    direct: Tensor  # int32 (units,): 1 where the gradient itself is formed; such a unit has tiles on the diagonal only


@lru_cache(maxsize=16)
def _tiles(sizes: tuple[int, ...], direct: tuple[bool, ...], block: int, device: torch.device) -> _Tiles:
    pairs, counts, begin = [torch.zeros(3, 0, dtype=torch.int64)], [0], 0
    for size, formed in zip(sizes, direct, strict=True):
        blocks = -(-size // block)
        own = torch.arange(blocks).expand(2, -1) if formed else torch.triu_indices(blocks, blocks)
        pairs.append(torch.cat([begin + block * own, torch.full((1, own.shape[1]), begin + size)]))
        counts.append(counts[-1] + own.shape[1])
        begin += size
    return _Tiles(*on_device(device, *torch.cat(pairs, 1), counts, direct))


@on_its_device
def linear_squared_norms(a: Tensor, gs: Sequence[Tensor], sizes: tuple[int, ...], longest_gram: float) -> Tensor:
    """||sum_{t in u} g_t a_t^T||_F^2 for every unit u and every output gradient g, float32 (len(gs), units).

    a: (rows, d) inputs that the layers share; gs: (rows, p), p as it is in each; bfloat16, float16 or float32, in unit order.
    Units of more than `longest_gram` rows, and units whose Gram sum has cancelled, have their gradient formed, tile by tile.
    """
    if len(gs) > SHARING:
        split = [gs[start : start + SHARING] for start in range(0, len(gs), SHARING)]
        return torch.cat([linear_squared_norms(a, some, sizes, longest_gram) for some in split])
    a, gs = rowwise(a), [rowwise(g) for g in gs]
    n_units, n_gs, d, device = len(sizes), len(gs), a.shape[1], a.device
    norms, bounds = torch.empty(n_gs, n_units, device=device), torch.empty(n_gs, n_units, device=device)
    if n_units == 0:
        return norms
    options = fitted(GRAM_OPTIONS, [a, *gs], BLOCK=max(sizes))
    tiles = _tiles(sizes, tuple(size > longest_gram for size in sizes), options["BLOCK"], device)
    offsets = unit_offsets(sizes, device)
    n_tiles = len(tiles.rows)
    norm_parts, bound_parts = torch.empty(2, n_gs, n_tiles, device=device)
    redo = torch.empty(n_gs, n_units, dtype=torch.int32, device=device)
    three = [*gs, *gs[:1] * (SHARING - n_gs)]
    if n_tiles:
        gram_kernel[(n_tiles,)](
            a,
            *three,
            a.stride(0),
            *(g.stride(0) for g in three),
            d,
            *(g.shape[1] for g in three),
            tiles.rows,
            tiles.columns,
            tiles.ends,
            norm_parts,
            bound_parts,
            n_tiles,
            COUNT=n_gs,
            **options,
        )
    grid = (n_units, n_gs)
    decide_kernel[grid](
        norm_parts, bound_parts, tiles.starts, tiles.direct, norms, bounds, redo, n_tiles, n_units, CANCELLED, **REDUCE_OPTIONS
    )
    programs = min(PROGRAMS, max(product_tiles(a, g) for g in gs))
    parts = torch.empty(n_gs, n_units, programs, device=device)
    for g, again, part in zip(gs, redo, parts, strict=True):
        direct_kernel[(programs, n_units)](
            a, g, a.stride(0), g.stride(0), d, g.shape[1], offsets, again, part, **product_options(a, g)
        )
    finish_kernel[grid](norms, bounds, redo, parts, offsets, n_units, programs, HIDDEN * EPS, **REDUCE_OPTIONS)
    return norms


@on_its_device
def unit_gradients(a: Tensor, g: Tensor, sizes: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """G_u = sum_{t in u} g_t a_t^T of every unit, float32 (units, p, d), added to `out` where it is given.

    a: (rows, d), g: (rows, p), bfloat16, float16 or float32, in unit order. out: float32, the elements of a row adjacent.
    """
    a, g = rowwise(a), rowwise(g)
    (d, p), add = (a.shape[1], g.shape[1]), out is not None
    if out is None:
        out = torch.empty(len(sizes), p, d, device=a.device)
    if out.numel():
        unit_gradients_kernel[(product_tiles(a, g), len(sizes))](
            *(a, g, a.stride(0), g.stride(0), d, p, unit_offsets(sizes, a.device), out, out.stride(0), out.stride(1)),
            ADD=add,
            **product_options(a, g),
        )
    return out


@on_its_device
def row_sums(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows x (rows, p), in unit order, added over each unit: float32 (units, p)."""
    x = rowwise(x)
    out = torch.empty(len(sizes), x.shape[1], device=x.device)
    if out.numel():
        grid = (len(sizes), triton.cdiv(x.shape[1], SUM_OPTIONS["D_BLOCK"]))
        row_sums_kernel[grid](x, x.stride(0), x.shape[1], unit_offsets(sizes, x.device), out, **SUM_OPTIONS)
    return out


@on_its_device
def embedding_squared_norms(ids: Tensor, g: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Squared norm of each unit's embedding gradient, float32 (units,): rows of equal (unit, id) add before they are squared.

    ids: int64 (rows,), g: (rows, d) output gradients, bfloat16, float16 or float32, both in unit order.
    """
    g = rowwise(g)
    # Units stay where they are in this order, so that what a unit's runs leave is again in unit order.
    keys, order = torch.sort((unit_of_row(sizes, g.device).to(torch.int64) << 32) + ids, stable=True)
    lengths = torch.linalg.vector_norm(g, dim=1, dtype=torch.float32)
    blocks = triton.cdiv(g.shape[1], SUM_OPTIONS["D_BLOCK"])
    parts = torch.empty(len(g), blocks, device=g.device)
    if parts.numel():
        table_rows_kernel[(len(g), blocks)](
            g, g.stride(0), g.shape[1], order, run_ends(keys), lengths, parts, HIDDEN * EPS, **SUM_OPTIONS
        )
    return row_sums(parts, sizes).sum(1)
