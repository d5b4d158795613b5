"""The plugin for axolotl, beside a stand-in of its base class; tests/frameworks has the real one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.integrations import axolotl
from dp_flash_hf.integrations.axolotl import privacy_config
from tests.support.trainers import trainer_for

PRIVACY = {"noise_multiplier": 1.0, "target_delta": 1e-3}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object  # type: ignore[attr-defined]
    axolotl._plugin.cache_clear()
    yield axolotl.DPPlugin()
    axolotl._plugin.cache_clear()


def test_the_trainer_that_it_is_shown_trains_privately(plugin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = {"privacy": PRIVACY}
    plugin.register(cfg)
    trainer = trainer_for("gpt2", tmp_path)
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    with caplog.at_level("WARNING"):
        plugin.post_train(cfg, trainer.model)
    assert plugin.dp.report().steps == 2
    assert "private training has ended" in caplog.text


def test_a_training_that_was_not_private_is_an_error(plugin: Any) -> None:
    plugin.register({"privacy": PRIVACY})
    with pytest.raises(PrivacyError, match="not attached"):
        plugin.post_train({}, None)


@pytest.mark.parametrize(
    "settings", [None, 8.0, ["target_epsilon"], {}, {"target_epsilon": 8.0}, {"epsilon": 8.0}, dict([*PRIVACY.items(), (1, 2)])]
)
def test_other_settings_are_refused_by_name(settings: Any, plugin: Any) -> None:
    with pytest.raises(ValueError, match=r"privacy: expected a section .*target_epsilon"):
        plugin.register({"privacy": settings})


def test_numbers_that_yaml_takes_for_text_are_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="target_delta"):
        privacy_config({**PRIVACY, "target_delta": "1e-3"})


def test_other_names_are_no_attributes() -> None:
    assert not hasattr(axolotl, "Plugin")
