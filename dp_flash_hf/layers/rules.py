"""How layers take part in private training.

While an engine records, every module with trained parameters hands them out as tensors that know where they go
(`tracking.Tracked`), and the rules in `operations` record per-unit gradients where one of them meets the data. A layer whose
computation torch functions do not show (kernels of its own, routing by the data) has a rule for the whole layer: a subclass of,
or a mixin for, its class. Attaching swaps a module's class; detaching swaps it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dp_flash_hf.layers import experts
from dp_flash_hf.layers.class_swap import ClassSwap
from dp_flash_hf.layers.operations import record_bias, record_product
from dp_flash_hf.layers.recorder import Recorder
from dp_flash_hf.layers.tracking import Tracked, record
from dp_flash_hf.layers.unit_layout import Layout

_ATTRIBUTE = "_dp_recorder"
_RULES: dict[type | str, type] = {}
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
    """The rule of a module: of its class, or of the nearest base that has one."""
    for base in type(module).__mro__:
        rule = _RULES.get(base) or _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return rule
    return experts.Experts if experts.is_experts(module) else None


class _Tracking:
    """Hands out trained parameters as tracked tensors."""

    def __getattr__(self: Any, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        # Traced code has no use for what holds in one batch only: autograd's gradient tells the engine that it was traced.
        if isinstance(value, nn.Parameter) and not torch.compiler.is_compiling():
            recorder = _recorder_of(self)
            if recorder.tracks(value, (self, name)) and torch.is_grad_enabled():
                return Tracked.of(value, recorder)
        return value


_SWAP = ClassSwap(front=(_Tracking,))


def attach(module: nn.Module, recorder: Recorder) -> None:
    """Make a module report to this recorder, by its rule if it has one."""
    setattr(module, _ATTRIBUTE, recorder)
    _SWAP.put_on(module, rule_for(module))


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    _SWAP.take_off(module)
    delattr(module, _ATTRIBUTE)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that an attached module had before."""
    original = _SWAP.original_of(module)
    assert original is not None
    return original


def is_attached(module: nn.Module) -> bool:
    """Whether an engine's rule is on this module."""
    return _ATTRIBUTE in vars(module)


def layout_of(module: Any, x: Tensor, feature_dims: int = 1) -> Layout | None:
    """For rules: how the input x (*lead, *features) of an attached module is laid out.

    None where nothing is being recorded, or where the units stand is not certain: the layer must then compute as without the
    library.
    """
    return _recorder_of(module).layout(module, x, feature_dims)


def _recorder_of(module: Any) -> Recorder:
    recorder: Recorder = vars(module)[_ATTRIBUTE]
    return recorder


__all__ = [
    "attach",
    "detach",
    "is_attached",
    "layout_of",
    "original_class",
    "record",
    "record_bias",
    "record_product",
    "register_rule",
    "rule_for",
]
