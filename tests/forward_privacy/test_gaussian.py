"""The Gaussian mechanism: its delta, its calibration, and what sampled passes cost."""

from __future__ import annotations

import math

import dp_accounting
import pytest
import torch
from scipy import stats

from dp_flash_hf.forward_privacy.gaussian import calibrations, gaussian_delta, sampled_delta, sampled_epsilon


def test_delta_is_the_inverse_of_the_epsilon_of_dp_accounting() -> None:
    for mu in (0.05, 0.7, 3.0):
        for delta in (1e-9, 1e-5, 1e-2):
            epsilon = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
            if epsilon > 0:
                assert float(gaussian_delta(epsilon, torch.tensor(mu))) == pytest.approx(delta, rel=1e-6)


def test_calibrations_are_the_published_ones_and_say_where_the_textbook_fails() -> None:
    one = calibrations(1.0, 1e-5)
    assert one.analytic == pytest.approx(3.7306, abs=1e-4)  # Balle and Wang 2018
    assert one.classic == pytest.approx(math.sqrt(2 * math.log(1.25e5)))
    assert one.classic_is_proven
    assert one.waste == pytest.approx(one.classic / one.analytic)
    assert calibrations(0.1, 1e-5).waste > one.waste > 1
    far = calibrations(50.0, 1e-5)
    assert not far.classic_is_proven
    assert far.waste < 1
    assert dp_accounting.get_epsilon_gaussian(far.classic, 1e-5) > 50
    with pytest.raises(ValueError, match="epsilon: expected"):
        calibrations(0.0, 1e-5)


def test_sampled_passes_cost_the_mixture_over_how_many_were_joined() -> None:
    epsilon, squared_mu, q, passes, certain = 1.3, 0.4, 0.2, 12, 0.1
    expected = 0.0
    for k in range(passes + 1):
        mu = math.sqrt(certain + k * squared_mu)
        above, below = stats.norm.cdf(mu / 2 - epsilon / mu), stats.norm.cdf(-mu / 2 - epsilon / mu)
        expected += stats.binom.pmf(k, passes, q) * (above - math.exp(epsilon) * below)
    found = sampled_delta(epsilon, squared_mu=squared_mu, sampling_rate=q, passes=passes, certain=certain)
    assert found == pytest.approx(expected, rel=1e-9)
    assert sampled_epsilon(expected, squared_mu=squared_mu, sampling_rate=q, passes=passes, certain=certain) == pytest.approx(
        epsilon, rel=1e-6
    )
    always = sampled_epsilon(1e-5, squared_mu=squared_mu, sampling_rate=1.0, passes=passes)
    assert always == pytest.approx(dp_accounting.get_epsilon_gaussian(1 / math.sqrt(passes * squared_mu), 1e-5), rel=1e-9)
    rarely = sampled_epsilon(1e-5, squared_mu=squared_mu, sampling_rate=0.01, passes=passes)
    one = dp_accounting.get_epsilon_gaussian(1 / math.sqrt(squared_mu), 1e-5)
    assert 0.5 * one < rarely < always  # far more than 0.01 of it: who takes part is seen
