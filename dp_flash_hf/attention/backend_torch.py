"""Attention computed by torch: one call for separate rows; segment by segment, or one varlen call, for packed ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dp_flash_hf.attention.masks import causal_mask
from dp_flash_hf.attention.pattern import Pattern, Segments, Visibility, is_divided


def attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> Tensor:
    """(B, H, Q, E) by torch: one call for separate rows; for packed rows one per segment, or one varlen call on a GPU."""
    if not is_divided(segments):
        return _rows(query, key, value, pattern)
    if takes_varlen(query, value, segments, pattern):
        return _varlen(query, key, value, segments, pattern.scale, causal=_visibilities(segments) == {"causal"})
    # split and cat, not slices: their backward only copies, so no gradient of one segment is added to another's.
    return torch.cat(
        [
            _row(q, k, v, segments, b, pattern)
            for b, (q, k, v) in enumerate(zip(*(torch.split(x, 1) for x in (query, key, value)), strict=True))
        ]
    )


def _row(query: Tensor, key: Tensor, value: Tensor, segments: Segments, row: int, pattern: Pattern) -> Tensor:
    """(1, H, Q, E): the segments of one row, each by itself."""
    parts = segments[row]
    queries, keys = [part.queries for part in parts], [part.keys for part in parts]
    pieces = torch.split(query, queries, 2), torch.split(key, keys, 2), torch.split(value, keys, 2)
    outputs = []
    q0 = k0 = 0
    for part, q, k, v in zip(parts, *pieces, strict=True):
        span = (slice(q0, q0 + part.queries), slice(k0, k0 + part.keys))
        q0, k0 = span[0].stop, span[1].stop
        if part.visibility == "nothing" or part.keys == 0:
            outputs.append(q.new_zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype))
            continue
        mask = _cut(pattern.mask, row, span) if part.visibility == "mask" else None
        bias = _cut(pattern.bias, row, span)
        outputs.append(_rows(q, k, v, replace(pattern, mask=mask, causal=part.visibility == "causal", bias=bias)))
    return torch.cat(outputs, 2)


def _cut(table: Tensor | None, row: int, span: tuple[slice, slice]) -> Tensor | None:
    """The entries of a (B or 1, H or 1, Q or 1, K) table for one row and one segment."""
    if table is None:
        return None
    row = row if table.shape[0] > 1 else 0
    return table[row : row + 1, :, span[0] if table.shape[2] > 1 else slice(None), span[1]]


def _rows(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
    """Attention of separate rows; within a row only the pattern stands between tokens."""
    groups = query.shape[1] // key.shape[1]
    mask, causal, bias = pattern.mask, pattern.causal and query.shape[2] > 1, pattern.bias
    explicit = pattern.softcap is not None or pattern.sinks is not None
    if causal and (explicit or bias is not None):
        mask, causal = causal_mask(key.shape[2], key.device), False
    # Torch's fused kernels read shared key heads in place, but not under a mask.
    shared = mask is None and bias is None and not explicit and key.shape[-1] == value.shape[-1] <= 256
    if groups > 1 and not shared:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if explicit:
        return _explicit(query, key, value, mask, pattern)
    if bias is not None:
        bias = bias.to(query.dtype)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        mask = bias
    return F.scaled_dot_product_attention(
        query, key, value, mask, pattern.dropout, causal, scale=pattern.scale, enable_gqa=groups > 1 and shared
    )


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, pattern: Pattern) -> Tensor:
    """Attention by its formula, for what torch's fused kernels do not offer: soft-capped logits and sinks."""
    logits = torch.matmul(query, key.transpose(-1, -2)) * pattern.scale
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if pattern.softcap is not None:
        logits = pattern.softcap * torch.tanh(logits / pattern.softcap)
    if pattern.bias is not None:
        logits = logits + pattern.bias
    if mask is not None:
        # The lowest value, not -inf, which would make the softmax of a query that sees nothing NaN.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if pattern.sinks is not None:
        sinks = pattern.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[2]]
    if mask is not None and mask.dtype == torch.bool:
        weights = weights.masked_fill(~mask, 0)
    return torch.matmul(F.dropout(weights, pattern.dropout).to(value.dtype), value)


def _visibilities(segments: Segments) -> set[Visibility]:
    return {part.visibility for parts in segments for part in parts} - {"nothing"}


def takes_varlen(query: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> bool:
    """Whether torch's varlen kernel does this call: packed rows in half precision on CUDA, and nothing but scaled logits."""
    return (
        is_divided(segments)
        and _visibilities(segments) in ({"all"}, {"causal"})
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and pattern.dropout == 0
        and pattern.softcap is None
        and pattern.sinks is None
        and pattern.bias is None
        and _varlen_kernel() is not None
    )


@functools.cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """Torch's attention over packed rows, where it has one that takes causal and grouped-query calls (since torch 2.12)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # absent before torch 2.10, and slow to import
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, *, causal: bool) -> Tensor:
    parts = [part for row in segments for part in row]
    queries, keys = [part.queries for part in parts], [part.keys for part in parts]
    ends_q, ends_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device) for lengths in (queries, keys)
    )
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    kernel = _varlen_kernel()
    assert kernel is not None
    output = kernel(
        *(flat_q, flat_k, flat_v, ends_q, ends_k, max(queries), max(keys)),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] > key.shape[1],
    )
    assert isinstance(output, Tensor)  # a tuple only if asked for more
    return output.view(query.shape[0], query.shape[2], *output.shape[1:]).transpose(1, 2)
