"""Attention patches of model families: what the files of `patches/` register, and how models come to follow them and back.

A patch is a mixin put in front of a family's own attention class, as a rule is put in front of a layer's: parameters, buffers
and names stay, only the methods it defines are other ones. `set_attn_implementation` and building a model call `patch` and
`unpatch` by themselves.
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

from dp_flash_hf.attention import usage
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.layers.class_swap import ClassSwap

_MIXINS: dict[str, type] = {}  # by "module.QualName" of the class they go in front of
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
    """Class decorator: a mixin whose `forward` computes what a family's attention computes, by `dp_flash_attention`.

    While a model's attention implementation is ours, the mixin stands in front of the family's class; `self` is the family's
    layer, with its own projections, config and buffers. It takes the arguments of the family's `forward` and returns what that
    returns, with None for attention weights. Arguments of the family's `forward` that the mixin does not name are an error when
    a model is patched, so that a new version of Transformers cannot pass something that would be ignored.

    Args:
        names: "module.QualName" of each class it is for, so that none is imported before it is needed. Subclasses of these,
            which may compute something else, are left alone.

    Returns:
        The decorator, which returns the class it was given.
    """

    def register(mixin: _C) -> _C:
        _MIXINS.update(dict.fromkeys(names, mixin))
        return mixin

    return register


def register_guard(*model_types: str) -> Callable[[_F], _F]:
    """Function decorator: a forward pre-hook of the patched models of these types.

    For families whose attention does not learn what it would need to know: that a row is packed, say. The guard is called as
    ``guard(model, args, kwargs)`` before every forward. It raises UnsupportedError, or returns other ``(args, kwargs)``, or
    None to leave them as they are.

    Args:
        model_types: `config.model_type` of the families; the last guard registered for one holds.

    Returns:
        The decorator, which returns the function it was given.
    """

    def register(guard: _F) -> _F:
        _GUARDS.update(dict.fromkeys(model_types, guard))
        return guard

    return register


def has_patch(model_class: type) -> bool:
    """Whether the file this model class (or a base of it) comes from has classes with a patch."""
    return any(name.rpartition(".")[0] == base.__module__ for base in model_class.__mro__ for name in _MIXINS)


def is_patched(model: nn.Module) -> bool:
    """Whether a layer of this model follows a patch."""
    return any(follows_patch(module) for _, module in _attention_modules(model))


def follows_patch(layer: nn.Module) -> bool:
    """Whether this layer follows a patch, also where an engine's rule lies on top of it."""
    return _SWAP.is_on(layer)


def patch(model: nn.Module, name: str = "dp_flash") -> None:
    """Let the layers of `model` that have a patch call our attention. Calling it again changes nothing.

    Swaps the classes of these layers, registers the guards of their families, and writes `name` into the configs of the models
    they belong to. Parameters, buffers, names and hooks stay. A model without such layers is left as it is.

    Args:
        model: A model, or a module that holds models.
        name: What the configs then say, one of `attention.function.NAMES`.

    Raises:
        UnsupportedError: A `ClippingEngine` is attached to one of these layers, or this version of Transformers hands them
            arguments that their patch does not know. Nothing was changed.
    """
    found = _attention_modules(model)
    fresh = [module for _, module in found if not _SWAP.is_on(module)]
    _refuse_attached(fresh)
    mixins = [_mixin_for(type(module)) for module in fresh]
    for module, mixin in zip(fresh, mixins, strict=True):
        _SWAP.put_on(module, mixin)
    for owner, _ in found:
        vars(owner).setdefault(_BEFORE, owner.config._attn_implementation)
    for owner, _ in found:
        owner.config._attn_implementation_internal = name
    for part, guard in _guarded(model) if found else []:
        if guard not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(guard, with_kwargs=True)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: classes, guards and the configs' attention implementation are those from before.

    Args:
        model: What was patched, or a module that holds it. Layers without a patch are left as they are.

    Raises:
        UnsupportedError: A `ClippingEngine` is attached to one of the layers. Nothing was changed.
    """
    found = [(owner, module) for owner, module in _attention_modules(model) if _SWAP.is_on(module)]
    _refuse_attached([module for _, module in found])
    for owner, module in found:
        _SWAP.take_off(module)
        usage.forget(module)
        if _BEFORE in vars(owner):
            owner.config._attn_implementation_internal = vars(owner).pop(_BEFORE)
    for part, guard in _guarded(model) if found else []:
        for number in [number for number, hook in part._forward_pre_hooks.items() if hook is guard]:
            del part._forward_pre_hooks[number]
            part._forward_pre_hooks_with_kwargs.pop(number, None)


def keys_and_values(
    cache: Any, layer: int, project: Callable[[], tuple[Tensor, Tensor]], *, cross: bool = False
) -> tuple[Tensor, Tensor]:
    """The keys and values that a layer's queries see: what `project` returns, appended to what the cache holds.

    Of an encoder's states, which stay the same, the cache holds what the first call projected; `project` is not called again.

    Args:
        cache: What the model hands its layers as `past_key_values`, or None.
        layer: The layer's number in the cache.
        project: Returns new keys (B, G, S, D) and values (B, G, S, E).
        cross: Whether these are of an encoder's states.

    Returns:
        Keys (B, G, K, D) and values (B, G, K, E).
    """
    if cache is None:
        return project()
    if not isinstance(cache, transformers.EncoderDecoderCache):
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
    if "ALL_ATTENTION_FUNCTIONS" in source or _attention_modules(model):
        return None
    return "own attention code: its modeling file computes attention by itself, and no patch is known"


@functools.cache
def _source(module_name: str) -> str:
    if module_name.partition(".")[0] == "torch":  # mentions everything
        return ""
    with contextlib.suppress(KeyError, OSError, TypeError):
        return inspect.getsource(sys.modules[module_name])
    return ""


def _attention_modules(model: nn.Module) -> list[tuple[transformers.PreTrainedModel, nn.Module]]:
    """The modules that follow a patch or have one, each with the innermost model it is part of."""
    owners: dict[nn.Module, transformers.PreTrainedModel] = {}
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):  # outer ones come first
            owners.update((module, part) for module in part.modules() if _SWAP.is_on(module) or _name(module) in _MIXINS)
    return [(owner, module) for module, owner in owners.items()]


def _guarded(model: nn.Module) -> list[tuple[transformers.PreTrainedModel, Callable[..., Any]]]:
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    return [(part, _GUARDS[part.config.model_type]) for part in parts if part.config.model_type in _GUARDS]


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _refuse_attached(modules: list[nn.Module]) -> None:
    from dp_flash_hf.layers import rules  # which loads all rules: not needed before a model is patched

    for module in modules:
        if rules.is_attached(module):
            raise UnsupportedError(
                f"a rule is on {type(module).__name__}, whose attention implementation is to change; call engine.detach() first"
            )


def _mixin_for(original: Any) -> type:
    """The patch of a class; raises UnsupportedError if the class takes arguments that the patch does not know."""
    mixin: Any = _MIXINS[f"{original.__module__}.{original.__qualname__}"]
    known = {*inspect.signature(mixin.forward).parameters, "output_attentions"}
    new = [name for name in inspect.signature(original.forward).parameters if name not in known]
    if new:  # would be ignored
        raise UnsupportedError(
            f"{original.__name__} of transformers {transformers.__version__} takes {', '.join(new)}, which its patch does not "
            'know; use a version that dp-flash-hf is tested with, or attn_implementation="eager"'
        )
    return mixin  # type: ignore[no-any-return]


def _revive(original: type) -> Any:
    """An empty instance of the patched class, for copies and pickles, which name the original one."""
    patched: Any = _SWAP.derived(original, _mixin_for(original))
    return patched.__new__(patched)


_SWAP = ClassSwap(revive=_revive)
