"""What a verdict of `verify_cut` depends on: which code a model runs, in a form that can be compared later."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dp_flash_hf.attention.release import site_of

_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_EVERY_MODULE = tuple(f"_global{table}" for table in _TABLES)
_SETTINGS = (bool, str, float)  # whole numbers are often counters, and tensors values
# What calls leave behind: dp_flash attention remembers what ran, Transformers and torch what was hooked and compiled once. The
# hooks by which Transformers collects hidden states only collect, and stay from the first call that asks for some.
_LEFT_BEHIND = ("_dp_flash", "_output_capturing_hooks_installed", "_is_full_backward_hook", "_is_torch_compile")
_COLLECTING = "transformers.utils.output_capturing"


def fingerprint(model: nn.Module) -> Mapping[str, Hashable]:
    """By name: each module's class, forward, mode, hooks, callables and settings; configs; what is trained; global hooks.

    Equal for a deep copy of the model. Not seen: values of tensors, whole numbers that modules keep, what functions close
    over, and code that is replaced anywhere but on modules and in their classes' `forward`.
    """
    found: dict[str, Hashable] = {"hooks of every module": tuple(_global_hooks())}
    for name, module in model.named_modules():
        found[name] = (
            type(module),
            type(module).forward,
            module.training,
            site_of(module) is not None,
            tuple(key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad),
            tuple(tuple(_hooks(getattr(module, table))) for table in _TABLES),
            tuple(sorted(_settings(module), key=lambda setting: setting[0])),
        )
        if isinstance(module, PreTrainedModel):
            found[f"config of {name or 'the model'}"] = token(module.config)
    return found


def token(value: Any) -> Hashable:
    """Equal for equal simple values, for the same functions and classes, and for all other objects of one class."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, types.MethodType):
        return token(value.__func__)
    if isinstance(value, functools.partial):
        return (functools.partial, token(value.func), token(value.args), token(value.keywords))
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return value
    if isinstance(value, PreTrainedConfig):
        return (type(value), token(vars(value)))
    if isinstance(value, Mapping):
        items = ((str(key), token(inner)) for key, inner in value.items())
        return (type(value), tuple(sorted(items, key=lambda item: item[0])))
    if isinstance(value, Set):
        return (type(value), frozenset(map(token, value)))
    if isinstance(value, Sequence):
        return (type(value), tuple(map(token, value)))
    kind: type = type(value)
    return kind


def changed(before: Mapping[str, Hashable], after: Mapping[str, Hashable]) -> list[str]:
    """What differs, by name; the model itself has no name, and is called that."""
    return [name or "the model" for name in {**before, **after} if before.get(name) != after.get(name)]


def _settings(module: nn.Module) -> Iterator[tuple[str, Hashable]]:
    for name, value in vars(module).items():
        simple = type(value) in _SETTINGS
        if (simple or callable(value)) and not name.startswith(_LEFT_BEHIND):
            yield name, repr(value) if simple else token(value)


def _hooks(table: Mapping[int, Any]) -> Iterator[Hashable]:
    return (token(hook) for hook in table.values() if getattr(hook, "__module__", None) != _COLLECTING)


def _global_hooks() -> Iterator[Hashable]:
    """Hooks that torch runs for every module there is."""
    for table in _OF_EVERY_MODULE:
        yield tuple(_hooks(getattr(nn.modules.module, table)))
