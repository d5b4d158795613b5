"""What calls cost the units in them, and how it adds up."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.gaussian import sampled_epsilon
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.forward_privacy.sensitivity import full_token_factor, token_factor, token_sensitivity
from tests.support.forward_privacy import GOOD, band, call, cost, private_layer, random_qkv


def test_a_call_costs_what_the_rows_of_its_longest_unit_cost() -> None:
    privacy = AttentionPrivacy(**GOOD)
    qkv = random_qkv(3, 2, 1, 6)
    padding = torch.arange(6) < torch.tensor([[2], [5], [1]])
    for rows, expected in ((3, 5), (None, 8), (6, 8)):  # where rows are not known to be units, all are taken for one
        module, ledger = private_layer(privacy, rows=rows)
        call(module, qkv, padding)
        assert ledger.squared_mu == pytest.approx(cost(privacy, expected))
        assert ledger.rho == pytest.approx(ledger.squared_mu / 2)
    module, ledger = private_layer(privacy, causal=False, rows=3)
    call(module, random_qkv(3, 2, 1, 4, keys=7))  # across: the queries are what is released
    assert ledger.squared_mu == pytest.approx(cost(privacy, 4))
    assert sum(ledger.calls.values()) == 1


def test_packed_parts_are_one_unit_unless_they_are_named() -> None:
    privacy = AttentionPrivacy(**GOOD)
    ends = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    module, ledger = private_layer(privacy, rows=1)
    call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 8))
    module, ledger = private_layer(privacy, rows=1)
    with ledger.units(["a", "b", "c"]):
        call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 4))
    with ledger.units(["a", "b"]), pytest.raises(PrivacyError, match="2 ids"):
        call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert sum(ledger.calls.values()) == 1


def test_named_units_are_charged_for_their_own_rows_and_the_worst_is_reported() -> None:
    privacy = AttentionPrivacy(**GOOD)
    module, ledger = private_layer(privacy, rows=3)
    qkv, padding = random_qkv(3, 1, 1, 6), torch.arange(6) < torch.tensor([[2], [5], [4]])
    with ledger.units(torch.tensor([7, 8, 7])):  # unit 7 holds two rows
        call(module, qkv, padding)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 6))
    with ledger.units([8, 9, 10]):
        call(module, qkv, padding)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 7))
    call(module, qkv, padding)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 12))
    assert ledger.epsilon(1e-5) == dp_accounting.get_epsilon_gaussian(1 / math.sqrt(ledger.squared_mu), 1e-5)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3), (False, 2)])
def test_a_token_costs_what_the_pattern_of_the_call_lets_it_move(causal: bool, window: int | None) -> None:
    privacy = AttentionPrivacy(**GOOD, unit="token", logit_cap=0.5)
    module, ledger = private_layer(privacy, causal=causal, rows=2)
    mask = None if window is None else band(6, window, causal)[None, None]
    call(module, random_qkv(2, 2, 1, 6), mask)
    expected = (token_sensitivity(6, [1.0], 0.5, causal=causal, window=window) / 2) ** 2
    assert ledger.squared_mu == pytest.approx(cost(privacy, expected))


def test_a_token_of_a_packed_or_padded_row_costs_what_its_own_text_lets_it_move() -> None:
    privacy = AttentionPrivacy(**GOOD, unit="token", logit_cap=0.5)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    module, ledger = private_layer(privacy, rows=1)
    call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert ledger.squared_mu == pytest.approx(cost(privacy, full_token_factor(5, 5, 0.5, True)))
    module, ledger = private_layer(privacy, rows=1)
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool()[None, None]
    call(module, random_qkv(1, 1, 1, 6), blocks.tril(1))  # neither causal nor full: the mask is looked at
    expected = max(float(token_factor(blocks.tril(1)[..., a:b, a:b], 0.5)) for a, b in ((0, 4), (4, 6)))
    assert ledger.squared_mu == pytest.approx(cost(privacy, expected))
    module, ledger = private_layer(privacy, rows=2)
    call(module, random_qkv(2, 1, 1, 8), torch.arange(8) < torch.tensor([[6], [2]]))
    assert ledger.squared_mu == pytest.approx(cost(privacy, full_token_factor(6, 6, 0.5, True)))


def test_the_ledger_agrees_with_pld_composition() -> None:
    # dp-accounting doubles the sensitivity where one is replaced; here it is that of replacing one already.
    ledger, accountant = AttentionLedger(), PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for place, mu in (("0", 0.3), ("1", 0.5), ("0", 0.2), ("0", 0.3)):
        ledger.record(place, [mu**2])
        accountant.compose(dp_accounting.GaussianDpEvent(1 / mu))
    for delta in (1e-8, 1e-5, 1e-2):
        assert ledger.epsilon(delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-3)
    assert ledger.calls == {("0", 0.09): 2, ("1", 0.25): 1, ("0", 0.2**2): 1}


def test_sampled_passes_are_taken_for_the_dearest_and_add_to_the_rest() -> None:
    ledger = AttentionLedger()
    for squared_mu in (0.1, 0.3):
        with ledger.sampled(0.2):
            ledger.record("0", [squared_mu / 2])
            ledger.record("1", [squared_mu / 2, 0.01])
    ledger.record("0", [0.05])
    expected = sampled_epsilon(1e-5, squared_mu=0.3, sampling_rate=0.2, passes=2, certain=0.05)
    assert ledger.epsilon(1e-5) == pytest.approx(expected)
    assert ledger.squared_mu == pytest.approx(0.45)
    with ledger.sampled(0.2):
        ledger.record("0", [0.3])
        within = ledger.epsilon(1e-5)
    assert within == ledger.epsilon(1e-5) > expected


def test_a_call_is_counted_in_one_way() -> None:
    ledger = AttentionLedger()
    with ledger.units([1]), pytest.raises(PrivacyError, match="another context"), ledger.sampled(0.5):
        pass
    with pytest.raises(ValueError, match="sampling_rate"), ledger.sampled(0.0):
        pass
    with pytest.raises(ValueError, match="delta"):
        ledger.epsilon(0.0)
    assert ledger.epsilon(1e-5) == 0
    assert not ledger.knows_units


def test_a_thread_is_in_no_context_of_another_thread() -> None:
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=1)
    with ledger.units(["a"]), ThreadPoolExecutor(1) as pool, pytest.raises(PrivacyError, match="another thread"):
        pool.submit(call, module, random_qkv(1, 1, 1, 3)).result()
    assert not ledger.calls


def test_ids_are_compared_by_what_they_are() -> None:
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=2)
    for _ in range(3):
        with ledger.units(list(torch.tensor([4, 5]))):
            call(module, random_qkv(2, 1, 1, 3))
    assert ledger.squared_mu == pytest.approx(3 * cost(AttentionPrivacy(**GOOD), 3))
    with pytest.raises(ValueError, match="equal to themselves"), ledger.units([math.nan]):
        pass


def test_a_copy_records_in_the_same_ledger() -> None:
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=1)
    call(copy.deepcopy(module), random_qkv(1, 1, 1, 3))
    assert sum(ledger.calls.values()) == 1
