"""Exact differentially private fine-tuning for Hugging Face Transformers.

`import dp_flash_hf` makes `attn_implementation="dp_flash"` known to Transformers, and costs next to nothing: each public name
is imported when it is first asked for, and the attention is registered once `transformers.modeling_utils` is loaded, without
which there is no model to give it to.

Registration must follow that module wherever it is first imported, so a finder on `sys.meta_path` runs it right behind the
module's own code. (`wrapt.register_post_import_hook` does the same, but forgets its hook once it has raised: the next import
of Transformers would then leave this attention out without a word. It also takes longer to import than this package.)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from dp_flash_hf.accounting.plan import PrivacyPlan
    from dp_flash_hf.engine.clipping_engine import ClippingEngine
    from dp_flash_hf.errors import PrivacyError, UnsupportedError
    from dp_flash_hf.forward_privacy.config import AttentionPrivacy
    from dp_flash_hf.forward_privacy.privatize import Privatized, privatize
    from dp_flash_hf.forward_privacy.report import AttentionPrivacyReport
    from dp_flash_hf.forward_privacy.verify_cut import verify_cut
    from dp_flash_hf.integrations.accelerate import make_private
    from dp_flash_hf.integrations.private import private
    from dp_flash_hf.integrations.trainer import DPCallback
    from dp_flash_hf.layers.rules import register_rule
    from dp_flash_hf.mechanisms.config import PrivacyConfig
    from dp_flash_hf.mechanisms.generators import fresh_generator
    from dp_flash_hf.reporting.report import PrivacyReport
    from dp_flash_hf.training.dp_sgd import DPSGD

__version__ = "0.1.0"  # pyproject.toml reads it from here
__all__ = [
    "DPSGD",
    "AttentionPrivacy",
    "AttentionPrivacyReport",
    "ClippingEngine",
    "DPCallback",
    "PrivacyConfig",
    "PrivacyError",
    "PrivacyPlan",
    "PrivacyReport",
    "Privatized",
    "UnsupportedError",
    "fresh_generator",
    "make_private",
    "private",
    "privatize",
    "register_rule",
    "verify_cut",
]

# Public names by the module that has them: what runs for the imports that type checkers see above.
_PUBLIC = {
    "accounting.plan": ("PrivacyPlan",),
    "engine.clipping_engine": ("ClippingEngine",),
    "errors": ("PrivacyError", "UnsupportedError"),
    "forward_privacy.config": ("AttentionPrivacy",),
    "forward_privacy.privatize": ("Privatized", "privatize"),
    "forward_privacy.report": ("AttentionPrivacyReport",),
    "forward_privacy.verify_cut": ("verify_cut",),
    "integrations.accelerate": ("make_private",),
    "integrations.private": ("private",),
    "integrations.trainer": ("DPCallback",),
    "layers.rules": ("register_rule",),
    "mechanisms.config": ("PrivacyConfig",),
    "mechanisms.generators": ("fresh_generator",),
    "reporting.report": ("PrivacyReport",),
    "training.dp_sgd": ("DPSGD",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
_MODELS = "transformers.modeling_utils"

if not TYPE_CHECKING:  # a type checker would take any name from it

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    # Transformers' module may be locked for import by this thread. So nothing imported here may wait for it while it holds a
    # lock of its own: `attention` and `patches` name classes as `transformers.PreTrainedModel`, inside functions only.
    from dp_flash_hf import patches
    from dp_flash_hf.attention import registration

    registration.register()
    patches.load()


class _RegisteringLoader:
    """Loads a module as `loader` does, and registers behind it; an error there is one of importing the module."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()


class _ModelsFinder:
    """Finds Transformers' models where the finders behind it do."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = _RegisteringLoader(spec.loader)
            spec.loader = loader
        return spec


if _MODELS in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _ModelsFinder())
