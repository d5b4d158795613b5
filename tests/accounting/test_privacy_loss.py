"""Epsilon is right over the whole range, also far in the tails, and never too small."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy.special import ndtr

from dp_flash_hf.accounting.loss_grid import Steps
from dp_flash_hf.accounting.privacy_loss import gaussian_epsilon, poisson_epsilon
from tests.support.accounts import bracket, contour_epsilon, fine_pld_epsilon

HIGH = 1e-3  # of epsilon: what the bound may exceed it by


def exact_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """Of the Gaussian mechanism, with 60 digits."""
    with mpmath.workdps(60):  # type: ignore[no-untyped-call]
        a = mpmath.mpf(epsilon) / mu
        return mpmath.ncdf(mu / mpmath.mpf(2) - a) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / mpmath.mpf(2) - a)


def one_step_delta(q: float, sigma: float, epsilon: float) -> mpmath.mpf:
    """Of one Poisson step, a unit removed, by the definition, with 60 digits."""
    with mpmath.workdps(60):  # type: ignore[no-untyped-call]
        s = mpmath.mpf(sigma)
        x = s * s * mpmath.log((mpmath.exp(epsilon) - 1 + q) / q) + mpmath.mpf(1) / 2
        with_unit = (1 - mpmath.mpf(q)) * mpmath.ncdf(-x / s) + q * mpmath.ncdf((1 - x) / s)
        return with_unit - mpmath.exp(epsilon) * mpmath.ncdf(-x / s)


def two_steps_delta(q: float, sigma: float, epsilon: float) -> float:
    """Of two Poisson steps, a unit removed, by the definition: an integral over one outcome, the other in closed form."""
    first = np.linspace(-10 * sigma, 1 + 11 * sigma, 20_001)
    losses = np.log1p(q * np.expm1((2 * first - 1) / (2 * sigma * sigma)))
    masses = np.exp(losses - first * first / (2 * sigma * sigma)) * (first[1] - first[0]) / math.sqrt(2 * math.pi) / sigma
    left = np.expm1(epsilon - losses) + q  # what q e^((2 x - 1) / (2 sigma^2)) has to be; any x will do below 0
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(left > 0, sigma * sigma * np.log(left / q) + 0.5, -np.inf)
    return float(masses @ (q * ndtr((1 - x) / sigma) - left * ndtr(-x / sigma)))


@pytest.mark.parametrize("mu", [1e-3, 0.03, 0.9, 4.0, 42.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12, 1e-18, 1e-60])
def test_full_batches_are_exact(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon == 0:
        assert exact_delta(mu, 0) <= delta
    else:
        assert exact_delta(mu, epsilon) <= delta < exact_delta(mu, epsilon * (1 - 1e-9))


@pytest.mark.parametrize("mu", [0.03, 1.0, 42.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-12, 1e-18])
@pytest.mark.parametrize("steps", [1, 60, 5000])
def test_full_batches_composed_step_by_step_give_the_same(mu: float, delta: float, steps: int) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    assert epsilon <= poisson_epsilon([Steps(1.0, math.sqrt(steps) / mu, steps)], delta) <= (1 + HIGH) * epsilon


@pytest.mark.parametrize(
    ("q", "sigma", "delta"),
    [
        (0.01, 0.5, 1e-18),
        (1e-4, 0.3, 1e-9),
        (0.3, 0.02, 1e-12),
        (0.9, 5.0, 1e-15),
        (0.5, 80.0, 1e-18),
        (1e-6, 0.8, 1e-18),  # epsilon is 0.007
        (1e-8, 0.4, 1e-12),
    ],
)
def test_one_step_is_that_of_the_definition(q: float, sigma: float, delta: float) -> None:
    epsilon = poisson_epsilon([Steps(q, sigma, 1)], delta)
    assert one_step_delta(q, sigma, epsilon) <= delta < one_step_delta(q, sigma, epsilon * (1 - HIGH))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("q", "sigma", "doublings", "delta", "interval"),
    [(0.05, 0.8, 3, 1e-18, 1e-3), (0.3, 2.0, 4, 1e-15, 5e-4), (0.01, 0.4, 2, 1e-17, 2e-3), (0.9, 6.0, 4, 1e-18, 5e-4)],
)
def test_steps_at_a_delta_that_fourier_transforms_lose(
    q: float, sigma: float, doublings: int, delta: float, interval: float
) -> None:
    below, above = bracket(q, sigma, doublings, delta, interval)
    assert above - below <= 2**doublings * interval * (1 + 1e-6)
    assert below <= poisson_epsilon([Steps(q, sigma, 2**doublings)], delta) <= (1 + HIGH) * above


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "interval"),
    [
        (0.1, 0.24, 60, 1e-5, 1e-3),  # was inf
        (0.1, 0.22, 10, 1e-5, 1e-3),
        (0.01, 1.0, 1000, 1e-2, 1e-4),
        (0.01, 1.0, 1000, 1e-10, 1e-4),
        (1e-3, 0.5, 10_000, 1e-6, 1e-4),
        (1e-5, 0.3, 1, 1e-6, 1e-4),
        (0.3, 20.0, 1000, 1e-6, 1e-5),
        (0.5, 100.0, 5, 1e-6, 1e-5),
        pytest.param(1e-4, 0.4, 100_000, 1e-6, 1e-4, marks=pytest.mark.complete),
    ],
)
def test_epsilon_is_that_of_dp_accounting_on_a_fine_grid(
    q: float, sigma: float, steps: int, delta: float, interval: float
) -> None:
    direct = fine_pld_epsilon(q, sigma, steps, delta, interval)
    # dp-accounting rounds up too: by steps * interval^2 / 6 or so, times the order of the moment that decides.
    assert 0.999 * direct <= poisson_epsilon([Steps(q, sigma, steps)], delta) <= (1 + HIGH) * direct


@pytest.mark.parametrize(
    ("q", "sigma", "delta"), [(1e-6, 0.7, 1e-18), (1e-4, 0.9, 1e-15), (1e-3, 0.4, 1e-10), (0.3, 3.0, 1e-18)]
)
def test_two_steps_are_those_of_the_definition(q: float, sigma: float, delta: float) -> None:
    epsilon = poisson_epsilon([Steps(q, sigma, 2)], delta)
    assert two_steps_delta(q, sigma, epsilon) <= delta < two_steps_delta(q, sigma, epsilon * (1 - HIGH))


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "epsilon"),
    [
        # `contour_epsilon` of tests.support.accounts
        (1e-6, 0.7053, 100_000, 1e-10, 0.0092711),  # was 0.00968
        (1e-5, 0.7929, 100_000, 1e-10, 0.0489265),
    ],
)
def test_steps_that_together_draw_a_unit_less_than_once(
    q: float, sigma: float, steps: int, delta: float, epsilon: float
) -> None:
    assert (1 - 1e-5) * epsilon <= poisson_epsilon([Steps(q, sigma, steps)], delta) <= (1 + HIGH) * epsilon


@pytest.mark.complete
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.01, 0.8, 1000, 1e-18),  # epsilon is 10
        (1e-4, 0.4, 100_000, 1e-6),  # 8
        (1e-5, 0.7929, 100_000, 1e-10),  # 0.05
    ],
)
def test_epsilon_is_that_of_an_integral_without_a_grid(q: float, sigma: float, steps: int, delta: float) -> None:
    exact = contour_epsilon(q, sigma, steps, delta)
    assert (1 - 1e-5) * exact <= poisson_epsilon([Steps(q, sigma, steps)], delta) <= (1 + HIGH) * exact


def test_kinds_of_steps_compose() -> None:
    half, rest = [Steps(0.02, 1.1, 60)], [Steps(0.02, 1.1, 40)]
    whole = poisson_epsilon([Steps(0.02, 1.1, 100)], 1e-9)
    assert poisson_epsilon(half + rest, 1e-9) == pytest.approx(whole, rel=HIGH)
    mixed = poisson_epsilon([Steps(0.02, 1.1, 60), Steps(1.0, 30.0, 8), Steps(0.3, 9.0, 5)], 1e-9)
    # More than the parts, less than their sum at shares of delta.
    parts = [poisson_epsilon([part], 1e-9) for part in (Steps(0.02, 1.1, 60), Steps(1.0, 30.0, 8), Steps(0.3, 9.0, 5))]
    shared = [poisson_epsilon([part], 1e-9 / 3) for part in (Steps(0.02, 1.1, 60), Steps(1.0, 30.0, 8), Steps(0.3, 9.0, 5))]
    assert max(parts) < mixed < sum(shared)


def test_the_larger_direction_is_reported() -> None:
    # Where the rate is high, a unit added is nearly as bad as one removed; the bound is for both.
    from dp_flash_hf.accounting import privacy_loss

    steps = [Steps(0.99, 2.0, 3)]
    both = [privacy_loss._directed(steps, 1e-6, added=added, known=0.0) for added in (False, True)]
    assert max(both) <= poisson_epsilon(steps, 1e-6) <= max(both) * (1 + HIGH)
    assert min(both) > 0.9 * max(both)
