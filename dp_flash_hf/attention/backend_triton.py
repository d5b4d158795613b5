"""Attention computed by this library's Triton kernels: which calls they take, and the table of segments they are given."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from dp_flash_hf.attention.pattern import Pattern, Segment, Segments
from dp_flash_hf.attention.release import finite
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels.attention import flash_attention
from dp_flash_hf.kernels.numerics import has_triton
from dp_flash_hf.kernels.types import Release, SegmentTable


def attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern, release: Release | None
) -> Tensor:
    """(B, H, Q, E) in the dtype of the values; with a release, its noise included.

    Raises UnsupportedError for what the kernels lack. Random numbers for dropout come from torch's generator.
    """
    dtype = value.dtype
    if release is not None and release.exact:
        query, key, value = finite(query), finite(key), finite(value)
    lacking = lacks(query, value, segments, pattern)
    if lacking is not None:
        raise UnsupportedError(f'the "triton" implementation of attention does not take {lacking}; use "sdpa"')
    causal, window = pattern.causal, None
    if segments is None:
        table = SegmentTable.whole(len(query), query.shape[2], key.shape[2], query.device)
    else:
        table = _table(segments, query.device)
        parts = _long_parts(segments)
        causal = any(part.visibility != "all" for part in parts)
        window = max((part.window for part in parts if part.window is not None), default=None)
    output = flash_attention(
        *(query, key, value),
        segments=table,
        causal=causal,
        window=window,
        scale=pattern.scale,
        softcap=pattern.softcap,
        sinks=pattern.sinks,
        dropout=pattern.dropout,
        # From torch's generator, so that gradient checkpointing, which sets it back, drops the same weights again.
        dropout_key=tuple(torch.randint(2**32, (2,)).tolist()) if pattern.dropout else None,
        # Weights are rounded to the values' dtype, by at most eps / 2, before the two are multiplied, and sums over tiles of
        # keys are rounded to float32: with norms so much smaller, C still holds.
        release=release and release._replace(clip_norms=release.clip_norms / (1 + max(torch.finfo(value.dtype).eps, 2**-12))),
    )
    return output.to(dtype)


def lacks(query: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> str | None:
    """What the Triton kernels cannot do of this call, in words; None if they take it."""
    interpreted = not query.is_cuda and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
    if not interpreted and not (query.is_cuda and has_triton(query.device)):
        return "this device (it needs Triton and an NVIDIA GPU)"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or max(query.shape[-1], value.shape[-1]) > 256:
        return f"{query.dtype} with heads of {query.shape[-1]} and {value.shape[-1]} features"
    if pattern.bias is not None or (pattern.mask is not None and pattern.mask.dtype != torch.bool):
        return "a bias or mask added to the logits"
    if pattern.sinks is not None and type(pattern.sinks) not in (Tensor, nn.Parameter):
        return "trained sinks while their per-unit gradients are recorded"  # which happens in torch functions
    if segments is None:
        return None if pattern.mask is None else "such a mask"
    parts = _long_parts(segments)
    windows = {part.window for part in parts if part.window is not None}
    # Under one window, a segment that is no longer than it is just causal.
    fits = all(part.visibility == "all" for part in parts) or (
        len(windows) <= 1
        and all(part.visibility == "causal" or part.window is not None for part in parts)
        and all(part.queries <= window for part in parts if part.window is None for window in windows)
    )
    return None if fits else "such a mask"


def _long_parts(segments: Segments) -> list[Segment]:
    """Segments in which it matters what a query sees: for one query and one key, all is also up to the diagonal."""
    return [
        part for parts in segments for part in parts if part.visibility != "nothing" and (part.queries > 1 or part.keys > 1)
    ]


@functools.lru_cache(maxsize=64)  # all layers of a forward ask for the same one
def _table(segments: Segments, device: torch.device) -> SegmentTable:
    rows = []
    for number, parts in enumerate(segments):
        q0 = k0 = 0
        for part in parts:
            if part.visibility != "nothing":
                rows.append((number, q0, part.queries, k0, part.keys))
            q0, k0 = q0 + part.queries, k0 + part.keys
    row, q_start, queries, k_start, keys = torch.tensor(rows, dtype=torch.int32).view(-1, 5).to(device).T.contiguous()
    most_queries, most_keys = (max((span[which] for span in rows), default=0) for which in (2, 4))
    return SegmentTable(row, q_start, queries, k_start, keys, most_queries, most_keys)
