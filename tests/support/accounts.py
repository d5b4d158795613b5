"""Plans, and their epsilon computed by others: dp-accounting called directly, and sums of positive numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import brentq
from scipy.special import ndtr

from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.sampling import PoissonSampler

KEY = "00" * 16  # of fingerprints


# (units, expected batch size, noise multiplier, steps, delta)
RUNS = [
    (67349, 1000, 0.6, 202, 1e-5),  # SST-2, three epochs
    (10_000, 100, 1.0, 1000, 1e-6),
    (1000, 50, 1.5, 300, 1e-4),
    (500, 500, 8.0, 30, 1e-5),  # every unit in every step
]


def plan_of(run: tuple[int, int, float, int, float], accountant: AccountantName = "pld") -> PrivacyPlan:
    units, batch, sigma, steps, delta = run
    return PrivacyPlan(
        sampler=PoissonSampler(units, batch), noise_multiplier=sigma, steps=steps, target_delta=delta, accountant=accountant
    )


def pld_epsilon(events: Iterable[tuple[dp_accounting.DpEvent, int]], delta: float) -> float:
    """dp-accounting called directly."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, count in events:
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def poisson_event(q: float, sigma: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))


def fine_pld_epsilon(q: float, sigma: float, steps: int, delta: float, interval: float) -> float:
    """dp-accounting called directly, on a grid of this spacing; for a delta of 1e-12 or more."""
    one = pld.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=interval, log_mass_truncation_bound=-70
    )
    return float(one.self_compose(steps, 1e-16).get_epsilon_for_delta(delta))


def bracket(q: float, sigma: float, doublings: int, delta: float, interval: float) -> tuple[float, float]:
    """Below and above the epsilon of 2^doublings Poisson steps, a unit removed, at any delta.

    Losses are rounded down and up to a grid, and distributions convolved number by number: sums of products of positive numbers
    keep their relative accuracy however small they are, where a Fourier transform loses it.
    """
    reach = 12.0  # standard deviations: 1e-33 is beyond
    edges = np.arange(
        math.floor(_loss(-reach * sigma, q, sigma) / interval), math.ceil(_loss(1 + reach * sigma, q, sigma) / interval) + 1
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.log(np.maximum(np.expm1(edges * interval) / q + 1, 0))
    x = np.nan_to_num(inner, neginf=-1e6) * sigma * sigma + 0.5
    masses = (1 - q) * _between(x / sigma) + q * _between((x - 1) / sigma)
    for _ in range(doublings):
        masses = np.convolve(masses, masses)
    lowest = edges[0] * interval * 2**doublings
    bounds = []
    for up in (0, 2**doublings):  # of each loss, the end of its cell that is lower, or higher
        losses = lowest + interval * (np.arange(len(masses)) + up)

        def excess(epsilon: float, losses: np.ndarray = losses) -> float:
            return float(masses @ np.maximum(0, -np.expm1(np.minimum(epsilon - losses, 0)))) / delta - 1

        bounds.append(float(brentq(excess, 0, losses[-1])))
    return bounds[0], bounds[1]


def _loss(x: float, q: float, sigma: float) -> float:
    return math.log1p(q * math.expm1((2 * x - 1) / (2 * sigma * sigma)))


def _between(z: np.ndarray) -> np.ndarray:
    left, right = z[:-1], z[1:]
    return np.asarray(np.where(left > 0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left)))
