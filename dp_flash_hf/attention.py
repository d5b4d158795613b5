"""`attn_implementation="dp_flash"`: exact attention in which no unit can see another, forward or backward.

    import dp_flash_hf                                       # registers the name
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dp_flash")

Rows of a batch are separate by construction. Units packed into one row are computed segment by segment, so that not even
a NaN crosses: a mask alone does not stop it, because 0 * NaN = NaN in weights @ value and in every product of the backward.
Segments come from `cu_seq_lens_q/k`, else from the mask (a block-diagonal mask is cut into its blocks), else, where there is
no mask, from `position_ids` that restart. Padding (keys nobody sees, queries that see nothing) is zeroed for the same reason.

`dp_attention` is the same thing under a name without "flash": some models treat any name with that word as the flash-attn
package and refuse what this implementation can do (Llama 4's chunks beyond one chunk, HRM's prefix masks, ESM-C's chains).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.kernels import reference

NAMES = ("dp_flash", "dp_attention")

# Keyword arguments of transformers that change what attention computes, and that nothing below implements.
_UNHANDLED = ("block_indices", "sinks", "cache", "block_table", "head_mask")


class _Segment(NamedTuple):
    """Consecutive queries of one row and the only keys they may see."""

    queries: int
    keys: int
    sight: Literal["all", "causal", "mask", "nothing"]


Segments = list[list[_Segment]]  # per row, in order, covering it


def dp_flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with Transformers; see `AttentionInterface` for who calls it.

    Args:
        module: the calling layer; `module.is_causal` counts where `is_causal` is None.
        query: (B, H, Q, D).
        key: (B, G, K, D), heads not repeated: H is a multiple of G.
        value: (B, G, K, E).
        attention_mask: what `dp_flash_mask` returned: bool, broadcastable to (B, H, Q, K), True where a query may see a key;
            or a float mask of that shape, added to the logits; or (B, K), True at real keys. A 4-D mask says everything:
            `is_causal` and `sliding_window` are not applied on top of it. None: all keys, or those up to the diagonal.
        dropout: probability of dropping an attention weight; 0 outside training.
        scaling: factor on the logits; None means D ** -0.5.
        is_causal: None means `module.is_causal`.
        sliding_window: without a mask, a causal query sees the last `sliding_window` keys only.
        softcap: logits become softcap * tanh(logits / softcap) before the mask.
        s_aux: (H,), one logit per head without a value (attention sinks); trainable.
        position_bias: broadcastable to (B, H, Q, K), added to the scaled logits; trainable.
        indices: (B, Q, N) keys picked by a sparse-attention indexer; a query sees only these, and only if the mask agrees.
        cu_seq_lens_q: (n + 1,) boundaries of the segments packed into the one row of the batch, 0 first and Q last.
        cu_seq_lens_k: the same for keys; None means `cu_seq_lens_q`.
        max_length_q, max_length_k: longest segments; only saves reading them from the device.
        position_ids: (B or 1, Q); without mask and `cu_seq_lens_q`, a position not above the one before starts a segment.
        output_attentions: only False.
        kwargs: what other layers of the model need; nothing that changes attention.

    Returns:
        ((B, Q, H, E) in the dtype of `value`, None). Zero for queries that see nothing.

    Raises:
        UnsupportedError: an argument that changes the result is not implemented, or its meaning here would be ambiguous.
        ValueError: shapes or boundaries that contradict each other.
    """
    if not getattr(module, "_dp_flash_ran", False):
        module._dp_flash_ran = True  # type: ignore[assignment]  # read by _check_ran
    for name in _UNHANDLED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f'dp_flash attention does not implement {name}; use attn_implementation="eager"')
    if output_attentions:
        raise UnsupportedError('dp_flash attention forms no attention weights to return; use attn_implementation="eager"')
    n_queries, n_keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and n_queries > 1
    square = n_queries == n_keys > 1

    mask = attention_mask
    if mask is None and causal and not square:
        raise UnsupportedError(
            f"{type(module).__name__} asks for causal attention of {n_queries} queries over {n_keys} keys without a mask, which "
            "does not say whether the first or the last keys line up; pass a 4-D attention_mask"
        )
    if mask is not None and mask.ndim == 2:
        mask = _mask_of_padding(mask, causal=causal, self_attention=causal and square)
    elif mask is not None and mask.ndim != 4:
        raise invalid("attention_mask", expected="2 or 4 dimensions", actual=tuple(mask.shape), remedy="broadcast it to (B, H, Q, K)")
    if mask is None and sliding_window is not None and n_keys > sliding_window and n_queries > 1:
        if not causal:
            raise UnsupportedError("a sliding window that is not causal comes as a mask, or not at all; pass a 4-D attention_mask")
        mask = _causal_mask(n_keys, query.device, window=sliding_window)[None, None]
    if indices is not None:
        picked = torch.zeros(indices.shape[0], 1, n_queries, n_keys, dtype=torch.bool, device=query.device)
        picked.scatter_(-1, indices.long()[:, None], True)
        if mask is None and causal:
            mask = _causal_mask(n_keys, query.device)[None, None]
        mask = picked if mask is None else mask & picked

    layout = _once(mask, _layout_of_mask) if mask is not None and mask.dtype == torch.bool else _Layout(None, None, None, 0)
    if attention_mask is not None and causal and square and sliding_window is not None and layout.reach >= sliding_window:
        raise UnsupportedError(
            f"{type(module).__name__} has a sliding window of {sliding_window} that its attention mask ignores, so whether it "
            "applies would depend on the other rows of the batch; set sliding_window to None or pass a mask that contains it"
        )
    segments = layout.segments
    if cu_seq_lens_q is not None:
        ends = _once(cu_seq_lens_q, _to_list), _once(cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k, _to_list)
        segments = _segments_of_ends(*ends, query, key, causal, mask is not None, segments)
    elif mask is None and square and position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == n_queries:
        restarts = _once(position_ids, _lengths_between_restarts)
        if restarts is not None:
            sight: Literal["all", "causal"] = "causal" if causal else "all"
            segments = [[_Segment(n, n, sight) for n in row] for row in restarts] * (query.shape[0] // len(restarts))

    if layout.unseen is not None:
        key, value = key.masked_fill(layout.unseen, 0), value.masked_fill(layout.unseen, 0)
    if layout.blind is not None:
        query = query.masked_fill(layout.blind, 0)
    output = _IMPLEMENTATIONS[_implementation](
        *(query, key, value, segments),
        _Pattern(
            mask=mask,
            causal=causal and mask is None,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
            softcap=softcap,
            sinks=s_aux,
            bias=position_bias,
        ),
    )
    if layout.blind is not None:  # some backends average over all keys instead
        output = output.masked_fill(layout.blind, 0)
    return output.transpose(1, 2).contiguous(), None


def dp_flash_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function registered with Transformers: `sdpa_mask`, and padding tokens of a causal model see nothing.

    Returns None where causality (or full sight) says it all, else (B, 1, Q, K) bool, True where a query may see a key.
    Takes the arguments of `transformers.masking_utils.sdpa_mask`.
    """
    queries, keys, padding = kwargs.get("q_length"), kwargs.get("kv_length"), kwargs.get("attention_mask")
    if queries != keys and queries != 1:
        kwargs["allow_is_causal_skip"] = False  # without a mask it would not be known where the diagonal lies
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    # Only the causal mask builders leave this argument out; for the others the queries may be another sequence than the keys.
    causal = "allow_is_bidirectional_skip" not in kwargs
    if mask is not None and causal and padding is not None and queries == keys == padding.shape[-1]:
        mask = mask & padding[:, None, :, None].to(torch.bool)
    return mask


def register() -> None:
    """Make the names in `NAMES` known to Transformers; calling it again changes nothing.

    Registers the attention and the mask function, and teaches `PreTrainedModel` that the names need no flash-attn package
    and no replacement by a kernel from the Hub. All other names behave as before.

    Raises UnsupportedError if this version of Transformers chooses attention implementations in an unknown way.
    """
    for name in NAMES:
        AttentionInterface.register(name, dp_flash_attention)
        AttentionMaskInterface.register(name, dp_flash_mask)
    _wrap("_check_and_adjust_attn_implementation", ("self", "attn_implementation", "is_init_check"), _skip_flash_packages)
    _wrap("get_correct_attn_implementation", ("self", "requested_attention", "is_init_check"), _arm_check)
    _wrap("set_attn_implementation", ("self", "attn_implementation"), _raise_if_not_set)


@contextlib.contextmanager
def use(implementation: Literal["sdpa", "reference"]) -> Iterator[None]:
    """Within the context, dp_flash attention is computed by `sdpa` (torch; the default) or `reference` (the slow oracle)."""
    global _implementation
    if implementation not in _IMPLEMENTATIONS:
        raise invalid("implementation", expected=f"one of {', '.join(_IMPLEMENTATIONS)}", actual=implementation, remedy="choose one")
    before, _implementation = _implementation, implementation
    try:
        yield
    finally:
        _implementation = before


# --- what a call asks for -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pattern:
    """Which keys a query sees, and how its logits become weights; the same for every segment."""

    mask: Tensor | None  # 4-D; bool, or float to be added
    causal: bool  # up to the diagonal; only without a mask
    scale: float
    dropout: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class _Layout:
    """What a bool mask (B, H, Q, K) implies; B and H may be 1. Holds no view of the mask, which it must not keep alive."""

    unseen: Tensor | None  # (B, 1, K, 1), True at keys no query sees; None if there are none
    blind: Tensor | None  # (B, 1, Q, 1), True at queries that see no key; None if there are none
    segments: Segments | None  # None if no row holds two blocks
    reach: int  # how far behind itself a query sees at most; for Q == K


def _layout_of_mask(mask: Tensor) -> _Layout:
    sight = mask.any(1)
    seen, sees = sight.any(1), sight.any(2)
    unseen = None if bool(seen.all()) else ~seen[:, None, :, None]
    blind = None if bool(sees.all()) else ~sees[:, None, :, None]
    if sight.shape[1] != sight.shape[2] or sight.shape[1] == 1:
        return _Layout(unseen, blind, None, 0)

    size = sight.shape[1]
    place = torch.arange(size, device=mask.device).expand_as(sees)
    bits = sight.to(torch.uint8)
    first = torch.where(sees, bits.argmax(-1), place)
    last = torch.where(sees, size - 1 - bits.flip(-1).argmax(-1), place)
    # A block starts where nobody from here on looks back across, and nobody before looks ahead across.
    looks_back = first.flip(-1).cummin(-1).values.flip(-1)
    looks_ahead = last.cummax(-1).values
    starts = looks_back >= place
    starts[:, 1:] &= looks_ahead[:, :-1] < place[:, 1:]
    rows = []
    for row, (is_start, can_see) in enumerate(zip(starts.tolist(), sees.tolist(), strict=True)):
        edges = [i for i, start in enumerate(is_start) if start and (can_see[i] or i == 0 or can_see[i - 1])] + [size]
        rows.append([_Segment(b - a, b - a, _sight(mask[row], a, b) if can_see[a] else "nothing") for a, b in pairwise(edges)])
    packed = any(sum(part.sight != "nothing" for part in parts) > 1 for parts in rows)
    return _Layout(unseen, blind, rows if packed else None, int((place - first).max()))


def _sight(mask: Tensor, start: int, stop: int) -> Literal["all", "causal", "mask"]:
    """How the block [start, stop) of one row's mask (H, S, S) can be said without a mask."""
    block = mask[:, start:stop, start:stop]
    if bool(block.all()):
        return "all"
    return "causal" if bool((block == _causal_mask(stop - start, mask.device)).all()) else "mask"


def _segments_of_ends(
    ends_q: list[int], ends_k: list[int], query: Tensor, key: Tensor, causal: bool, masked: bool, blocks: Segments | None
) -> Segments:
    for name, ends, size in (("cu_seq_lens_q", ends_q, query.shape[2]), ("cu_seq_lens_k", ends_k, key.shape[2])):
        if not ends or ends[0] != 0 or ends[-1] != size or any(b < a for a, b in pairwise(ends)) or len(ends) != len(ends_q):
            raise invalid(name, expected=f"boundaries rising from 0 to {size}", actual=ends, remedy="give every token one segment")
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
    sight: Literal["all", "causal", "mask"] = "mask" if masked else "causal" if causal else "all"
    return [[_Segment(q, k, sight) for q, k in lengths]]


def _lengths_between_restarts(position_ids: Tensor) -> list[list[int]] | None:
    restarts = position_ids.diff(dim=-1) <= 0
    if not bool(restarts.any()):
        return None
    size = position_ids.shape[-1]
    edges = ([0, *(i + 1 for i, restart in enumerate(row) if restart), size] for row in restarts.tolist())
    return [[b - a for a, b in pairwise(row)] for row in edges]


def _mask_of_padding(padding: Tensor, *, causal: bool, self_attention: bool) -> Tensor:
    mask = padding.to(torch.bool)[:, None, None, :]
    if causal:
        mask = mask & _causal_mask(padding.shape[-1], padding.device)
    return mask & padding.to(torch.bool)[:, None, :, None] if self_attention else mask


def _causal_mask(size: int, device: torch.device, window: int | None = None) -> Tensor:
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _to_list(tensor: Tensor) -> list[int]:
    ends: list[int] = tensor.tolist()
    return ends


_T = TypeVar("_T")
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(tensor: Tensor, work: Callable[[Tensor], _T]) -> _T:
    """`work(tensor)`, computed once while the tensor lives unchanged: all layers of a forward are given the same one."""
    if tensor.is_inference():  # has no version to notice a change by
        return work(tensor)
    stamp = (work, tensor._version)
    known = _KNOWN.get(tensor)
    if known is None or known[0] != stamp:
        known = _KNOWN[tensor] = (stamp, work(tensor))
    result: _T = known[1]
    return result


# --- how it is computed ---------------------------------------------------------------------------------------------------


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, pattern: _Pattern) -> Tensor:
    """(B, H, Q, E) by torch: one call for separate rows, one per segment for packed rows (or one varlen call on GPU)."""
    if segments is None:
        return _rows(query, key, value, pattern)
    plain = {part.sight for parts in segments for part in parts} - {"nothing"}
    if _varlen_takes(query, key, value, pattern) and plain in ({"all"}, {"causal"}):
        return _varlen(query, key, value, segments, pattern.scale, causal=plain == {"causal"})
    # split and cat, not slices: their backward only copies, so that no gradient of one segment is added to another's.
    outputs = []
    for row, parts in enumerate(segments):
        queries, keys = [part.queries for part in parts], [part.keys for part in parts]
        q, k, v = query[row : row + 1].split(queries, 2), key[row : row + 1].split(keys, 2), value[row : row + 1].split(keys, 2)
        outputs.append(torch.cat([_part(*qkv, pattern_of) for *qkv, pattern_of in zip(q, k, v, _patterns(pattern, row, parts), strict=True)], 2))
    return torch.cat(outputs)


def _rows(query: Tensor, key: Tensor, value: Tensor, pattern: _Pattern) -> Tensor:
    """Attention of separate rows; the mask is the only thing between their tokens."""
    groups = query.shape[1] // key.shape[1]
    mask, causal = pattern.mask, pattern.causal
    explicit = pattern.softcap is not None or pattern.sinks is not None
    if causal and (explicit or pattern.bias is not None):
        mask, causal = _causal_mask(key.shape[2], key.device), False
    # The fused kernels read shared key heads in place, but not together with a mask.
    shared = mask is None and pattern.bias is None and not explicit and key.shape[-1] == value.shape[-1] <= 256
    if groups > 1 and not shared:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if explicit:
        return _explicit(query, key, value, mask, pattern)
    if pattern.bias is not None:
        bias = pattern.bias.to(query.dtype)
        if mask is None:
            mask = bias
        else:
            mask = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    return F.scaled_dot_product_attention(
        *(query, key, value),
        attn_mask=mask,
        dropout_p=pattern.dropout,
        is_causal=causal,
        scale=pattern.scale,
        enable_gqa=groups > 1 and shared,
    )
