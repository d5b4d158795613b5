"""Which modules of a model are privatised, and whether the settings make sense there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from dp_flash_hf.attention import patching, usage
from dp_flash_hf.errors import UnsupportedError, invalid
from dp_flash_hf.forward_privacy.config import AttentionPrivacy, Placement

_CROSS = re.compile(r"cross|encoder_attn|enc_?dec", re.IGNORECASE)


def _calls_attention(module: nn.Module) -> bool:
    """Whether it is a module that calls dp_flash attention: it did, it follows a patch, or its forward looks the name up."""
    if usage.has_called(module) or patching.follows_patch(module):
        return True
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


def _blocks(model: nn.Module) -> list[str]:
    """The elements of the module lists that are in no other."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in blocks):
            blocks += [f"{name}.{i}" for i in range(len(module))]
    return blocks


def select(model: nn.Module, layers: Sequence[int | str] | str | None, placement: Placement) -> dict[str, nn.Module]:
    """The modules that `layers` names, by name, in the order of the model; see `privatize`.

    Raises ValueError for places that are not there, and where none is named.
    """
    attention = placement == "attention"
    modules = dict(model.named_modules())
    found = [name for name, module in modules.items() if _calls_attention(module)] if attention else _blocks(model)
    wanted: list[str] = []
    if attention and layers is None:
        wanted = found
    elif attention and layers == "cross":
        wanted = [name for name in found if _CROSS.search(name) or getattr(modules[name], "is_cross_attention", False)]
    elif layers is not None and not isinstance(layers, str):
        for layer in layers:
            if isinstance(layer, int):
                chosen = found[layer : layer + 1] if layer >= 0 else []
            elif attention:
                chosen = [name for name in found if name == layer or name.startswith(f"{layer}.")]
            else:
                chosen = [layer] if layer in modules else []
            if not chosen:
                raise invalid("layers", expected=f"of {', '.join(found)}", actual=layer, remedy="choose one of these")
            wanted += chosen
    if not wanted:
        raise invalid(
            "layers",
            expected=f"some of {', '.join(found) or 'none'}",
            actual=layers,
            remedy='give numbers or names of layers; "cross" and None are for placement="attention"',
        )
    return {name: module for name, module in modules.items() if name in wanted}


def check_fits(privacy: AttentionPrivacy, placement: Placement, places: dict[str, nn.Module]) -> None:
    """Refuse what would be ignored, and what has no known sensitivity."""
    if placement == "attention":
        if privacy.max_length is None:
            raise invalid(
                "max_length", expected="the most rows a unit has in a call", actual=None, remedy="set it: noise is made for it"
            )
        if privacy.unit == "token" and len(places) > 1:
            raise UnsupportedError(
                f'unit="token" at {len(places)} places: what a place is given depends on a token in that token\'s place alone '
                "only at the first, directly on the embeddings; choose that one"
            )
        return
    if privacy.unit == "token":
        raise UnsupportedError('placement "residual" clips a sequence\'s hidden states as a whole: only unit="sequence"')
    ignored = {name: getattr(privacy, name) for name in ("max_length", "logit_cap", "head_shares")}
    ignored["clip_norm"] = privacy.clip_norm if isinstance(privacy.clip_norm, tuple) else None
    for name, given in ignored.items():
        if given is not None:
            expected = "one norm" if name == "clip_norm" else "None"
            raise invalid(name, expected=expected, actual=given, remedy='heads and rows mean nothing to placement="residual"')


def owner_of(parts: dict[str, PreTrainedModel], place: str) -> PreTrainedModel | None:
    """The innermost model that a place belongs to."""
    around = [name for name in parts if name == "" or place.startswith(f"{name}.")]
    return parts[max(around, key=len)] if around else None
