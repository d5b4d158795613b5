"""Attention masks: those that Transformers makes for this attention, and the one that the arguments of a call add up to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import sdpa_mask

from dp_flash_hf.errors import UnsupportedError, invalid

_WINDOW = "made_by_dp_flash"  # attribute of masks made here: the window that was asked for, or None
_NEEDS_MASK = "_dp_flash_needs_mask"  # attribute of the configs of such models
_READ_THEIR_MASK = ("mpt",)  # types of models that change their mask before attention gets it


def require_mask(config: PretrainedConfig) -> None:
    """Always make a mask for the model of this config, also where causality alone would say who sees whom.

    The config remembers it, and so does a model that is copied or sent to another process. It is saved with it too, where
    nothing else reads it.
    """
    setattr(config, _NEEDS_MASK, True)


def mark_made_here(mask: Tensor, window: int | None = None) -> Tensor:
    """Say of a bool mask that it holds True for "sees", padding included, and this sliding window; returns it."""
    setattr(mask, _WINDOW, window)
    return mask


def is_made_here(mask: Tensor) -> bool:
    """Whether `dp_flash_mask` made this mask, so that it is known what it means."""
    return hasattr(mask, _WINDOW)


def window_of(mask: Tensor) -> int | None:
    """The sliding window that a mask is known to hold."""
    window: int | None = getattr(mask, _WINDOW, None)
    return window


def dp_flash_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function registered with Transformers for `attn_implementation="dp_flash"`.

    As `transformers.masking_utils.sdpa_mask`, and in a causal model padding tokens see nothing, so that nothing of theirs (a
    NaN, say) is computed. Transformers calls it once per forward and kind of layer; a call by hand is rarely needed.

    Args:
        args: As of `sdpa_mask`.
        kwargs: As of `sdpa_mask`; read here: `q_length` and `kv_length` (int), `attention_mask` (B, K), `config` and
            `local_size`, a sliding window.

    Returns:
        (B, 1, Q, K) bool, True where a query may see a key; None where causality, or the lack of any restriction, says it all:
        with as many queries as keys, no padding and no window. Models of configs that `require_mask` marked always get a mask.
    """
    queries, keys, padding = kwargs.get("q_length"), kwargs.get("kv_length"), kwargs.get("attention_mask")
    # Without a mask, the diagonal of unequal lengths could lie anywhere, and a model that was never meant to run without
    # one may call its causal layers not causal (BigBird-Pegasus).
    config = kwargs.get("config")
    needed = getattr(config, _NEEDS_MASK, False) or getattr(config, "model_type", None) in _READ_THEIR_MASK
    if needed or (queries != keys and queries != 1):
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    # Only the causal mask builders leave this argument out; for the others the queries may be another sequence than the keys.
    causal = "allow_is_bidirectional_skip" not in kwargs
    if mask is not None and causal and padding is not None and queries == keys and padding.shape == (mask.shape[0], keys):
        mask = mask & padding[:, None, :, None].to(torch.bool)
    return None if mask is None else mark_made_here(mask, kwargs.get("local_size"))


def causal_mask(size: int, device: torch.device, window: int | None = None) -> Tensor:
    """(size, size) bool, True up to the diagonal, and there for the last `window` keys."""
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def mask_of_call(
    layer: str, query: Tensor, key: Tensor, given: Tensor | None, *, causal: bool, window: int | None, picked: Tensor | None
) -> Tensor | None:
    """The one 4-D mask that the arguments of an attention call add up to; None where causality says it all.

    Args:
        layer: The calling layer, for messages.
        query: (B, H, Q, D).
        key: (B, G, K, D).
        given: The mask that the call was given: None, (B, K) or 4-D.
        causal: Whether the call is causal where no 4-D mask says otherwise.
        window: Sliding window, applied where no mask was given.
        picked: (B, Q, N) keys that an indexer chose.

    Raises:
        UnsupportedError: It is not known where the diagonal lies, or a window is not causal.
        ValueError: A mask with neither 2 nor 4 dimensions.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    mask = given
    if causal and n_queries != n_keys and (mask is None or mask.ndim == 2):
        raise UnsupportedError(
            f"{layer} asks for causal attention of {n_queries} queries over {n_keys} keys without a 4-D mask: it is not known "
            "whether the first or the last of them line up; pass a 4-D attention_mask"
        )
    if mask is not None and mask.ndim == 2:
        mask = _of_padding(mask, causal)
    elif mask is not None and mask.ndim != 4:
        raise invalid(
            "attention_mask", expected="2 or 4 dimensions", actual=tuple(mask.shape), remedy="broadcast it to (B, H, Q, K)"
        )
    if mask is None and window is not None and n_keys > window and n_queries > 1:
        if not causal:
            raise UnsupportedError(
                "a sliding window that is not causal comes as a mask, or not at all; pass a 4-D attention_mask"
            )
        mask = causal_mask(n_keys, query.device, window=window)[None, None]
    if picked is None:
        return mask
    chosen = torch.zeros(picked.shape[0], 1, n_queries, n_keys, dtype=torch.bool, device=query.device)
    chosen.scatter_(-1, picked.long()[:, None], True)
    if mask is None and causal:
        mask = causal_mask(n_keys, query.device)[None, None]
    return chosen if mask is None else mask & chosen


def _of_padding(padding: Tensor, causal: bool) -> Tensor:
    real = padding.to(torch.bool)
    mask = real[:, None, None, :]
    return mask & causal_mask(real.shape[1], real.device) & real[:, None, :, None] if causal else mask
