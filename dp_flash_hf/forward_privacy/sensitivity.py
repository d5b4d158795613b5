"""forward_privacy.sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# --- sensitivity ----------------------------------------------------------------------------------------------------------


def sequence_sensitivity(rows: int, clip_norms: Sequence[float]) -> float:
    """How far one sequence moves the output (rows, heads, E) of a call in norm, at most: 2 sqrt(rows sum_h C_h^2).

    Proof. Output row i of head h is sum_j p_j v_j with p_j >= 0 and sum_j p_j <= 1 (less than 1 with attention sinks) and
    |v_j| <= C_h: it lies in the ball of radius C_h, whatever the sequence, its mask or the logits. Two points of that ball are
    at most 2 C_h apart. Squared distances add over rows and heads. Reached by two sequences whose values are all C_h u, and
    all -C_h u.

    Args:
        rows: queries of the sequence that see something.
        clip_norms: C_h for each *query* head; with grouped queries a key/value head counts once for each that reads it.
    """
    return 2 * math.sqrt(rows * sum(norm**2 for norm in clip_norms))


def weight_bound(keys: int | Tensor, logit_cap: float) -> Any:
    """The largest weight that one of `keys` keys can have, with logits within [-S, S]: 1 / (1 + (keys - 1) e^(-2 S)).

    e^S / (e^S + (n - 1) e^-S): its own logit as large, and all others as small, as they can be. A sink only adds to the sum.
    """
    return 1 / (1 + (keys - 1) * math.exp(-2 * logit_cap))


def token_sensitivity(
    rows: int, clip_norms: Sequence[float], logit_cap: float, *, causal: bool = True, window: int | None = None
) -> float:
    """How far one token moves the output (rows, heads, E) of self-attention in norm, at most; see `token_factor`.

    Args:
        rows: tokens of the sequence.
        clip_norms: C_h for each query head.
        logit_cap: S.
        causal: token i sees the tokens up to i; else all.
        window: with `causal` the last `window` of these; else those less than `window` away.
    """
    place = torch.arange(rows)
    away = place[:, None] - place
    visible = away >= 0 if causal else torch.ones(rows, rows, dtype=torch.bool)
    if window is not None:
        visible = visible & (away.abs() < window)
    return 2 * math.sqrt(float(token_factor(visible[None, None], logit_cap)) * sum(norm**2 for norm in clip_norms))


def token_factor(visible: Tensor, logit_cap: float) -> Tensor:
    """(B,) float64: the squared token-level sensitivity of a call over sum_h (2 C_h)^2.

    Replacing token j replaces its key, its value and its query. Consider a row i of another token that sees n_i keys, j among
    them, and let p, p' be the weights of j before and after, both at most w = weight_bound(n_i, S). The other weights keep
    their proportions, so with m their weighted mean (|m| <= C, shorter still with a sink), o = p v + (1 - p) m and
    o' = p' v' + (1 - p') m; o - o' = p v - p' v' + (p' - p) m has norm at most C (p + p' + |p' - p|) = 2 C max(p, p') <= 2 w C.
    The token's own row, whose query changes too, moves by at most 2 C, as any row does. Rows that do not see j do not move. So

        factor = max_j (1 + sum over other rows i that see j of w(n_i)^2).

    Where queries and keys are not the same tokens, every row that sees j is counted besides its own, wherever that is.

    Args:
        visible: (B, H or 1, Q, K) bool, True where a query sees a key; what is visible must not depend on the tokens.
        logit_cap: S.
    """
    weights: Tensor = weight_bound(visible.sum(-1).clamp(min=1).double(), logit_cap).square()  # (B, H, Q)
    moved: Tensor = (visible * weights[..., None]).sum(-2)  # (B, H, K)
    if visible.shape[-2] == visible.shape[-1]:
        moved = moved - visible.diagonal(dim1=-2, dim2=-1) * weights
    return 1 + moved.flatten(1).amax(-1)


@lru_cache(maxsize=256)
def full_token_factor(queries: int, keys: int, logit_cap: float, causal: bool) -> float:
    """`token_factor` where nothing but causality hides a key, without forming the mask.

    Causal (queries == keys): the first token is seen by all rows, and its row is the shortest, so it is the worst j:
    1 + sum_{n=2}^{T} w(n)^2. No square pattern of all keys has more, because w falls: (T - 1) w(T)^2 <= the same sum.
    """
    if causal:
        return 1 + float(weight_bound(torch.arange(2, queries + 1, dtype=torch.float64), logit_cap).square().sum())
    return 1 + (queries - (queries == keys)) * float(weight_bound(keys, logit_cap)) ** 2
