"""Plain-torch oracles: slow, obvious, in float64. Every fast path is tested against these."""

from __future__ import annotations

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
        cu_seqlens_q, cu_seqlens_k: segment boundaries 0 = c_0 <= ... <= c_n, the same in every row; a query sees only
            the keys of its own segment. Queries after c_n see nothing. `cu_seqlens_k` defaults to `cu_seqlens_q`.
        window: with `causal`, only the last `window` keys up to the diagonal; without, those less than `window` away.
        scale: defaults to D ** -0.5.
        softcap: logits are squashed into (-softcap, softcap).
        sinks: (H,).
        bias: broadcastable to (B, H, Q, K).
        keep, dropout: bool (B, H, Q, K); weights that are not kept become 0, the others are divided by 1 - dropout.
        clip_norms: (G,); value rows of a key/value head are scaled down to at most this norm, v min(1, C / |v|).
        noise: (B, H, Q, E), added to every query of a segment, also to one that sees nothing.

    Returns:
        (B, H, Q, E) float64.

    Raises:
        ValueError: heads that do not divide.
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
    for b in range(batch):
        for h in range(heads):
            for i in range(n_queries):
                keys: list[int] = []
                real = lengths is None or n_queries != n_keys or i < lengths[b]
                for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
                    if not q0 <= i < q1:
                        continue
                    diagonal = i - q0 + k0 + (k1 - k0) - (q1 - q0)
                    keys = list(range(k0, min(k1, diagonal + 1) if causal else k1))
                    if window is not None:
                        keys = [j for j in keys if abs(diagonal - j) < window]
                if lengths is not None:
                    keys = [j for j in keys if real and j < lengths[b]]
                if mask is not None:
                    keys = [j for j in keys if bool(mask[b, h, i, j])]
                added = query.new_zeros(value.shape[-1])
                if noise is not None and real and i < ends_q[-1]:
                    added = noise[b, h, i].double()
                if not keys:
                    rows.append(added)
                    continue
                g = h // (heads // kv_heads)
                logits = key[b, g, keys] @ query[b, h, i] * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if bias is not None:
                    logits = logits + bias[b, h, i, keys]
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h].double().reshape(1)])
                if bool((logits == -torch.inf).all()):
                    rows.append(added)
                    continue
                weights = torch.softmax(logits, dim=0)[: len(keys)]
                if keep is not None:
                    weights = torch.where(keep[b, h, i, keys], weights / (1 - dropout), 0.0)
                values = value[b, g, keys]
                if clip_norms is not None:
                    norms, limit = values.norm(dim=1, keepdim=True), clip_norms[g].double()
                    over = norms > limit  # the quotient only where it is taken: elsewhere the norm may be 0
                    values = torch.where(over, values * limit / torch.where(over, norms, 1.0), values)
                rows.append(weights @ values + added)
    return torch.stack(rows).reshape(batch, heads, n_queries, value.shape[-1])
