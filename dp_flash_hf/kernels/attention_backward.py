"""Backward pass of flash attention (Triton): delta, then dK and dV per tile of keys, then dQ per tile of queries.

With weights P, dP = dO V^T and delta = rowsum(dO * O): dV = P^T dO, dS = P * (dP - delta), dQ = dS K, dK = dS^T Q (Dao et al.
2022, arXiv:2205.14135, algorithm 4). Each gradient has one writer, which adds in a fixed order: the heads of a group are summed
in float32 by the program of their key head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_hf.kernels.attention_tiles import (
    LOG2E,
    VARYING,
    config,
    constants,
    grad_before_clipping,
    grid,
    key_tiles,
    keys_of_program,
    load_rows,
    queries_of_program,
    query_tiles,
    signed,
    sizes,
    tanh,
    tile_offsets,
    tuned,
    visible,
)
from dp_flash_hf.kernels.counter_noise_triton import kept
from dp_flash_hf.kernels.triton_common import dot
from dp_flash_hf.kernels.types import AttentionOptions, SegmentTable

# As the forward's: the first of each is the one that must build everywhere without spilling registers.
KEY_VALUE_CONFIGS = {
    (64, False): [config(32, 128, 8, 2), config(32, 64, 4, 2), config(64, 128, 8, 2), config(64, 64, 4, 2)],
    (128, False): [config(32, 64, 8, 2), config(32, 128, 8, 2), config(64, 128, 8, 2), config(32, 64, 4, 2)],
    (256, False): [config(32, 32, 8, 1), config(16, 64, 8, 2), config(32, 64, 8, 1)],
    (64, True): [config(16, 32, 8, 1), config(16, 32, 4, 2)],
    (128, True): [config(16, 16, 8, 1), config(16, 32, 4, 2)],
    (256, True): [config(16, 16, 8, 1), config(16, 16, 4, 1)],
}
QUERY_CONFIGS = {
    (64, False): [config(64, 64, 4, 3), config(128, 64, 8, 3), config(128, 32, 4, 3), config(64, 32, 4, 3)],
    (128, False): [config(128, 32, 8, 2), config(128, 64, 8, 2), config(64, 64, 4, 2), config(64, 32, 4, 2)],
    (256, False): [config(64, 32, 8, 2), config(64, 16, 8, 2), config(32, 32, 4, 1)],
    (64, True): [config(32, 16, 4, 2), config(16, 16, 8, 1)],
    (128, True): [config(16, 16, 8, 1), config(32, 16, 4, 2)],
    (256, True): [config(16, 16, 8, 1), config(16, 16, 4, 1)],
}


@triton.jit
def delta_kernel(
    grad_ptr, clean_ptr, delta_ptr,
    row_ptr, q_start_ptr, q_length_ptr,
    max_rows, heads, g_row, g_head, g_stride, o_row, o_head, o_stride, lse_stride,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O), O without noise."""
    tiles = tl.cdiv(max_rows, BLOCK_M)
    pid = tl.program_id(0)
    head = (pid // tiles % heads).to(tl.int64)
    segment = pid // tiles // heads
    first = pid % tiles * BLOCK_M
    n_q = tl.load(q_length_ptr + segment)
    if first >= n_q:
        return
    batch_row = tl.load(row_ptr + segment).to(tl.int64)
    q_start = tl.load(q_start_ptr + segment).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    grad_base = grad_ptr + batch_row * g_row + head * g_head + q_start * g_stride
    clean_base = clean_ptr + batch_row * o_row + head * o_head + q_start * o_stride
    grad = load_rows(grad_base, g_stride, first, rows, columns, n_q, E, BLOCK_E, True).to(tl.float32)
    clean = load_rows(clean_base, o_stride, first, rows, columns, n_q, E, BLOCK_E, True).to(tl.float32)
    out = delta_ptr + (batch_row * heads + head) * lse_stride + q_start + first + rows
    tl.store(out, tl.sum(grad * clean, 1), mask=first + rows < n_q)


@triton.jit
def _key_value_tile(
    key_grad, value_grad, key, value, factors, query_base, grad_base, lse_base, delta_base, first, j, n_q, n_k,
    window, slope, height, drop_below, kept_scale, key0, key1, q_start, k_first, plane, q_stride, g_stride,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, CLIPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)
    query = load_rows(query_base, q_stride, first, rows, tl.arange(0, BLOCK_D), n_q, D, BLOCK_D, MASKED)
    if MASKED:  # beyond the last query, 2^(logit - inf) = 0
        lse = tl.load(lse_base + first + rows, mask=first + rows < n_q, other=float("inf"))
        delta = tl.load(delta_base + first + rows, mask=first + rows < n_q, other=0.0)
    else:
        lse = tl.load(lse_base + first + rows)
        delta = tl.load(delta_base + first + rows)
    logits = dot(key, query.T, None)  # (keys, queries), as are all tiles here
    if SOFTCAPPED:
        squashed = tanh(logits * slope)
        weights = tl.exp2(squashed * height - lse[None, :])
    else:
        weights = tl.exp2(logits * slope - lse[None, :])
    if MASKED:
        seen = visible((first + rows)[None, :], j[:, None], n_q, n_k, window, CAUSAL, WINDOWED)
        weights = tl.where(seen, weights, 0.0)
    grad = load_rows(grad_base, g_stride, first, rows, tl.arange(0, BLOCK_E), n_q, E, BLOCK_E, MASKED)
    weight_grad = dot(value, grad.T, None)
    if CLIPPED:
        weight_grad *= factors[:, None]
    used = weights
    if DROPOUT:
        keep = kept(key0, key1, q_start + first + rows, k_first, plane, drop_below, BLOCK_M, BLOCK_N).T
        used = tl.where(keep, weights * kept_scale, 0.0)
        weight_grad = tl.where(keep, weight_grad * kept_scale, 0.0)
    value_grad = dot(used.to(grad.dtype), grad, value_grad)
    logit_grad = weights * (weight_grad - delta[None, :])
    if SOFTCAPPED:
        logit_grad *= 1.0 - squashed * squashed
    key_grad = dot(logit_grad.to(query.dtype), query, key_grad)
    return key_grad, value_grad


@triton.jit
def _key_value_grads(
    key_grad, value_grad, key, value, factors, query_base, grad_base, lse_base, delta_base, low, high, j, n_q, n_k,
    window, slope, height, drop_below, kept_scale, key0, key1, q_start, k_first, plane, q_stride, g_stride,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, CLIPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first in range(low, high, BLOCK_M):
        key_grad, value_grad = _key_value_tile(
            key_grad, value_grad, key, value, factors, query_base, grad_base, lse_base, delta_base, first, j, n_q, n_k,
            window, slope, height, drop_below, kept_scale, key0, key1, q_start, k_first, plane, q_stride, g_stride,
            D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, MASKED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return key_grad, value_grad


@triton.jit
def _key_value_grads_of_head(
    key_grad, value_grad, key, value, factors, query_base, grad_base, lse_base, delta_base, low, left, right, high, j, n_q, n_k,
    window, slope, height, drop_below, kept_scale, key0, key1, q_start, k_first, plane, q_stride, g_stride,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, CLIPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if CAUSAL or WINDOWED:
        key_grad, value_grad = _key_value_grads(
            key_grad, value_grad, key, value, factors, query_base, grad_base, lse_base, delta_base,
            low, tl.minimum(left, high), j, n_q, n_k, window, slope, height, drop_below, kept_scale, key0, key1,
            q_start, k_first, plane, q_stride, g_stride, D, E, BLOCK_D, BLOCK_E,
            CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    key_grad, value_grad = _key_value_grads(
        key_grad, value_grad, key, value, factors, query_base, grad_base, lse_base, delta_base,
        left, right, j, n_q, n_k, window, slope, height, drop_below, kept_scale, key0, key1,
        q_start, k_first, plane, q_stride, g_stride, D, E, BLOCK_D, BLOCK_E,
        CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    return _key_value_grads(
        key_grad, value_grad, key, value, factors, query_base, grad_base, lse_base, delta_base,
        right, high, j, n_q, n_k, window, slope, height, drop_below, kept_scale, key0, key1,
        q_start, k_first, plane, q_stride, g_stride, D, E, BLOCK_D, BLOCK_E,
        CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _key_value_grads_of_group(
    key_grad, value_grad, key, value, factors, query_base, grad_base, lse_ptr, delta_ptr, low, high,
    kv_head, heads, batch_row, q_head, g_head, lse_stride, j, n_q, n_k, window, slope, height, drop_below,
    kept_scale, key0, key1, q_start, k_start, first, q_stride, g_stride, GROUP: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, CLIPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # All heads of the group in one loop; three loops inside another would spill registers.
    steps = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
    for step in range(steps * GROUP):
        head = kv_head * GROUP + step // steps
        plane = batch_row * heads + head
        key_grad, value_grad = _key_value_tile(
            key_grad, value_grad, key, value, factors, query_base + head * q_head, grad_base + head * g_head,
            lse_ptr + plane * lse_stride + q_start, delta_ptr + plane * lse_stride + q_start,
            low + step % steps * BLOCK_M, j, n_q, n_k, window, slope, height, drop_below, kept_scale, key0, key1,
            q_start, k_start + first, plane, q_stride, g_stride,
            D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return key_grad, value_grad


@tuned(KEY_VALUE_CONFIGS)
@triton.jit(do_not_specialize=VARYING)
def key_value_grad_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, factors_ptr, norms_ptr, key_grad_ptr, value_grad_ptr,
    row_ptr, q_start_ptr, q_length_ptr, k_start_ptr, k_length_ptr,
    max_rows, length_class, heads, window, slope, height, drop_below, kept_scale,
    key0, key1, scale,
    q_row, q_head, q_stride, k_row, k_head, k_stride, v_row, v_head, v_stride, g_row, g_head, g_stride,
    kg_row, kg_head, kg_stride, vg_row, vg_head, vg_stride,
    lse_stride, factor_stride,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head. max_rows: of keys in a segment, plus 3 with dropout."""
    kv_heads = heads // GROUP
    segment, kv_head, first = keys_of_program(max_rows, kv_heads, BLOCK_N)
    n_k = tl.load(k_length_ptr + segment)
    k_start = tl.load(k_start_ptr + segment)
    if DROPOUT:  # words come in fours of columns
        first -= k_start % 4
    if first >= n_k:
        return
    n_q = tl.load(q_length_ptr + segment)
    batch_row = tl.load(row_ptr + segment).to(tl.int64)
    q_start = tl.load(q_start_ptr + segment)

    columns = tl.arange(0, BLOCK_N)
    j = first + columns
    width, width_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    key_base = key_ptr + batch_row * k_row + kv_head * k_head + k_start.to(tl.int64) * k_stride
    value_base = value_ptr + batch_row * v_row + kv_head * v_head + k_start.to(tl.int64) * v_stride
    key = load_rows(key_base, k_stride, first, columns, width, n_k, D, BLOCK_D, True)
    value = load_rows(value_base, v_stride, first, columns, width_v, n_k, E, BLOCK_E, True)
    CLIPPED: tl.constexpr = factors_ptr is not None
    factors = slope
    if CLIPPED:
        factors = tl.load(factors_ptr + (batch_row * kv_heads + kv_head) * factor_stride + k_start + j, mask=j < n_k, other=0.0)
    key_grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_grad = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    low, left, right, high = query_tiles(first, n_q, n_k, window, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N)
    query_base = query_ptr + batch_row * q_row + q_start.to(tl.int64) * q_stride
    grad_base = grad_ptr + batch_row * g_row + q_start.to(tl.int64) * g_stride
    if GROUP == 1:
        plane = batch_row * heads + kv_head
        key_grad, value_grad = _key_value_grads_of_head(
            key_grad, value_grad, key, value, factors, query_base + kv_head * q_head, grad_base + kv_head * g_head,
            lse_ptr + plane * lse_stride + q_start, delta_ptr + plane * lse_stride + q_start, low, left, right, high,
            j, n_q, n_k, window, slope, height, drop_below, kept_scale, key0, key1, q_start, k_start + first, plane,
            q_stride, g_stride, D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        key_grad, value_grad = _key_value_grads_of_group(
            key_grad, value_grad, key, value, factors, query_base, grad_base, lse_ptr, delta_ptr, low, high,
            kv_head, heads, batch_row, q_head, g_head, lse_stride, j, n_q, n_k, window, slope, height, drop_below,
            kept_scale, key0, key1, q_start, k_start, first, q_stride, g_stride, GROUP, D, E, BLOCK_D, BLOCK_E,
            CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    inside = ((j >= 0) & (j < n_k))[:, None]
    key_tile = tile_offsets(kg_row, kg_head, kg_stride, batch_row, kv_head, k_start, first, columns)
    tl.store(
        key_grad_ptr + key_tile + width[None, :],
        (key_grad * scale).to(key_grad_ptr.dtype.element_ty),
        mask=inside & (width < D)[None, :],
    )
    if CLIPPED:
        value_grad = grad_before_clipping(value_grad, value, factors, norms_ptr, kv_head)
    value_tile = tile_offsets(vg_row, vg_head, vg_stride, batch_row, kv_head, k_start, first, columns)
    tl.store(
        value_grad_ptr + value_tile + width_v[None, :],
        value_grad.to(value_grad_ptr.dtype.element_ty),
        mask=inside & (width_v < E)[None, :],
    )


@triton.jit
def _query_grads(
    query_grad, query, grad, lse, delta, key_base, value_base, factor_base, low, high, i, n_q, n_k,
    window, slope, height, drop_below, kept_scale, key0, key1, row, k_start, plane, k_stride, v_stride,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr, CLIPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    for first in range(low, high, BLOCK_N):
        key = load_rows(key_base, k_stride, first, columns, tl.arange(0, BLOCK_D), n_k, D, BLOCK_D, MASKED)
        logits = dot(query, key.T, None)
        if SOFTCAPPED:
            squashed = tanh(logits * slope)
            weights = tl.exp2(squashed * height - lse[:, None])
        else:
            weights = tl.exp2(logits * slope - lse[:, None])
        if MASKED:
            seen = visible(i[:, None], (first + columns)[None, :], n_q, n_k, window, CAUSAL, WINDOWED)
            weights = tl.where(seen, weights, 0.0)
        value = load_rows(value_base, v_stride, first, columns, tl.arange(0, BLOCK_E), n_k, E, BLOCK_E, MASKED)
        weight_grad = dot(grad, value.T, None)
        if CLIPPED:
            if MASKED:
                factors = tl.load(factor_base + first + columns, mask=first + columns < n_k, other=0.0)
            else:
                factors = tl.load(factor_base + first + columns)
            weight_grad *= factors[None, :]
        if DROPOUT:
            keep = kept(key0, key1, row, k_start + first, plane, drop_below, BLOCK_M, BLOCK_N)
            weight_grad = tl.where(keep, weight_grad * kept_scale, 0.0)
        logit_grad = weights * (weight_grad - delta[:, None])
        if SOFTCAPPED:
            logit_grad *= 1.0 - squashed * squashed
        query_grad = dot(logit_grad.to(key.dtype), key, query_grad)
    return query_grad


@tuned(QUERY_CONFIGS)
@triton.jit(do_not_specialize=VARYING)
def query_grad_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, delta_ptr, factors_ptr, query_grad_ptr,
    row_ptr, q_start_ptr, q_length_ptr, k_start_ptr, k_length_ptr,
    max_rows, length_class, heads, window, slope, height, drop_below, kept_scale,
    key0, key1, scale,
    q_row, q_head, q_stride, k_row, k_head, k_stride, v_row, v_head, v_stride, g_row, g_head, g_stride,
    qg_row, qg_head, qg_stride,
    lse_stride, factor_stride,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one query head. max_rows: of queries in a segment."""
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
    width = tl.arange(0, BLOCK_D)
    query_base = query_ptr + batch_row * q_row + head.to(tl.int64) * q_head + q_start.to(tl.int64) * q_stride
    grad_base = grad_ptr + batch_row * g_row + head.to(tl.int64) * g_head + q_start.to(tl.int64) * g_stride
    key_base = key_ptr + batch_row * k_row + kv_head * k_head + k_start.to(tl.int64) * k_stride
    value_base = value_ptr + batch_row * v_row + kv_head * v_head + k_start.to(tl.int64) * v_stride
    query = load_rows(query_base, q_stride, first, rows, width, n_q, D, BLOCK_D, True)
    grad = load_rows(grad_base, g_stride, first, rows, tl.arange(0, BLOCK_E), n_q, E, BLOCK_E, True)
    lse = tl.load(lse_ptr + plane * lse_stride + q_start + i, mask=i < n_q, other=float("inf"))
    delta = tl.load(delta_ptr + plane * lse_stride + q_start + i, mask=i < n_q, other=0.0)
    CLIPPED: tl.constexpr = factors_ptr is not None
    factor_base = factors_ptr
    if CLIPPED:
        factor_base = factors_ptr + (batch_row * (heads // GROUP) + kv_head) * factor_stride + k_start

    query_grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low, left, right, high = key_tiles(first, n_q, n_k, k_start, window, CAUSAL, WINDOWED, DROPOUT, BLOCK_M, BLOCK_N)
    if WINDOWED and not DROPOUT:
        query_grad = _query_grads(
            query_grad, query, grad, lse, delta, key_base, value_base, factor_base, low, tl.minimum(left, high), i, n_q, n_k,
            window, slope, height, drop_below, kept_scale, key0, key1, q_start + i, k_start, plane, k_stride, v_stride,
            D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if not DROPOUT:
        query_grad = _query_grads(
            query_grad, query, grad, lse, delta, key_base, value_base, factor_base, left, right, i, n_q, n_k,
            window, slope, height, drop_below, kept_scale, key0, key1, q_start + i, k_start, plane, k_stride, v_stride,
            D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    query_grad = _query_grads(
        query_grad, query, grad, lse, delta, key_base, value_base, factor_base, right, high, i, n_q, n_k,
        window, slope, height, drop_below, kept_scale, key0, key1, q_start + i, k_start, plane, k_stride, v_stride,
        D, E, BLOCK_D, BLOCK_E, CAUSAL, WINDOWED, SOFTCAPPED, DROPOUT, CLIPPED, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    tile = tile_offsets(qg_row, qg_head, qg_stride, batch_row, head, q_start, first, rows)
    tl.store(
        query_grad_ptr + tile + width[None, :],
        (query_grad * scale).to(query_grad_ptr.dtype.element_ty),
        mask=(i < n_q)[:, None] & (width < D)[None, :],
    )


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    clean: Tensor,
    lse: Tensor,
    factors: Tensor | None,
    clip_norms: Tensor | None,
    segments: SegmentTable,
    pattern: AttentionOptions,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for query, key, value and sinks, where needed, from grad (B, H, Q, E) and what forward kept."""
    heads, n_queries = query.shape[1], query.shape[2]
    kv_heads, n_keys, dim_v = key.shape[1], key.shape[2], value.shape[3]
    delta = torch.zeros_like(lse)
    query_grad, key_grad, value_grad = (
        torch.empty_like(x) if segments.everything else torch.zeros_like(x) for x in (query, key, value)
    )
    varying = *signed(pattern.dropout_key)[:2], pattern.scale
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3]
    with torch.cuda.device_of(query):
        if tiles := len(segments.row) * heads * triton.cdiv(segments.max_queries, 32):
            delta_kernel[(tiles,)](
                grad, clean, delta,
                segments.row, segments.q_start, segments.q_length,
                segments.max_queries, heads, *grad.stride()[:3], *clean.stride()[:3], n_queries,
                E=dim_v, BLOCK_E=triton.next_power_of_2(dim_v), BLOCK_M=32,
            )  # fmt: skip
        max_keys = segments.max_keys + 3 if pattern.dropout > 0 else segments.max_keys
        if (needed[1] or needed[2]) and len(segments.row) * segments.max_keys:
            key_value_grad_kernel[grid(segments, kv_heads, "BLOCK_N", max_keys)](
                query, key, value, grad, lse, delta, factors, clip_norms, key_grad, value_grad,
                *segments[:5],
                *sizes(max_keys, heads, pattern), *varying,
                *strides, *key_grad.stride()[:3], *value_grad.stride()[:3],
                n_queries, n_keys,
                **constants(query, key, value, pattern),
            )  # fmt: skip
        if needed[0] and len(segments.row) * segments.max_queries:
            query_grad_kernel[grid(segments, heads, "BLOCK_M", segments.max_queries)](
                query, key, value, grad, lse, delta, factors, query_grad,
                *segments[:5],
                *sizes(segments.max_queries, heads, pattern), *varying,
                *strides, *query_grad.stride()[:3],
                n_queries, n_keys,
                **constants(query, key, value, pattern),
            )  # fmt: skip
    sinks_grad = None
    if sinks is not None and needed[3]:
        # A sink is a logit whose value is 0: its weight times (0 - delta).
        weights = torch.exp2(sinks.float()[:, None] * LOG2E.value - lse)
        sinks_grad = torch.where(torch.isinf(lse), 0.0, -weights * delta).sum((0, 2)).to(sinks.dtype)
    return (
        query_grad if needed[0] else None,
        key_grad if needed[1] else None,
        value_grad if needed[2] else None,
        sinks_grad,
    )
