"""The families of `patches/`: loading their files registers what each has for its models.

An attention patch is a mixin put in front of a family's own attention class, as a rule is put in front of a layer's: the
parameters, buffers and names stay, only the methods it defines are other ones. `set_attn_implementation` and building a model
call `patch` and `unpatch` by themselves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import transformers
from torch import Tensor, nn
from transformers import EncoderDecoderCache, PreTrainedModel

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.layers import rules

_MIXINS: dict[str, type] = {}  # by "module.QualName" of the class they go in front of
_CLASSES: dict[type, type] = {}
_GUARDS: dict[str, Callable[..., Any]] = {}  # by model type
_BEFORE = "_dp_flash_before"  # attribute of a patched model: the attention implementation it had
_SOFTMAX = re.compile(r"[sS]oftmax\(|scaled_dot_product_attention|ALL_ATTENTION_FUNCTIONS")
_C = TypeVar("_C", bound=type)
_F = TypeVar("_F", bound=Callable[..., Any])

# Attention that is not softmax(q k + bias) v of one query, key and value per token, by model type.
_OWN_ATTENTION = {
    "big_bird": "block-sparse attention",
    "canine": "attention within chunks of characters",
    "convbert": "attention mixed with convolutions",
    **dict.fromkeys(("deberta", "deberta-v2"), "disentangled attention: keys and queries for content and for positions"),
    "deepseek_v4": "it extends its mask by additive terms",
    "funnel": "attention over pooled tokens with shifted relative logits",
    "ibert": "integer softmax",
    **dict.fromkeys(("led", "longformer"), "attention in sliding chunks with global tokens"),
    **dict.fromkeys(("mra", "nystromformer", "yoso"), "approximate attention"),
    "prophetnet": "attention over several streams of n-grams",
    "reformer": "hashed attention",
    "xlnet": "two-stream attention with shifted relative logits",
}


def register_attention(*names: str) -> Callable[[_C], _C]:
    """Class decorator: a mixin for these classes, each "module.QualName", so that none is imported before it is needed.

    Its `forward` replaces theirs while the model's attention implementation is ours, and gives the same outputs. Subclasses,
    which may compute something else, are left alone.
    """

    def register(mixin: _C) -> _C:
        _MIXINS.update(dict.fromkeys(names, mixin))
        return mixin

    return register


def register_guard(*model_types: str) -> Callable[[_F], _F]:
    """Function decorator: guard(model, args, kwargs), a forward pre-hook of the patched models of these types.

    It raises where the attention of the family would not be told what it needs to know, or returns other (args, kwargs).
    """

    def register(guard: _F) -> _F:
        _GUARDS.update(dict.fromkeys(model_types, guard))
        return guard

    return register


def has_patch(model_class: type) -> bool:
    """Whether the file this model class (or a base of it) comes from has classes with a patch."""
    return any(name.rpartition(".")[0] == base.__module__ for base in model_class.__mro__ for name in _MIXINS)


def is_patched(model: nn.Module) -> bool:
    """Whether a module of this model follows a patch."""
    return any(_follows(module) for _, module in _attentions(model))


def patch(model: nn.Module, name: str = "dp_flash") -> None:
    """Let the modules of `model` that have a patch call our attention, and their configs say `name`. Safe to call again.

    Raises UnsupportedError, having changed nothing, if an engine's rule is on one of these modules, or if this version of
    Transformers hands them arguments that their patch does not know.
    """
    found = _attentions(model)
    _refuse_attached([module for _, module in found if not _follows(module)])
    classes = [type(module) if _follows(module) else _class_of(type(module)) for _, module in found]
    for (owner, module), changed in zip(found, classes, strict=True):
        module.__class__ = changed
        vars(owner).setdefault(_BEFORE, owner.config._attn_implementation)
    for owner, _ in found:
        owner.config._attn_implementation_internal = name
    for part, guard in _guarded(model) if found else []:
        if guard not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(guard, with_kwargs=True)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the classes and the attention implementation are those from before.

    Raises UnsupportedError, having changed nothing, if an engine's rule is on one of the modules.
    """
    found = [(owner, module) for owner, module in _attentions(model) if _follows(module)]
    _refuse_attached([module for _, module in found])
    for owner, module in found:
        original: Any = type(module)
        module.__class__ = original._dp_flash_original
        vars(module).pop("_dp_flash_ran", None)
        if _BEFORE in vars(owner):
            owner.config._attn_implementation_internal = vars(owner).pop(_BEFORE)
    for part, guard in _guarded(model) if found else []:
        for number in [number for number, hook in part._forward_pre_hooks.items() if hook is guard]:
            del part._forward_pre_hooks[number]
            part._forward_pre_hooks_with_kwargs.pop(number, None)


def keys_and_values(
    cache: Any, layer: int, project: Callable[[], tuple[Tensor, Tensor]], *, cross: bool = False
) -> tuple[Tensor, Tensor]:
    """The keys and values a layer attends to, each (B, G, K, D): `project()` appended to what the cache holds.

    Of an encoder's states (`cross`), which stay the same, the cache holds what the first call projected.
    """
    if cache is None:
        return project()
    if not isinstance(cache, EncoderDecoderCache):
        key, value = cache.update(*project(), layer)
    elif not cross:
        key, value = cache.self_attention_cache.update(*project(), layer)
    elif cache.is_updated.get(layer):
        held: Any = cache.cross_attention_cache.layers[layer]
        key, value = held.keys, held.values
    else:
        key, value = cache.cross_attention_cache.update(*project(), layer)
        cache.is_updated[layer] = True
    return key, value


def heads(states: Tensor, size: int) -> Tensor:
    """(B, S, H * D) to (B, H, S, D), with D = `size`."""
    split: Tensor = states.unflatten(-1, (-1, size))
    return split.transpose(1, 2)


def reason(model: nn.Module) -> str | None:
    """Why this model never calls our attention: "no softmax attention", "own attention code: ...", or None if it may."""
    own = _OWN_ATTENTION.get(getattr(getattr(model, "config", None), "model_type", ""))
    if own is not None:
        return f"own attention code: {own}"
    source = "".join({_source(type(part).__module__) for part in model.modules()})
    if not _SOFTMAX.search(source) and not any(
        isinstance(part, nn.Softmax | nn.MultiheadAttention) for part in model.modules()
    ):
        return "no softmax attention"
    if "ALL_ATTENTION_FUNCTIONS" in source or _attentions(model):
        return None
    return "own attention code: its modeling file computes attention by itself, and no patch is known"


@functools.cache
def _source(module_name: str) -> str:
    if module_name.partition(".")[0] == "torch":  # mentions everything
        return ""
    with contextlib.suppress(KeyError, OSError, TypeError):
        return inspect.getsource(sys.modules[module_name])
    return ""


def _attentions(model: nn.Module) -> list[tuple[PreTrainedModel, nn.Module]]:
    """The modules that follow a patch or have one, each with the innermost model it is part of."""
    owners: dict[nn.Module, PreTrainedModel] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):  # outer ones come first
            owners.update((module, part) for module in part.modules() if _follows(module) or _name(module) in _MIXINS)
    return [(owner, module) for module, owner in owners.items()]


def _guarded(model: nn.Module) -> list[tuple[PreTrainedModel, Callable[..., Any]]]:
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [(part, _GUARDS[part.config.model_type]) for part in parts if part.config.model_type in _GUARDS]


def _follows(module: nn.Module) -> bool:
    return hasattr(type(module), "_dp_flash_original")


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _refuse_attached(modules: list[nn.Module]) -> None:
    for module in modules:
        if rules.is_attached(module):
            raise UnsupportedError(
                f"a rule is on {type(module).__name__}, whose attention implementation is to change; call engine.detach() first"
            )


def _class_of(original: Any) -> type:
    if original not in _CLASSES:
        mixin: Any = _MIXINS[f"{original.__module__}.{original.__qualname__}"]
        known = {*inspect.signature(mixin.forward).parameters, "output_attentions"}
        new = [name for name in inspect.signature(original.forward).parameters if name not in known]
        if new:  # would be ignored
            raise UnsupportedError(
                f"{original.__name__} of transformers {transformers.__version__} takes {', '.join(new)}, which its patch does "
                'not know; use a version that dp-flash-hf is tested with, or attn_implementation="eager"'
            )
        body = {"__module__": original.__module__, "__reduce_ex__": _reduce, "_dp_flash_original": original}
        _CLASSES[original] = type(original.__name__, (mixin, original), body)
    return _CLASSES[original]


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle by the original class: the patched one is found nowhere by its name."""
    kind: Any = type(self)
    if "_dp_flash_original" not in vars(kind):  # something else, a rule perhaps, was put in front of it
        return object.__reduce_ex__(self, protocol)
    return _rebuild, (kind._dp_flash_original,), self.__getstate__()


def _rebuild(original: type) -> Any:
    patched: Any = _class_of(original)
    return patched.__new__(patched)
