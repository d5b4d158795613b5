"""Forward pass of flash attention (Triton): one program per segment, query head and tile of queries.

Logits are kept times log2 e, since hardware has 2^x. The running maximum starts at a finite number below every logit, so that a
query that sees nothing, or only logits of minus infinity, gives zero without a special case.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_hf.kernels.attention_tiles import (
    LOG2E,
    VARYING,
    config,
    constants,
    grid,
    key_tiles,
    keys_of_program,
    load_rows,
    queries_of_program,
    signed,
    sizes,
    tanh,
    tuned,
    visible,
)
from dp_flash_hf.kernels.counter_noise_triton import CHACHA, PHILOX, kept, normals
from dp_flash_hf.kernels.triton_common import dot
from dp_flash_hf.kernels.types import AttentionOptions, Release, SegmentTable

LOWEST = tl.constexpr(-1e30)


# By head width (the larger of query's and value's, as a power of two) and by whether elements have 4 bytes; the first of each
# is the one that must build everywhere without spilling registers.
CONFIGS = {
    (64, False): [config(128, 64, 8, 3), config(64, 64, 4, 3), config(128, 128, 8, 3), config(128, 64, 4, 3)],
    (128, False): [config(128, 64, 8, 3), config(128, 128, 8, 2), config(64, 64, 4, 3), config(64, 32, 4, 2)],
    (256, False): [config(64, 32, 8, 2), config(128, 32, 8, 2), config(64, 64, 8, 2)],
    (64, True): [config(32, 16, 8, 2), config(32, 32, 8, 2), config(16, 16, 4, 2)],
    (128, True): [config(32, 16, 8, 2), config(16, 16, 4, 2)],
    (256, True): [config(16, 16, 8, 2), config(16, 16, 4, 2)],
}


@triton.jit
def _attend(
    total, maximum, weighted, query, key_base, value_base, factor_base, low, high, i, n_q, n_k, window, slope, height,
    drop_below, key0, key1, row, k_start, plane, k_stride, v_stride,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, CLIPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    for first in range(low, high, BLOCK_N):
        key = load_rows(key_base, k_stride, first, columns, tl.arange(0, BLOCK_D), n_k, D, BLOCK_D, MASKED)
        logits = dot(query, key.T, None)
        if SOFTCAPPED:
            logits, unit = tanh(logits * slope), height
        else:
            unit = slope
        if MASKED:
            seen = visible(i[:, None], (first + columns)[None, :], n_q, n_k, window, CAUSAL, WINDOWED)
            logits = tl.where(seen, logits, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1) * unit)
        weights = tl.exp2(logits * unit - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None]
        maximum = new_maximum
        if DROPOUT:
            keep = kept(key0, key1, row, k_start + first, plane, drop_below, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        if CLIPPED:
            if MASKED:
                factors = tl.load(factor_base + first + columns, mask=first + columns < n_k, other=0.0)
            else:
                factors = tl.load(factor_base + first + columns)
            weights = weights * factors[None, :]
        value = load_rows(value_base, v_stride, first, columns, tl.arange(0, BLOCK_E), n_k, E, BLOCK_E, MASKED)
        weighted = dot(weights.to(value.dtype), value, weighted)
    return total, maximum, weighted


@triton.jit
def _attend_all(
    total, maximum, weighted, query, key_base, value_base, factor_base, low, left, right, high, i, n_q, n_k,
    window, slope, height, drop_below, key0, key1, row, k_start, plane, k_stride, v_stride,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, CLIPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if WINDOWED and not DROPOUT:
        total, maximum, weighted = _attend(
            total, maximum, weighted, query, key_base, value_base, factor_base, low, tl.minimum(left, high), i, n_q, n_k,
            window, slope, height, drop_below, key0, key1, row, k_start, plane, k_stride, v_stride,
            D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if not DROPOUT:
        total, maximum, weighted = _attend(
            total, maximum, weighted, query, key_base, value_base, factor_base, left, right, i, n_q, n_k,
            window, slope, height, drop_below, key0, key1, row, k_start, plane, k_stride, v_stride,
            D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return _attend(
        total, maximum, weighted, query, key_base, value_base, factor_base, right, high, i, n_q, n_k,
        window, slope, height, drop_below, key0, key1, row, k_start, plane, k_stride, v_stride,
        D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _first_sums(sinks_ptr, head, BLOCK_M: tl.constexpr):
    """(largest logit, sum of 2^(logit - largest)) of every query before it sees a key: of the sink, if there is one."""
    if sinks_ptr is None:
        maximum = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    else:
        maximum = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E, LOWEST)
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    return maximum, total


@triton.jit
def _store_some_noised(
    output, pointer, std_ptr, key0, key1, key2, key3, key4, key5, key6, key7, row, plane, real, stride,
    NOISE: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store (ROWS, COLUMNS) of the output, from column FIRST on, with noise."""
    z = normals(key0, key1, key2, key3, key4, key5, key6, key7, row, plane, NOISE, ROWS, FIRST, COLUMNS)
    columns = FIRST + tl.arange(0, COLUMNS)
    tile = tl.arange(0, ROWS)[:, None] * stride + columns[None, :]
    noised = (output + z * tl.load(std_ptr)).to(pointer.dtype.element_ty)
    tl.store(pointer + tile, noised, mask=real[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _store_noised(
    output, pointer, std_ptr, key0, key1, key2, key3, key4, key5, key6, key7, row, plane, real, stride,
    NOISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store (ROWS, COLUMNS) of the output with noise."""
    if COLUMNS < 128:
        _store_some_noised(
            output, pointer, std_ptr, key0, key1, key2, key3, key4, key5, key6, key7, row, plane, real, stride,
            NOISE, 0, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
    else:  # one half after the other, or the noise of both would not fit the registers
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(output, (ROWS, 2, HALF)), (0, 2, 1)))
        _store_some_noised(
            left, pointer, std_ptr, key0, key1, key2, key3, key4, key5, key6, key7, row, plane, real, stride,
            NOISE, 0, ROWS, HALF, WIDTH,
        )  # fmt: skip
        _store_some_noised(
            right, pointer, std_ptr, key0, key1, key2, key3, key4, key5, key6, key7, row, plane, real, stride,
            NOISE, HALF, ROWS, HALF, WIDTH,
        )  # fmt: skip


@tuned(CONFIGS, "NOISE")
@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, clean_ptr, lse_ptr, sinks_ptr, factors_ptr, std_ptr,
    row_ptr, q_start_ptr, q_length_ptr, k_start_ptr, k_length_ptr,
    max_rows, length_class, heads, window, slope, height, drop_below, kept_scale,
    key0, key1, key2, key3, key4, key5, key6, key7,
    q_row, q_head, q_stride, k_row, k_head, k_stride, v_row, v_head, v_stride, o_row, o_head, o_stride,
    lse_stride, factor_stride,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, NOISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output, log2-sum-exp2 of the logits (sink included) and, if asked for, the output without noise of one tile of queries.

    slope and height: logits in base 2 are slope * q.k, or height * tanh(slope * q.k). max_rows: of queries in a segment.
    NOISE: 0, PHILOX or CHACHA. Pointers may be None (lse_ptr and clean_ptr: not kept).
    """
    segment, head, first = queries_of_program(max_rows, heads, CAUSAL, BLOCK_M)
    n_q = tl.load(q_length_ptr + segment)
    if first >= n_q:
        return
    n_k = tl.load(k_length_ptr + segment)
    batch_row = tl.load(row_ptr + segment).to(tl.int64)
    q_start = tl.load(q_start_ptr + segment)
    k_start = tl.load(k_start_ptr + segment)
    plane = batch_row * heads + head
    kv_head = (head // GROUP).to(tl.int64)

    rows = tl.arange(0, BLOCK_M)
    i = first + rows
    query_base = query_ptr + batch_row * q_row + head.to(tl.int64) * q_head + q_start.to(tl.int64) * q_stride
    key_base = key_ptr + batch_row * k_row + kv_head * k_head + k_start.to(tl.int64) * k_stride
    value_base = value_ptr + batch_row * v_row + kv_head * v_head + k_start.to(tl.int64) * v_stride
    query = load_rows(query_base, q_stride, first, rows, tl.arange(0, BLOCK_D), n_q, D, BLOCK_D, True)
    CLIPPED: tl.constexpr = factors_ptr is not None
    factor_base = factors_ptr
    if CLIPPED:
        factor_base = factors_ptr + (batch_row * (heads // GROUP) + kv_head) * factor_stride + k_start

    maximum, total = _first_sums(sinks_ptr, head, BLOCK_M)
    weighted = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    low, left, right, high = key_tiles(first, n_q, n_k, k_start, window, CAUSAL, WINDOWED, DROPOUT, BLOCK_M, BLOCK_N)
    total, maximum, weighted = _attend_all(
        total, maximum, weighted, query, key_base, value_base, factor_base, low, left, right, high, i, n_q, n_k,
        window, slope, height, drop_below, key0, key1, q_start + i, k_start, plane, k_stride, v_stride,
        D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output = weighted * (kept_scale / total)[:, None]
    columns = tl.arange(0, BLOCK_E)
    offsets = batch_row * o_row + head.to(tl.int64) * o_head + (q_start + first).to(tl.int64) * o_stride
    tile = offsets + rows[:, None] * o_stride + columns[None, :]
    inside = (i < n_q)[:, None] & (columns < E)[None, :]
    if CLIPPED:
        output = tl.where(tl.abs(output) < float("inf"), output, 0.0)
    if clean_ptr is not None:
        tl.store(clean_ptr + tile, output.to(clean_ptr.dtype.element_ty), mask=inside)
    if NOISE:
        _store_noised(
            output, output_ptr + offsets, std_ptr + head, key0, key1, key2, key3, key4, key5, key6, key7, q_start + i, plane,
            i < n_q, o_stride, NOISE, BLOCK_M, BLOCK_E, E,
        )  # fmt: skip
    else:
        tl.store(output_ptr + tile, output.to(output_ptr.dtype.element_ty), mask=inside)
    if lse_ptr is not None:
        lse = tl.where(empty, float("inf"), maximum + tl.log2(total))
        tl.store(lse_ptr + plane * lse_stride + q_start + i, lse, mask=i < n_q)


@triton.jit
def value_factors_kernel(
    value_ptr, norms_ptr, factors_ptr,
    row_ptr, k_start_ptr, k_length_ptr,
    max_rows, kv_heads, v_row, v_head, v_stride, factor_stride,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of each value row v in a segment, ``min(1, C / |v|)``, so that clipping costs attention one multiplication per weight."""
    segment, kv_head, first = keys_of_program(max_rows, kv_heads, BLOCK_N)
    n_k = tl.load(k_length_ptr + segment)
    if first >= n_k:
        return
    batch_row = tl.load(row_ptr + segment).to(tl.int64)
    k_start = tl.load(k_start_ptr + segment)
    rows = tl.arange(0, BLOCK_N)
    base = value_ptr + batch_row * v_row + kv_head * v_head + k_start.to(tl.int64) * v_stride
    value = load_rows(base, v_stride, first, rows, tl.arange(0, BLOCK_E), n_k, E, BLOCK_E, True).to(tl.float32)
    norm = tl.sqrt(tl.sum(value * value, 1))
    limit = tl.load(norms_ptr + kv_head)
    factor = tl.where(norm <= limit, 1.0, limit / norm)  # NaN of a NaN, so that nothing of such a row is left
    out = factors_ptr + (batch_row * kv_heads + kv_head) * factor_stride + k_start + first + rows
    tl.store(out, factor, mask=first + rows < n_k)


class Result(NamedTuple):
    """What forward returns, and keeps for backward."""

    output: Tensor  # (B, H, Q, E)
    clean: Tensor | None  # the same without noise: noise may be so large that subtracting it again would lose all digits
    lse: Tensor | None  # (B, H, Q) float32: log2 of the sum of 2^logit, sink included; infinite where a query sees nothing
    factors: Tensor | None  # (B, G, K) float32: clip factors of the value rows


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    segments: SegmentTable,
    pattern: AttentionOptions,
    release: Release | None,
    *,
    keep: bool,
) -> Result:
    """Launch the kernels; arguments as checked by `flash_attention`. `keep`: whether backward will follow."""
    batch, heads, n_queries = query.shape[:3]
    kv_heads, n_keys, dim_v = key.shape[1], key.shape[2], value.shape[3]
    empty = torch.empty if segments.everything else torch.zeros
    output = empty(batch, n_queries, heads, dim_v, dtype=value.dtype, device=value.device).transpose(1, 2)
    clean = output if release is None else torch.zeros_like(output)
    lse = torch.full((batch, heads, n_queries), math.inf, device=query.device) if keep else None
    factors, generator, std, words = None, 0, None, pattern.dropout_key
    with torch.cuda.device_of(query):
        if release is not None:
            generator = (PHILOX if len(release.key) == 2 else CHACHA).value
            std, words = release.noise_std, release.key
            factors = torch.ones(batch, kv_heads, n_keys, device=value.device)
            if tiles := len(segments.row) * kv_heads * triton.cdiv(segments.max_keys, 32):
                value_factors_kernel[(tiles,)](
                    value, release.clip_norms, factors,
                    segments.row, segments.k_start, segments.k_length,
                    segments.max_keys, kv_heads, *value.stride()[:3], n_keys,
                    E=dim_v, BLOCK_E=triton.next_power_of_2(dim_v), BLOCK_N=32,
                )  # fmt: skip
        if len(segments.row) * heads * segments.max_queries:
            attention_forward_kernel[grid(segments, heads, "BLOCK_M", segments.max_queries)](
                query, key, value, output, clean if keep and release is not None else None, lse, sinks, factors, std,
                *segments[:5],
                *sizes(segments.max_queries, heads, pattern), *signed(words),
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
                n_queries, n_keys,
                **constants(query, key, value, pattern), NOISE=generator,
            )  # fmt: skip
    return Result(output, clean if keep else None, lse, factors)
