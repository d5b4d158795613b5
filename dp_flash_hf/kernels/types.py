"""What callers hand to the kernels beside tensors: segments of a batch, a pattern of attention, a mechanism, a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentTable(NamedTuple):
    """Which queries see which keys: those of a segment see keys of that segment, and nothing else.

    A text of a padded batch is one segment, and so is each of several texts packed into one row. Queries outside all segments
    give zero, whatever they hold, and keys outside all segments are never read, so that padding may hold NaN.

    Segments of one row must overlap neither in queries nor in keys; this is not checked, as the table may be on a GPU.

    Args:
        row: int32 (n,), the row of the batch that each of the n segments is in; as the other tensors, on the device of the
            attention.
        q_start: int32 (n,), the first query of the segment.
        q_length: int32 (n,), its number of queries, 0 allowed.
        k_start: int32 (n,), its first key.
        k_length: int32 (n,), its number of keys, 0 allowed: its queries then give zero.
        max_queries: At least the largest `q_length`; kept beside the tensors so that a launch need not wait for the GPU.
        max_keys: At least the largest `k_length`.
        everything: Whether every query and every key lies in a segment, so that nothing has to be cleared first.
    """

    row: Tensor
    q_start: Tensor
    q_length: Tensor
    k_start: Tensor
    k_length: Tensor
    max_queries: int
    max_keys: int
    everything: bool = False

    def contiguous(self) -> SegmentTable:
        """The same with contiguous tensors, as the kernels read them."""
        row, q_start, q_length, k_start, k_length = (x.contiguous() for x in self[:5])
        return SegmentTable(row, q_start, q_length, k_start, k_length, *self[5:])

    @classmethod
    def whole(cls, batch: int, n_queries: int, n_keys: int, device: torch.device | str) -> SegmentTable:
        """Every row of the batch is one segment, without padding.

        Example:
            >>> SegmentTable.whole(2, 5, 5, "cpu").q_length
            tensor([5, 5], dtype=torch.int32)
        """
        row = torch.arange(batch, dtype=torch.int32, device=device)
        zero = torch.zeros_like(row)
        return cls(row, zero, zero + n_queries, zero, zero + n_keys, n_queries, n_keys, everything=True)

    @classmethod
    def from_lengths(
        cls, q_lengths: Tensor, k_lengths: Tensor | None = None, *, max_queries: int, max_keys: int | None = None
    ) -> SegmentTable:
        """Every row of the batch is one segment, padded at its end.

        Example:
            >>> table = SegmentTable.from_lengths(torch.tensor([3, 5]), max_queries=5)
            >>> table.q_start, table.k_length, table.max_keys
            (tensor([0, 0], dtype=torch.int32), tensor([3, 5], dtype=torch.int32), 5)

        Args:
            q_lengths: Whole numbers (B,): how many queries of each row are real, those at its beginning.
            k_lengths: Likewise for keys; `q_lengths` by default.
            max_queries: At least the largest of `q_lengths`.
            max_keys: At least the largest of `k_lengths`; `max_queries` by default.
        """
        q_length = q_lengths.to(torch.int32)
        k_length = q_length if k_lengths is None else k_lengths.to(torch.int32)
        row = torch.arange(len(q_length), dtype=torch.int32, device=q_length.device)
        zero = torch.zeros_like(row)
        return cls(row, zero, q_length, zero, k_length, max_queries, max_queries if max_keys is None else max_keys)

    @classmethod
    def from_cu_seqlens(cls, cu_q: Tensor, cu_k: Tensor, max_queries: int, max_keys: int) -> SegmentTable:
        """Segments packed one after another into row 0, given as flash-attn's variable-length interface has them.

        Example:
            >>> ends = torch.tensor([0, 3, 8])
            >>> table = SegmentTable.from_cu_seqlens(ends, ends, max_queries=5, max_keys=5)
            >>> table.q_start, table.q_length
            (tensor([0, 3], dtype=torch.int32), tensor([3, 5], dtype=torch.int32))

        Args:
            cu_q: Whole numbers (n + 1,), 0 = c_0 <= ... <= c_n: segment i has the queries c_i to c_(i+1) - 1.
            cu_k: Likewise for keys.
            max_queries: At least the most queries of a segment.
            max_keys: At least the most keys of a segment.
        """
        q, k = cu_q.to(torch.int32), cu_k.to(torch.int32)
        return cls(torch.zeros_like(q[:-1]), q[:-1], q.diff(), k[:-1], k.diff(), max_queries, max_keys)


class Release(NamedTuple):
    """The mechanism of privatised attention: value rows are clipped per head, and Gaussian noise is added to the output.

    What an output row holds besides noise has at most norm C (1 + eps), with eps that of the value's dtype (attention weights
    are rounded to it before they multiply the values), whatever the input: where it would be infinite or NaN it is 0. That
    bounds rows, not how far one key moves them: by C if it is NaN, and by C eps through the rounding of all other weights.
    `forward_privacy.sensitivity` turns this into a guarantee.

    Args:
        clip_norms: float32 (G,): value rows of a key/value head are scaled down to at most this norm C.
        noise_std: float32 (H,): standard deviation of the noise on the output of a query head; 0 is allowed.
        key: 32-bit words from a cryptographic source, used for one call only: 2 for Philox (fast), or 8 for ChaCha20, whose
            noise stays unpredictable to whoever knows some of it.
        exact: Whether the caller must not use half precision before the noise; a bound on what one token changes needs it. The
            kernels do not look at it.
    """

    clip_norms: Tensor
    noise_std: Tensor
    key: tuple[int, ...]
    exact: bool = False


class AttentionOptions(NamedTuple):
    """What all kernels of one call of attention have to know besides tensors; see `attention.flash_attention`.

    Args:
        causal: Whether a query sees only keys up to its own place.
        window: How far from its own place a query sees keys; None for no limit.
        scale: Factor of the logits.
        softcap: Limit of the logits' size; None for none.
        dropout: Probability of dropping an attention weight.
        dropout_key: Two 32-bit words; empty without dropout.
    """

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout: float
    dropout_key: tuple[int, ...]


class Head(NamedTuple):
    """An output layer: the logits of hidden states h are z = scale * (h W^T + b), then softcap * tanh(z / softcap).

    Args:
        weight: W (V, d), any floating dtype.
        bias: b (V,), or None.
        scale: As in Cohere and Granite models.
        softcap: As in Gemma 2 (arXiv 2408.00118); None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
