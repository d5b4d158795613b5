"""Plans keep their budget, waste little of it, and end at their searches' ends."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.privacy_filter import filter_epsilon
from dp_flash_hf.mechanisms.config import AccountantName, PrivacyConfig
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from tests.support.accounts import RUNS, fine_pld_epsilon, plan_of, pld_epsilon, poisson_event


@pytest.mark.sampled(3)
@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
@pytest.mark.parametrize(
    ("units", "batch", "steps", "epsilon", "delta"), [(10_000, 100, 300, 1.0, 1e-5), (500, 25, 40, 4.0, 1e-4)]
)
def test_calibrated_noise_meets_the_budget_and_wastes_little(
    accountant: AccountantName, units: int, batch: int, steps: int, epsilon: float, delta: float
) -> None:
    config = PrivacyConfig(target_epsilon=epsilon, target_delta=delta, accountant=accountant)
    plan = PrivacyPlan.from_config(config, n_units=units, expected_batch_size=batch, steps=steps)
    assert 0.999 * epsilon <= plan.epsilon() <= epsilon
    assert plan.epsilon(steps + 1) > plan.epsilon()
    if accountant == "pld":
        assert pld_epsilon([(poisson_event(batch / units, plan.noise_multiplier), steps)], delta) <= epsilon


def test_truncated_sampling_is_calibrated_with_more_noise() -> None:
    config = PrivacyConfig(target_epsilon=0.5, target_delta=1e-4)
    truncating = replace(config, sampling="truncated_poisson", max_batch_size=62)
    poisson, truncated = (
        PrivacyPlan.from_config(c, n_units=1000, expected_batch_size=50, steps=100) for c in (config, truncating)
    )
    assert truncated.noise_multiplier > 1.05 * poisson.noise_multiplier
    assert 0.999 * 0.5 <= truncated.epsilon() <= 0.5


@pytest.mark.parametrize(
    ("units", "batch", "steps", "epsilon", "delta", "sigma"),
    [
        (500, 500, 60, 0.01, 1e-12, 4484.9),  # was 4564.5
        (500, 500, 1, 0.01, 1e-18, None),
        (10**7, 10**7, 100_000, 1000.0, 1e-18, None),
        (1000, 100, 60, 100.0, 1e-5, None),  # was a plan of two thirds of it, after half a minute
        (1000, 100, 60, 900.0, 1e-18, None),
        (10**6, 2, 1, 3.0, 1e-9, None),
        (10**6, 999_999, 300, 0.01, 1e-15, None),
        (3 * 10**6, 500, 100_000, 0.5, 1e-10, None),
    ],
)
def test_any_budget_is_used_to_a_thousandth(
    units: int, batch: int, steps: int, epsilon: float, delta: float, sigma: float | None
) -> None:
    config = PrivacyConfig(target_epsilon=epsilon, target_delta=delta)
    plan = PrivacyPlan.from_config(config, n_units=units, expected_batch_size=batch, steps=steps)
    assert 0.999 * epsilon <= plan.epsilon() <= epsilon
    if sigma is not None:
        assert plan.noise_multiplier == pytest.approx(sigma, rel=2e-3)  # a thousandth, and what noise is charged
    if delta >= 1e-10 and steps <= 1000:
        direct = fine_pld_epsilon(batch / units, plan.noise_multiplier, steps, delta, 1e-3)
        assert 0.99 * epsilon <= direct <= 1.001 * epsilon


@settings(max_examples=15, deadline=None)
@given(epsilon=st.floats(0.5, 20), batch=st.integers(1, 200), steps=st.integers(1, 10_000), log_delta=st.floats(-9, -3))
def test_calibration_ends_within_the_budget_everywhere(epsilon: float, batch: int, steps: int, log_delta: float) -> None:
    config = PrivacyConfig(target_epsilon=epsilon, target_delta=10**log_delta, accountant="rdp")
    plan = PrivacyPlan.from_config(config, n_units=900, expected_batch_size=batch, steps=steps)
    assert 0.999 * epsilon <= plan.epsilon() <= epsilon


def test_given_noise_is_kept() -> None:
    plan = PrivacyPlan.from_config(
        PrivacyConfig(noise_multiplier=0.9, target_delta=1e-5), n_units=1000, expected_batch_size=10, steps=7
    )
    assert plan == PrivacyPlan(sampler=PoissonSampler(1000, 10), noise_multiplier=0.9, steps=7, target_delta=1e-5)


def test_a_budget_that_no_noise_meets_is_an_error() -> None:
    # RDP with opacus' orders (up to 63) cannot certify less than about log(1 / delta) / 62.
    config = PrivacyConfig(target_epsilon=0.05, target_delta=1e-6, accountant="rdp")
    with pytest.raises(ValueError, match="raise target_epsilon") as error:
        PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=10, steps=10)
    assert "\n" not in str(error.value)


def test_a_budget_that_hardly_needs_noise_is_met() -> None:
    config = PrivacyConfig(target_epsilon=1e9, target_delta=1e-5, accountant="rdp")
    assert PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=10, steps=1).epsilon() <= 1e9


@pytest.mark.sampled(3)
@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
@pytest.mark.parametrize("target", [0.3, 1.5, 4.0])
def test_max_steps_is_exact(accountant: AccountantName, target: float) -> None:
    plan = plan_of((2000, 40, 2.0, 1, 1e-4), accountant)
    affordable = plan.max_steps(target)
    assert plan.epsilon(affordable) <= target < plan.epsilon(affordable + 1)


@pytest.mark.parametrize("accountant", [pytest.param("pld", marks=pytest.mark.complete), "rdp"])
def test_noise_is_calibrated_to_what_is_left_of_a_budget(accountant: AccountantName) -> None:
    spent = Ledger(accountant)
    spent.record(PoissonSampler(1000, 10), 0.9, 50)
    spent.record(PoissonSampler(1000, 20), 1.5, 5)
    config = PrivacyConfig(target_epsilon=5.0, target_delta=1e-5, accountant=accountant)
    units: dict[str, Any] = {"n_units": 1000, "expected_batch_size": 10, "steps": 100}
    rest, alone = PrivacyPlan.from_config(config, **units, spent=spent), PrivacyPlan.from_config(config, **units)
    assert rest.noise_multiplier > alone.noise_multiplier
    assert (rest.steps, rest.spent) == (100, spent.entries)
    in_all = Ledger.total([spent], accountant)
    in_all.record(rest.sampler, rest.noise_multiplier, 100)
    assert 0.999 * 5.0 <= rest.epsilon() <= 5.0
    ideal = filter_epsilon(in_all.entries, 1e-5)  # of noise that is not computed, and charged for it
    assert ideal < rest.epsilon() < ideal * 1.001
    assert in_all.epsilon(1e-5) < rest.epsilon()
    assert rest.epsilon(0) == pytest.approx(filter_epsilon(spent.entries, 1e-5), rel=1e-3)
    with pytest.raises(ValueError, match="target_epsilon: expected a budget that some noise keeps"):
        PrivacyPlan.from_config(replace(config, target_epsilon=0.9 * filter_epsilon(spent.entries, 1e-5)), **units, spent=spent)


def test_steps_of_one_kind_are_one_entry_of_a_plan() -> None:
    spent = Ledger()
    spent.record(PoissonSampler(1000, 10), 0.9, 50)
    config = PrivacyConfig(noise_multiplier=0.9, target_delta=1e-5)
    plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=10, steps=7, spent=spent)
    assert (plan.steps, plan.spent) == (57, ())


def test_max_steps_at_its_ends() -> None:
    assert plan_of((100, 100, 0.5, 1, 1e-3)).max_steps(0.1) == 0
    assert plan_of((10**6, 1, 100.0, 1, 1e-7)).max_steps(8.0) == 10**6
    with pytest.raises(ValueError, match="target_epsilon"):
        plan_of(RUNS[0]).max_steps(0.0)


@pytest.mark.parametrize("delta", [0.001, 0.5, 0.0, math.nan])
def test_delta_of_one_over_the_units_or_more_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="try "):
        plan_of((1000, 10, 1.0, 5, delta))


@pytest.mark.parametrize("units", [1, 2, 3, 60, 1000, 67_349, 10**12])
def test_the_delta_that_is_advised_is_accepted(units: int) -> None:
    with pytest.raises(ValueError, match="try ") as error:
        plan_of((units, 1, 1.0, 5, 1 / units))
    advised = float(str(error.value).rpartition("try ")[2])
    assert plan_of((units, 1, 1.0, 5, advised)).target_delta == advised > 0


def test_bad_plans_are_refused() -> None:
    good = plan_of(RUNS[1])
    for changes in (
        {"steps": 0},
        {"steps": 2.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.inf},
        {"accountant": "gdp"},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            replace(good, **changes)
