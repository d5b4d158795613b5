"""A ledger counts every step once, and keeps what it counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.mechanisms.config import AccountantName
from dp_flash_hf.mechanisms.sampling import PoissonSampler, TruncatedPoissonSampler
from tests.support.accounts import plan_of, pld_epsilon, poisson_event


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
        assert ledger.epsilon(1e-5) == pytest.approx(expected, rel=1e-3)
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


def test_bad_records_are_refused() -> None:
    ledger = Ledger()
    ledger.record(PoissonSampler(100, 2), 1.0)
    with pytest.raises(ValueError, match="100 units"):
        ledger.record(PoissonSampler(101, 2), 1.0)
    with pytest.raises(ValueError, match="delta"):
        ledger.epsilon(0.0)
    assert ledger.steps == 1
