"""What attention computes once it is known who sees whom: the segments of each row, and how logits become weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

from torch import Tensor

# Which of a segment's keys its queries see: all of them; those up to the diagonal; what only the mask says; none (padding).
Visibility = Literal["all", "causal", "mask", "nothing"]


class Segment(NamedTuple):
    """Consecutive queries of one row, and the only keys they may see: usually the tokens of one text.

    Segments of a row follow one another, in queries as in keys, so their places need not be stated.

    Attributes:
        queries: How many queries, 0 or more.
        keys: How many keys, 0 or more.
        visibility: Which of these keys a query sees. With "mask", only `Pattern.mask` says.
        window: With "mask", a number says that the mask holds no more than this: a query sees the last `window` keys up to the
            diagonal. None where it may be any mask.
    """

    queries: int
    keys: int
    visibility: Visibility
    window: int | None = None


Segments = tuple[tuple[Segment, ...], ...]  # of each row of the batch, in order, covering its queries and keys


def is_divided(segments: Segments | None) -> TypeGuard[Segments]:
    """Whether a row is known to hold several segments in which something is seen."""
    return segments is not None and any(sum(part.visibility != "nothing" for part in parts) > 1 for parts in segments)


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, and how its logits become weights; the same for every segment of a call.

    The weights of a query are ``softmax(softcap * tanh(scale * q k / softcap) + bias + mask)`` over the keys that it sees and
    the sink of its head, if there is one.

    Attributes:
        mask: (B or 1, H or 1, Q or 1, K); bool, True where a query sees a key, or floating, added to the logits; or None.
        causal: Whether a query sees the keys up to the diagonal only. False where there is a mask, which says it itself.
        scale: Factor on the products of queries and keys.
        dropout: Probability of dropping a weight; the others are divided by 1 - dropout.
        softcap: Bound on the logits, or None.
        sinks: (H,) floating: one more logit per head, without a value; or None.
        bias: Broadcastable to (B, H, Q, K), floating, added to the logits; or None.
    """

    mask: Tensor | None
    causal: bool
    scale: float
    dropout: float
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
