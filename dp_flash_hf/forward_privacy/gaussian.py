"""The Gaussian mechanism: how private noise is, how much noise a target needs, and what sampling adds to that.

Everything is stated in mu = sensitivity / standard deviation of the noise, as in Gaussian differential privacy (Dong, Roth and
Su 2022, arXiv:1905.02383): mechanisms compose by adding mu^2, and mu^2 / 2 is the rho of zero-concentrated DP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dp_flash_hf import validation
from dp_flash_hf.errors import invalid


class Calibration(NamedTuple):
    """Noise std / sensitivity for one (epsilon, delta) by two formulas, for comparison. Nothing is accounted by `classic`.

    Attributes:
        analytic: The least that is private: the analytic Gaussian mechanism (Balle and Wang 2018, arXiv:1805.06530).
        classic: sqrt(2 ln(1.25 / delta)) / epsilon (Dwork and Roth 2014, theorem A.1).
        classic_is_proven: Whether that theorem holds, which is for epsilon <= 1.
        waste: classic / analytic; below 1 the classic noise does not keep the promise.
    """

    analytic: float
    classic: float
    classic_is_proven: bool
    waste: float


def calibrations(epsilon: float, delta: float) -> Calibration:
    """The noise that one Gaussian release needs for (epsilon, delta), and what the textbook formula says instead.

    The textbook's proof needs epsilon <= 1, where it wastes noise. For large epsilon it falls too fast (as 1 / epsilon, where
    1 / sqrt(2 epsilon) is necessary) and does not protect.

    >>> near, far = calibrations(1.0, 1e-5), calibrations(50.0, 1e-5)
    >>> round(near.analytic, 2), round(near.classic, 2)
    (3.73, 4.84)
    >>> far.classic < far.analytic, far.classic_is_proven
    (True, False)

    Args:
        epsilon: Finite and above 0.
        delta: Above 0 and below 1.

    Raises:
        ValueError: Values outside these ranges.
    """
    validation.positive("epsilon", epsilon, remedy="give the epsilon of one release")
    validation.delta("delta", delta)
    analytic, classic = _least_sigma(epsilon, delta), math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    return Calibration(analytic, classic, epsilon <= 1, classic / analytic)


@lru_cache(maxsize=64)
def calibrated_noise(epsilon: float, delta: float, passes: int, sampling_rate: float) -> float:
    """Noise std / sensitivity of a pass, such that all passes in sum are (epsilon, delta)-private.

    Args:
        epsilon: Of all passes, finite and above 0.
        delta: Of all passes, above 0 and below 1.
        passes: How many there are.
        sampling_rate: The probability with which a unit takes part in each; see `sampled_delta`.

    Raises:
        ValueError: Sampling alone would reach the target: without noise, it is those who are drawn who pay.
    """
    sigma = _least_sigma(epsilon, delta) * math.sqrt(passes)  # enough if a unit takes part in every pass
    if sampling_rate < 1:
        taking_part = 1 - (1 - sampling_rate) ** passes
        if taking_part <= delta:
            raise invalid(
                "target_delta",
                expected=f"less than the {taking_part:.2g} with which a unit takes part at all",
                actual=delta,
                remedy="lower it",
            )
        sigma = _least(
            lambda sigma: sampled_delta(epsilon, squared_mu=1 / sigma**2, sampling_rate=sampling_rate, passes=passes) <= delta,
            sigma,
        )
    return sigma * (1 + 1e-6)  # so that what rounding adds to the epsilon of it all stays below the target


def gaussian_delta(epsilon: float, mu: Tensor) -> Tensor:
    """The delta of Gaussian mechanisms at epsilon; exact, no bound.

    delta = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu), with Phi the distribution function of the
    standard normal (Balle and Wang 2018, arXiv:1805.06530, theorem 8). Falls with epsilon, rises with mu.

    >>> round(float(gaussian_delta(1.0, torch.tensor(1.0))), 4)
    0.1269

    Args:
        epsilon: 0 or above.
        mu: Sensitivity / standard deviation of each mechanism, any shape, above 0.

    Returns:
        float64, of the shape of `mu`.
    """
    mu = mu.double()
    above, below = (torch.special.log_ndtr(sign * mu / 2 - epsilon / mu) for sign in (1, -1))
    delta: Tensor = above.exp() - (epsilon + below).exp()
    return delta


def gaussian_epsilon(squared_mu: float, delta: float) -> float:
    """The epsilon at delta of Gaussian mechanisms whose mu^2 add up to `squared_mu`; 0 where nothing was released."""
    if squared_mu == 0:
        return 0.0
    import dp_accounting  # slow to import, and not needed to write a configuration

    return float(dp_accounting.get_epsilon_gaussian(1 / math.sqrt(squared_mu), delta))


def _least_sigma(epsilon: float, delta: float) -> float:
    """1 / mu of the least noise that is (epsilon, delta)-private."""
    import dp_accounting

    return float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def sampled_delta(epsilon: float, *, squared_mu: float, sampling_rate: float, passes: int, certain: float = 0.0) -> float:
    """The delta, at epsilon, of passes that a unit joins independently, each with the same probability; exact.

    What is released are rows of units, so an observer sees who took part: the privacy of not taking part, on which the
    amplification of DP-SGD rests, is not there, and epsilon is not multiplied by the sampling rate. What remains: whether a
    unit takes part does not depend on what it holds. So under both neighbours K, the number of its passes, is the same
    Binomial(passes, q) and is seen; given K the view is a Gaussian mechanism with mu^2 = certain + K squared_mu. The two
    distributions of (K, view) have densities P(K) f_K and P(K) g_K, so the hockey-stick divergence, an integral of
    max(0, f - e^epsilon g), is the sum over k of P(K = k) times that of f_k and g_k::

        delta(epsilon) = sum_k P(K = k) delta_Gauss(epsilon; sqrt(certain + k squared_mu))

    exactly. Passes may be chosen adaptively, as long as each joins by a draw of its own.

    Args:
        epsilon: 0 or above.
        squared_mu: mu^2 that a pass costs a unit that takes part.
        sampling_rate: q, above 0 and at most 1.
        passes: How many passes, 0 or more.
        certain: mu^2 of what the unit takes part in anyway.
    """
    k = torch.arange(passes + 1, dtype=torch.float64)
    n = torch.tensor(float(passes), dtype=torch.float64)
    log_choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    q = torch.tensor(sampling_rate, dtype=torch.float64)
    share = (log_choices + torch.xlogy(k, q) + torch.xlogy(n - k, 1 - q)).exp()
    mu = (certain + k * squared_mu).sqrt()
    return float((share * torch.where(mu > 0, gaussian_delta(epsilon, mu.clamp(min=1e-300)), 0)).sum())


def sampled_epsilon(delta: float, *, squared_mu: float, sampling_rate: float, passes: int, certain: float = 0.0) -> float:
    """The least epsilon at which `sampled_delta` is at most delta, rounded up to 12 digits; arguments as there."""

    def delta_at(epsilon: float) -> float:
        return sampled_delta(epsilon, squared_mu=squared_mu, sampling_rate=sampling_rate, passes=passes, certain=certain)

    if delta_at(0) <= delta:
        return 0.0
    return _least(lambda epsilon: delta_at(epsilon) <= delta, gaussian_epsilon(certain + passes * squared_mu, delta))


def _least(holds: Callable[[float], bool], high: float) -> float:
    """The least number in (0, high] at which `holds`, which holds from there on, to 1e-12; on the safe side."""
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
