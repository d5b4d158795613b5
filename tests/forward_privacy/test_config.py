"""The settings of privatised attention, and the noise that follows from them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.forward_privacy.sensitivity import sequence_sensitivity, token_sensitivity
from tests.support.forward_privacy import GOOD

TARGET: dict[str, Any] = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-6}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("clip_norm", {"clip_norm": 0.0}),
        ("clip_norm", {"clip_norm": [1.0, math.nan]}),
        ("clip_norm", {"clip_norm": []}),
        ("head_shares", {"head_shares": [0.5, 0.6]}),
        ("head_shares", {"head_shares": [1.5, -0.5]}),
        ("max_length", {"max_length": 0}),
        ("noise_multiplier", {"noise_multiplier": None}),
        ("noise_multiplier", {"noise_multiplier": 0.0}),
        ("noise_multiplier", {"target_epsilon": 1.0, "target_delta": 1e-5}),
        ("noise_multiplier", {**TARGET, "target_delta": None}),
        ("target_epsilon", {**TARGET, "target_epsilon": -1.0}),
        ("target_delta", {**TARGET, "target_delta": 1.0}),
        ("passes", {"passes": 3}),
        ("passes", {**TARGET, "passes": 0}),
        ("sampling_rate", {**TARGET, "sampling_rate": 0.0}),
        ("unit", {"unit": "word"}),
        ("noise", {"noise": "chacha"}),
        ("logit_cap", {"logit_cap": -1.0}),
        ("logit_cap", {"unit": "token"}),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        AttentionPrivacy(**{**GOOD, **changed})


@pytest.mark.parametrize(("passes", "rate"), [(1, 1.0), (7, 1.0), (40, 0.1)])
def test_a_target_holds_for_all_places_and_passes_in_sum(passes: int, rate: float) -> None:
    privacy = AttentionPrivacy(**{**GOOD, **TARGET, "passes": passes, "sampling_rate": rate})
    places, ledger = 3, AttentionLedger()
    for _ in range(passes):
        with ledger.sampled(rate):
            for place in range(places):
                ledger.record(str(place), [privacy.multiplier(places) ** -2])
    assert 3.0 * (1 - 1e-5) <= ledger.epsilon(1e-6) <= 3.0


def test_sampling_alone_is_no_privacy() -> None:
    privacy = AttentionPrivacy(**{**GOOD, **TARGET, "target_delta": 0.1, "passes": 3, "sampling_rate": 0.01})
    with pytest.raises(ValueError, match="takes part at all"):
        privacy.multiplier(1)


def test_noise_is_the_same_for_all_heads_unless_shares_say_otherwise() -> None:
    privacy = AttentionPrivacy(clip_norm=[0.5, 2.0], noise_multiplier=1.5, max_length=9)
    expected = 1.5 * sequence_sensitivity(9, [0.5, 0.5, 2.0, 2.0])
    assert privacy.noise_std(4, 2, 1) == pytest.approx([expected] * 4)
    shared = AttentionPrivacy(clip_norm=[0.5, 2.0], noise_multiplier=1.5, max_length=9, head_shares=[0.1, 0.2, 0.3, 0.4])
    squared_mus = [(2 * c) ** 2 * 9 / std**2 for c, std in zip([0.5, 0.5, 2.0, 2.0], shared.noise_std(4, 2, 1), strict=True)]
    assert squared_mus == pytest.approx([share / 1.5**2 for share in (0.1, 0.2, 0.3, 0.4)])
    with pytest.raises(ValueError, match="clip_norm"):
        shared.noise_std(4, 4, 1)
    with pytest.raises(ValueError, match="head_shares"):
        shared.noise_std(2, 2, 1)
    token = AttentionPrivacy(clip_norm=1.0, noise_multiplier=1.0, max_length=9, unit="token", logit_cap=0.5)
    assert token.noise_std(1, 1, 1)[0] == pytest.approx(token_sensitivity(9, [1.0], 0.5))
