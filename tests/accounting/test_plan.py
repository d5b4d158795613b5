from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.mechanisms.config import AccountantName, PrivacyConfig
from dp_flash_hf.mechanisms.sampling import PoissonSampler, TruncatedPoissonSampler

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


@pytest.mark.parametrize("run", RUNS)
def test_epsilon_is_dp_accountings_and_within_one_percent_of_prv(run: tuple[int, int, float, int, float]) -> None:
    from opacus.accountants import PRVAccountant

    units, batch, sigma, steps, delta = run
    ours = plan_of(run).epsilon()
    assert ours == pytest.approx(pld_epsilon([(poisson_event(batch / units, sigma), steps)], delta), rel=1e-12)
    prv = PRVAccountant()
    prv.history = [(sigma, batch / units, steps)]
    assert ours == pytest.approx(prv.get_epsilon(delta), rel=0.01)
    assert plan_of(run, "prv").epsilon() == prv.get_epsilon(delta)


def test_epsilon_of_the_published_example() -> None:
    # The figure the design quotes for Poisson sampling: SST-2's size, sigma 0.6, three epochs.
    assert plan_of(RUNS[0]).epsilon() == pytest.approx(5.85, abs=0.01)


def test_rdp_is_opacus_and_an_upper_bound() -> None:
    from opacus.accountants import RDPAccountant

    for run in RUNS[1:3]:
        units, batch, sigma, steps, delta = run
        rdp = RDPAccountant()
        rdp.history = [(sigma, batch / units, steps)]
        assert plan_of(run, "rdp").epsilon() == rdp.get_epsilon(delta) > plan_of(run).epsilon()


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
    for sampler, sigma, worse in (
        (TruncatedPoissonSampler(4, 1, 1), 5.0, 4),
        (TruncatedPoissonSampler(1000, 50, 60), 4.0, 1001),
    ):
        ledger = Ledger()
        ledger.record(sampler, sigma, 50)
        direct = {
            size: pld_epsilon(
                [
                    (
                        dp_accounting.TruncatedSubsampledGaussianDpEvent(
                            size, sampler.sampling_rate, sampler.max_batch_size, sigma
                        ),
                        50,
                    )
                ],
                1e-5,
            )
            for size in (sampler.n_units, sampler.n_units + 1)
        }
        assert max(direct, key=direct.__getitem__) == worse
        assert ledger.epsilon(1e-5) == pytest.approx(direct[worse], rel=1e-12)


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


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
@pytest.mark.parametrize("target", [0.3, 1.5, 4.0])
def test_max_steps_is_exact(accountant: AccountantName, target: float) -> None:
    plan = plan_of((2000, 40, 2.0, 1, 1e-4), accountant)
    affordable = plan.max_steps(target)
    assert plan.epsilon(affordable) <= target < plan.epsilon(affordable + 1)


@pytest.mark.parametrize("accountant", [pytest.param("pld", marks=pytest.mark.slow), "rdp"])
def test_noise_is_calibrated_to_what_is_left_of_a_budget(accountant: AccountantName) -> None:
    spent = Ledger(accountant)
    spent.record(PoissonSampler(1000, 10), 0.9, 50)
    spent.record(PoissonSampler(1000, 20), 1.5, 5)
    config = PrivacyConfig(target_epsilon=3.0, target_delta=1e-5, accountant=accountant)
    units: dict[str, Any] = {"n_units": 1000, "expected_batch_size": 10, "steps": 100}
    rest, alone = PrivacyPlan.from_config(config, **units, spent=spent), PrivacyPlan.from_config(config, **units)
    assert rest.noise_multiplier > alone.noise_multiplier
    assert (rest.steps, rest.spent) == (100, spent.entries)
    together = Ledger.total([spent], accountant)
    together.record(rest.sampler, rest.noise_multiplier, 100)
    assert 0.999 * 3.0 <= rest.epsilon() == together.epsilon(1e-5) <= 3.0
    assert rest.epsilon(0) == spent.epsilon(1e-5)
    with pytest.raises(ValueError, match="target_epsilon: expected a budget that some noise keeps"):
        PrivacyPlan.from_config(replace(config, target_epsilon=0.9 * spent.epsilon(1e-5)), **units, spent=spent)


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


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_a_ledger_of_the_plans_steps_spends_the_plans_epsilon(accountant: AccountantName) -> None:
    plan = plan_of((2000, 40, 1.2, 25, 1e-4), accountant)
    ledger = Ledger(accountant)
    assert plan.epsilon(0) == ledger.epsilon(1e-4) == 0.0
    spent = [0.0]
    for step in range(1, plan.steps + 1):
        ledger.record(plan.sampler, plan.noise_multiplier)
        assert ledger.steps == step
        if step % 8 == 1:
            spent.append(ledger.epsilon(1e-4))
            assert spent[-1] == plan.epsilon(step) > spent[-2]
    assert ledger.epsilon(1e-4) == plan.epsilon()


def test_different_steps_compose_whatever_their_order() -> None:
    steps = [(PoissonSampler(1000, 20), 1.0, 40), (PoissonSampler(1000, 50), 1.5, 10), (PoissonSampler(1000, 20), 1.0, 5)]
    expected = pld_epsilon([(poisson_event(0.02, 1.0), 45), (poisson_event(0.05, 1.5), 10)], 1e-5)
    for order in (steps, steps[::-1]):
        ledger = Ledger()
        for sampler, sigma, count in order:
            ledger.record(sampler, sigma, count)
        assert ledger.steps == 55
        assert ledger.epsilon(1e-5) == pytest.approx(expected, rel=1e-6)
        for accountant in ("prv", "rdp"):
            other = Ledger(accountant)
            for sampler, sigma, count in order:
                other.record(sampler, sigma, count)
            assert other.epsilon(1e-5) > 0.99 * expected


def test_ledger_survives_a_checkpoint() -> None:
    ledger = Ledger("pld")
    ledger.record(PoissonSampler(1000, 20), 10 / 3, 4)
    ledger.record(TruncatedPoissonSampler(1000, 20, 50), 4.9, 2)
    resumed = Ledger("rdp")
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert resumed.entries == ledger.entries
    assert resumed.accountant == "pld"
    assert resumed.epsilon(1e-5) == ledger.epsilon(1e-5) > 0
    resumed.record(PoissonSampler(1000, 20), 10 / 3)
    assert resumed.steps == 7
    assert resumed.epsilon(1e-5) > ledger.epsilon(1e-5)


def damaged(**changes: Any) -> dict[str, Any]:
    ledger = Ledger()
    ledger.record(PoissonSampler(100, 2), 1.0, 3)
    state = ledger.state_dict()
    state["entries"][0].update(changes)
    return state


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"accountant": "pld"},
        {"accountant": "gdp", "entries": []},
        damaged(steps=-1),
        damaged(steps="3"),
        damaged(noise_multiplier=0.0),
        damaged(noise_multiplier=None),
        damaged(sampler={"kind": "shuffle"}),
        damaged(sampler=None),
    ],
)
def test_a_damaged_state_is_refused_and_the_ledger_kept(state: Any) -> None:
    ledger = Ledger()
    ledger.record(PoissonSampler(100, 2), 1.0)
    entries = ledger.entries
    with pytest.raises(ValueError, match="expected"):
        ledger.load_state_dict(state)
    assert ledger.entries == entries


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


@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_hopelessly_little_noise_is_no_privacy_rather_than_no_memory(accountant: AccountantName) -> None:
    for sigma in (1e-200, 1e-3, 0.05):
        assert plan_of((1000, 100, sigma, 1000, 1e-4), accountant).epsilon() == math.inf
    assert plan_of((1000, 100, 1e-3, 1000, 1e-4), "rdp").epsilon() > 1e6


@pytest.mark.parametrize("delta", [0.001, 0.5, 0.0, math.nan])
def test_delta_of_one_over_the_units_or_more_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="try "):
        plan_of((1000, 10, 1.0, 5, delta))


def test_bad_plans_and_records_are_refused() -> None:
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
    ledger = Ledger()
    ledger.record(PoissonSampler(100, 2), 1.0)
    with pytest.raises(ValueError, match="100 units"):
        ledger.record(PoissonSampler(101, 2), 1.0)
    with pytest.raises(ValueError, match="delta"):
        ledger.epsilon(0.0)
    assert ledger.steps == 1
