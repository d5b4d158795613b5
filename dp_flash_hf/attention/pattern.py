"""attention.pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Sight = Literal["all", "causal", "mask", "nothing"]


class Segment(NamedTuple):
    """Consecutive queries of one row and the only keys they may see.

    sight: "mask" where only the mask says it all. window: the mask says no more than: up to the diagonal, this many keys.
    """

    queries: int
    keys: int
    sight: Sight
    window: int | None = None


Segments = tuple[tuple[Segment, ...], ...]  # per row, in order, covering it


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, and how its logits become weights; the same for every segment."""

    mask: Tensor | None  # 4-D; bool, or float to be added
    causal: bool  # up to the diagonal; only without a mask
    scale: float
    dropout: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None


def causal_mask(size: int, device: torch.device, window: int | None = None) -> Tensor:
    """(size, size) bool, True up to the diagonal, and there for the last `window` keys."""
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)
