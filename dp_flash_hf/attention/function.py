"""`attn_implementation="dp_flash"`: exact attention in which no unit can see another, forward or backward.

    import dp_flash_hf                                       # registers the name
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dp_flash")

Rows of a batch are separate by construction. Units packed into one row are computed segment by segment (by masks in code that
`torch.compile` traces), so that not even a NaN crosses: a mask alone does not stop it, because 0 * NaN = NaN in weights @
value and in every product of the backward. Segments come from `cu_seq_lens_q/k`, from the mask (a block-diagonal mask is cut
into its blocks) and from `position_ids` that restart (some models, GPT-OSS among them, do not tell their mask about these).
Padding (keys nobody sees, queries that see nothing) is zeroed for the same reason.

`dp_attention` is the same thing under a name without "flash": some models treat any name with that word as the flash-attn
package and refuse what this implementation can do (Llama 4's chunks beyond one chunk, HRM's prefix masks, ESM-C's chains).

A module on which `privatize` put a site releases a noised output of clipped values instead; see `Site`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dp_flash_hf.attention.backends import compute
from dp_flash_hf.attention.masks import MADE_HERE, _is_known, _mask_of_padding
from dp_flash_hf.attention.pattern import Pattern, Segment, Segments, Sight, causal_mask
from dp_flash_hf.attention.segments import (
    Layout,
    crosses_restarts,
    layout_of_mask,
    lengths_between_restarts,
    once,
    segments_of_ends,
    to_list,
    without_reading,
)
from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.kernels.types import Release

NAMES = ("dp_flash", "dp_attention")

# Keyword arguments of transformers that change what attention computes, and that nothing below implements.
_UNHANDLED = ("block_indices", "sinks", "cache", "block_table", "head_mask")


class Call(NamedTuple):
    """What a privatised module is about to compute."""

    query: Tensor  # (B, H, Q, D)
    key: Tensor  # (B, G, K, D)
    value: Tensor  # (B, G, K, E)
    segments: Segments | None  # per row of the batch
    blind: Tensor | None  # (B or 1, 1, Q, 1), True at queries that see no key
    pattern: Pattern
    picked: bool  # whether an indexer chose the keys


class Site(Protocol):
    """What makes a module private: its attribute `SITE`, put there by `privatize`."""

    def open(self, call: Call) -> tuple[Release, float | None] | Tensor:
        """Account a call, before it is computed: how to release it, and its soft-cap. Or the output to return instead of any.

        Raises UnsupportedError for a call whose sensitivity is not known.
        """


SITE = "_dp_flash_site"


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
        max_length_q, max_length_k: longest segments; models pass them, the boundaries already say so.
        position_ids: (B or 1, Q); without `cu_seq_lens_q`, a position below the one before starts a segment, and so does one
            that repeats without being above the first of its row.
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
    if causal and not square and (mask is None or mask.ndim == 2):
        raise UnsupportedError(
            f"{type(module).__name__} asks for causal attention of {n_queries} queries over {n_keys} keys without a 4-D mask: "
            "it is not known whether the first or the last of them line up; pass a 4-D attention_mask"
        )
    if mask is not None and mask.ndim == 2:
        mask = _mask_of_padding(mask, causal)
    elif mask is not None and mask.ndim != 4:
        raise invalid(
            "attention_mask", expected="2 or 4 dimensions", actual=tuple(mask.shape), remedy="broadcast it to (B, H, Q, K)"
        )
    if mask is None and sliding_window is not None and n_keys > sliding_window and n_queries > 1:
        if not causal:
            raise UnsupportedError(
                "a sliding window that is not causal comes as a mask, or not at all; pass a 4-D attention_mask"
            )
        mask = causal_mask(n_keys, query.device, window=sliding_window)[None, None]
    if indices is not None:
        picked = torch.zeros(indices.shape[0], 1, n_queries, n_keys, dtype=torch.bool, device=query.device)
        picked.scatter_(-1, indices.long()[:, None], True)
        if mask is None and causal:
            mask = causal_mask(n_keys, query.device)[None, None]
        mask = picked if mask is None else mask & picked

    site: Site | None = getattr(module, SITE, None)
    segments: Segments | None = None
    # Noise depends on who sees whom, and boundaries are numbers: these are read, also where that breaks a compiled graph.
    traced = torch.compiler.is_compiling() and site is None and cu_seq_lens_q is None
    if traced and _is_known(attention_mask, sliding_window, n_queries):
        positions = position_ids if square and (attention_mask is None or causal) else None
        mask, layout = without_reading(mask, positions, query, causal=causal, made=attention_mask is None)
    else:
        layout, segments = _read(
            *(module, query, key, attention_mask, mask, sliding_window, cu_seq_lens_q, cu_seq_lens_k, position_ids),
            causal=causal,
        )
    if layout.unseen is not None:
        key, value = key.masked_fill(layout.unseen, 0), value.masked_fill(layout.unseen, 0)
    if layout.blind is not None:
        query = query.masked_fill(layout.blind, 0)
    pattern = Pattern(
        mask=mask,
        causal=causal and mask is None,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        sinks=s_aux,
        bias=position_bias,
    )
    release = None
    if site is not None:
        opened = site.open(Call(query, key, value, segments, layout.blind, pattern, indices is not None))
        if isinstance(opened, Tensor):
            return opened.transpose(1, 2).contiguous(), None
        release, softcap = opened
        pattern = replace(pattern, softcap=softcap)
    output = compute(query, key, value, segments, pattern, release)
    if layout.blind is not None:  # some backends average over all keys instead; noise there would say nothing
        output = output.masked_fill(layout.blind, 0)
    return output.transpose(1, 2).contiguous(), None


def _read(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    mask: Tensor | None,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    position_ids: Tensor | None,
    *,
    causal: bool,
) -> tuple[Layout, Segments | None]:
    """What the numbers in mask, boundaries and positions say of who sees whom. mask: made of `attention_mask`, or as it was."""
    rows, _, n_queries, _ = query.shape
    n_keys = key.shape[2]
    square = n_queries == n_keys > 1
    layout = Layout(None, None, None, 0)
    if mask is not None and mask.dtype == torch.bool and n_queries > 1:  # for one (decoding), copying the keys costs too much
        layout = once(mask, layout_of_mask, n_queries)
    ignored = attention_mask is not None and getattr(attention_mask, MADE_HERE, None) != sliding_window
    if ignored and causal and square and sliding_window is not None and layout.reach >= sliding_window:
        raise UnsupportedError(
            f"{type(module).__name__} has a sliding window of {sliding_window} that its attention mask ignores, so whether it "
            "applies would depend on the other rows of the batch; set sliding_window to None or pass a mask that contains it"
        )
    segments = layout.segments and layout.segments * (rows // len(layout.segments))
    if cu_seq_lens_q is not None:
        ends = once(cu_seq_lens_q, to_list), once(cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k, to_list)
        return layout, segments_of_ends(*ends, query, key, causal, mask is not None, segments)
    if not square or position_ids is None or position_ids.shape not in ((1, n_keys), (rows, n_keys)):
        return layout, segments
    restarts = once(position_ids, lengths_between_restarts)
    if restarts is None:
        return layout, segments
    if attention_mask is not None:
        assert mask is not None
        if not causal or not bool(crosses_restarts(mask, position_ids)):
            return layout, segments
        if attention_mask.ndim == 4 and not hasattr(attention_mask, MADE_HERE):
            raise UnsupportedError(
                f"{type(module).__name__} was given position_ids that restart, as for several units in one row, and a mask "
                "under which these see each other; separate them in the mask, or give position_ids that do not restart"
            )
    sight: Sight = "mask" if mask is not None else "causal" if causal else "all"
    return layout, tuple(tuple(Segment(n, n, sight) for n in row) for row in restarts) * (rows // len(restarts))
