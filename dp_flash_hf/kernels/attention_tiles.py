"""What the passes of flash attention share: configurations, which keys a query sees, tiles of rows, arguments of launches.

Logits are kept times log2 e, since hardware has 2^x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_hf.kernels.triton_common import INTERPRETED
from dp_flash_hf.kernels.types import AttentionOptions, SegmentTable

LOG2E = tl.constexpr(math.log2(math.e))


def config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> triton.Config:
    """Tiles of block_m queries and block_n keys."""
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=num_warps, num_stages=num_stages)


def fitting(table: dict[tuple[int, bool], list[triton.Config]], D: int, E: int, wide: bool) -> list[triton.Config]:
    """The configurations of a table for heads of D and E elements."""
    return table[max(64, triton.next_power_of_2(max(D, E))), wide]


def tuned(table: dict[tuple[int, bool], list[triton.Config]], *also: str) -> Any:
    """Decorator: pick the fastest of the table's configurations that fit, once per kind of call, and remember it on disk."""

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        return fitting(table, constants["D"], constants["E"], arguments["key_ptr"].dtype == torch.float32)

    every = list({str(c): c for configs in table.values() for c in configs}.values())
    return triton.autotune(
        configs=[config(16, 32, 4, 1)] if INTERPRETED.value else every,  # nothing can be measured there
        key=["length_class", "D", "E", "GROUP", "CAUSAL", "WINDOWED", "SOFTCAPPED", "DROPOUT", *also],
        prune_configs_by={"early_config_prune": prune},
        cache_results=True,
    )


# Numbers that vary from call to call, and that no address depends on in a way worth another compilation.
VARYING = [
    "max_rows", "length_class", "window", "lse_stride", "factor_stride", "drop_below",
    "key0", "key1", "key2", "key3", "key4", "key5", "key6", "key7",
]  # fmt: skip


@triton.jit
def load_rows(base, stride, first, rows, columns, n_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """Tile of the rows `first + rows` below base; where CHECKED, rows outside 0..n_rows are zeros and are not read."""
    pointers = base + tl.cast(stride, tl.int64) * first + rows[:, None] * stride + columns[None, :]
    if CHECKED:
        inside = ((first + rows >= 0) & (first + rows < n_rows))[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def tile_offsets(row_stride, head_stride, stride, batch_row, head, start, first, rows):
    """(rows, 1) offsets of the rows `first + rows` of a segment that begins at `start`."""
    return (
        row_stride * batch_row
        + head_stride * head.to(tl.int64)
        + tl.cast(stride, tl.int64) * (start + first)
        + rows[:, None] * stride
    )


@triton.jit
def visible(i, j, n_q, n_k, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether query i of a segment sees key j; i and j broadcast against each other."""
    behind = i + n_k - n_q - j
    seen = (j >= 0) & (j < n_k)
    if CAUSAL:
        seen = seen & (behind >= 0)
    if WINDOWED:
        seen = seen & (behind < window)
        if not CAUSAL:
            seen = seen & (behind > -window)
    return seen


@triton.jit
def queries_of_program(max_rows, heads, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """(segment, head, first query) of this program, one of those of `grid`."""
    tiles = tl.cdiv(max_rows, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // tiles % heads
    segment = pid // tiles // heads
    first = pid % tiles * BLOCK_M
    if CAUSAL:
        first = (tiles - 1) * BLOCK_M - first  # those with the most keys begin first
    return segment, head, first


@triton.jit
def keys_of_program(max_rows, kv_heads, BLOCK_N: tl.constexpr):
    """(segment, key head, first key) of this program, one of those of `grid`."""
    tiles = tl.cdiv(max_rows, BLOCK_N)
    pid = tl.program_id(0)
    kv_head = (pid // tiles % kv_heads).to(tl.int64)
    segment = pid // tiles // kv_heads
    return segment, kv_head, pid % tiles * BLOCK_N


@triton.jit
def key_tiles(
    first, n_q, n_k, k_start, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(low, left, right, high): tiles of keys that the queries from `first` on see begin at low; those from left to right are
    seen in full by all of them.
    """
    shift = n_k - n_q
    last = tl.minimum(first + BLOCK_M, n_q) - 1
    low, full_low, high, full_high = 0, 0, n_k, n_k
    if WINDOWED:
        low = tl.maximum(first + shift - window + 1, 0)
        full_low = tl.maximum(last + shift - window + 1, 0)
    if CAUSAL:
        high = tl.minimum(last + shift + 1, n_k)
        full_high = tl.minimum(first + shift + 1, n_k)
    elif WINDOWED:
        high = tl.minimum(last + shift + window, n_k)
        full_high = tl.minimum(first + shift + window, n_k)
    if DROPOUT:  # words come in fours of columns; every tile is masked, as the first may begin before the segment
        low = low - (k_start + low) % 4
        left = low
        right = low
    else:
        left = low + tl.cdiv(full_low - low, BLOCK_N) * BLOCK_N
        right = left + tl.maximum(full_high - left, 0) // BLOCK_N * BLOCK_N
    return low, left, right, high


@triton.jit
def query_tiles(
    first, n_q, n_k, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(low, left, right, high): tiles of queries that see any of the keys from `first` on begin at low; those from left to
    right see all of them.
    """
    shift = n_k - n_q
    last = tl.minimum(first + BLOCK_N, n_k) - 1
    low, full_low, high, full_high = 0, 0, n_q, n_q
    if WINDOWED:
        high = tl.minimum(last - shift + window, n_q)
        full_high = tl.minimum(first - shift + window, n_q)
    if CAUSAL:
        low = tl.maximum(first - shift, 0)
        full_low = tl.maximum(last - shift, 0)
    elif WINDOWED:
        low = tl.maximum(first - shift - window + 1, 0)
        full_low = tl.maximum(last - shift - window + 1, 0)
    left = low + tl.cdiv(full_low - low, BLOCK_M) * BLOCK_M
    right = left + tl.maximum(full_high - left, 0) // BLOCK_M * BLOCK_M
    return low, left, right, high


@triton.jit
def grad_before_clipping(value_grad, value, factors, norms_ptr, kv_head):
    """Gradient of value rows v from that of the rows ``v' = v min(1, C / |v|)`` that attention used."""
    # v' = C v / |v| where |v| > C, so dv = C / |v| (dv' - u (u . dv')) with u = v / |v|; else dv = dv'.
    direction = value.to(tl.float32)
    norm = tl.sqrt(tl.sum(direction * direction, 1))
    clipped = norm > tl.load(norms_ptr + kv_head)
    direction = direction / tl.where(clipped, norm, 1.0)[:, None]
    radial = tl.where(clipped, tl.sum(direction * value_grad, 1), 0.0)
    return factors[:, None] * (value_grad - direction * radial[:, None])


@triton.jit
def tanh(x):
    """Absolute error about 1e-7."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


def grid(segments: SegmentTable, heads: int, block: str, max_rows: int) -> Any:
    """One program per segment, head and tile of at most max_rows rows."""
    return lambda meta: (len(segments.row) * heads * triton.cdiv(max_rows, meta[block]),)


def sizes(max_rows: int, heads: int, pattern: AttentionOptions) -> tuple[float, ...]:
    """The arguments max_rows to kept_scale, which forward and backward share."""
    if pattern.softcap is None:
        slope, height = pattern.scale * LOG2E.value, 0.0
    else:
        slope, height = pattern.scale / pattern.softcap, pattern.softcap * LOG2E.value
    drop_below = min(round(pattern.dropout * 2**32), 2**32 - 1)
    window = 0 if pattern.window is None else min(pattern.window, 2**30)
    length_class = triton.next_power_of_2(max_rows)  # lengths of one class share what was tuned
    return max_rows, length_class, heads, window, slope, height, signed([drop_below])[0], 1.0 / (1.0 - pattern.dropout)


def signed(words: Sequence[int]) -> list[int]:
    """Eight int32 with the bits of at most eight 32-bit words."""
    padded = [*words, *[0] * (8 - len(words))]
    return [word - 2**32 if word >= 2**31 else word for word in padded]


def constants(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionOptions) -> dict[str, Any]:
    """The arguments that kernels are compiled for."""
    dim, dim_v = query.shape[3], value.shape[3]
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "D": dim,
        "E": dim_v,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_E": max(16, triton.next_power_of_2(dim_v)),
        "CAUSAL": pattern.causal,
        "WINDOWED": pattern.window is not None,
        "SOFTCAPPED": pattern.softcap is not None,
        "DROPOUT": pattern.dropout > 0,
    }
