"""What steps cost whose number and parameters somebody chose after looking at earlier ones."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from dp_flash_hf.accounting.epsilon import Entry
from dp_flash_hf.errors import UnsupportedError

# Public, and the same for everybody: 2, 3, 4, 6, 8, 12, 16 ... 8192.
ORDERS = tuple(sorted({2**power for power in range(1, 14)} | {3 * 2**power for power in range(12)}))


def filter_epsilon(entries: tuple[Entry, ...], delta: float) -> float:
    """A bound of the epsilon of all these steps, whatever their parameters, and when to stop, were chosen by.

    Composition theorems, and with them `epsilon_of`, are for steps that were fixed before the first of them. This is a Rényi
    filter (Feldman and Zrnic 2021, arXiv 2008.11193) at the m orders a of `ORDERS` at once:

        min over a of  sum of steps * rho_a  +  c_a,    c_a = log(1 - 1 / a) + (log(m / delta) - log a) / (a - 1),

    with rho_a the Rényi divergence of one step's releases with and without a unit, in the worse direction (Mironov et al. 2019,
    arXiv 1908.10530, theorems 4 and 5), and c_a as in Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), at delta / m.

    Proof. P and Q are the distributions of everything released, on neighbours; L is the log of their ratio after some steps,
    and R_a the sum of those steps' rho_a. Given what was released before, the parameters of a step are fixed, so
    e^((a - 1) (L - R_a)) is a supermartingale under P that starts at 1: at any time when somebody stops, by whatever rule, its
    expectation is at most 1. For every x >= 0, 1 - e^-x <= e^((a - 1) x) (1 - 1 / a)^(a - 1) / a. With x = L - R_a - c_a, where
    that is above 0, the choice of c_a makes it (1 - e^(R_a + c_a - L))_+ <= e^((a - 1) (L - R_a)) delta / m. For the least of
    all R_a + c_a, called E, the left side is the largest of m such terms, at most their sum: E_P (1 - e^(E - L))_+ <= delta. If
    E is never allowed beyond a budget that was fixed before, P(S) - e^budget Q(S) <= delta for every set S of outcomes. QED

    Args:
        entries: The steps by kind, of plain Poisson samplers.
        delta: Above 0 and below 1.

    Returns:
        From 1.1 times what `epsilon_of` says of the same steps, where that is 10 or more, to 3 times, where it is 0.5.

    Raises:
        UnsupportedError: Truncated Poisson sampling, whose Rényi divergences are not known.
    """
    if not entries:
        return 0.0
    for (sampler, _), _ in entries:
        if sampler.kind != "poisson":
            raise UnsupportedError(
                f"steps of {sampler.kind} sampling cannot be added up with steps of other parameters: no privacy filter is "
                "known for them; keep the parameters, or start afresh in another folder"
            )
    spent = sum(steps * _divergences(sampler.sampling_rate, sigma) for (sampler, sigma), steps in entries)
    orders = np.array(ORDERS, dtype=np.float64)
    added = np.log1p(-1 / orders) + (math.log(len(ORDERS) / delta) - np.log(orders)) / (orders - 1)
    return max(0.0, float((spent + added).min()))


@lru_cache(maxsize=256)
def _divergences(rate: float, sigma: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of one Poisson step, at each order a: log(sum_k C(a, k) (1 - q)^(a - k) q^k e^(k (k - 1) / (2 sigma^2))) / (a - 1)."""
    from scipy.special import gammaln, logsumexp

    orders = np.array(ORDERS, dtype=np.float64)
    if rate == 1:
        return orders / 2 / sigma / sigma
    found = []
    for order in ORDERS:
        k = np.arange(order + 1.0)
        chosen = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        drawn = chosen + (order - k) * math.log1p(-rate) + k * math.log(rate)
        found.append(float(logsumexp(drawn + k * (k - 1) / 2 / sigma / sigma)) / (order - 1))
    return np.maximum(found, 0)
