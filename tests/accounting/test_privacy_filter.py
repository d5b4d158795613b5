"""Figures of steps that were chosen by what earlier ones released."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dp_flash_hf.accounting.epsilon import Entry, epsilon_of
from dp_flash_hf.accounting.privacy_filter import ORDERS, _divergences, filter_epsilon
from dp_flash_hf.accounting.privacy_loss import gaussian_epsilon
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.mechanisms.sampling import PoissonSampler, TruncatedPoissonSampler


def delta_of(epsilons: np.ndarray, losses: np.ndarray) -> float:
    """E (1 - e^(epsilon - loss))_+ over runs: the delta that an epsilon, of each run its own, has."""
    return float(np.maximum(0, -np.expm1(epsilons - losses)).mean())


def test_stopping_by_what_was_seen_breaks_the_spent_epsilon_and_neither_the_plans_nor_the_filters() -> None:
    """Full batches, a loss of N(mu^2 / 2, mu^2) a step, and a run that stops when its loss looks worst for what was spent."""
    steps, mu, delta, runs = 60, 0.3, 1e-2, 100_000
    spent = np.array([gaussian_epsilon(mu * math.sqrt(taken), delta) for taken in range(1, steps + 1)])
    sampler = PoissonSampler(50, 50)
    filtered = np.array([filter_epsilon((((sampler, 1 / mu), taken),), delta) for taken in range(1, steps + 1)])
    losses = np.random.default_rng(0).normal(mu * mu / 2, mu, (runs, steps)).cumsum(1)
    # Stop at the first step whose loss is one standard deviation above epsilon.
    beyond = losses > spent + 0.5 * mu * np.sqrt(np.arange(1, steps + 1))
    stopped = np.where(beyond.any(1), beyond.argmax(1), steps - 1)
    at_stop = losses[np.arange(runs), stopped]
    error = 4 * math.sqrt(delta / runs)  # four standard deviations of the mean
    assert delta_of(spent[stopped], at_stop) > 2 * delta
    assert delta_of(filtered[stopped], at_stop) <= delta + error
    # The plan's: what was released by the stop is a part of what the whole run releases.
    assert delta_of(np.full(runs, spent[-1]), at_stop) <= delta + error
    assert delta_of(np.full(runs, spent[-1]), losses[:, -1]) == pytest.approx(delta, abs=error)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize(
    "entries",
    [
        (((PoissonSampler(1000, 20), 1.0), 40), ((PoissonSampler(1000, 50), 1.5), 10)),
        (((PoissonSampler(1000, 1000), 30.0), 40), ((PoissonSampler(1000, 1), 0.6), 500)),
        (((PoissonSampler(10**6, 500), 0.8), 20_000),),
        (((PoissonSampler(100, 100), 4000.0), 3),),
    ],
)
def test_the_filter_is_above_fixed_composition_and_not_far(entries: tuple[Entry, ...], delta: float) -> None:
    fixed = epsilon_of("pld", entries, delta)
    assert fixed <= filter_epsilon(entries, delta) < (7 if delta == 1e-2 else 3.5) * fixed + 2e-3


def test_the_filter_is_the_least_of_all_orders() -> None:
    """Of full batches: sum of steps * a / (2 sigma^2), and c_a at delta / m."""
    assert ORDERS[:7] == (2, 3, 4, 6, 8, 12, 16)
    assert ORDERS[7:] == tuple(order * 2**k for k in range(3, 12) for order in (3, 4))
    sampler, delta = PoissonSampler(50, 50), 1e-5
    for entries in ((((sampler, 4.0), 7), ((sampler, 2.5), 3)), (((sampler, 300.0), 9),), (((sampler, 0.4), 2),)):
        bounds = [
            sum(steps * a / 2 / sigma**2 for (_, sigma), steps in entries)
            + math.log(1 - 1 / a)
            + (math.log(len(ORDERS) / delta) - math.log(a)) / (a - 1)
            for a in ORDERS
        ]
        assert filter_epsilon(entries, delta) == pytest.approx(min(bounds), rel=1e-12)


def test_divergences_are_those_of_opacus() -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    for q, sigma in ((0.01, 0.7), (0.3, 2.0), (1.0, 5.0), (1e-5, 0.5)):
        orders = list(ORDERS[:9])
        theirs = np.asarray(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=orders))
        np.testing.assert_allclose(_divergences(q, sigma)[: len(orders)], theirs, rtol=1e-6, atol=1e-13)


def test_no_steps_cost_nothing_and_truncated_draws_have_no_filter() -> None:
    assert filter_epsilon((), 1e-5) == 0.0
    with pytest.raises(UnsupportedError, match=r"no privacy filter is known.*start afresh"):
        filter_epsilon((((TruncatedPoissonSampler(100, 5, 9), 1.0), 1),), 1e-5)
