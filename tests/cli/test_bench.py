"""`dp-flash bench`: options and presets; what they measure is tested in tests/benchmarks."""

from __future__ import annotations

from dp_flash_hf.benchmarks import training
from dp_flash_hf.cli.bench import PRESETS


def test_the_presets_that_help_names_are_those_there_are() -> None:
    assert set(PRESETS) == {*training.PRESETS, "attention"}
