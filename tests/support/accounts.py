"""Plans and their epsilon, computed by dp-accounting called directly."""

from __future__ import annotations

from collections.abc import Iterable

import dp_accounting
from dp_accounting.pld import PLDAccountant

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
