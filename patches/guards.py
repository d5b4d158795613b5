"""Families whose attention does not learn what it would have to refuse: packed rows, or that its weights are wanted."""

from __future__ import annotations

from typing import Any

from dp_flash_hf.attention.patching import register_guard
from dp_flash_hf.attention.segments import is_packed
from dp_flash_hf.errors import UnsupportedError


@register_guard(
    *("bloom", "cpmant", "flaubert", "git", "layoutlmv3", "lilt", "luke", "megatron-bert", "mpnet", "mpt", "mvp", "openai-gpt"),
    *("perceiver", "rembert", "roformer", "squeezebert", "tapas", "trocr", "xglm", "xlm"),
)
def one_unit_per_row(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a row of several units instead of letting them see each other, and `output_attentions`."""
    if kwargs.get("cu_seq_lens_q") is not None or is_packed(kwargs.get("position_ids"), kwargs.get("attention_mask")):
        raise UnsupportedError(
            f"{type(model).__name__} does not tell its attention of units packed into one row, which would see each other; "
            "give each unit a row of its own"
        )
    if kwargs.get("output_attentions"):  # some would return None for each layer
        raise UnsupportedError('dp_flash attention forms no attention weights to return; use attn_implementation="eager"')
