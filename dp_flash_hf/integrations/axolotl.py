"""Private training with axolotl: `plugins: [dp_flash_hf.integrations.axolotl.DPPlugin]` in its YAML."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dp_flash_hf.distributed import logger_of_all_ranks
from dp_flash_hf.errors import invalid
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.mechanisms.config import PrivacyConfig

logger = logger_of_all_ranks(__name__)


def __getattr__(name: str) -> Any:
    if name != "DPPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _plugin()


def privacy_config(settings: Any) -> PrivacyConfig:
    """The `privacy` section of a YAML file: arguments of `PrivacyConfig` by name.

    >>> privacy_config({"target_epsilon": 8.0, "target_delta": 1e-6}).target_epsilon
    8.0

    Raises:
        ValueError: there is none, it lacks target_delta or has other names, or a value is out of range.
    """
    names = [field.name for field in fields(PrivacyConfig)]
    if not isinstance(settings, Mapping) or not {"target_delta"} <= set(settings) <= set(names):
        raise invalid(
            "privacy",
            expected=f"a section of the YAML file with target_delta, and others of {', '.join(names)}",
            actual=settings,
            remedy="write target_epsilon and target_delta below 'privacy:' (1.0e-6, as YAML takes 1e-6 for text)",
        )
    return PrivacyConfig(**settings)


@functools.cache
def _plugin() -> type:
    """`DPPlugin`, made when it is asked for: axolotl need not be installed, and importing it takes a while."""
    from axolotl.integrations.base import BasePlugin

    class DPPlugin(BasePlugin):  # type: ignore[misc]
        """Gives axolotl's trainer a `DPCallback`, and logs its report when training has ended.

        The section `privacy` of the YAML file has the arguments of `PrivacyConfig`; it is read before models and data are.
        """

        def register(self, cfg: Any) -> None:
            """Read the section `privacy`. Raises ValueError where it is no `PrivacyConfig`."""
            self.dp = DPCallback(privacy_config(cfg.get("privacy")))

        def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
            """Hand the callback over: it attaches itself when `train` is called, once everything is set up."""
            trainer.add_callback(self.dp)

        def post_train(self, cfg: Any, model: Any) -> None:
            """Log what was spent. Raises PrivacyError where training was not private."""
            logger.warning(f"private training has ended: {self.dp.report()}")

    DPPlugin.__module__, DPPlugin.__qualname__ = __name__, "DPPlugin"
    return DPPlugin
