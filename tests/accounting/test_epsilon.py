"""Epsilon is what the accountants say, and what the definition allows."""

from __future__ import annotations

import math
import sys
from itertools import combinations
from typing import Any

import dp_accounting
import numpy as np
import pytest
from scipy import stats

from dp_flash_hf.accounting.epsilon import chi_square, epsilon_of, of_computed_noise
from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.gaussian_noise import closeness
from dp_flash_hf.mechanisms.sampling import PoissonSampler, TruncatedPoissonSampler
from tests.support.accounts import RUNS, plan_of, pld_epsilon, poisson_event


@pytest.mark.sampled(2)
@pytest.mark.parametrize("run", RUNS)
def test_epsilon_is_dp_accountings_and_within_one_percent_of_prv(run: tuple[int, int, float, int, float]) -> None:
    from opacus.accountants import PRVAccountant

    units, batch, sigma, steps, delta = run
    ours = plan_of(run).epsilon()
    assert ours == pytest.approx(pld_epsilon([(poisson_event(batch / units, sigma), steps)], delta), rel=1e-3)
    prv = PRVAccountant()
    prv.history = [(sigma, batch / units, steps)]
    assert ours == pytest.approx(prv.get_epsilon(delta), rel=0.01)
    assert plan_of(run, "prv").epsilon() == pytest.approx(prv.get_epsilon(delta), abs=0.01)


def test_epsilon_of_the_published_example() -> None:
    # The figure the design quotes for Poisson sampling: SST-2's size, sigma 0.6, three epochs.
    assert plan_of(RUNS[0]).epsilon() == pytest.approx(5.85, abs=0.01)


def test_full_batches_are_exact() -> None:
    """They add up to one Gaussian mechanism, whose delta is known (Balle and Wang 2018), whatever noise each had."""
    every = PoissonSampler(500, 500)
    epsilon = epsilon_of("pld", (((every, 8.0), 30), ((every, 4.0), 10)), 1e-5)
    mu = math.sqrt(30 / 8.0**2 + 10 / 4.0**2)
    above, below = (float(stats.norm.cdf(sign * mu / 2 - epsilon / mu)) for sign in (1, -1))
    assert above - math.exp(epsilon) * below == pytest.approx(1e-5, rel=1e-6)


def test_rdp_is_opacus_and_an_upper_bound() -> None:
    from opacus.accountants import RDPAccountant

    for run in RUNS[1:3]:
        units, batch, sigma, steps, delta = run
        rdp = RDPAccountant()
        rdp.history = [(sigma, batch / units, steps)]
        charged = plan_of(run, "rdp").epsilon()  # for noise computed in float64
        assert charged - 1e-3 < rdp.get_epsilon(delta) < charged
        assert plan_of(run).epsilon() < charged


def true_delta(epsilon: float, *, larger: int, others: int, q: float, most: int, sigma: float) -> float:
    """Exact delta of one step on a pair of neighbours: `larger` units, of which one adds +1 to the sum and the rest `others`.

    Straight from the definition: every subset of units, every way to truncate it to `most`, both directions of adding one unit.
    """
    y = np.linspace(-larger - 12 * sigma, larger + 12 * sigma, 20_001)

    def density(values: list[int]) -> Any:
        total = np.zeros_like(y)
        for size in range(len(values) + 1):
            for included in combinations(values, size):
                kept = list(combinations(included, min(size, most)))
                for subset in kept:
                    weight = q**size * (1 - q) ** (len(values) - size) / len(kept)
                    total += weight * stats.norm.pdf(y, sum(subset), sigma)
        return total

    pair = density([others] * (larger - 1)), density([others] * (larger - 1) + [1])
    return max(float(np.trapezoid(np.maximum(0, a - math.exp(epsilon) * b), y)) for a, b in (pair, pair[::-1]))


@pytest.mark.parametrize(("n", "batch", "most"), [(4, 2, 2), (5, 1, 2), (3, 2, 2)])
def test_truncated_poisson_is_accounted_for_both_neighbours(n: int, batch: int, most: int) -> None:
    q, delta, sigma = batch / n, 1e-3, 3.0
    rounding = 1e-7  # of the integral: h^2 / 8 * |slope| at its kink, with h < 0.005 and slope < 0.25 / sigma^2
    truncated, poisson = Ledger(), Ledger()
    truncated.record(TruncatedPoissonSampler(n, batch, most), sigma)
    poisson.record(PoissonSampler(n, batch), sigma)
    for larger in (n, n + 1):
        for others in (-1, 0, 1):
            spent = true_delta(truncated.epsilon(delta), larger=larger, others=others, q=q, most=most, sigma=sigma)
            assert spent <= delta + rounding
    # The check has teeth: what Poisson accounting claims is true of Poisson draws, and untrue of truncated ones.
    claim = poisson.epsilon(delta)
    assert 0.98 * delta < true_delta(claim, larger=n, others=0, q=q, most=n, sigma=sigma) <= delta + rounding
    assert true_delta(claim, larger=n + 1, others=-1, q=q, most=most, sigma=sigma) > 1.2 * delta


def test_truncated_poisson_takes_the_worse_neighbour() -> None:
    # Which neighbour is worse depends on the run; dataset_size is the size of the larger of the two datasets.
    for sampler, sigma, steps, worse in (
        (TruncatedPoissonSampler(5, 1, 1), 2.0, 5, 5),
        (TruncatedPoissonSampler(2, 1, 1), 5.0, 50, 3),
        (TruncatedPoissonSampler(1000, 50, 60), 4.0, 50, 1001),
    ):
        ledger = Ledger()
        ledger.record(sampler, sigma, steps)
        direct = {
            size: pld_epsilon(
                [
                    (
                        dp_accounting.TruncatedSubsampledGaussianDpEvent(
                            size, sampler.sampling_rate, sampler.max_batch_size, sigma
                        ),
                        steps,
                    )
                ],
                1e-5,
            )
            for size in (sampler.n_units, sampler.n_units + 1)
        }
        assert max(direct, key=direct.__getitem__) == worse
        assert max(direct.values()) > 1.003 * min(direct.values())  # or the other could pass for it
        assert 0.9999 * direct[worse] < ledger.epsilon(1e-5) < 1.005 * direct[worse]


def test_where_draws_are_hardly_ever_truncated_they_are_accounted_as_plain_ones() -> None:
    n, batch, most, sigma, delta = 6, 1, 5, 0.5, 0.3
    truncated, poisson = Ledger(), Ledger()
    truncated.record(TruncatedPoissonSampler(n, batch, most), sigma)
    poisson.record(PoissonSampler(n, batch), sigma)
    claim = truncated.epsilon(delta)
    assert poisson.epsilon(delta) <= claim <= 1.01 * poisson.epsilon(delta)
    for larger in (n, n + 1):
        for others in (-1, 0, 1):
            assert true_delta(claim, larger=larger, others=others, q=batch / n, most=most, sigma=sigma) <= delta + 1e-5
    # Millions of units, and deltas that dp-accounting's transforms lose.
    large, plain = Ledger(), Ledger()
    large.record(TruncatedPoissonSampler(10**6, 1000, 1400), 0.8, 10_000)
    plain.record(PoissonSampler(10**6, 1000), 0.8, 10_000)
    for delta in (1e-8, 1e-18):
        assert plain.epsilon(delta) <= large.epsilon(delta) <= 1.001 * plain.epsilon(delta)
    # Of all steps together one is truncated too often for an epsilon of 4; of each alone, or for one of 0, it would not be.
    more = Ledger()
    more.record(TruncatedPoissonSampler(10**6, 1000, 1330), 0.8, 10_000)
    with pytest.raises(UnsupportedError, match="unless draws are hardly ever truncated"):
        more.epsilon(1e-15)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_truncated_sampling_needs_pld(accountant: AccountantName) -> None:
    ledger = Ledger(accountant)
    ledger.record(TruncatedPoissonSampler(100, 5, 9), 1.0)
    with pytest.raises(UnsupportedError, match="pld"):
        ledger.epsilon(1e-3)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_missing_opacus_names_the_extra(accountant: AccountantName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    plan = plan_of((321, 4, 1.0, 2, 1e-3), accountant)
    with pytest.raises(UnsupportedError, match=r"pip install dp-flash-hf\[opacus\]"):
        plan.epsilon()


def test_prv_is_as_accurate_for_small_epsilons() -> None:
    # Opacus' default accuracy is 0.01, of an epsilon of 0.2.
    run = (1000, 10, 6.0, 1000, 1e-6)
    assert plan_of(run, "prv").epsilon() == pytest.approx(plan_of(run).epsilon(), rel=0.01)


def test_what_an_accountant_cannot_is_refused_and_says_who_can() -> None:
    tiny = (1000, 10, 1.0, 1000, 1e-18)
    with pytest.raises(UnsupportedError, match="use accountant='pld'"):
        plan_of(tiny, "prv").epsilon()
    assert plan_of(tiny).epsilon() > plan_of((*tiny[:4], 1e-12)).epsilon()
    truncated = Ledger()
    truncated.record(TruncatedPoissonSampler(1000, 10, 30), 1.0, 5)
    for delta in (0.98e-12, 1e-15):
        with pytest.raises(UnsupportedError, match="sampling='poisson' with accountant='pld'"):
            truncated.epsilon(delta)
    assert truncated.epsilon(1e-12) > truncated.epsilon(1e-9)

    class Otherwise(TruncatedPoissonSampler):
        """It could draw in any way."""

    other = Ledger()
    other.record(Otherwise(1000, 10, 30), 1.0, 5)
    with pytest.raises(UnsupportedError, match="no accountant knows truncated_poisson sampling as Otherwise draws it"):
        other.epsilon(1e-5)


def test_hopelessly_little_noise_is_no_privacy_rather_than_no_memory() -> None:
    for sigma in (1e-200, 1e-6):
        assert plan_of((1000, 100, sigma, 1000, 1e-4)).epsilon() == math.inf
        assert plan_of((1000, 1000, sigma, 1000, 1e-4)).epsilon() == math.inf
    for sigma in (1e-200, 1e-3, 0.05):
        assert plan_of((1000, 100, sigma, 1000, 1e-4), "prv").epsilon() == math.inf
    assert 1e9 > plan_of((1000, 100, 1e-3, 1000, 1e-4)).epsilon() > 1e7
    assert plan_of((1000, 100, 1e-3, 1000, 1e-4), "rdp").epsilon() > 1e6


def test_computed_noise_is_charged_as_the_proof_says() -> None:
    asked: list[float] = []

    def ideal(delta: float) -> float:
        asked.append(delta)
        return 2.0

    steps, delta = 400, 1e-5
    charged = 2.0 + 2 * closeness(steps, math.log(2.0**11 / delta) + 2.0 + 1)
    assert of_computed_noise(ideal, steps, delta) == pytest.approx(charged, rel=1e-14)
    assert asked == [delta * (1 - 2.0**-9)]
    small = 0.01 + 2 * closeness(steps, math.log(2.0**11 / delta) + 0.01 + 1)
    assert of_computed_noise(lambda delta: 0.01, steps, delta) == pytest.approx(small, rel=1e-14)
    assert of_computed_noise(lambda delta: 0.0, steps, delta) == 0.0
    assert of_computed_noise(lambda delta: math.inf, steps, delta) == math.inf


@pytest.mark.parametrize(("batch", "sigma"), [(20, 1.0), (1, 0.5), (1000, 4.0)])
def test_the_chi_square_divergence_is_that_of_the_mixture(batch: int, sigma: float) -> None:
    """E (p / q)^2 - 1 of p = (1 - r) N(0, sigma^2) + r N(1, sigma^2) and q = N(0, sigma^2), by integration."""
    sampler = PoissonSampler(1000, batch)
    y = np.linspace(-20, 30, 200_001)
    rate, without = batch / 1000, stats.norm.pdf(y, 0, sigma)
    ratio = 1 - rate + rate * np.exp((2 * y - 1) / 2 / sigma**2)
    assert chi_square(sampler, sigma) == pytest.approx(float(np.trapezoid(without * ratio**2, y)) - 1, rel=1e-6)
    assert chi_square(sampler, 0.03) == math.inf
