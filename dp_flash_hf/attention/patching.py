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
# What patches know by an older name, by the name that a newer version of Transformers gives it in a family's `forward`.
_RENAMED = {"cache": "past_key_values"}
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
    returns, with None for attention weights.

    Versions of Transformers differ in what a family's `forward` takes. The mixin is called by name: the order of arguments may
    change, and `past_key_values` is handed to it also where the family says `cache`. An argument that the family's `forward`
    names and the mixin does not is left out while it is None or its default; any other value is an UnsupportedError in that
    call, so that nothing is ignored. A class that takes its attention from Transformers' interface keeps its own code.

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
    """Function decorator: a forward pre-hook of the models of these types that are given our attention, patched or not.

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
    files = {base.__module__ for base in model_class.__mro__}
    named = (name.rpartition(".") for name in _MIXINS)
    classes = (getattr(sys.modules.get(file), own, None) for file, _, own in named if file in files)
    return any(cls is not None and _mixin_of(cls) is not None for cls in classes)


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
        UnsupportedError: A `ClippingEngine` is attached to one of these layers. Nothing was changed.
    """
    found = _attention_modules(model)
    fresh = [module for _, module in found if not _SWAP.is_on(module)]
    _refuse_attached(fresh)
    for module in fresh:
        _SWAP.put_on(module, _mixin_of(type(module)))
    for owner, _ in found:
        vars(owner).setdefault(_BEFORE, owner.config._attn_implementation)
    for owner, _ in found:
        owner.config._attn_implementation_internal = name
    if found:
        guard(model)


def guard(model: nn.Module) -> None:
    """Let the guards of the families in `model` look at every call, of those too whose attention needs no patch."""
    for part, look in _guarded(model):
        if look not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(look, with_kwargs=True)


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
    for part, look in _guarded(model):
        for number in [number for number, hook in part._forward_pre_hooks.items() if hook is look]:
            del part._forward_pre_hooks[number]
            part._forward_pre_hooks_with_kwargs.pop(number, None)


def keys_and_values(
    cache: Any, layer: int, project: Callable[[], tuple[Tensor, Tensor]], *, cross: bool = False
) -> tuple[Tensor, Tensor]:
    """The keys and values that a layer's queries see: what `project` returns, appended to what the cache holds.

    Of an encoder's states, which stay the same, the cache holds what the first call projected; `project` is not called again.

    Args:
        cache: What the model hands its layers as `past_key_values` or `cache`, or None.
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
            owners.update((module, part) for module in part.modules() if _SWAP.is_on(module) or _mixin_of(type(module)))
    return [(owner, module) for module, owner in owners.items()]


def _guarded(model: nn.Module) -> list[tuple[transformers.PreTrainedModel, Callable[..., Any]]]:
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    return [(part, _GUARDS[part.config.model_type]) for part in parts if part.config.model_type in _GUARDS]


def _refuse_attached(modules: list[nn.Module]) -> None:
    from dp_flash_hf.layers import rules  # which loads all rules: not needed before a model is patched

    for module in modules:
        if rules.is_attached(module):
            raise UnsupportedError(
                f"a rule is on {type(module).__name__}, whose attention implementation is to change; call engine.detach() first"
            )


def _mixin_of(original: type) -> type | None:
    """The patch of a class, fitted to it; None if there is none, or if the class takes its attention from the interface."""
    mixin = _MIXINS.get(f"{original.__module__}.{original.__qualname__}")
    return None if mixin is None or _is_on_interface(original) else _fitted(mixin, original)


@functools.cache
def _is_on_interface(original: type) -> bool:
    with contextlib.suppress(OSError, TypeError):
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(original)
    return False


@functools.cache
def _fitted(mixin: Any, original: Any) -> type:
    """A subclass of a patch whose `forward` is called as `original`'s is, by positions and names of the installed version."""
    takes = inspect.signature(mixin.forward).parameters
    known = {*takes}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        known.add("output_attentions")  # which our attention refuses
    _, *family = inspect.signature(original.forward).parameters.values()
    named = {parameter.name: parameter.default for parameter in family if parameter.kind is not parameter.VAR_KEYWORD}
    renamed = {new: old for new, old in _RENAMED.items() if new in named.keys() - known and old in known}
    unknown = {name: default for name, default in named.items() if name not in known | renamed.keys()}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(list(named)[: len(args)], args, strict=True)), **kwargs}
        for name, default in unknown.items():
            value = given.pop(name, None)
            if value is not None and (isinstance(value, Tensor) or value != default):
                raise UnsupportedError(
                    f"{original.__name__} of transformers {transformers.__version__} was given {name}, which its patch does "
                    'not know; leave it out, use attn_implementation="eager" or a version that dp-flash-hf is tested with'
                )
        return mixin.forward(self, **{renamed.get(name, name): value for name, value in given.items()})

    return type(mixin.__name__, (mixin,), {"forward": forward, "__module__": mixin.__module__, "__doc__": mixin.__doc__})


def _revive(original: type) -> Any:
    """An empty instance of the patched class, for copies and pickles, which name the original one."""
    patched: Any = _SWAP.derived(original, _mixin_of(original))
    return patched.__new__(patched)


_SWAP = ClassSwap(revive=_revive)
