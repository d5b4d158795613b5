"""Which layers have called dp_flash attention: for reports, for the check of a model's first forward and for `privatize`."""

from __future__ import annotations

from torch import nn

_CALLED = "_dp_flash_called"


def mark_called(layer: nn.Module) -> None:
    """Remember that this layer called dp_flash attention; in traced code too, once for each compilation."""
    if not has_called(layer):
        setattr(layer, _CALLED, True)


def has_called(layer: nn.Module) -> bool:
    """Whether this layer itself has called dp_flash attention since it was built or given it."""
    return getattr(layer, _CALLED, False)


def any_has_called(model: nn.Module) -> bool:
    """Whether any layer of this model has."""
    return any(has_called(module) for module in model.modules())


def forget(layer: nn.Module) -> None:
    """Leave no trace on a layer that is given other attention."""
    vars(layer).pop(_CALLED, None)
