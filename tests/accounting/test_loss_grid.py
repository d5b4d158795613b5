"""Losses on a grid keep what has to be kept, and their sums are what adding up number by number gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from dp_flash_hf.accounting.loss_grid import Grid, LossSum, Outcomes, Steps, large_losses, losses, small_losses


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("rate", "sigma", "split", "interval"), [(0.3, 1.5, 2.0, 3e-3), (1e-4, 0.6, 2.0, 1e-5), (1.0, 2.0, 3.0, 0.01)]
)
def test_small_and_large_losses_keep_both_distributions_of_the_pair(
    added: bool, rate: float, sigma: float, split: float, interval: float
) -> None:
    low, high = -9 * sigma, 1 + 9 * sigma
    outcomes = Outcomes(Steps(rate, sigma, 1), added, low, -split if added else split, high)
    small = small_losses(outcomes, interval)
    grid = interval * np.arange(small.first, small.first + len(small.masses))
    values, masses = large_losses(outcomes, small, interval)
    assert values[0] == pytest.approx(grid[-1], abs=1e-12)
    assert values[-1] >= abs(losses(low if added else high, rate, sigma)) * (1 - 1e-12)
    for found, of_values in ((small.masses, grid), (masses, values)):
        # Losses from the first to the last belong to outcomes between two, which have so much in either dataset.
        x = np.clip(np.array([_outcome(-value if added else value, rate, sigma) for value in of_values[[0, -1]]]), low, high)
        without, drawn = abs(np.diff(norm.cdf(x, 0, sigma)))[0], abs(np.diff(norm.cdf(x, 1, sigma)))[0]
        with_unit = (1 - rate) * without + rate * drawn
        first, second = (without, with_unit) if added else (with_unit, without)
        assert found.sum() == pytest.approx(first, rel=1e-6, abs=1e-15)
        assert found @ np.exp(-of_values) == pytest.approx(second, rel=1e-6, abs=1e-15)


def _outcome(loss: float, rate: float, sigma: float) -> float:
    inner = math.expm1(loss) / rate + 1
    return sigma * sigma * math.log(inner) + 0.5 if inner > 0 else -math.inf


@pytest.mark.parametrize("tilt", [0.0, 3.0, 40.0])
def test_sums_are_those_of_numbers_added_up_one_by_one(tilt: float) -> None:
    interval = 0.05
    grids = [Grid(-2, np.array([0.5, 0.3, 0.1, 0.0, 0.05]), 3), Grid(-1, np.array([0.2, 0.79, 0.009]), 2)]
    total = LossSum(grids, tilt, interval)
    total.compose()
    masses, first = np.ones(1), 0
    for grid in grids:
        for _ in range(grid.number):
            masses, first = np.convolve(masses, grid.masses), first + grid.first
    sums = interval * (first + np.arange(len(masses)))
    for epsilon in (-0.3, 0.0, 0.02, 0.2, 0.33):
        delta = float(masses @ np.maximum(0, -np.expm1(np.minimum(epsilon - sums, 0))))
        if tilt:
            more = 1e-11 * math.exp(total.log_moment - tilt * epsilon)
            assert delta <= math.exp(total.log_delta(epsilon)) <= delta + more
        else:
            assert delta <= total.deltas(np.array([epsilon]))[0] <= delta + 2e-9


def test_no_steps_are_a_loss_of_0() -> None:
    nothing = LossSum([Grid(-2, np.array([0.5, 0.5]), 0)], 0.0, 0.1)
    nothing.compose()
    assert nothing.deltas(np.array([-1.0, 0.0, 1.0])) == pytest.approx([1 - math.exp(-1), 0, 0], abs=2e-9)
