"""Which modules of a model report to an engine's recorder."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.layers import rules
from dp_flash_hf.layers.recorder import Recorder


def attach_to(model: nn.Module, recorder: Recorder, sharded: Collection[Tensor]) -> list[nn.Module]:
    """Attach every module that owns a trained parameter, or has a rule of its own and trained parameters below it.

    sharded: the parameters that FSDP2 sharded.

    Returns the modules, for `detach_from`. Raises UnsupportedError, and changes nothing, where an engine is attached already.
    """
    attached: list[nn.Module] = []
    try:
        for module in model.modules():
            if rules.is_attached(module):
                raise UnsupportedError("the model already has a ClippingEngine; call its detach() first")
        for module in list(model.modules()):
            owns = any(p.requires_grad for p in module.parameters(recurse=False))
            if owns or (rules.rule_for(module) is not None and any(p.requires_grad for p in module.parameters())):
                rules.attach(module, recorder)
                attached.append(module)
                for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                    if parameter in sharded:
                        recorder.add_sharded(module, name, parameter)
    except BaseException:
        detach_from(attached)
        raise
    return attached


def detach_from(attached: list[nn.Module]) -> None:
    """Undo `attach_to`; the list is empty afterwards."""
    while attached:
        rules.detach(attached.pop())
