"""How each kind of layer takes part in private training.

A rule is a subclass of (or a mixin for) a layer class whose `forward` computes the same values and whose backward hands the
engine's recorder what it saw, returning no gradient for the parameters it recorded. Attaching swaps a module's class for one
that has the rule in its ancestry, so that subclasses which call `super().forward` are served too; detaching swaps it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from dp_flash_hf.records import Recorder

_ATTRIBUTE = "_dp_recorder"
_RULES: dict[type | str, type] = {}
_CLASSES: dict[tuple[type, type], type] = {}
_R = TypeVar("_R", bound=type)


def register_rule(layer: type[nn.Module] | str) -> Callable[[_R], _R]:
    """Class decorator: the rule for a layer class, given as the class or, so as not to import it, as "module.QualName".

    A rule given for a class must subclass it, and serves its subclasses as far as they call `super().forward`. A rule given
    for a name is a mixin put in front of that class.
    """

    def register(rule: _R) -> _R:
        _RULES[layer] = rule
        return rule

    return register


def rule_for(module: nn.Module) -> type | None:
    """The rule of a module: of its class, or of the nearest base that has one; else `Elementwise` if that fits exactly."""
    for base in type(module).__mro__:
        rule = _RULES.get(base) or _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule
    return Elementwise if fits_elementwise(module) else None


def attach(module: nn.Module, rule: type, recorder: Recorder) -> None:
    """Make a module follow a rule, reporting to this recorder."""
    original = type(module)
    key = (original, rule)
    if key not in _CLASSES:
        bases: tuple[type, ...] = (rule, original)
        if issubclass(rule, nn.Module):
            bases = (rule,) if original in rule.__mro__ else (original, rule)
        _CLASSES[key] = type(original.__name__, bases, {"__module__": original.__module__, "_dp_original": original})
    setattr(module, _ATTRIBUTE, recorder)
    module.__class__ = _CLASSES[key]


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    module.__class__ = module._dp_original  # type: ignore[assignment]
    delattr(module, _ATTRIBUTE)


def is_attached(module: nn.Module) -> bool:
    """Whether an engine's rule is on this module."""
    return _ATTRIBUTE in vars(module)


def recorder_of(module: Any) -> Recorder:
    """The recorder an attached module reports to."""
    recorder: Recorder = vars(module)[_ATTRIBUTE]
    return recorder


def tracked(recorder: Recorder, *parameters: Any) -> tuple[Any, ...]:
    """Each parameter if its gradient is to be recorded, else None: for backward, which cannot ask.

    What backward gets from `ctx.saved_tensors` is equal to the parameter and need not be it: checkpointing and offloading put
    another tensor in its place.
    """
    return tuple(p if recorder.tracks(p) else None for p in parameters)


from dp_flash_hf.layers import conv, embedding, linear, lora, norm  # noqa: E402  # registers the rules
from dp_flash_hf.layers.norm import Elementwise, fits_elementwise  # noqa: E402

__all__ = [
    "attach",
    "conv",
    "detach",
    "embedding",
    "is_attached",
    "linear",
    "lora",
    "norm",
    "recorder_of",
    "register_rule",
    "rule_for",
    "tracked",
]
