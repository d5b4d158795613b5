"""What the user decides is validated once, and says what to do."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from dp_flash_hf.mechanisms.config import PrivacyConfig

GOOD: dict[str, Any] = {"target_delta": 1e-5, "target_epsilon": 8.0}


def test_fields_are_frozen_and_by_keyword_only() -> None:
    config = PrivacyConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_grad_norm = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        PrivacyConfig(1e-5, 8.0)  # type: ignore[call-arg]
    assert len({config, PrivacyConfig(**GOOD)}) == 1  # equal by value, and usable as a key


def test_a_public_number_of_units_is_for_plain_poisson_sampling() -> None:
    assert PrivacyConfig(**GOOD, public_n_units=1000).public_n_units == 1000
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="public_n_units"):
            PrivacyConfig(**GOOD, public_n_units=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"public_n_units.*cost depends on the true number.*sampling='poisson'"):
        PrivacyConfig(**GOOD, public_n_units=1000, sampling="truncated_poisson", max_batch_size=60)


def test_every_field_explains_itself() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(PrivacyConfig))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"target_delta": 0}, "target_delta"),
        ({"target_delta": 1.0}, "target_delta"),
        ({"target_delta": math.nan}, "target_delta"),
        ({"target_delta": "1e-5"}, "target_delta"),
        ({"target_delta": True}, "target_delta"),
        ({"target_epsilon": None}, "target_epsilon, noise_multiplier"),
        ({"noise_multiplier": 1.0}, "target_epsilon, noise_multiplier"),
        ({"target_epsilon": 0}, "target_epsilon"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"target_epsilon": math.inf}, "target_epsilon"),
        ({"target_epsilon": math.nan}, "target_epsilon"),
        ({"target_epsilon": None, "noise_multiplier": 0.0}, "noise_multiplier"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"max_grad_norm": "1"}, "max_grad_norm"),
        ({"clipping": "none"}, "clipping"),
        ({"sampling": "shuffle"}, "sampling"),
        ({"accountant": "gdp"}, "accountant"),
        ({"unit_loss": "batch"}, "unit_loss"),
        ({"sampling": "truncated_poisson"}, "max_batch_size"),
        ({"sampling": "truncated_poisson", "max_batch_size": 1.5}, "max_batch_size"),
        ({"max_batch_size": 10}, "max_batch_size"),
        ({"privacy_unit": "user"}, "max_examples_per_unit"),
        ({"privacy_unit": "user", "max_examples_per_unit": 0}, "max_examples_per_unit"),
        ({"max_examples_per_unit": 3}, "max_examples_per_unit"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": True}, "seed"),
    ],
    ids=str,
)
def test_a_bad_field_is_named_with_a_remedy(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got .*; \w"):
        PrivacyConfig(**{**GOOD, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_epsilon": 1},
        {"target_epsilon": None, "noise_multiplier": 0.5},
        {"sampling": "truncated_poisson", "max_batch_size": 64},
        {"privacy_unit": "user", "max_examples_per_unit": 3},
        {"seed": 0, "unit_loss": "sum", "clipping": "per_layer", "accountant": "prv"},
    ],
    ids=str,
)
def test_good_configs_survive_json(changes: dict[str, Any]) -> None:
    config = PrivacyConfig(**{**GOOD, **changes})
    assert PrivacyConfig(**json.loads(json.dumps(config.to_dict()))) == config
