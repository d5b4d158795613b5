"""Settings of Accelerate and data that no loop can train on privately."""

from __future__ import annotations

import types

import pytest
from accelerate.accelerator import Accelerator

from dp_flash_hf.training.refusals import accelerator_refusals

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("way", ["tp", "cp", "sp"])
def test_other_parallelism_is_refused_by_name(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator()
    assert not any(accelerator_refusals(accelerator).values())
    parallel = types.SimpleNamespace(**{"dp_shard_size": 2, f"{way}_size": 2})
    monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda self: parallel))
    assert [text for text, found in accelerator_refusals(accelerator).items() if found and "FSDP2 or HSDP" in text]
