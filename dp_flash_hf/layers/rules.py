"""How layers take part in private training, and how to write a rule for a new one.

While an engine records, every module with trained parameters hands them out as tensors that know where they go
(`tracking.Tracked`), and the rules in `operations` record per-unit gradients where one of them is combined with data. A layer
whose computation torch functions do not show (kernels of its own, routing by the data) needs a rule for the whole layer: a
subclass of, or a mixin for, its class. Attaching swaps a module's class; detaching swaps it back.

A rule computes what its layer computes, through a `torch.autograd.Function` whose backward records per-unit gradients of the
parameters by one of three functions, and returns the gradient of the input: `record_product` (y = x W^T), `record_bias`
(y = x + b), or `record` (gradients that the rule formed itself). `testing.check_rule` compares it with the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dp_flash_hf.errors import invalid
from dp_flash_hf.layers import any_operation, experts  # noqa: F401 - the first registers a rule
from dp_flash_hf.layers.chain import record
from dp_flash_hf.layers.class_swap import ClassSwap
from dp_flash_hf.layers.operations import record_bias, record_product
from dp_flash_hf.layers.recorder import ATTRIBUTE, Recorder, recorder_of
from dp_flash_hf.layers.tracking import Tracked
from dp_flash_hf.layers.unit_layout import Layout

_RULES: dict[type | str, type] = {}
_R = TypeVar("_R", bound=type)


def register_rule(layer: type[nn.Module] | str) -> Callable[[_R], _R]:
    """Class decorator: make this class the rule for a layer class, and for its subclasses.

    While an engine is attached, a layer's class is swapped for one derived from rule and class, so that the rule's `forward`
    runs. Inside it, trained parameters are `Tracked` tensors, and `layout_of` says whose row is where. A rule that is not sure
    must compute as the layer does: autograd then leaves a gradient, the engine finds it, and computes every unit by itself.

    Example:
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(width))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> class Multiply(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, weight, tracked, layout):
        ...         ctx.save_for_backward(x, weight)
        ...         ctx.tracked, ctx.layout = tracked, layout
        ...         return x * weight
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         x, weight = ctx.saved_tensors
        ...         record_bias(ctx.tracked, g * x, ctx.layout)
        ...         return g * weight, None, None, None
        >>> @register_rule(Scale)
        ... class ScaleRule(Scale):
        ...     def forward(self, x):
        ...         weight, layout = self.weight, layout_of(self, x)
        ...         if layout is None or not isinstance(weight, Tracked):
        ...             return super().forward(x)
        ...         return Multiply.apply(x, weight.plain, weight, layout)
        >>> rule_for(Scale(3)).__name__
        'ScaleRule'

    Args:
        layer: The class of the layer, or its name "module.QualName", so that it need not be imported. A rule given for a class
            must subclass it; in a subclass of the layer the subclass's own `forward` comes first, and reaches the rule by
            `super().forward`. A rule given for a name is a mixin, no module itself, and comes first in subclasses too.

    Returns:
        A decorator that returns the class unchanged. A later rule for the same class takes the place of an earlier one; models
        that an engine is attached to already keep theirs.

    Raises:
        ValueError: By the decorator: the rule for a class does not subclass it, or the rule for a name is a module itself, so
            that its `forward` would never run.
    """

    def register(rule: _R) -> _R:
        if isinstance(layer, type) and not issubclass(rule, layer):
            raise invalid("rule", expected=f"a subclass of {layer.__name__}", actual=rule, remedy="derive it from its layer")
        if isinstance(layer, str) and issubclass(rule, nn.Module):
            raise invalid(
                "rule", expected=f"a mixin for {layer}", actual=rule, remedy="derive it from no module, or give the class"
            )
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
            recorder = recorder_of(self)
            if recorder.tracks(value, (self, name)) and torch.is_grad_enabled():
                return Tracked.of(value, recorder)
        return value


_SWAP = ClassSwap(front=(_Tracking,))


def attach(module: nn.Module, recorder: Recorder) -> None:
    """Make a module report to this recorder, by its rule if it has one."""
    setattr(module, ATTRIBUTE, recorder)
    _SWAP.put_on(module, rule_for(module))


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    _SWAP.take_off(module)
    delattr(module, ATTRIBUTE)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that an attached module had before."""
    original = _SWAP.original_of(module)
    assert original is not None
    return original


def is_attached(module: nn.Module) -> bool:
    """Whether an engine's rule is on this module."""
    return ATTRIBUTE in vars(module)


def layout_of(module: Any, x: Tensor, feature_dims: int = 1) -> Layout | None:
    """For rules: how the input of an attached module is laid out.

    **Guarantee.** A layout that is returned was proven: the engine ran units alone and found their values in the whole batch at
    these places. Nothing is guessed from sizes, which can agree by chance.

    Args:
        module: The module, as the rule's `forward` has it.
        x: Its input ``(*lead, *features)``, the same one in every call of `forward`: layouts are learnt from its values.
        feature_dims: How many of the last dimensions are features.

    Returns:
        The layout of the leading dimensions; None where nothing is being recorded, or where it is not certain what belongs to
        whom. The layer must then compute as without the library.

    Raises:
        KeyError: The module is not attached: no `ClippingEngine` is on the model it is part of.
    """
    return recorder_of(module).layout(module, x, feature_dims)


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
