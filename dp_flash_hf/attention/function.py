"""`attn_implementation="dp_flash"`: exact attention in which no unit can see another, forward or backward.

::

    import dp_flash_hf                                       # registers the name
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dp_flash")

Rows of a batch are separate by construction. Units packed into one row are computed segment by segment (by masks in code that
`torch.compile` traces), so that not even a NaN crosses: a mask alone does not stop it, because 0 * NaN = NaN in weights @
value and in every product of the backward. Segments come from `cu_seq_lens_q/k`, from the mask (a block-diagonal mask is cut
into its blocks) and from `position_ids` that restart (some models, GPT-OSS among them, do not tell their mask about these).
Padding (keys that no query sees, queries that see no key) is zeroed for the same reason.

`dp_attention` is the same thing under a name without "flash": some models treat any name with that word as the flash-attn
package and refuse what this implementation can do (Llama 4's chunks beyond one chunk, HRM's prefix masks, ESM-C's chains).

A layer on which `privatize` put a site releases a noised output of clipped values instead; see `attention.release`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_hf.attention import usage
from dp_flash_hf.attention.backends import compute
from dp_flash_hf.attention.pattern import Pattern
from dp_flash_hf.attention.release import Call, site_of
from dp_flash_hf.attention.visibility import Arguments, who_sees_whom
from dp_flash_hf.errors import UnsupportedError

NAMES = ("dp_flash", "dp_attention")

# Keyword arguments of transformers that change what attention computes, and that nothing below implements.
_UNHANDLED = ("block_indices", "sinks", "cache", "block_table", "head_mask")


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

    Outputs and gradients are those of eager attention, but for the order of sums. What a query returns, and the gradient that
    reaches a key, depend on the tokens that see each other and on nothing else in the batch, so that not even a NaN crosses (in
    code that a compiler traces, a NaN is stopped between rows only).

    Args:
        module: The calling layer; `module.is_causal` counts where `is_causal` is None.
        query: (B, H, Q, D).
        key: (B, G, K, D), heads not repeated: H is a multiple of G.
        value: (B, G, K, E).
        attention_mask: What `dp_flash_mask` returned: bool, broadcastable to (B, H, Q, K), True where a query may see a key;
            or a float mask of that shape, added to the logits; or (B, K), True at real keys. A 4-D mask says everything:
            `is_causal` and `sliding_window` are not applied on top of it. None: all keys, or those up to the diagonal.
        dropout: Probability of dropping an attention weight; 0 outside training.
        scaling: Factor on the logits; None means D ** -0.5.
        is_causal: None means `module.is_causal`.
        sliding_window: Without a mask, a causal query sees the last `sliding_window` keys only.
        softcap: Logits become softcap * tanh(logits / softcap) before the mask.
        s_aux: (H,), one logit per head without a value (attention sinks); trainable.
        position_bias: Broadcastable to (B, H, Q, K), added to the scaled logits; trainable.
        indices: (B, Q, N) keys picked by a sparse-attention indexer; a query sees only these, and only if the mask agrees.
        cu_seq_lens_q: (n + 1,) boundaries of the segments packed into the one row of the batch, 0 first and Q last.
        cu_seq_lens_k: The same for keys; None means `cu_seq_lens_q`.
        max_length_q: Longest segment; models pass it, the boundaries already say so.
        max_length_k: The same for keys.
        position_ids: (B or 1, Q); without `cu_seq_lens_q`, a position below the one before starts a segment, and so does one
            that repeats without being above the first of its row (`units.restarts`).
        output_attentions: Only False.
        kwargs: What other layers of the model need; nothing that changes attention.

    Returns:
        ((B, Q, H, E) in the dtype of `value`, None). Zero for queries that see no key.

    Raises:
        UnsupportedError: An argument that changes the result is not implemented, or its meaning here would be ambiguous.
        ValueError: Shapes or boundaries that contradict each other.
    """
    usage.mark_called(module)
    _refuse_unhandled(kwargs, output_attentions)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    asked = Arguments(
        *(type(module).__name__, query, key, attention_mask, causal, sliding_window, indices),
        *(cu_seq_lens_q, cu_seq_lens_k, position_ids),
    )
    site = site_of(module)
    # Noise depends on who sees whom: there it is read also where that breaks a compiled graph.
    mask, seen = who_sees_whom(asked, read=site is not None or not torch.compiler.is_compiling())
    if seen.unseen is not None:
        key, value = key.masked_fill(seen.unseen, 0), value.masked_fill(seen.unseen, 0)
    if seen.fully_masked is not None:
        query = query.masked_fill(seen.fully_masked, 0)
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
        opened = site.open(Call(query, key, value, seen.segments, seen.fully_masked, pattern, indices is not None))
        if isinstance(opened, Tensor):
            return opened.transpose(1, 2).contiguous(), None
        release, softcap = opened
        pattern = replace(pattern, softcap=softcap)
    output = compute(query, key, value, seen.segments, pattern, release)
    if seen.fully_masked is not None:  # some backends average over all keys instead; noise there would say nothing
        output = output.masked_fill(seen.fully_masked, 0)
    return output.transpose(1, 2).contiguous(), None


def _refuse_unhandled(kwargs: Mapping[str, Any], output_attentions: bool | None) -> None:
    for name in _UNHANDLED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f'dp_flash attention does not implement {name}; use attn_implementation="eager"')
    if output_attentions:
        raise UnsupportedError('dp_flash attention forms no attention weights to return; use attn_implementation="eager"')
