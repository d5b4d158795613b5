"""How far one unit can move the output of an attention call: the sensitivities that noise is made for, with their proofs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import overload

import torch
from torch import Tensor


def sequence_sensitivity(rows: int, clip_norms: Sequence[float]) -> float:
    """How far one sequence moves the output (rows, heads, E) of a call, at most: 2 sqrt(rows sum_h C_h^2).

    In Euclidean norm, if the sequence is replaced by any other of the same length.

    Proof. Output row i of head h is sum_j p_j v_j with p_j >= 0 and sum_j p_j <= 1 (less than 1 with attention sinks) and
    norm(v_j) <= C_h: it lies in the ball of radius C_h, whatever the sequence, its mask or the logits. Two points of that ball
    are at most 2 C_h apart. Squared distances add over rows and heads. Reached by two sequences whose values are all C_h u, and
    all -C_h u.

    >>> sequence_sensitivity(4, [0.5, 0.5, 0.5, 0.5])
    4.0

    Args:
        rows: Queries of the sequence that see something.
        clip_norms: C_h for each *query* head; with grouped queries a key/value head counts once for each that reads it.
    """
    return 2 * math.sqrt(rows * sum(norm**2 for norm in clip_norms))


@overload
def weight_bound(keys: int, logit_cap: float) -> float: ...
@overload
def weight_bound(keys: Tensor, logit_cap: float) -> Tensor: ...
def weight_bound(keys: int | Tensor, logit_cap: float) -> float | Tensor:
    """The largest weight that one of `keys` keys can have, with logits within [-S, S]: 1 / (1 + (keys - 1) e^(-2 S)).

    That is e^S / (e^S + (n - 1) e^-S): its own logit as large, and all others as small, as they can be. A sink only adds to the
    sum.

    >>> weight_bound(1, 5.0), weight_bound(100, 0.0)
    (1.0, 0.01)

    Args:
        keys: n, 1 or more; or a floating tensor of such.
        logit_cap: S.
    """
    return 1 / (1 + (keys - 1) * math.exp(-2 * logit_cap))


def token_sensitivity(
    rows: int, clip_norms: Sequence[float], logit_cap: float, *, causal: bool = True, window: int | None = None
) -> float:
    """How far one token moves the output (rows, heads, E) of self-attention, at most: 2 sqrt(factor sum_h C_h^2).

    In Euclidean norm, if the token is replaced by any other, in the same place; `token_factor` has the factor and the proof.

    >>> token_sensitivity(1, [1.0], 2.0)  # a token alone is a sequence
    2.0
    >>> token_sensitivity(512, [1.0], 0.5) < 0.1 * sequence_sensitivity(512, [1.0])
    True

    Args:
        rows: Tokens of the sequence.
        clip_norms: C_h for each query head.
        logit_cap: S.
        causal: Token i sees the tokens up to i; else all.
        window: With `causal` the last `window` of these; else those less than `window` away.
    """
    place = torch.arange(rows)
    away = place[:, None] - place
    visible = away >= 0 if causal else torch.ones(rows, rows, dtype=torch.bool)
    if window is not None:
        visible = visible & (away.abs() < window)
    return 2 * math.sqrt(float(token_factor(visible[None, None], logit_cap)) * sum(norm**2 for norm in clip_norms))


def token_factor(visible: Tensor, logit_cap: float) -> Tensor:
    """The squared token-level sensitivity of a call, over sum_h (2 C_h)^2.

    Replacing token j replaces its key, its value and its query. Consider a row i of another token that sees n_i keys, j among
    them, and let p, p' be the weights of j before and after, both at most w = weight_bound(n_i, S). The other weights keep
    their proportions, so with m their weighted mean (norm(m) <= C, shorter still with a sink), o = p v + (1 - p) m and
    o' = p' v' + (1 - p') m; o - o' = p v - p' v' + (p' - p) m has norm at most C (p + p' + abs(p' - p)) = 2 C max(p, p')
    <= 2 w C. The token's own row, whose query changes too, moves by at most 2 C, as any row does. Rows that do not see j do not
    move. So::

        factor = max_j (1 + sum over other rows i that see j of w(n_i)^2).

    Where queries and keys are not the same tokens, every row that sees j is counted besides its own, wherever that is.

    Args:
        visible: (B, H or 1, Q, K) bool, True where a query sees a key; what is visible must not depend on the tokens.
        logit_cap: S.

    Returns:
        (B,) float64, at least 1.
    """
    weights = weight_bound(visible.sum(-1).clamp(min=1).double(), logit_cap).square()  # (B, H, Q)
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
    return 1 + (queries - (queries == keys)) * weight_bound(keys, logit_cap) ** 2
