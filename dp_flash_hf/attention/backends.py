"""How dp_flash attention is computed: by torch, by this library's Triton kernels, or by the slow oracle.

`compute` takes the implementation that `use` asked for, which runs or raises; without it, the one that `choose` picks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dp_flash_hf.attention.pattern import Pattern, Segment, Segments, Sight, causal_mask
from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.kernels import reference
from dp_flash_hf.kernels.attention import flash_attention
from dp_flash_hf.kernels.counter_noise import normals
from dp_flash_hf.kernels.numerics import has_triton
from dp_flash_hf.kernels.types import Release, SegmentTable

Implementation = Literal["sdpa", "triton", "reference"]


@contextlib.contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Within the context, dp_flash attention is computed by this implementation, which runs or raises UnsupportedError.

    `sdpa`: torch. `triton`: this library's kernels (`kernels.attention`), on CUDA devices. `reference`: the slow oracle.
    Without it, `choose` decides.
    """
    global _asked_for
    if implementation not in get_args(Implementation):
        raise invalid(
            "implementation",
            expected=f"one of {', '.join(get_args(Implementation))}",
            actual=implementation,
            remedy="choose one",
        )
    before, _asked_for = _asked_for, implementation
    try:
        yield
    finally:
        _asked_for = before


_asked_for: Implementation | None = None


def choose(
    query: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern, release: Release | None = None
) -> Implementation:
    """Who computes this call: whom `use` asked for; else torch, unless it would form all weights where the kernels need not.

    That is on CUDA devices with soft-capped logits, sinks, or a mask that `segments` say in fewer words; and a release, whose
    clipping and noise the kernels do on the way. Where a compiler traces, it is torch, whose operations it fuses. Which of the
    two is faster where torch's fused kernels take the call has not been measured yet.
    """
    if _asked_for is not None:
        return _asked_for
    forms_weights = any(x is not None for x in (pattern.softcap, pattern.sinks, pattern.mask, release))
    own_kernels = query.is_cuda and forms_weights and not torch.compiler.is_compiling()
    if own_kernels and not _varlen_does(query, value, segments, pattern):
        return "triton" if _triton_lacks(query, value, segments, pattern) is None else "sdpa"
    return "sdpa"


def compute(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern, release: Release | None = None
) -> Tensor:
    """Attention of query (B, H, Q, D) over key (B, G, K, D) and value (B, G, K, E), as `choose` says: (B, H, Q, E) like value.

    segments: what the rows consist of, where that is known; rows of several are computed one by one.
    release: clip the values and add noise, as privatised attention does.
    Raises UnsupportedError if the implementation asked for does not offer what the call needs.
    """
    chosen = choose(query, value, segments, pattern, release)
    if chosen == "triton":
        return _triton(query, key, value, segments, pattern, release)
    by_torch = _reference if chosen == "reference" else _sdpa
    if release is None:
        return by_torch(query, key, value, segments, pattern)
    return _released(by_torch, query, key, value, segments, pattern, release)


def _is_packed(segments: Segments | None) -> TypeGuard[Segments]:
    return segments is not None and any(sum(part.sight != "nothing" for part in parts) > 1 for parts in segments)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> Tensor:
    """(B, H, Q, E) by torch: one call for separate rows; for packed rows one per segment, or one varlen call on a GPU."""
    if not _is_packed(segments):
        return _rows(query, key, value, pattern)
    if _varlen_does(query, value, segments, pattern):
        return _varlen(query, key, value, segments, pattern.scale, causal=_sights(segments) == {"causal"})
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
        if part.sight == "nothing" or part.keys == 0:
            outputs.append(q.new_zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype))
            continue
        mask = _cut(pattern.mask, row, span) if part.sight == "mask" else None
        bias = _cut(pattern.bias, row, span)
        outputs.append(_rows(q, k, v, replace(pattern, mask=mask, causal=part.sight == "causal", bias=bias)))
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
    # Torch's fused kernels read shared key heads in place, but not together with a mask.
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
        # The lowest number, not -inf, which would make the softmax of a query that sees nothing NaN.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if pattern.sinks is not None:
        sinks = pattern.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[2]]
    if mask is not None and mask.dtype == torch.bool:
        weights = weights.masked_fill(~mask, 0)
    return torch.matmul(F.dropout(weights, pattern.dropout).to(value.dtype), value)


def _sights(segments: Segments) -> set[Sight]:
    return {part.sight for parts in segments for part in parts} - {"nothing"}


def _varlen_does(query: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> bool:
    """Whether torch's varlen kernel does this call: packed rows in half precision on CUDA, and nothing but scaled logits."""
    return (
        _is_packed(segments)
        and _sights(segments) in ({"all"}, {"causal"})
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


def _reference(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> Tensor:
    """The float64 oracle, one query at a time. Raises UnsupportedError with dropout, which has no one right answer."""
    if pattern.dropout:
        raise UnsupportedError('the "reference" implementation has no dropout; set the attention dropout to 0')
    bias, mask = pattern.bias, pattern.mask
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias + mask, None
    rows = []
    for b in range(query.shape[0]):
        parts = segments[b] if _is_packed(segments) else [Segment(query.shape[2], key.shape[2], "mask")]
        row = slice(b, b + 1)
        rows.append(
            reference.attention(
                *(query[row], key[row], value[row]),
                causal=mask is None and (pattern.causal or any(part.sight == "causal" for part in parts)),
                mask=mask if mask is None or len(mask) == 1 else mask[row],
                cu_seqlens_q=[0, *accumulate(part.queries for part in parts)],
                cu_seqlens_k=[0, *accumulate(part.keys for part in parts)],
                scale=pattern.scale,
                softcap=pattern.softcap,
                sinks=pattern.sinks,
                bias=bias if bias is None or len(bias) == 1 else bias[row],
            )
        )
    return torch.cat(rows).to(value.dtype)


def _released(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments | None,
    pattern: Pattern,
    release: Release,
) -> Tensor:
    """(B, H, Q, E) with noise. Every row before it is a convex combination of clipped values, or clipped itself.

    The latter where numbers added to the logits are not finite, and where matrix products round (TF32).
    """
    dtype = value.dtype
    query, key, value = finite(query), finite(key), finite(value)
    norms = release.clip_norms.to(value)[:, None, None]
    value = value * (norms / torch.linalg.vector_norm(value, dim=-1, keepdim=True).clamp(min=norms))
    if pattern.mask is not None and pattern.mask.is_floating_point():
        pattern = replace(pattern, mask=pattern.mask.to(query.dtype))
    with torch.autocast(query.device.type, enabled=False):
        output: Tensor = attend(query, key, value, segments, pattern).nan_to_num(0.0, 0.0, 0.0)
    norms = norms.repeat_interleave(query.shape[1] // key.shape[1], 0)
    output = output * (norms / torch.linalg.vector_norm(output, dim=-1, keepdim=True).clamp(min=norms))
    noise = normals(release.key, output.shape, output.device, secure=len(release.key) > 2)
    noised: Tensor = (output + release.noise_std[:, None, None] * noise).to(dtype)
    return noised


def finite(x: Tensor) -> Tensor:
    """`x` in float32 at least, with 0 for NaN and magnitudes of at most 1e15, so that no product or norm of it overflows."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.nan_to_num().clamp(-1e15, 1e15)


def _triton(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern, release: Release | None
) -> Tensor:
    """This library's kernels."""
    dtype = value.dtype
    if release is not None and release.exact:
        query, key, value = finite(query), finite(key), finite(value)
    lacking = _triton_lacks(query, value, segments, pattern)
    if lacking is not None:
        raise UnsupportedError(f'the "triton" implementation of attention does not take {lacking}; use "sdpa"')
    causal, window = pattern.causal, None
    if segments is None:
        table = SegmentTable.whole(len(query), query.shape[2], key.shape[2], query.device)
    else:
        table = _table(segments, query.device)
        parts = _long_parts(segments)
        causal = any(part.sight != "all" for part in parts)
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
        # Weights are rounded to the values' dtype, by at most eps / 2, before they meet them, and sums over tiles of keys are
        # rounded to float32: with norms so much smaller, C still holds.
        release=release and release._replace(clip_norms=release.clip_norms / (1 + max(torch.finfo(value.dtype).eps, 2**-12))),
    )
    return output.to(dtype)


def _triton_lacks(query: Tensor, value: Tensor, segments: Segments | None, pattern: Pattern) -> str | None:
    """What the Triton kernels cannot do of this call, in words."""
    interpreted = not query.is_cuda and os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
    if not interpreted and not (query.is_cuda and has_triton(query.device)):
        return "this device (it needs Triton and an NVIDIA GPU)"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or max(query.shape[-1], value.shape[-1]) > 256:
        return f"{query.dtype} with heads of {query.shape[-1]} and {value.shape[-1]} numbers"
    if pattern.bias is not None or (pattern.mask is not None and pattern.mask.dtype != torch.bool):
        return "numbers added to the logits"
    if pattern.sinks is not None and type(pattern.sinks) not in (Tensor, nn.Parameter):
        return "trained sinks while their per-unit gradients are recorded"  # which happens in torch functions
    if segments is None:
        return None if pattern.mask is None else "a mask of this form"
    parts = _long_parts(segments)
    windows = {part.window for part in parts if part.window is not None}
    # Under one window, a segment that is no longer than it is just causal.
    fits = all(part.sight == "all" for part in parts) or (
        len(windows) <= 1
        and all(part.sight == "causal" or part.window is not None for part in parts)
        and all(part.queries <= window for part in parts if part.window is None for window in windows)
    )
    return None if fits else "a mask of this form"


def _long_parts(segments: Segments) -> list[Segment]:
    """Segments in which it matters what a query sees: for one query and one key, all is also up to the diagonal."""
    return [part for parts in segments for part in parts if part.sight != "nothing" and (part.queries > 1 or part.keys > 1)]


@functools.lru_cache(maxsize=64)  # all layers of a forward ask for the same one
def _table(segments: Segments, device: torch.device) -> SegmentTable:
    rows = []
    for number, parts in enumerate(segments):
        q0 = k0 = 0
        for part in parts:
            if part.sight != "nothing":
                rows.append((number, q0, part.queries, k0, part.keys))
            q0, k0 = q0 + part.queries, k0 + part.keys
    row, q_start, queries, k_start, keys = torch.tensor(rows, dtype=torch.int32).view(-1, 5).to(device).T.contiguous()
    most_queries, most_keys = (max((span[which] for span in rows), default=0) for which in (2, 4))
    return SegmentTable(row, q_start, queries, k_start, keys, most_queries, most_keys)
