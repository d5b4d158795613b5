"""forward_privacy.gaussian."""

from __future__ import annotations

import math
from typing import Any

import torch
from dp_accounting import get_epsilon_gaussian
from torch import Tensor

# --- the Gaussian mechanism -----------------------------------------------------------------------------------------------


def gaussian_delta(epsilon: float, mu: Tensor) -> Tensor:
    """The delta of Gaussian mechanisms with sensitivity / std = mu > 0, at epsilon, float64; exact.

    Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu) (Balle and Wang 2018, arXiv:1805.06530, theorem 8).
    """
    mu = mu.double()
    above, below = (torch.special.log_ndtr(sign * mu / 2 - epsilon / mu) for sign in (1, -1))
    delta: Tensor = above.exp() - (epsilon + below).exp()
    return delta


def sampled_delta(epsilon: float, *, squared_mu: float, sampling_rate: float, passes: int, certain: float = 0.0) -> float:
    """The delta, at epsilon, of `passes` passes each of which a unit joins independently with probability `sampling_rate`.

    A pass costs a unit that takes part mu^2 = `squared_mu`; `certain` is the mu^2 of what it takes part in anyway.

    What is released are rows of units, so an observer sees who took part: the privacy of not taking part, on which the
    amplification of DP-SGD rests, is not there, and epsilon is not multiplied by the sampling rate. What remains: whether a
    unit takes part does not depend on what it holds. So under both neighbours K, the number of its passes, is the same
    Binomial(passes, q) and is seen; given K the view is a Gaussian mechanism with mu^2 = certain + K squared_mu. The two
    distributions of (K, view) have densities P(K) f_K and P(K) g_K, so the hockey-stick divergence, an integral of
    max(0, f - e^epsilon g), is the sum over k of P(K = k) times that of f_k and g_k:

        delta(epsilon) = sum_k P(K = k) delta_Gauss(epsilon; sqrt(certain + k squared_mu)),

    exactly. Passes may be chosen adaptively, as long as each joins by a draw of its own.
    """
    k = torch.arange(passes + 1, dtype=torch.float64)
    n = torch.tensor(float(passes), dtype=torch.float64)
    log_choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    q = torch.tensor(sampling_rate, dtype=torch.float64)
    share = (log_choices + torch.xlogy(k, q) + torch.xlogy(n - k, 1 - q)).exp()
    mu = (certain + k * squared_mu).sqrt()
    return float((share * torch.where(mu > 0, gaussian_delta(epsilon, mu.clamp(min=1e-300)), 0)).sum())


def sampled_epsilon(delta: float, *, squared_mu: float, sampling_rate: float, passes: int, certain: float = 0.0) -> float:
    """The least epsilon at which `sampled_delta` is at most delta."""

    def delta_at(epsilon: float) -> float:
        return sampled_delta(
            epsilon, squared_mu=squared_mu, sampling_rate=sampling_rate, passes=passes, certain=certain
        )  # falls with epsilon

    if delta_at(0) <= delta:
        return 0.0
    return _least(lambda epsilon: delta_at(epsilon) <= delta, 0, _epsilon(certain + passes * squared_mu, delta))


def _epsilon(squared_mu: float, delta: float) -> float:
    return float(get_epsilon_gaussian(1 / math.sqrt(squared_mu), delta)) if squared_mu > 0 else 0.0


def _least(holds: Any, low: float, high: float) -> float:
    """The least number in (low, high] at which `holds`, which holds from there on, to 1e-12; on the safe side."""
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
