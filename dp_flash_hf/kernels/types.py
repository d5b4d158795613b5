"""kernels.types."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentTable(NamedTuple):
    """Which queries see which keys: those of a segment see keys of that segment, and nothing else; the rest gives zero.

    All tensors are int32 (n,) on the device of the attention. Segments of one row overlap neither in queries nor in keys.
    """

    row: Tensor  # of the batch
    q_start: Tensor
    q_length: Tensor
    k_start: Tensor
    k_length: Tensor
    max_queries: int  # at least the largest q_length
    max_keys: int  # at least the largest k_length
    everything: bool = False  # whether every query and every key lies in a segment: nothing has to be cleared first

    def contiguous(self) -> SegmentTable:
        """The same with contiguous tensors, as the kernels read them."""
        row, q_start, q_length, k_start, k_length = (x.contiguous() for x in self[:5])
        return SegmentTable(row, q_start, q_length, k_start, k_length, *self[5:])

    @classmethod
    def whole(cls, batch: int, n_queries: int, n_keys: int, device: torch.device | str) -> SegmentTable:
        """Every row of the batch is one segment."""
        row = torch.arange(batch, dtype=torch.int32, device=device)
        zero = torch.zeros_like(row)
        return cls(row, zero, zero + n_queries, zero, zero + n_keys, n_queries, n_keys, everything=True)

    @classmethod
    def from_lengths(
        cls, q_lengths: Tensor, k_lengths: Tensor | None = None, *, max_queries: int, max_keys: int | None = None
    ) -> SegmentTable:
        """Rows padded at their end: q_lengths (B,) and k_lengths (B,), by default the same, count what is real."""
        q_length = q_lengths.to(torch.int32)
        k_length = q_length if k_lengths is None else k_lengths.to(torch.int32)
        row = torch.arange(len(q_length), dtype=torch.int32, device=q_length.device)
        zero = torch.zeros_like(row)
        return cls(row, zero, q_length, zero, k_length, max_queries, max_queries if max_keys is None else max_keys)

    @classmethod
    def from_cu_seqlens(cls, cu_q: Tensor, cu_k: Tensor, max_queries: int, max_keys: int) -> SegmentTable:
        """Segments packed one after another into row 0, with boundaries 0 = c_0 <= ... <= c_n, (n + 1,) each."""
        q, k = cu_q.to(torch.int32), cu_k.to(torch.int32)
        return cls(torch.zeros_like(q[:-1]), q[:-1], q.diff(), k[:-1], k.diff(), max_queries, max_keys)


class Release(NamedTuple):
    """What privatised attention does besides: value rows are clipped per head, and noise is added to the output.

    The result is a Gaussian mechanism. What an output row holds besides noise has at most norm C (1 + eps), with eps that of
    the value's dtype (attention weights are rounded to it before they meet the values), whatever the input: where it would be
    infinite or NaN it is 0. That bounds rows, not how far
    one key moves them: by C if it is NaN, and by C eps through the rounding of all other weights.
    """

    clip_norms: Tensor  # float32 (G,): value rows of a key/value head are scaled down to at most this norm
    noise_std: Tensor  # float32 (H,), per query head; 0 is allowed
    key: tuple[
        int, ...
    ]  # 32-bit words, never used before: 2 for Philox, 8 for ChaCha20 (unpredictable to whoever knows some noise)
    exact: bool = False  # for whoever calls the kernels: no half precision before the noise; a bound on one token needs it


class Pattern(NamedTuple):
    """What all kernels of one call have to know besides tensors."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout: float
    dropout_key: tuple[int, ...]  # empty without dropout


class Head(NamedTuple):
    """Logits of hidden states h: z = scale * (h W^T + b), then softcap * tanh(z / softcap) if there is a soft-cap.

    weight: (V, d). bias: (V,) or None. Soft-cap as in Gemma 2 (arXiv 2408.00118).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
