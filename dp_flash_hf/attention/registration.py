"""What Transformers has to be taught to take `attn_implementation="dp_flash"`, and whether a model really uses it.

`dp_flash_hf` imports this file and the patches while Transformers' models are being imported, and another thread may import
it at the same time. Neither waits for the other, because classes of models are named inside functions only.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from dp_flash_hf.attention import masks, patching, usage
from dp_flash_hf.attention.function import NAMES, dp_flash_attention
from dp_flash_hf.errors import UnsupportedError

# Model types that extend their mask by additive terms, which a bool mask silently turns around.
_ADDS_TO_ITS_MASK = ("deepseek_v4",)
# Attribute of a model that is to be patched, from the beginning of its construction to the end.
_WANTED = "_dp_flash_wanted"
# Models that were given one of our names, until a forward has shown that they call this attention.
_UNCHECKED: weakref.WeakSet[transformers.PreTrainedModel] = weakref.WeakSet()


def register() -> None:
    """Make the names in `NAMES` known to Transformers. `dp_flash_hf` calls it; calling it again changes nothing.

    Registers the attention and the mask function, and wraps four methods of `PreTrainedModel`. From then on

    - the names need no flash-attn package, and no kernel from the Hub takes their place;
    - models with a patch (`patches/`) are patched when they are built with one of the names or given it by
      `set_attn_implementation`, and unpatched when given another;
    - a model that would ignore the name is refused when that is known, and at the latest on its first forward, in which none of
      its layers called this attention.

    All other names behave as before.

    Raises:
        UnsupportedError: This version of Transformers chooses attention implementations in an unknown way.
    """
    for name in NAMES:
        transformers.AttentionInterface.register(name, dp_flash_attention)
        transformers.AttentionMaskInterface.register(name, masks.dp_flash_mask)
    _wrap("_check_and_adjust_attn_implementation", ("self", "attn_implementation", "is_init_check"), _skip_flash_packages)
    _wrap("get_correct_attn_implementation", ("self", "requested_attention", "is_init_check"), _arm_check)
    _wrap("set_attn_implementation", ("self", "attn_implementation"), _patch_or_raise)
    _wrap("post_init", ("self",), _patch_once_built)


def status(model: nn.Module) -> str:
    """Whether a model uses this attention, for reports; runs nothing.

    Args:
        model: A model, or a module that holds models.

    Returns:
        One of

        - "called": by a forward of this model;
        - "patched": through a file of `patches/`;
        - "not called yet": asked for, and nothing is known against it;
        - "not asked for": the model runs another implementation, though it could run this one;
        - "no softmax attention": there is nothing to replace;
        - "own attention code: ...": why it cannot be replaced.
    """
    why = patching.reason(model)
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    if not any(part.config._attn_implementation in NAMES for part in parts):
        return why or "not asked for"
    if patching.is_patched(model):
        return "patched"
    return "called" if usage.any_has_called(model) else why or "not called yet"


def _wrap(method: str, parameters: tuple[str, ...], wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(transformers.PreTrainedModel, method, None)
    if getattr(original, "_wrapped_by_dp_flash", False):
        return
    found = tuple(inspect.signature(original).parameters) if original is not None else ()
    if original is None or found[: len(parameters)] != parameters:
        raise UnsupportedError(
            f"transformers {transformers.__version__} does not choose attention implementations through "
            f"PreTrainedModel.{method}({', '.join(parameters)}, ...) but {found}; use a version that dp-flash-hf is tested with"
        )
    wrapped = functools.wraps(original)(wrapper(original))
    wrapped._wrapped_by_dp_flash = True  # type: ignore[attr-defined]
    setattr(transformers.PreTrainedModel, method, wrapped)


def _skip_flash_packages(original: Callable[..., str]) -> Callable[..., str]:
    def check(
        self: transformers.PreTrainedModel,
        attn_implementation: str | None,
        is_init_check: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        if attn_implementation in NAMES:  # the original would look for a flash-attn package, or fetch a kernel from the Hub
            checked: str = self.get_correct_attn_implementation(attn_implementation, is_init_check)
            return checked
        return original(self, attn_implementation, is_init_check, *args, **kwargs)

    return check


def _arm_check(original: Callable[..., str]) -> Callable[..., str]:
    def check(self: transformers.PreTrainedModel, requested_attention: str | None, is_init_check: bool = False) -> str:
        chosen = original(self, requested_attention, is_init_check)
        if chosen in NAMES:
            if patching.has_patch(type(self)):
                if is_init_check:  # these know no name but their own while they are built
                    setattr(self, _WANTED, chosen)
                    _arm(self)
                    return "eager"
            elif _picks_attention_itself(type(self).__module__):
                raise UnsupportedError(_never_runs(self))
            elif self.config.model_type in _ADDS_TO_ITS_MASK:
                raise UnsupportedError(f'{type(self).__name__} needs a float mask; use attn_implementation="eager"')
            elif not self._supports_sdpa:
                for part in self.modules():  # a decoder may have a copy of the config
                    if isinstance(part, transformers.PreTrainedModel) and not part._supports_sdpa:
                        masks.require_mask(part.config)
            _arm(self)
        return chosen

    return check


def _arm(model: transformers.PreTrainedModel) -> None:
    if _check_ran not in model._forward_hooks.values():
        model.register_forward_hook(_check_ran)
    _UNCHECKED.add(model)
    patching.guard(model)


def _patch_once_built(original: Callable[..., None]) -> Callable[..., None]:
    def post_init(self: transformers.PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _WANTED in vars(self):
            wanted = vars(self).pop(_WANTED)
            patching.patch(self, wanted)
            self.config._attn_implementation_internal = wanted
            _arm_all(self)

    return post_init


def _arm_all(model: transformers.PreTrainedModel) -> None:
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel) and part.config._attn_implementation in NAMES:
            _arm(part)


@functools.cache
def _picks_attention_itself(module_name: str) -> bool:
    """Whether this modeling file looks the name up in a table of its own, or calls flash-attn itself (Falcon, GPT-J, Git)."""
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return False
    return re.search(r"_CLASSES\[(config\._)?attn_implementation\]|_flash_attention_forward\(", source) is not None


def _patch_or_raise(original: Callable[..., None]) -> Callable[..., None]:
    def set_attn_implementation(
        self: transformers.PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        wanted = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if wanted is not None:
            vars(self).pop(_WANTED, None)
        if wanted in NAMES:  # before the original, which finds nothing to change then
            patching.patch(self, wanted)
        elif wanted is not None:
            patching.unpatch(self)
        original(self, attn_implementation, *args, **kwargs)
        if wanted in NAMES:
            if self.config._attn_implementation != wanted:  # the original only warned
                raise UnsupportedError(_never_runs(self))
            if patching.is_patched(self):
                _arm_all(self)

    return set_attn_implementation


def _check_ran(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a model that was given one of our names: after its first forward, has our attention been called?

    Removes itself once it has. Raises UnsupportedError if not, except in a part of a larger model that has one attention
    among other parts: there the larger model decides.
    """
    assert isinstance(model, transformers.PreTrainedModel)
    if _WANTED in vars(model):
        raise UnsupportedError(
            f"{type(model).__name__} does not call self.post_init() at the end of its __init__, so it ran without "
            f'attn_implementation="{vars(model)[_WANTED]}"; call it there, or model.set_attn_implementation on the built model'
        )
    if model.config._attn_implementation not in NAMES:
        _disarm(model)
    elif usage.any_has_called(model):
        for part in model.modules():
            _disarm(part)
        for whole in list(_UNCHECKED):  # a wrapper may call only its body, as PEFT does
            if whole.base_model is model:
                _disarm(whole)
    else:
        wholes = [whole for whole in _UNCHECKED if whole is not model and any(part is model for part in whole.modules())]
        if all(whole.base_model is model for whole in wholes):
            raise UnsupportedError(_never_runs(model))
        _disarm(model)


def _disarm(module: nn.Module) -> None:
    for number in [number for number, hook in module._forward_hooks.items() if hook is _check_ran]:
        del module._forward_hooks[number]
    if isinstance(module, transformers.PreTrainedModel):
        _UNCHECKED.discard(module)


def _never_runs(model: transformers.PreTrainedModel) -> str:
    why = patching.reason(model)
    if why == "no softmax attention":
        return f"{type(model).__name__} has no softmax attention; leave attn_implementation out, one unit per row"
    return (
        f"{type(model).__name__} does not take its attention from Transformers' attention interface"
        f'{"" if why is None else f" ({why})"}, so attn_implementation="{NAMES[0]}" would be ignored; '
        'use attn_implementation="eager", and one unit per row'
    )
