"""`privatize`: calibrated noise at chosen places of a model, from now on, and the handle that accounts for it.

::

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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, get_args

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from dp_flash_hf import validation
from dp_flash_hf.attention import release
from dp_flash_hf.attention.function import NAMES
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.forward_privacy.config import AttentionPrivacy, Placement
from dp_flash_hf.forward_privacy.fingerprint import fingerprint
from dp_flash_hf.forward_privacy.generation import Recorded
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.forward_privacy.places import check_fits, owner_of, select
from dp_flash_hf.forward_privacy.report import ADJACENCY, AttentionPrivacyReport
from dp_flash_hf.forward_privacy.scope import Scope
from dp_flash_hf.forward_privacy.sites import AttentionSite, ResidualSite, is_private

_EXPAND = "_expand_inputs_for_generation"


def privatize(
    model: nn.Module,
    privacy: AttentionPrivacy,
    *,
    layers: Sequence[int | str] | str | None = None,
    placement: Placement = "attention",
) -> Privatized:
    """Add calibrated noise to the output of places of `model`, in every forward from now on, and account it.

    Each output of such a place is a Gaussian mechanism whose sensitivity is known whatever the input, NaN and infinity included
    (`AttentionPrivacy` has the formulas), and is recorded in the handle's ledger before it goes on. Whether that protects what
    the model returns is another question, which `verify_cut` answers. Calls whose noise would be used twice (traced, exported,
    captured, recomputed in backward) are refused, and so are calls whose sensitivity is not known (attention dropout, longer
    units than the noise is made for).

    Args:
        model: With placement "attention" it runs ``attn_implementation="dp_flash"`` (or "dp_attention"), without dropout there.
        privacy: How calls are made private.
        layers: With placement "attention", the modules that call dp_flash attention: None for all, "cross" for
            cross-attention, or numbers in their order and names, of them or of what they are part of. With "residual", the
            blocks after which hidden states (B, S, D) are clipped as a whole, for each row of the batch, and noised: numbers
            in the order of the model's layer lists, or names of any modules.
        placement: "attention" or "residual".

    Returns:
        A handle: ledger, report, remove.

    Raises:
        UnsupportedError: The model does not run dp_flash attention, or the sensitivity of such a placement is not known.
        ValueError: Places that are not there, settings that would be ignored, or a model that is privatised already.
    """
    validation.one_of("placement", placement, get_args(Placement))
    if any(is_private(module) for module in model.modules()):
        raise invalid("model", expected="one that is not privatised", actual=type(model).__name__, remedy="remove() first")
    places = select(model, layers, placement)
    check_fits(privacy, placement, places)
    return Privatized(model, privacy, placement, places)


class Privatized:
    """A model with noise at some places; made by `privatize`, and called as before.

    **Guarantee.** What left a privatised place since `privatize` is in the ledger: every call is recorded before its output
    goes on, one that fails afterwards too. `report` says what that protects, for the inputs that `verify_cut` found to be cut
    off.

    **Edge cases.**

    ====================================  ============================================================================
    case                                  what happens
    ====================================  ============================================================================
    evaluation, training, `no_grad`       noise alike: what is released does not depend on the mode
    generation                            every pass through the model is a call, one for each token; it is verified by
                                          itself, with ``verify_cut(..., call="generate")``
    beams, several return sequences       PrivacyError unless `ledger.units(ids)` names the unit of every row
    a call that was not verified          `report` refuses from then on: other arguments or options, `generate` with other
                                          settings, a part of the model called by itself
    a model that changed                  the same, until it is verified as it stands: hooks, modules, methods, mode, config,
                                          parametrizations, attention implementation, which parameters are trained
    `remove()`                            no noise from then on, and no report
    ====================================  ============================================================================

    Attributes:
        model: The model itself, which is called as before.
        privacy: How calls are made private.
        placement: "attention" or "residual".
        places: Names of the modules with noise.
        ledger: Every release so far.
        scope: What the places share; for `verify_cut`.
    """

    def __init__(self, model: nn.Module, privacy: AttentionPrivacy, placement: Placement, places: dict[str, nn.Module]) -> None:
        self.model, self.privacy, self.placement, self.places = model, privacy, placement, tuple(places)
        self.ledger = AttentionLedger()
        if not hasattr(GenerationMixin, _EXPAND):  # under another name it would repeat units unseen
            raise UnsupportedError(
                f"this version of transformers repeats rows by something else than GenerationMixin.{_EXPAND}; use a version "
                "that dp-flash-hf is tested with (dp-flash doctor says which)"
            )
        parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
        owners = {place: owner_of(parts, place) for place in places}
        if placement == "attention":
            for place, owner in owners.items():
                if owner is None or owner.config._attn_implementation not in NAMES:
                    raise UnsupportedError(
                        f'{place} does not run attn_implementation="{NAMES[0]}"; load the model with it, or call '
                        f'set_attn_implementation("{NAMES[0]}")'
                    )
        configs = [owner.config for owner in owners.values() if owner is not None] if placement == "attention" else []
        self.scope = Scope(model, privacy, places, self.ledger, configs)
        self._undo: list[Callable[[], None]] = []
        for place, module in places.items():
            self._install(place, module, owners[place])
        for part in {id(part): part for part in (model, *parts.values())}.values():
            self._hook(part.register_forward_pre_hook(self.scope.enter, with_kwargs=True, prepend=True))
            self._hook(part.register_forward_hook(self.scope.leave, always_call=True))
            if isinstance(part, GenerationMixin):
                self._put(part, _EXPAND, functools.partial(_expand, part, self.scope))
            if hasattr(type(part), "generate"):
                self._put(part, "generate", Recorded(part, self.scope, vars(part).get("generate")))
        self._hook(model.register_forward_hook(self.scope.check_released))

    def _install(self, place: str, module: nn.Module, owner: PreTrainedModel | None) -> None:
        if self.placement == "attention":
            release.put_on(module, AttentionSite(place, self.scope))
            self._undo.append(functools.partial(release.take_off, module))
            return
        site = ResidualSite(place, self.scope)
        self._hook(module.register_forward_hook(site))
        if owner is not None:
            self._hook(owner.register_forward_pre_hook(site.see_padding, with_kwargs=True))

    def _put(self, part: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """In place of this method of a model, until `remove`."""
        before = vars(part).get(name)
        setattr(part, name, method)
        self._undo.append(functools.partial(setattr, part, name, before) if before else functools.partial(vars(part).pop, name))

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def remove(self) -> None:
        """Take all noise out again. The ledger stays; there is no report of a model without noise, so take that before.

        Another `privatize` begins another ledger: what both of them released, of the same units, costs the sum of their rho.
        """
        while self._undo:
            self._undo.pop()()

    def report(self, delta: float | None = None) -> AttentionPrivacyReport:
        """The guarantee of everything released so far.

        Args:
            delta: Above 0 and below 1; default: `privacy.target_delta`.

        Raises:
            PrivacyError: Something was released by a call that was not made as `verify_cut` tried it, or the model, as it
                stands, was not verified; the message says which call, and what changed.
            ValueError: No delta, or one outside its range.
        """
        calls, code = self.scope.calls, fingerprint(self.model)
        if not calls.is_verified(code):
            raise PrivacyError(
                "whether the privatised places are a cut has not been verified as the model stands: noise that the private "
                f"input gets around protects nothing. Call verify_cut(privatized, batch) first{calls.since_verified(code)}"
            )
        unverified = calls.not_verified()
        if unverified:
            raise PrivacyError(
                f"released by calls that have not been verified: {'; '.join(unverified)}. Call verify_cut(privatized, batch) "
                'with the arguments that the model is called with, call="generate" for generating; what cannot be verified '
                "has no epsilon"
            )
        verdicts = calls.verdicts(code)
        delta = self.privacy.target_delta if delta is None else delta
        validation.delta("delta", delta)
        assert delta is not None
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
            noise=self.privacy.noise,
            verified_calls=tuple(dict.fromkeys(map(str, verdicts))),
            private_inputs=_names(verdict.private for verdict in verdicts.values()),
            public_inputs=_names(verdict.public for verdict in verdicts.values()),
            released=_names(verdict.released for verdict in verdicts.values()),
        )


def _names(several: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """All of them, once each."""
    return tuple(dict.fromkeys(name for names in several for name in names))


def _expand(part: Any, scope: Scope, *args: Any, **kwargs: Any) -> Any:
    """In place of a model's method for beams and several return sequences, which put one unit into several rows."""
    if kwargs.get("expand_size", args[0] if args else 1) > 1 and not (scope.ledger.knows_units or scope.is_observed):
        raise PrivacyError(
            "beams and several return sequences repeat a unit in several rows, and each row is a release: say so, "
            "with ledger.units(ids), an id for every row, repeated like the rows"
        )
    return getattr(type(part), _EXPAND)(part, *args, **kwargs)
