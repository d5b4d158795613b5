from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib import metadata
from typing import Any

import pytest

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.reporting.report import (
    CHANGED_NOT_COVERED,
    LOST_STEPS_NOT_COVERED,
    N_UNITS_NOT_COVERED,
    NOT_COVERED,
    PrivacyReport,
)

CONFIG = PrivacyConfig(target_delta=1e-5, noise_multiplier=2.5, max_grad_norm=0.25, clipping="automatic")
TRUNCATED = replace(
    CONFIG,
    sampling="truncated_poisson",
    max_batch_size=70,
    privacy_unit="user|id",
    max_examples_per_unit=4,
    clipping="per_layer",
)


def report_of(config: PrivacyConfig, steps: int = 30) -> PrivacyReport:
    plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=20, steps=40)
    ledger = Ledger(plan.accountant)
    ledger.record(plan.sampler, plan.noise_multiplier, steps)
    return PrivacyReport.of(config, plan, ledger)


def test_report_states_what_was_executed() -> None:
    report = report_of(CONFIG)
    ledger = Ledger()
    ledger.record(PoissonSampler(1000, 20), 2.5, 30)
    assert report.spent_epsilon == ledger.epsilon(1e-5) < report.epsilon
    assert report.epsilon == report_of(CONFIG, 40).epsilon == report_of(CONFIG, 40).spent_epsilon
    assert (report.steps, report.planned_steps) == (30, 40)
    assert (report.sampler, report.sampling_rate, report.expected_batch_size, report.max_batch_size) == (
        "poisson",
        0.02,
        20,
        None,
    )
    assert (report.noise_multiplier, report.max_grad_norm, report.clipping, report.delta) == (2.5, 0.25, "automatic", 1e-5)
    assert (report.n_units, report.adjacency, report.unit) == (1000, "add or remove one unit", "one training example")
    assert report.private
    assert set(NOT_COVERED) <= set(report.not_covered)
    names = {"dp-flash-hf", "torch", "transformers", "scipy"}
    assert report.versions == {name: metadata.version(name) for name in names}


def test_report_of_users_under_truncated_sampling() -> None:
    report = report_of(TRUNCATED)
    assert (report.unit, report.max_examples_per_unit, report.max_batch_size) == ("all rows with the same 'user|id'", 4, 70)
    assert report.sampler == "truncated_poisson"
    assert report.versions["dp-accounting"] == metadata.version("dp-accounting")


def test_report_names_opacus_where_it_did_the_accounting() -> None:
    report = report_of(replace(CONFIG, accountant="prv"))
    assert report.accountant == "prv"
    assert report.versions["opacus"] == metadata.version("opacus")
    assert "dp-accounting" not in report.versions


def test_caller_can_name_the_unit_and_add_gaps() -> None:
    plan = PrivacyPlan.from_config(CONFIG, n_units=1000, expected_batch_size=20, steps=40)
    report = PrivacyReport.of(CONFIG, plan, Ledger(), unit="one preference pair", not_covered=("The reference model.",))
    assert report.unit == "one preference pair"
    assert (report.spent_epsilon, report.epsilon) == (0, plan.epsilon())
    assert report.not_covered == (*NOT_COVERED, N_UNITS_NOT_COVERED, LOST_STEPS_NOT_COVERED, "The reference model.")


def test_lost_steps_are_covered_where_they_are_on_record() -> None:
    plan = PrivacyPlan.from_config(CONFIG, n_units=1000, expected_batch_size=20, steps=40)
    ledger = Ledger()
    ledger.record(plan.sampler, 2.5, 30)
    report = PrivacyReport.of(CONFIG, plan, ledger, lost_steps=3, recorded=True)
    assert report.not_covered == (*NOT_COVERED, N_UNITS_NOT_COVERED)
    assert "3 of them are not in the weights" in " ".join(report.to_text().split())
    assert report.spent_epsilon == report_of(CONFIG).spent_epsilon


def test_every_part_is_shown() -> None:
    spent = Ledger()
    spent.record(PoissonSampler(1000, 50), 1.5, 7)
    plan = PrivacyPlan.from_config(CONFIG, n_units=1000, expected_batch_size=20, steps=40, spent=spent)
    ledger = Ledger.total([spent], "pld")
    ledger.record(plan.sampler, 2.5, 10)
    report = PrivacyReport.of(CONFIG, plan, ledger)
    assert (report.steps, report.planned_steps) == (17, 47)
    assert report.spent_epsilon == ledger.epsilon(1e-5) > report_of(CONFIG, 10).spent_epsilon
    assert report.epsilon == plan.epsilon()
    assert CHANGED_NOT_COVERED in report.not_covered
    assert PrivacyReport.from_json(report.to_json()) == report
    for text in (" ".join(report.to_text().split()), report.to_model_card()):
        assert "composed of 7 steps with sigma = 1.5, q = 0.05; 10 steps with sigma = 2.5, q = 0.02" in text
    assert "composed of" not in report_of(CONFIG).to_text()


@pytest.mark.parametrize("config", [CONFIG, TRUNCATED, replace(CONFIG, seed=1)])
def test_report_survives_json(config: PrivacyConfig) -> None:
    report = report_of(config)
    assert PrivacyReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.to_dict().keys() == {f.name for f in fields(PrivacyReport)}


def test_other_json_is_refused() -> None:
    data = report_of(CONFIG).to_dict()
    others: list[Any] = [[], {}, {**data, "dropped": 3}, {k: v for k, v in data.items() if k != "private"}]
    for broken in others:
        with pytest.raises(ValueError, match="to_json"):
            PrivacyReport.from_json(json.dumps(broken))


@pytest.mark.parametrize("config", [CONFIG, TRUNCATED])
def test_text_and_model_card_say_everything_on_one_screen(config: PrivacyConfig) -> None:
    report = report_of(config)
    text, card = report.to_text(), report.to_model_card()
    assert str(report) == text
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100
    said = " ".join(text.split())
    for shown in ("1e-05", "add or remove one unit", "1000 units", "q = 0.02", "20 units expected", "C = 0.25", "sigma = 2.5"):
        assert shown in said
        assert shown in card
    for shown in ("30 executed of 40 planned", "pld", metadata.version("scipy"), report.sampler, *report.not_covered):
        assert shown in said
        assert shown in card
    assert (report.max_batch_size is not None) == ("at most 70" in said)
    assert "NOT PRIVATE" not in said + card
    assert card.startswith("## Differential privacy\n")
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in table)  # a column name with a bar does not split a cell


def test_printed_epsilon_never_flatters() -> None:
    report = report_of(CONFIG)
    for epsilon in (1.0001, 1.0005, 1.99999, 3.0, 7.1234, 0.0, float("inf")):
        text = replace(report, epsilon=epsilon).to_text()
        shown = float(text.split("epsilon <= ")[1].split()[0])
        assert shown == epsilon or epsilon < shown <= epsilon + 0.001 + 1e-9
        spent = replace(report, spent_epsilon=epsilon).to_text().split("epsilon <= ")[2].split()[0]
        assert float(spent) == shown


def test_budget_is_shown_beside_what_was_spent() -> None:
    report = report_of(PrivacyConfig(target_epsilon=0.5, target_delta=1e-5))
    assert report.target_epsilon == 0.5
    assert "(budget: epsilon = 0.5)" in report.to_text()
    assert report.spent_epsilon < report.epsilon <= 0.5


def test_a_fixed_seed_is_shouted() -> None:
    report = report_of(replace(CONFIG, seed=0))
    assert not report.private
    assert report.to_text().startswith("NOT PRIVATE")
    assert "> **NOT PRIVATE" in report.to_model_card()
    assert json.loads(report.to_json())["private"] is False
