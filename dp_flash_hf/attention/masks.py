"""attention.masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from dp_flash_hf.attention.pattern import causal_mask

# Attribute of masks that `dp_flash_mask` made: the window that was asked for, or None.
MADE_HERE = "made_by_dp_flash"
# Model types that cannot do without a mask: those that do not support torch's SDPA by themselves, found while models are built.
ALWAYS_MASKED: set[str] = set()


def dp_flash_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function registered with Transformers: `sdpa_mask`, and padding tokens of a causal model see nothing.

    Returns None where causality (or full sight) says it all, else (B, 1, Q, K) bool, True where a query may see a key.
    Takes the arguments of `transformers.masking_utils.sdpa_mask`.
    """
    queries, keys, padding = kwargs.get("q_length"), kwargs.get("kv_length"), kwargs.get("attention_mask")
    # Without a mask, the diagonal of unequal lengths could lie anywhere, and a model that was never meant to run without
    # one may call its causal layers not causal (BigBird-Pegasus).
    if (queries != keys and queries != 1) or getattr(kwargs.get("config"), "model_type", None) in ALWAYS_MASKED:
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    # Only the causal mask builders leave this argument out; for the others the queries may be another sequence than the keys.
    causal = "allow_is_bidirectional_skip" not in kwargs
    if mask is not None and causal and padding is not None and queries == keys and padding.shape == (mask.shape[0], keys):
        mask = mask & padding[:, None, :, None].to(torch.bool)
    if mask is not None:
        setattr(mask, MADE_HERE, kwargs.get("local_size"))
    return mask


def _mask_of_padding(padding: Tensor, causal: bool) -> Tensor:
    real = padding.to(torch.bool)
    mask = real[:, None, None, :]
    return mask & causal_mask(real.shape[1], real.device) & real[:, None, :, None] if causal else mask


def _is_known(attention_mask: Tensor | None, sliding_window: int | None, n_queries: int) -> bool:
    """Whether nothing has to be read in a mask to be sure of it."""
    if attention_mask is None:
        return True
    if attention_mask.ndim == 2:
        return sliding_window is None
    made_here = attention_mask.dtype == torch.bool and hasattr(attention_mask, MADE_HERE)
    return made_here and attention_mask.shape[2] == n_queries and sliding_window in (None, getattr(attention_mask, MADE_HERE))
