"""Who sees whom in a call of attention: what its mask, boundaries and positions say in sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dp_flash_hf.attention import masks
from dp_flash_hf.attention.pattern import Segment, Segments, Visibility
from dp_flash_hf.attention.segments import (
    MaskStructure,
    crosses_restarts,
    lengths_between_restarts,
    segments_of_boundaries,
    structure_of_mask,
)
from dp_flash_hf.attention.tensor_cache import once
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.units import restarts


class Arguments(NamedTuple):
    """The arguments of `dp_flash_attention` that say who sees whom; see there."""

    layer: str  # its class, for messages
    query: Tensor
    key: Tensor
    attention_mask: Tensor | None
    causal: bool
    sliding_window: int | None
    indices: Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    position_ids: Tensor | None

    @property
    def is_square(self) -> bool:
        """Whether queries and keys may be the same tokens, and are several."""
        return self.query.shape[2] == self.key.shape[2] > 1

    @property
    def positions(self) -> Tensor | None:
        """The positions, if there is one for each token."""
        rows, _, size, _ = self.query.shape
        fits = self.is_square and self.position_ids is not None and self.position_ids.shape in ((1, size), (rows, size))
        return self.position_ids if fits else None


class Seen(NamedTuple):
    """Who sees whom.

    Attributes:
        mask: 4-D, bool or floating; None where causality, or nothing, restricts what a query sees.
        structure: What the mask and the boundaries imply.
    """

    mask: Tensor | None
    structure: MaskStructure


def who_sees_whom(asked: Arguments, *, read: bool) -> Seen:
    """Who sees whom in a call.

    Args:
        asked: The arguments of the call.
        read: Whether masks, positions and boundaries have to be read: where noise depends on them, and in code that is not
            traced. Without, they are read only if the call cannot be understood otherwise, which breaks the compiled graph.

    Raises:
        UnsupportedError: Arguments that contradict each other, or whose meaning would depend on the other rows of the batch.
        ValueError: Boundaries that do not cover the call's tokens; a mask of other dimensions than 2 and 4.
    """
    mask = masks.mask_of_call(
        *(asked.layer, asked.query, asked.key, asked.attention_mask),
        causal=asked.causal,
        window=asked.sliding_window,
        picked=asked.indices,
    )
    if not read and _is_known(asked):
        return _without_reading(asked, mask)
    return Seen(mask, _read(asked, mask))


def _is_known(asked: Arguments) -> bool:
    """Whether nothing has to be read to be sure of who sees whom."""
    mask, window = asked.attention_mask, asked.sliding_window
    if asked.cu_seq_lens_q is not None:
        return False
    if mask is None:
        return True
    if mask.ndim == 2:
        return window is None
    made_here = mask.dtype == torch.bool and masks.is_made_here(mask)
    return made_here and mask.shape[2] == asked.query.shape[2] and window in (None, masks.window_of(mask))


def _without_reading(asked: Arguments, mask: Tensor | None) -> Seen:
    """For code that a compiler traces, in which nothing can be done segment by segment: the mask that says it all.

    Outputs are those of segments, but a NaN is stopped between rows only.
    """
    size, device = asked.query.shape[2], asked.query.device
    positions = asked.positions if asked.attention_mask is None or asked.causal else None
    if positions is not None:
        segment = F.pad(restarts(positions).long().cumsum(-1), (1, 0))
        same = (segment[:, :, None] == segment[:, None, :])[:, None]
        if mask is None:
            mask = same & masks.causal_mask(size, device) if asked.causal else same
        elif asked.attention_mask is None:  # so restarts are certainly not in this one
            mask = mask & same
        else:
            mask = mask & (same | ~crosses_restarts(mask, positions))
    if mask is None or size == 1:
        return Seen(mask, MaskStructure())
    visible = mask.any(1)
    return Seen(mask, MaskStructure(~visible.any(1)[:, None, :, None], ~visible.any(2)[:, None, :, None]))


def _read(asked: Arguments, mask: Tensor | None) -> MaskStructure:
    """What the entries of mask, boundaries and positions say. mask: made of the one that was given, or as it was."""
    rows, _, n_queries, _ = asked.query.shape
    given, window = asked.attention_mask, asked.sliding_window
    structure = MaskStructure()
    if mask is not None and mask.dtype == torch.bool and n_queries > 1:  # for one (decoding), copying the keys costs too much
        structure = once(mask, structure_of_mask, n_queries)
    ignored = given is not None and masks.window_of(given) != window
    if ignored and asked.causal and asked.is_square and window is not None and structure.reach >= window:
        raise UnsupportedError(
            f"{asked.layer} has a sliding window of {window} that its attention mask ignores, so whether it applies would "
            "depend on the other rows of the batch; set sliding_window to None or pass a mask that contains it"
        )
    segments = structure.segments and structure.segments * (rows // len(structure.segments))
    if asked.cu_seq_lens_q is not None:
        ends_q = once(asked.cu_seq_lens_q, _to_list)
        ends_k = ends_q if asked.cu_seq_lens_k is None else once(asked.cu_seq_lens_k, _to_list)
        segments = segments_of_boundaries(
            *(ends_q, ends_k, asked.query, asked.key), causal=asked.causal, masked=mask is not None, blocks=segments
        )
    else:
        segments = _segments_of_positions(asked, mask) or segments
    return MaskStructure(structure.unseen, structure.fully_masked, segments, structure.reach)


def _segments_of_positions(asked: Arguments, mask: Tensor | None) -> Segments | None:
    """The segments between positions that restart; None where none does, or where the mask keeps them apart anyway."""
    if asked.positions is None:
        return None
    lengths = once(asked.positions, lengths_between_restarts)
    if lengths is None:
        return None
    given = asked.attention_mask
    if given is not None:
        assert mask is not None
        if not asked.causal or not bool(crosses_restarts(mask, asked.positions)):
            return None
        if given.ndim == 4 and not masks.is_made_here(given):
            raise UnsupportedError(
                f"{asked.layer} was given position_ids that restart, as for several units in one row, and a mask under which "
                "these see each other; separate them in the mask, or give position_ids that do not restart"
            )
    visibility: Visibility = "mask" if mask is not None else "causal" if asked.causal else "all"
    return tuple(tuple(Segment(n, n, visibility) for n in row) for row in lengths) * (asked.query.shape[0] // len(lengths))


def _to_list(tensor: Tensor) -> list[int]:
    ends: list[int] = tensor.tolist()
    return ends
