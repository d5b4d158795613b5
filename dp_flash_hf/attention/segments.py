"""Which tokens of a row form one segment: what a mask, boundaries and positions say about it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dp_flash_hf.attention.pattern import Segment, Segments, Visibility
from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.units import restarts


def is_packed(position_ids: Tensor | None, attention_mask: Tensor | None = None) -> bool:
    """Whether positions say that a row holds several texts, which the mask does not keep apart.

    For guards of families whose attention does not learn of packed rows. Where the token before is padding, a position that
    starts again is just that, and a 4-D mask says everything.

    >>> is_packed(torch.tensor([[0, 1, 2, 0, 1]])), is_packed(torch.tensor([[0, 1, 2, 3, 4]]))
    (True, False)
    >>> is_packed(torch.tensor([[1, 1, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1, 1]]))  # padding on the left
    False

    Args:
        position_ids: (B or 1, S) integers, or None.
        attention_mask: (B, S), zero at padding; or None, or a mask of other dimensions.
    """
    if position_ids is None or position_ids.ndim != 2 or (attention_mask is not None and attention_mask.ndim != 2):
        return False
    starts = restarts(position_ids)
    if attention_mask is not None and attention_mask.shape[1] == position_ids.shape[1]:
        starts = starts & attention_mask[:, :-1].to(torch.bool)
    return bool(starts.any())


@dataclass(frozen=True)
class MaskStructure:
    """What a bool mask (B, H, Q, K) implies; B and H may be 1. Holds no view of the mask, which it must not keep alive.

    In traced code `unseen` and `fully_masked` are there in any case, and `segments` and `reach` say nothing.
    """

    unseen: Tensor | None = None  # (B, 1, K, 1), True at keys no query sees; None if there are none
    fully_masked: Tensor | None = None  # (B, 1, Q, 1), True at queries that see no key; None if there are none
    segments: Segments | None = None  # None if a row is not made of blocks of queries and the keys they see
    reach: int = 0  # how far behind itself a query sees at most; for Q == K


def structure_of_mask(mask: Tensor, n_queries: int) -> MaskStructure:
    """What a mask says. n_queries: Q, also where the mask is the same for all of them."""
    visible = mask.any(1)
    seen, sees = visible.any(1), visible.any(2)
    unseen = None if bool(seen.all()) else ~seen[:, None, :, None]
    fully_masked = None if bool(sees.all()) else ~sees[:, None, :, None]
    constant = bool((mask == visible[:, None, :1]).all())
    if visible.shape[1] != visible.shape[2]:
        return MaskStructure(unseen, fully_masked, _segments_of_keys(seen, n_queries) if constant else None)

    size = visible.shape[1]
    place = torch.arange(size, device=mask.device).expand_as(sees)
    bits = visible.to(torch.uint8)
    first = torch.where(sees, bits.argmax(-1), place)
    reach = int((place - first).max())
    if constant:
        return MaskStructure(unseen, fully_masked, _segments_of_keys(seen, size), reach)
    last = torch.where(sees, size - 1 - bits.flip(-1).argmax(-1), place)
    # A block starts where no query from here on looks back across, and none before looks ahead across.
    looks_back = first.flip(-1).cummin(-1).values.flip(-1)
    looks_ahead = last.cummax(-1).values
    starts = looks_back >= place
    starts[:, 1:] &= looks_ahead[:, :-1] < place[:, 1:]
    # What a mask without holes would be, block by block, and whether what a query sees is that.
    block = starts.cumsum(1)
    behind = place[:, :, None] - place[:, None, :]
    full = block[:, :, None] == block[:, None, :]
    candidates = [full, full & (behind >= 0), full & (behind >= 0) & (behind <= reach)]
    agrees = [(mask == one[:, None]).all(3).all(1) for one in candidates]

    rows = []
    for is_start, can_see, *agree in torch.stack([starts, sees, *agrees], 1).tolist():
        edges = [i for i, start in enumerate(is_start) if start and (can_see[i] or i == 0 or can_see[i - 1])] + [size]
        rows.append(tuple(_block(a, b, can_see, agree, reach + 1) for a, b in pairwise(edges)))
    return MaskStructure(unseen, fully_masked, tuple(rows), reach)


def _block(start: int, stop: int, can_see: list[bool], agrees: list[list[bool]], window: int) -> Segment:
    """What the block [start, stop) of one row's mask says; agrees: whether each query sees all, all behind, or a window."""
    length = stop - start
    if not any(can_see[start:stop]):
        return Segment(length, length, "nothing")
    all_of_it, causal, windowed = (all(agree[start:stop]) for agree in agrees)
    if all_of_it or causal:
        return Segment(length, length, "all" if all_of_it else "causal")
    return Segment(length, length, "mask", window if windowed else None)


def _segments_of_keys(seen: Tensor, queries: int) -> Segments | None:
    """Rows whose queries all see the same keys (B, K), if these follow one another."""
    rows = []
    for row in seen.tolist():
        first, count = row.index(True) if any(row) else 0, sum(row)
        if not all(row[first : first + count]):
            return None
        after = len(row) - first - count
        rows.append((Segment(0, first, "nothing"), Segment(queries, count, "all"), Segment(0, after, "nothing")))
    return tuple(rows)


def segments_of_boundaries(
    ends_q: list[int], ends_k: list[int], query: Tensor, key: Tensor, *, causal: bool, masked: bool, blocks: Segments | None
) -> Segments:
    """The segments of one packed row between boundaries. blocks: what the mask says of the row.

    Raises ValueError for boundaries that do not cover query and key, UnsupportedError for causal segments of unequal lengths.
    """
    for name, ends, size in (("cu_seq_lens_q", ends_q, query.shape[2]), ("cu_seq_lens_k", ends_k, key.shape[2])):
        if not ends or ends[0] != 0 or ends[-1] != size or any(b < a for a, b in pairwise(ends)) or len(ends) != len(ends_q):
            raise invalid(
                name, expected=f"boundaries rising from 0 to {size}", actual=ends, remedy="give every token one segment"
            )
    if query.shape[0] != 1:
        raise invalid("cu_seq_lens_q", expected="a batch of one packed row", actual=query.shape[0], remedy="flatten the batch")
    lengths = [(q1 - q0, k1 - k0) for (q0, q1), (k0, k1) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    if causal and any(q != k for q, k in lengths):
        raise UnsupportedError("causal segments with different numbers of queries and keys; pass equal cu_seq_lens_q and _k")
    if blocks is not None and ends_q == ends_k:
        starts, start = {0}, 0
        for part in blocks[0]:
            start += part.queries
            starts.add(start)
        if starts.issuperset(ends_q):  # the mask is at least as fine, and already known block by block
            return blocks
    visibility: Visibility = "mask" if masked else "causal" if causal else "all"
    return (tuple(Segment(q, k, visibility) for q, k in lengths),)


def lengths_between_restarts(position_ids: Tensor) -> list[list[int]] | None:
    """Lengths of the segments of each row; None where no position restarts."""
    starts = restarts(position_ids)
    if not bool(starts.any()):
        return None
    size = position_ids.shape[-1]
    edges = ([0, *(i + 1 for i, start in enumerate(row) if start), size] for row in starts.tolist())
    return [[b - a for a, b in pairwise(row)] for row in edges]


def crosses_restarts(mask: Tensor, position_ids: Tensor) -> Tensor:
    """Whether a segment's first token sees the token before it: the mask was made without looking at `position_ids`."""
    sees_previous = mask.diagonal(-1, 2, 3)
    if mask.dtype != torch.bool:
        sees_previous = sees_previous > torch.finfo(mask.dtype).min / 2
    return (sees_previous.any(1) & restarts(position_ids)).any()
