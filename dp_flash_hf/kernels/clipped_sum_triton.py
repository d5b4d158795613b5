"""Sums of per-unit gradients weighted by clip factors, on the GPU (Triton): what `clipped_sum.py` computes with torch.

Factors multiply float32 sums of a unit's own rows, never 16-bit values: rounding factor times g would let a unit exceed its
bound. What a unit of factor 0 holds is not read. Every element of a sum has one program, which adds in a fixed order: no
atomics, the same bits every time.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_hf.kernels.triton_common import (
    PRODUCT_OPTIONS,
    SUM_OPTIONS,
    dot,
    on_device,
    on_its_device,
    product_options,
    product_tiles,
    rowwise,
    run_ends,
    unit_of_row,
)

# Launch options. The compiler divides stages among loads that wait for each other, the table of chunks and the rows it names:
# with two more than other products have, as many chunks of rows are under way.
LINEAR_OPTIONS = {size: {**options, "num_stages": options["num_stages"] + 2} for size, options in PRODUCT_OPTIONS.items()}
TABLE_OPTIONS = SUM_OPTIONS  # of table_sum_kernel
UNITS_OPTIONS = {"BLOCK": 1024, "num_warps": 4}  # of units_sum_kernel


@triton.jit(do_not_specialize=["n_chunks"], do_not_specialize_on_alignment=["chunk_rows", "chunk_ends", "chunk_factors"])
def linear_sum_kernel(
    a,
    g,
    a_stride,
    g_stride,
    d,
    p,
    chunk_rows,
    chunk_ends,
    chunk_factors,
    out,
    out_stride,
    n_chunks,
    ADD: tl.constexpr,
    P_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of sum_u f_u sum_{t in u} g_t a_t^T, stored, or added to what is there. Grid: (tiles,).

    One loop over chunks of rows, each of one unit, so that loads of the next unit run ahead of the sums of this one.
    """
    tile = tl.program_id(0)
    across = tl.cdiv(d, D_BLOCK)
    outputs = tile // across * P_BLOCK + tl.arange(0, P_BLOCK)
    inputs = tile % across * D_BLOCK + tl.arange(0, D_BLOCK)
    total = tl.zeros((P_BLOCK, D_BLOCK), tl.float32)
    own = tl.zeros((P_BLOCK, D_BLOCK), tl.float32)
    for chunk in range(n_chunks):
        first = tl.load(chunk_rows + chunk)
        end = tl.load(chunk_ends + chunk)
        factor = tl.load(chunk_factors + chunk)
        rows = first + tl.arange(0, ROWS)
        index = rows.to(tl.int64)
        read = rows < tl.where(factor != 0.0, end, first)
        left = tl.load(g + index[None, :] * g_stride + outputs[:, None], mask=read[None, :] & (outputs < p)[:, None], other=0.0)
        right = tl.load(a + index[:, None] * a_stride + inputs[None, :], mask=read[:, None] & (inputs < d)[None, :], other=0.0)
        own = dot(left, right, own)
        if first + ROWS >= end:
            total += factor * own
            own = tl.zeros((P_BLOCK, D_BLOCK), tl.float32)
    places = out + outputs.to(tl.int64)[:, None] * out_stride + inputs[None, :]
    mask = (outputs < p)[:, None] & (inputs < d)[None, :]
    if ADD:
        total += tl.load(places, mask=mask, other=0.0)
    tl.store(places, total, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["ids", "order", "run_ends", "factors"])
def table_sum_kernel(
    g,
    stride,
    width,
    ids,
    order,
    run_ends,
    factors,
    out,
    out_stride,
    ROWS: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """Add to one row of a table the rows g that were looked up there, each times its unit's factor.

    ids: sorted. factors: of each row. The program of a run's first row does the run; the others end at once. Grid: (rows,
    blocks of columns).
    """
    first = tl.program_id(0)
    columns = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    if tl.load(run_ends + tl.maximum(first, 1) - 1, mask=first > 0, other=0) <= first:
        end = tl.load(run_ends + first)
        sums = tl.zeros((ROWS, D_BLOCK), tl.float32)
        for start in range(first, end, ROWS):
            places = start + tl.arange(0, ROWS)
            rows = tl.load(order + places, mask=places < end, other=0)
            weights = tl.load(factors + rows, mask=places < end, other=0.0)
            mask = (weights != 0.0)[:, None] & (columns < width)[None, :]
            read = tl.load(g + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
            sums += weights[:, None] * read.to(tl.float32)
        place = out + tl.load(ids + first) * out_stride + columns
        mask = columns < width
        tl.store(place, tl.load(place, mask=mask, other=0.0) + tl.sum(sums, 0), mask=mask)


@triton.jit(do_not_specialize=["n_units"], do_not_specialize_on_alignment=["factors"])
def units_sum_kernel(gradients, unit_stride, size, factors, out, n_units, BLOCK: tl.constexpr):
    """out += sum over units of factor times gradient, some elements of it. Grid: (blocks,)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(out + places, mask=places < size, other=0.0)
    for unit in range(n_units):
        factor = tl.load(factors + unit)
        mask = places < tl.where(factor != 0.0, size, 0)
        # Gradients of several units may be more than an int32 can count.
        total += factor * tl.load(gradients + tl.cast(unit, tl.int64) * unit_stride + places, mask=mask, other=0.0)
    tl.store(out + places, total, mask=places < size)


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """int32 (chunks,) each: first row, end of its unit, and unit of every `rows` rows of a unit."""
    counts = torch.tensor([-(-size // rows) for size in sizes], dtype=torch.int64)
    units = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = torch.tensor([0, *accumulate(sizes)], dtype=torch.int64)
    within = torch.arange(len(units)) - (counts.cumsum(0) - counts)[units]
    return on_device(device, starts[units] + rows * within, starts[units + 1], units)


@on_its_device
def add_linear_(out: Tensor, a: Tensor, g: Tensor, factors: Tensor, sizes: tuple[int, ...], *, replace: bool = False) -> Tensor:
    """out (p, d) float32 += sum_u factors[u] sum_{t in u} g_t a_t^T, or becomes it; the elements of its rows are adjacent.

    a: (rows, d), g: (rows, p), bfloat16, float16 or float32, in unit order. factors: (units,) float32.
    """
    a, g = rowwise(a), rowwise(g)
    options = product_options(a, g, LINEAR_OPTIONS)
    rows, ends, units = _chunks(sizes, options["ROWS"], a.device)
    if out.numel():
        linear_sum_kernel[(product_tiles(a, g),)](
            *(a, g, a.stride(0), g.stride(0), a.shape[1], g.shape[1]),
            *(rows, ends, factors[units], out, out.stride(0), len(rows)),
            ADD=not replace,
            **options,
        )
    return out


@on_its_device
def add_embedding_(out: Tensor, ids: Tensor, g: Tensor, factors: Tensor, sizes: tuple[int, ...]) -> None:
    """out (V, d) float32 rows at ids (rows,) += factor of the unit times g (rows, d), in unit order. factors: float32."""
    g = rowwise(g)
    in_order, order = torch.sort(ids, stable=True)
    if g.numel():
        table_sum_kernel[(len(g), triton.cdiv(g.shape[1], TABLE_OPTIONS["D_BLOCK"]))](
            *(g, g.stride(0), g.shape[1], in_order, order, run_ends(in_order)),
            *(factors[unit_of_row(sizes, g.device)], out, out.stride(0)),
            **TABLE_OPTIONS,
        )


@on_its_device
def add_per_unit_(out: Tensor, gradients: Tensor, factors: Tensor) -> None:
    """out ``(*shape)`` float32, contiguous, += sum_u factors[u] gradients[u]; gradients (units, ...) and factors float32."""
    gradients, factors = gradients.contiguous(), factors.contiguous()
    if gradients.numel():
        units_sum_kernel[(triton.cdiv(out.numel(), UNITS_OPTIONS["BLOCK"]),)](
            gradients, out.numel(), out.numel(), factors, out, len(gradients), **UNITS_OPTIONS
        )
