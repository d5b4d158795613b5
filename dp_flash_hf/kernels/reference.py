"""Attention in plain torch, slow, obvious and in float64: what the fast kernels are tested against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dp_flash_hf.errors import invalid


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    cu_seqlens_q: Sequence[int] | None = None,
    cu_seqlens_k: Sequence[int] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    clip_norms: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Exact attention, one query at a time over the keys it may see; nothing else is read. Differentiable.

    It is the specification of `kernels.attention.flash_attention`, and takes masks, biases and noise as tensors besides.

    For query i with visible keys V(i): s_j = scale * q_i . k_j, then softcap * tanh(s_j / softcap), then + bias_ij, and
    out_i = sum_V e^{s_j} v_j / (e^{sink} + sum_V e^{s_j}). A query that sees nothing, or only logits of minus infinity, gives
    zero. Soft-cap as in Gemma 2 (arXiv:2408.00118), sinks as in GPT-OSS (one more logit, without a value).

    Args:
        query: (B, H, Q, D), any floating dtype.
        key: (B, G, K, D); H is a multiple of G, and query head h reads key head h // (H // G).
        value: (B, G, K, E).
        causal: query i of a segment sees keys j <= i + n_k - n_q of that segment (the last query sees the last key).
        mask: bool, broadcastable to (B, H, Q, K); True where a query may see a key, on top of everything else.
        lengths: per row, how many leading keys are real; the queries from there on see nothing when Q == K.
        cu_seqlens_q: Segment boundaries 0 = c_0 <= ... <= c_n, the same in every row; a query sees only the keys of its own
            segment, and after c_n none.
        cu_seqlens_k: Likewise for keys; `cu_seqlens_q` by default.
        window: with `causal`, only the last `window` keys up to the diagonal; without, those less than `window` away.
        scale: defaults to D ** -0.5.
        softcap: logits are squashed into (-softcap, softcap).
        sinks: (H,).
        bias: broadcastable to (B, H, Q, K).
        keep: bool (B, H, Q, K): weights that are not kept become 0, the others are divided by 1 - dropout.
        dropout: The probability that `keep` was drawn with.
        clip_norms: (G,); value rows of a key/value head are scaled down to at most this norm, ``v min(1, C / |v|)``.
        noise: (B, H, Q, E), added to every query of a segment, also to one that sees nothing.

    Returns:
        (B, H, Q, E) float64.

    Raises:
        ValueError: H is not a multiple of G.
    """
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    if heads % kv_heads:
        raise invalid("key", expected=f"a number of heads dividing {heads}", actual=kv_heads, remedy="check the head layout")
    scale = dim**-0.5 if scale is None else scale
    query, key, value = query.double(), key.double(), value.double()
    shape = (batch, heads, n_queries, n_keys)
    mask = None if mask is None else mask.expand(shape)
    bias = None if bias is None else bias.double().expand(shape)
    ends_q = list(cu_seqlens_q) if cu_seqlens_q is not None else [0, n_queries]
    ends_k = list(cu_seqlens_k) if cu_seqlens_k is not None else list(cu_seqlens_q) if cu_seqlens_q is not None else [0, n_keys]

    rows = []
    for b, h, i in itertools.product(range(batch), range(heads), range(n_queries)):
        g = h // (heads // kv_heads)
        real = lengths is None or n_queries != n_keys or i < lengths[b]
        keys = _keys_of_segment(i, ends_q, ends_k, causal, window)
        if lengths is not None:
            keys = [j for j in keys if real and j < lengths[b]]
        if mask is not None:
            keys = [j for j in keys if bool(mask[b, h, i, j])]
        out = query.new_zeros(value.shape[-1])
        if noise is not None and real and i < ends_q[-1]:
            out = noise[b, h, i].double()
        weights = _weights(
            key[b, g, keys] @ query[b, h, i] * scale,
            softcap,
            None if bias is None else bias[b, h, i, keys],
            None if sinks is None else sinks[h].double(),
        )
        if weights is not None:
            if keep is not None:
                weights = torch.where(keep[b, h, i, keys], weights / (1 - dropout), 0.0)
            values = value[b, g, keys]
            out = weights @ (values if clip_norms is None else _clipped(values, clip_norms[g].double())) + out
        rows.append(out)
    return torch.stack(rows).reshape(batch, heads, n_queries, value.shape[-1])


def _keys_of_segment(i: int, ends_q: list[int], ends_k: list[int], causal: bool, window: int | None) -> list[int]:
    """The keys that query i sees, as far as segments, diagonal and window say."""
    keys: list[int] = []
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        if q0 <= i < q1:
            diagonal = i - q0 + k0 + (k1 - k0) - (q1 - q0)
            keys = list(range(k0, min(k1, diagonal + 1) if causal else k1))
            if window is not None:
                keys = [j for j in keys if abs(diagonal - j) < window]
    return keys


def _weights(logits: Tensor, softcap: float | None, bias: Tensor | None, sink: Tensor | None) -> Tensor | None:
    """Softmax weights of the keys; None without keys, or if all logits are minus infinity."""
    n_keys = len(logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if sink is not None:
        logits = torch.cat([logits, sink.reshape(1)])
    if n_keys == 0 or bool((logits == -torch.inf).all()):
        return None
    return torch.softmax(logits, dim=0)[:n_keys]


def _clipped(values: Tensor, limit: Tensor) -> Tensor:
    """Rows scaled down to at most this norm."""
    norms = values.norm(dim=1, keepdim=True)
    over = norms > limit  # the quotient only where it is taken: otherwise the norm may be 0
    return torch.where(over, values * limit / torch.where(over, norms, 1.0), values)
