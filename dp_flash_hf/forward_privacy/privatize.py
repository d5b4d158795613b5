"""`privatize`: noise at chosen places of a model; `verify_cut`: whether nothing private goes around it.

    privatized = privatize(model, AttentionPrivacy(clip_norm=1.0, noise_multiplier=2.0, max_length=512), layers="cross")
    verify_cut(privatized, batch, private=("input_ids",), released=("logits",))
    model(**batch).logits
    print(privatized.report(delta=1e-6))

Noise protects a private input only where every way from it to what is released leads through a privatised place: where these
are a cut of the model. In a decoder block the residual stream carries the input around attention, so noise inside attention
alone protects nothing there. Cross-attention of an encoder-decoder is a cut between the two; so is noise on the hidden states
themselves, placement "residual", as in DP-Forward (Du et al., CCS 2023, arXiv:2309.06746).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast, get_args

from torch import nn
from transformers import PreTrainedModel

from dp_flash_hf.attention.function import NAMES, SITE
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.forward_privacy.config import AttentionPrivacy, Placement
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.forward_privacy.report import ADJACENCY, AttentionPrivacyReport
from dp_flash_hf.forward_privacy.sites import _AttentionSite, _is_private, _ResidualSite, _Scope

_CROSS = re.compile(r"cross|encoder_attn|enc_?dec", re.IGNORECASE)
_EXPAND = "_expand_inputs_for_generation"


def privatize(
    model: nn.Module,
    privacy: AttentionPrivacy,
    *,
    layers: Sequence[int | str] | str | None = None,
    placement: Placement = "attention",
) -> Privatized:
    """Add calibrated noise to the output of places of `model`, in every forward from now on, and account it.

    Args:
        model: with placement "attention" it runs `attn_implementation="dp_flash"` (or "dp_attention"), without dropout there.
        privacy: how.
        layers: with placement "attention", the modules that call dp_flash attention: None for all, "cross" for
            cross-attention, or numbers in their order and names, of them or of what they are part of. With "residual", the
            blocks after which hidden states (B, S, D) are clipped as a whole, for each row of the batch, and noised: numbers
            in the order of the model's layer lists, or names of any modules.
        placement: "attention" or "residual".

    Returns:
        A handle: ledger, report, remove.

    Raises:
        UnsupportedError: the model does not run dp_flash attention, or the sensitivity of such a placement is not known.
        ValueError: places that are not there, or settings that would be ignored.
    """
    if placement not in get_args(Placement):
        raise invalid("placement", expected="attention or residual", actual=placement, remedy="choose one of them")
    if any(_is_private(module) for module in model.modules()):
        raise invalid("model", expected="one that is not privatised", actual=type(model).__name__, remedy="remove() first")
    places = _selected(model, layers, placement)
    _check_fits(privacy, placement, places)
    return Privatized(model, privacy, placement, places)


class Privatized:
    """A model with noise at its `places`; made by `privatize`.

    ledger: every release so far. model, privacy, placement, places: what was given and chosen.
    """

    def __init__(self, model: nn.Module, privacy: AttentionPrivacy, placement: Placement, places: dict[str, nn.Module]) -> None:
        self.model, self.privacy, self.placement, self.places = model, privacy, placement, tuple(places)
        self.ledger = AttentionLedger()
        self._verified: _Verified | None = None
        parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
        owners = {place: _owner(parts, place) for place in places}
        if placement == "attention":
            for place, owner in owners.items():
                if owner is None or owner.config._attn_implementation not in NAMES:
                    raise UnsupportedError(
                        f'{place} does not run attn_implementation="{NAMES[0]}"; load the model with it, or call '
                        f'set_attn_implementation("{NAMES[0]}")'
                    )
        configs = [owner.config for owner in owners.values() if owner is not None] if placement == "attention" else []
        self._scope = _Scope(privacy, len(places), self.ledger, configs)
        self._scope.root = model
        self._undo: list[Callable[[], None]] = []
        for place, module in places.items():
            self._install(place, module, owners[place])
        for part in {id(part): part for part in (model, *parts.values())}.values():
            self._hook(part.register_forward_pre_hook(self._scope.enter, with_kwargs=True, prepend=True))
            self._hook(part.register_forward_hook(self._scope.leave, always_call=True))
            if hasattr(type(part), _EXPAND):
                setattr(part, _EXPAND, functools.partial(_expand, part, self.ledger))
                self._undo.append(functools.partial(vars(part).pop, _EXPAND))
        self._hook(model.register_forward_hook(self._scope.check_released))

    def _install(self, place: str, module: nn.Module, owner: PreTrainedModel | None) -> None:
        if self.placement == "attention":
            setattr(module, SITE, _AttentionSite(place, self._scope))
            self._undo.append(functools.partial(delattr, module, SITE))
            return
        site = _ResidualSite(place, self._scope)
        self._hook(module.register_forward_hook(site))
        if owner is not None:
            self._hook(owner.register_forward_pre_hook(site.see_padding, with_kwargs=True))

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def remove(self) -> None:
        """Take all noise out again. The ledger stays; there is no report of a model without noise, so take that before.

        Another `privatize` begins another ledger: what both of them released, of the same units, costs the sum of their rho.
        """
        while self._undo:
            self._undo.pop()()
        self._verified = None

    def report(self, delta: float | None = None) -> AttentionPrivacyReport:
        """The guarantee of everything released so far, at `delta` (default: target_delta).

        Raises PrivacyError unless `verify_cut` has passed since privatised places or trainable parameters last changed.
        """
        if self._verified is None or self._verified.state != self._state():
            raise PrivacyError(
                "whether the privatised places are a cut has not been verified as the model stands: noise that the private "
                "input gets around protects nothing. Call verify_cut(privatized, batch) first"
            )
        delta = self.privacy.target_delta if delta is None else delta
        if delta is None:
            raise invalid("delta", expected="0 < delta < 1", actual=None, remedy="use well below 1 / units")
        clip = self.privacy.clip_norm
        return AttentionPrivacyReport(
            epsilon=self.ledger.epsilon(delta),
            delta=delta,
            rho=self.ledger.rho,
            target_epsilon=self.privacy.target_epsilon,
            adjacency=ADJACENCY[self.privacy.unit],
            placement=self.placement,
            places=self.places,
            calls=sum(self.ledger.calls.values()),
            clip_norm=clip if isinstance(clip, tuple) else cast(float, clip),
            noise_multiplier=self.privacy.multiplier(len(self.places)),
            max_length=self.privacy.max_length,
            logit_cap=self.privacy.logit_cap,
            generator="ChaCha20, 256-bit keys" if self.privacy.secure else "Philox4x32-10, 64-bit keys",
            private_inputs=self._verified.private,
            public_inputs=self._verified.public,
            released=self._verified.released,
        )

    def _state(self) -> tuple[Any, ...]:
        """What verify_cut's verdict depends on: modules and places, what is trained, who computes attention, and whether
        batches are normalised by themselves.
        """
        return (
            tuple((name, _is_private(module)) for name, module in self.model.named_modules()),
            tuple(name for name, parameter in self.model.named_parameters() if parameter.requires_grad),
            tuple(config._attn_implementation for config in self._scope.configs),
            tuple(module.training for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)),
        )


class _Verified(NamedTuple):
    state: tuple[Any, ...]
    private: tuple[str, ...]
    public: tuple[str, ...]
    released: tuple[str, ...]


# --- where ----------------------------------------------------------------------------------------------------------------


def _calls_attention(module: nn.Module) -> bool:
    """Whether it is a module that calls dp_flash attention: it did, it follows a patch, or its forward looks the name up."""
    if getattr(module, "_dp_flash_ran", False) or hasattr(type(module), "_dp_flash_original"):
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


def _selected(model: nn.Module, layers: Sequence[int | str] | str | None, placement: Placement) -> dict[str, nn.Module]:
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
            remedy='give numbers or names; "cross" and None are for placement="attention"',
        )
    return {name: module for name, module in modules.items() if name in wanted}


def _check_fits(privacy: AttentionPrivacy, placement: Placement, places: dict[str, nn.Module]) -> None:
    """Refuse what would be ignored, and what has no known sensitivity."""
    if placement == "attention":
        if privacy.max_length is None:
            raise invalid(
                "max_length", expected="the most rows a unit has in a call", actual=None, remedy="noise is made for it"
            )
        if privacy.unit == "token" and len(places) > 1:
            raise UnsupportedError(
                f'unit="token" at {len(places)} places: what a place is given depends on a token in that token\'s place alone '
                "only at the first, directly on the embeddings; choose that one"
            )
        return
    if privacy.unit == "token":
        raise UnsupportedError('placement "residual" clips a sequence\'s hidden states together: only unit="sequence"')
    ignored = {name: getattr(privacy, name) for name in ("max_length", "logit_cap", "head_shares")}
    ignored["clip_norm"] = privacy.clip_norm if isinstance(privacy.clip_norm, tuple) else None
    for name, given in ignored.items():
        if given is not None:
            expected = "one number" if name == "clip_norm" else "None"
            raise invalid(name, expected=expected, actual=given, remedy='heads and rows mean nothing to placement="residual"')


def _owner(parts: dict[str, PreTrainedModel], place: str) -> PreTrainedModel | None:
    """The innermost model that a place belongs to."""
    around = [name for name in parts if name == "" or place.startswith(f"{name}.")]
    return parts[max(around, key=len)] if around else None


def _expand(part: Any, ledger: AttentionLedger, *args: Any, **kwargs: Any) -> Any:
    """In place of a model's method for beams and several return sequences, which put one unit into several rows."""
    if kwargs.get("expand_size", args[0] if args else 1) > 1 and not ledger.knows_units:
        raise PrivacyError(
            "beams and several return sequences repeat a unit in several rows, each of which is a release: say so, "
            "with ledger.units(ids), an id for every row, repeated like the rows"
        )
    return getattr(type(part), _EXPAND)(part, *args, **kwargs)
