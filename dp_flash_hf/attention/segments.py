"""Which tokens of a row form one segment: what a mask, boundaries and positions say about it, found out once for all layers."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from dp_flash_hf.attention.pattern import Segment, Segments, Sight, causal_mask
from dp_flash_hf.errors import UnsupportedError, invalid


def is_packed(position_ids: Tensor | None, attention_mask: Tensor | None = None) -> bool:
    """Whether `position_ids` (B, S) say that a row holds several units, which `attention_mask` (B, S) does not keep apart.

    Where the token before is padding, a position that starts again is just that; a 4-D mask says everything.
    """
    if position_ids is None or position_ids.ndim != 2 or (attention_mask is not None and attention_mask.ndim != 2):
        return False
    restarts = _restarts(position_ids)
    if attention_mask is not None and attention_mask.shape[1] == position_ids.shape[1]:
        restarts = restarts & attention_mask[:, :-1].to(torch.bool)
    return bool(restarts.any())


@dataclass(frozen=True)
class Layout:
    """What a bool mask (B, H, Q, K) implies; B and H may be 1. Holds no view of the mask, which it must not keep alive.

    In traced code `unseen` and `blind` are there in any case, and `segments` and `reach` say nothing.
    """

    unseen: Tensor | None  # (B, 1, K, 1), True at keys no query sees; None if there are none
    blind: Tensor | None  # (B, 1, Q, 1), True at queries that see no key; None if there are none
    segments: Segments | None  # None if a row is not made of blocks of queries and the keys they see
    reach: int  # how far behind itself a query sees at most; for Q == K


def layout_of_mask(mask: Tensor, n_queries: int) -> Layout:
    """What a mask says. n_queries: Q, also where the mask is the same for all of them."""
    sight = mask.any(1)
    seen, sees = sight.any(1), sight.any(2)
    unseen = None if bool(seen.all()) else ~seen[:, None, :, None]
    blind = None if bool(sees.all()) else ~sees[:, None, :, None]
    constant = bool((mask == sight[:, None, :1]).all())
    if sight.shape[1] != sight.shape[2]:
        return Layout(unseen, blind, _segments_of_keys(seen, n_queries) if constant else None, 0)

    size = sight.shape[1]
    place = torch.arange(size, device=mask.device).expand_as(sees)
    bits = sight.to(torch.uint8)
    first = torch.where(sees, bits.argmax(-1), place)
    reach = int((place - first).max())
    if constant:
        return Layout(unseen, blind, _segments_of_keys(seen, size), reach)
    last = torch.where(sees, size - 1 - bits.flip(-1).argmax(-1), place)
    # A block starts where nobody from here on looks back across, and nobody before looks ahead across.
    looks_back = first.flip(-1).cummin(-1).values.flip(-1)
    looks_ahead = last.cummax(-1).values
    starts = looks_back >= place
    starts[:, 1:] &= looks_ahead[:, :-1] < place[:, 1:]
    # What a mask without holes would be, block by block, and whether a query's sight is that.
    block = starts.cumsum(1)
    behind = place[:, :, None] - place[:, None, :]
    full = block[:, :, None] == block[:, None, :]
    sights = [full, full & (behind >= 0), full & (behind >= 0) & (behind <= reach)]
    agrees = [(mask == one[:, None]).all(3).all(1) for one in sights]

    rows = []
    for is_start, can_see, *agree in torch.stack([starts, sees, *agrees], 1).tolist():
        edges = [i for i, start in enumerate(is_start) if start and (can_see[i] or i == 0 or can_see[i - 1])] + [size]
        rows.append(tuple(_block(a, b, can_see, agree, reach + 1) for a, b in pairwise(edges)))
    return Layout(unseen, blind, tuple(rows), reach)


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


def segments_of_ends(
    ends_q: list[int], ends_k: list[int], query: Tensor, key: Tensor, causal: bool, masked: bool, blocks: Segments | None
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
    sight: Sight = "mask" if masked else "causal" if causal else "all"
    return (tuple(Segment(q, k, sight) for q, k in lengths),)


def _restarts(position_ids: Tensor) -> Tensor:
    """(B, S - 1) bool: whether token i + 1 begins a segment. A repeated position may be an image's, unless it is the first."""
    step = position_ids.diff(dim=-1)
    return (step < 0) | ((step == 0) & (position_ids[:, 1:] <= position_ids[:, :1]))


def lengths_between_restarts(position_ids: Tensor) -> list[list[int]] | None:
    """Lengths of the segments of each row; None where no position restarts."""
    restarts = _restarts(position_ids)
    if not bool(restarts.any()):
        return None
    size = position_ids.shape[-1]
    edges = ([0, *(i + 1 for i, restart in enumerate(row) if restart), size] for row in restarts.tolist())
    return [[b - a for a, b in pairwise(row)] for row in edges]


def crosses_restarts(mask: Tensor, position_ids: Tensor) -> Tensor:
    """Whether a segment's first token sees the token before it: the mask was made without looking at `position_ids`."""
    sees_previous = mask.diagonal(-1, 2, 3)
    if mask.dtype != torch.bool:
        sees_previous = sees_previous > torch.finfo(mask.dtype).min / 2
    return (sees_previous.any(1) & _restarts(position_ids)).any()


def without_reading(
    mask: Tensor | None, position_ids: Tensor | None, query: Tensor, *, causal: bool, made: bool
) -> tuple[Tensor | None, Layout]:
    """For code that a compiler traces, in which nothing can be done segment by segment: the mask that says it all.

    Numbers are those of segments, but a NaN is stopped between rows only.

    mask: bool, or None. position_ids: (B or 1, Q) where a restart separates segments, else None. query: (B, H, Q, D).
    made: whether the caller was given no mask, so that restarts are certainly not in this one.
    """
    rows, _, size, _ = query.shape
    if position_ids is not None and position_ids.shape in ((1, size), (rows, size)):
        segment = F.pad(_restarts(position_ids).long().cumsum(-1), (1, 0))
        same = (segment[:, :, None] == segment[:, None, :])[:, None]
        if mask is None:
            mask = same & causal_mask(size, query.device) if causal else same
        else:
            mask = mask & (same if made else same | ~crosses_restarts(mask, position_ids))
    if mask is None or size == 1:
        return mask, Layout(None, None, None, 0)
    sight = mask.any(1)
    return mask, Layout(~sight.any(1)[:, None, :, None], ~sight.any(2)[:, None, :, None], None, 0)


def to_list(tensor: Tensor) -> list[int]:
    """Boundaries as Python's numbers."""
    ends: list[int] = tensor.tolist()
    return ends


_T = TypeVar("_T")
_KNOWN: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()


def once(tensor: Tensor, work: Callable[..., _T], *args: Any) -> _T:
    """`work(tensor, *args)`, computed once while the tensor lives unchanged: all layers of a forward are given the same one."""
    if tensor.is_inference():  # has no version to notice a change by
        return work(tensor, *args)
    known = _KNOWN.setdefault(tensor, {})
    if (work, args) not in known or known[work, args][0] != tensor._version:
        known[work, args] = (tensor._version, work(tensor, *args))
    result: _T = known[work, args][1]
    return result
