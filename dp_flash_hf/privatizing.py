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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dp_flash_hf.attention import NAMES, SITE, Call
from dp_flash_hf.attention_implementations import finite
from dp_flash_hf.attention_privacy import (
    ADJACENCY,
    AttentionLedger,
    AttentionPrivacy,
    AttentionPrivacyReport,
    Placement,
    full_token_factor,
    token_factor,
)
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.kernels.attention import Release
from dp_flash_hf.kernels.counter_noise import fresh_key, normals

# Arguments of models that say where units and tokens lie, not what they hold.
STRUCTURE = frozenset(
    f"{side}{name}"
    for side in ("", "decoder_", "encoder_")
    for name in ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position", "inputs_mask")
)
_CROSS = re.compile(r"cross|encoder_attn|enc_?dec", re.IGNORECASE)
_EXPAND = "_expand_inputs_for_generation"
_ROUNDING = 1024  # units in the last place that a row may differ by because another one changed: sums are reordered


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


# --- at work --------------------------------------------------------------------------------------------------------------


class _Scope:
    """What the sites of one model share. Copied and pickled with it."""

    def __init__(
        self, privacy: AttentionPrivacy, places: int, ledger: AttentionLedger, configs: list[PreTrainedConfig]
    ) -> None:
        self.privacy, self.places, self.ledger, self.configs = privacy, places, ledger, configs
        self.root: nn.Module | None = None  # the whole model
        self.whole: frozenset[str] = frozenset()  # places whose rows may not be those of the batch, as verify_cut saw
        self.rows: int | None = None  # of the batch that the outermost model was given; None if its inputs disagree
        self.depth = 0
        self.missing: set[str] = set()  # places that have not released yet
        self.seen: list[tuple[str, tuple[Tensor, ...]]] | None = None  # what sites were given, while verify_cut runs

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of every model and the models in it."""
        if module is self.root:  # also after one that was interrupted
            self.depth = 0
        self.depth += 1
        if self.depth > 1:
            return
        for config in self.configs:
            if config._attn_implementation not in NAMES:
                raise PrivacyError(
                    f'the attention implementation became "{config._attn_implementation}", so that privatised attention would '
                    "not run; set it back, or call remove()"
                )
        sizes = {
            value.shape[0]
            for name, value in _arguments(module, args, kwargs).items()
            if isinstance(value, Tensor) and value.ndim > 1 and name not in STRUCTURE
        }
        self.rows = sizes.pop() if len(sizes) == 1 else None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the same, also after an error."""
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0:
            self.rows = None

    def check_released(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the whole model."""
        if self.missing and self.seen is None:
            raise PrivacyError(
                f"privatised, but nothing was released there: {', '.join(sorted(self.missing))}; choose the layers that run"
            )

    def account(self, place: str, by_row: list[float], by_part: list[float] | None = None) -> None:
        """Record a release; the arguments as those of AttentionLedger.per_unit, in factors."""
        costs = self.per_unit(place, by_row, by_row if by_part is None else by_part)
        multiplier = self.privacy.multiplier(self.places)
        base = 1.0 if self.privacy.max_length is None else self.privacy.factor
        self.ledger.record(place, [factor / base / multiplier**2 for factor in costs])
        self.missing.discard(place)

    def per_unit(self, place: str, by_row: list[float], by_part: list[float]) -> list[float]:
        rows_are_units = self.rows == len(by_row) and place not in self.whole
        return self.ledger.per_unit(by_row, by_part, sum(by_row), rows_are_units=rows_are_units)

    def refuse_replaying(self) -> None:
        if _is_replayed():
            raise UnsupportedError(
                "a privatised call while the model is traced, exported, captured or transformed by torch.func: what is made of "
                "it would add the same noise again and again, and no ledger would know; release with the model itself"
            )
        # A recomputed forward would draw other noise than the one whose loss is being differentiated.
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedError("a privatised call during the backward pass: switch gradient checkpointing off")

    def constant(self, place: str, given: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        """For verify_cut: remember what a site was given, and answer by numbers that depend on the call's place only."""
        assert self.seen is not None
        self.seen.append((place, given))
        numbers = normals((len(self.seen), 0), (1, 1, 1, shape.numel()), given[-1].device, given[-1].dtype)
        return numbers[0, 0, 0].view(shape)


def _is_replayed() -> bool:
    """Whether what is computed now will serve for several releases."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return captured or transformed or bool(torch._C._is_tracing() or torch.compiler.is_exporting())


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


class _AttentionSite:
    """On a module that calls dp_flash attention; see `attention.Site`."""

    def __init__(self, place: str, scope: _Scope) -> None:
        self.place, self.scope = place, scope
        scope.missing.add(place)

    def open(self, call: Call) -> tuple[Release, float | None] | Tensor:
        privacy, scope = self.scope.privacy, self.scope
        scope.refuse_replaying()
        softcap = self._cap(call)
        (batch, heads, queries, _), kv_heads = call.query.shape, call.key.shape[1]
        clip, std = _constants(privacy, scope.places, heads, kv_heads, call.query.device)
        if scope.seen is not None:
            shape = torch.Size((batch, heads, queries, call.value.shape[-1]))
            return scope.constant(self.place, (call.query, call.key, call.value), shape)
        by_row, by_part = _rows(call)
        longest = max(scope.per_unit(self.place, by_row, by_part), default=0)
        assert privacy.max_length is not None
        if longest > privacy.max_length:
            raise UnsupportedError(
                f"{self.place} was given {longest:g} rows of one unit, and its noise is made for {privacy.max_length}; raise "
                "max_length, cut the units, or say with ledger.units(ids) which rows or packed parts are whose"
            )
        if privacy.unit == "token":
            by_row, by_part = _token_factors(call, cast(float, privacy.logit_cap))
        scope.account(self.place, by_row, by_part)
        return Release(clip, std, fresh_key(secure=privacy.secure), exact=privacy.unit == "token"), softcap

    def _cap(self, call: Call) -> float | None:
        """The cap on this call's logits. Raises UnsupportedError where the bounds do not hold for the call."""
        pattern, cap = call.pattern, self.scope.privacy.logit_cap
        if pattern.dropout:
            raise UnsupportedError(f"{self.place} has dropout, whose weights are not convex; set the attention dropout to 0")
        if cap is not None and pattern.softcap is not None and pattern.softcap > cap:
            raise UnsupportedError(
                f"{self.place} caps its logits at {pattern.softcap:g} itself, above logit_cap = {cap:g}, and one is applied "
                "only; raise logit_cap to it, or lower the model's own"
            )
        if self.scope.privacy.unit == "token":
            float_mask = pattern.mask is not None and pattern.mask.is_floating_point()
            if pattern.bias is not None or float_mask or call.picked:
                raise UnsupportedError(
                    f"{self.place} adds to its logits or picks keys by them, so that the logit cap does not bound a token's "
                    'weight; use unit="sequence"'
                )
        return cap if pattern.softcap is None else pattern.softcap  # its own is at most the cap: the bound holds as it is


@functools.lru_cache(maxsize=64)
def _constants(
    privacy: AttentionPrivacy, places: int, heads: int, kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """clip_norms (G,) and noise_std (H,) of a Release."""
    clip, std = privacy.clip_norms(kv_heads), privacy.noise_std(heads, kv_heads, places)
    with torch.inference_mode(False):  # they outlive the call, and others may need gradients
        return torch.tensor(clip, device=device), torch.tensor(std, device=device)


def _rows(call: Call) -> tuple[list[float], list[float]]:
    """How many queries see something, per row of the batch and per packed part."""
    batch, _, queries, _ = call.query.shape
    if call.segments is not None:
        parts = [[float(part.queries) for part in row if part.sight != "nothing"] for row in call.segments]
        return [sum(row) for row in parts], [rows for row in parts for rows in row]
    if call.blind is None:
        return [float(queries)] * batch, [float(queries)] * batch
    seeing = (~call.blind).flatten(1).sum(1).tolist()
    rows = list(map(float, seeing)) * (batch // len(seeing))
    return rows, rows


def _token_factors(call: Call, cap: float) -> tuple[list[float], list[float]]:
    """`token_factor`, per row of the batch and per packed part."""
    (batch, _, queries, _), keys, mask = call.query.shape, call.key.shape[2], call.pattern.mask
    if call.segments is not None:
        rows: list[list[float]] = []
        for b, segments in enumerate(call.segments):
            rows.append([])
            q = k = 0
            for part in segments:
                if part.sight == "mask":
                    assert mask is not None
                    block = mask[b % len(mask), :, q : q + part.queries, k : k + part.keys]
                    rows[-1].append(float(token_factor(block[None], cap)))
                elif part.sight != "nothing":
                    rows[-1].append(full_token_factor(part.queries, part.keys, cap, part.sight == "causal"))
                q, k = q + part.queries, k + part.keys
        return [max(row, default=0.0) for row in rows], [factor for row in rows for factor in row]
    if mask is not None:
        factors = token_factor(mask.expand(*mask.shape[:2], queries, keys), cap).tolist()
        factors *= batch // len(factors)
    else:
        factors = [full_token_factor(queries, keys, cap, call.pattern.causal)] * batch
    return factors, factors


class _ResidualSite:
    """Forward hook of a block: its hidden states, (B, S, D) or the first of a tuple, are clipped for each row and noised.

    What is clipped is the Frobenius norm of a row's hidden states X, to C: X min(1, C / |X|_F). Two such points are at most
    2 C apart, so the sensitivity is 2 C, also for several units packed into one row. Hidden states of padding become zero;
    where no mask says what is padding, nothing is. Either way all that goes on is noised or zero.
    """

    def __init__(self, place: str, scope: _Scope) -> None:
        self.place, self.scope = place, scope
        self.padding: Tensor | None = None
        scope.missing.add(place)

    def see_padding(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model that the block is part of."""
        mask = _arguments(owner, args, kwargs).get("attention_mask")
        self.padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise UnsupportedError(f"{self.place} does not return hidden states (B, S, D); choose another block")
        noised = self._release(states)
        return (noised, *output[1:]) if isinstance(output, tuple) else noised

    def _release(self, states: Tensor) -> Tensor:
        scope, privacy = self.scope, self.scope.privacy
        scope.refuse_replaying()
        if scope.seen is not None:
            return scope.constant(self.place, (states,), states.shape)
        batch, length, _ = states.shape
        scope.account(self.place, [1.0] * batch)
        padding = self.padding
        hidden = finite(states)
        real = None
        if padding is not None and len(padding) == batch and padding.shape[1] >= length:
            real = padding[:, -length:, None].bool()
            hidden = hidden.masked_fill(~real, 0)
        norm = cast(float, privacy.clip_norm)
        hidden = hidden * (norm / torch.linalg.vector_norm(hidden, dim=(1, 2), keepdim=True).clamp(min=norm))
        noise = normals(fresh_key(secure=privacy.secure), (batch, 1, *hidden.shape[1:]), hidden.device, secure=privacy.secure)
        noised: Tensor = hidden + 2 * norm * privacy.multiplier(scope.places) * noise[:, 0]
        if real is not None:
            noised = noised.masked_fill(~real, 0)
        return noised.to(states.dtype)


def _is_private(module: nn.Module) -> bool:
    return hasattr(module, SITE) or any(isinstance(hook, _ResidualSite) for hook in module._forward_hooks.values())


def _expand(part: Any, ledger: AttentionLedger, *args: Any, **kwargs: Any) -> Any:
    """In place of a model's method for beams and several return sequences, which put one unit into several rows."""
    if kwargs.get("expand_size", args[0] if args else 1) > 1 and not ledger.knows_units:
        raise PrivacyError(
            "beams and several return sequences repeat a unit in several rows, each of which is a release: say so, "
            "with ledger.units(ids), an id for every row, repeated like the rows"
        )
    return getattr(type(part), _EXPAND)(part, *args, **kwargs)


# --- whether it is a cut --------------------------------------------------------------------------------------------------


def verify_cut(
    privatized: Privatized,
    inputs: Mapping[str, Any],
    *,
    private: Sequence[str] | None = None,
    released: Sequence[str] | None = None,
    special_ids: Sequence[int] = (),
    replacements: int = 3,
) -> None:
    """Check on a real batch that the privatised places cut everything released, and trained, off from what is private.

    Each privatised output is replaced by numbers that depend on nothing. Then: no released output may change when the private
    entries are replaced by others of the same lengths (bit for bit, `replacements` times), nor be reachable by autograd from
    where they enter; no trainable parameter may lie before a privatised place that is given anything private, because its
    gradient is computed from that without noise; what a place is given of one row may not depend on another row; and with
    unit="token", replacing one token may change what the place is given in that token's place only. The model runs as it
    stands, in training or in evaluation mode, always from the same torch seed.

    What passes is what was tried: a way around that is taken only by other inputs, or at another length, is not seen.

    Args:
        privatized: what `privatize` returned.
        inputs: keyword arguments of the model, as it will be called; a real batch. After one of one row, calls with several
            count as one unit, because nothing shows that rows do not mix.
        private: names of the entries that the guarantee protects. Default: every tensor but masks and positions. So where
            `labels` or `decoder_input_ids` are public, say private=("input_ids",).
        released: names of the entries of the model's output that will leave it, or that a loss to train on is made of; "0",
            "1", ... of a tuple. Default: all, with losses, caches and an encoder's states.
        special_ids: token ids that every text has in the same places, such as a classification token; with those that the
            model's config names, they stay where they are, and where they are is public.
        replacements: how many other private inputs are tried.

    Raises:
        PrivacyError: it is not a cut, with what leaks and why. The handle then gives no report.
        ValueError: names that are not there, or nothing private.
    """
    privatized._verified = None
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    private = tuple(name for name in tensors if name not in STRUCTURE) if private is None else tuple(private)
    if not private or not set(private) <= tensors.keys():
        raise invalid("private", expected=f"some of {', '.join(tensors)}", actual=private, remedy="name what is protected")
    trial = _Trial(privatized, dict(inputs), private, released, special_ids)
    first = trial.run(inputs)
    missed = set(privatized.places) - {place for place, _ in first.seen}
    if missed:
        raise PrivacyError(f"privatised, but never called: {', '.join(sorted(missed))}; choose the layers that run")
    generator = torch.Generator().manual_seed(0)
    others = [trial.run_like(first, trial.replaced(generator)) for _ in range(replacements)]
    for other in others:
        leaks = [name for name, value in first.outputs.items() if not _equal(value, other.outputs.get(name))]
        if leaks or other.outputs.keys() != first.outputs.keys():
            raise PrivacyError(
                f"not a cut: with the privatised outputs held constant, {', '.join(leaks) or 'what is returned'} still depends "
                f"on {', '.join(private)}. {_REMEDY[privatized.placement]}"
            )
    facing = {i for other in others for i, call in enumerate(first.seen) if not _same_call(call, other.seen[i])}
    if not facing:
        raise PrivacyError(f"nothing that the privatised places are given depends on {', '.join(private)}; is that private?")
    trial.check_gradients(first, others, facing)
    trial.check_rows(first, generator)
    if privatized.privacy.unit == "token":
        trial.check_tokens(first, generator)
    names = tuple(dict.fromkeys(name.partition(".")[0] for name in first.outputs)) if released is None else tuple(released)
    public = tuple(name for name in tensors if name not in private)
    privatized._verified = _Verified(privatized._state(), private, public, names)


_REMEDY = {
    "attention": "Around attention, the residual stream carries the input: choose cross-attention (layers='cross'), or "
    "placement='residual'; or release less (released=...), without caches and an encoder's states (use_cache=False)",
    "residual": "Choose a block behind which nothing comes from before it; or release less (released=...), without caches and "
    "hidden states (use_cache=False)",
}


class _Run(NamedTuple):
    """One forward with constants in place of the privatised outputs."""

    outputs: dict[str, Tensor]  # what is released, by path
    seen: list[tuple[str, tuple[Tensor, ...]]]  # (place, what it was given), in order
    looked_up: list[Tensor]  # what embeddings were given, in order

    def shapes(self) -> list[Any]:
        return [(place, [x.shape for x in given]) for place, given in (*self.seen, ("", self.looked_up))]


class _Trial:
    """Runs of the model under verify_cut."""

    def __init__(
        self,
        privatized: Privatized,
        inputs: dict[str, Any],
        private: tuple[str, ...],
        released: Sequence[str] | None,
        special_ids: Sequence[int],
    ) -> None:
        self.model, self.scope = privatized.model, privatized._scope
        self.inputs, self.private, self.released = inputs, private, released
        numbers = {
            entry
            for part in self.model.modules()
            if isinstance(part, PreTrainedModel)
            for entry in _whole_numbers(part.config.to_dict())
        }
        special = sorted({*special_ids, *(number for name, number in numbers if re.search(r"_token_(id|index)s?$", name))})
        words = set(range(min((n for name, n in numbers if name == "vocab_size"), default=0))) - set(special)
        self.special, self.words = torch.tensor(special, dtype=torch.long), torch.tensor(sorted(words), dtype=torch.long)

    def run(self, inputs: Mapping[str, Any], probe: Callable[[int, Tensor], Tensor] | None = None) -> _Run:
        """`probe(i, output)` replaces the output of the i-th embedding that is looked up."""
        looked_up: list[Tensor] = []

        def look_up(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not isinstance(args[0], Tensor):  # a length, of which positions are made
                return None
            looked_up.append(args[0].detach().clone())
            return None if probe is None else probe(len(looked_up) - 1, output)

        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(0)
            stack.enter_context(torch.set_grad_enabled(probe is not None))
            seen = stack.enter_context(self._constants())
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(look_up).remove)
            output = self.model(**inputs)
        return _Run(dict(self._released(output)), seen, looked_up)

    def run_like(self, first: _Run, inputs: Mapping[str, Any]) -> _Run:
        """`run`; raises PrivacyError if other calls are made than in `first`."""
        run = self.run(inputs)
        if run.shapes() != first.shapes():
            raise PrivacyError("which calls the model makes depends on what is private, not on its lengths alone")
        return run

    @contextmanager
    def _constants(self) -> Iterator[list[tuple[str, tuple[Tensor, ...]]]]:
        self.scope.seen = []
        try:
            yield self.scope.seen
        finally:
            self.scope.seen = None

    def _released(self, output: Any) -> Iterator[tuple[str, Tensor]]:
        entries: dict[str, Any]
        if isinstance(output, Tensor):
            entries = {"output": output}
        elif isinstance(output, Mapping):
            entries = dict(output)
        else:
            entries = {str(i): entry for i, entry in enumerate(output)}
        names = list(entries) if self.released is None else list(self.released)
        missing = set(names) - entries.keys()
        if missing or not names:
            raise invalid("released", expected=f"some of {', '.join(entries)}", actual=names, remedy="name what is returned")
        for name in names:
            yield from _tensors(name, entries[name], set())

    def replaced(self, generator: torch.Generator, row: int | None = None) -> dict[str, Any]:
        """The inputs with other private ones, of the same lengths: of all rows, or of one."""
        inputs = dict(self.inputs)
        for name in self.private:
            old = inputs[name]
            new = self._other(name, old, generator)
            if row is not None:
                new = torch.cat([old[:row], new[row : row + 1], old[row + 1 :]])
            inputs[name] = new
        if all(torch.equal(inputs[name], self.inputs[name]) for name in self.private):
            raise invalid("inputs", expected="private entries that can be replaced", actual=self.private, remedy="give text")
        return inputs

    def _other(self, name: str, old: Tensor, generator: torch.Generator) -> Tensor:
        if old.is_floating_point():
            spread = old.std() if old.numel() > 1 else 1
            return (torch.randn(old.shape, generator=generator).to(old) * spread + old.mean()).detach()
        if len(self.words) and (name.endswith("input_ids") or name == "inputs"):
            new = self.words[torch.randint(len(self.words), old.shape, generator=generator)].to(old)
            structure = torch.isin(old, self.special.to(old))  # padding, ends, placeholders of images
            return torch.where(structure, old, new)
        return old.flatten()[torch.randperm(old.numel(), generator=generator).to(old.device)].view_as(old)

    def check_gradients(self, first: _Run, others: list[_Run], facing: set[int]) -> None:
        """Raise PrivacyError if autograd leads from where private inputs enter to an output, or to a trained parameter.

        To an output, a gradient that is zero throughout leads nowhere: where only a classification token is read, the others
        are computed beside it. To parameters, any way counts.
        """
        probes: list[Tensor] = []
        private: list[Tensor] = []  # of each probe, where what enters is not the same in all runs

        def probe(i: int, output: Tensor) -> Tensor:
            ids = first.looked_up[i]
            differs = torch.stack([ids != run.looked_up[i] for run in others]).any(0)
            if not differs.any() or output.shape[: ids.ndim] != ids.shape:
                return output
            probes.append(torch.zeros_like(output, requires_grad=True))
            private.append(differs)
            return output + probes[-1]

        inputs = dict(self.inputs)
        for name in self.private:
            if inputs[name].is_floating_point():
                inputs[name] = inputs[name].detach().clone().requires_grad_()
                probes.append(inputs[name])
                private.append(torch.ones(inputs[name].shape, dtype=torch.bool, device=inputs[name].device))
        run = self.run(inputs, probe)
        for name, value in run.outputs.items():
            ways = zip(_gradients(value, probes), private, strict=True)
            if any(gradient is not None and bool((gradient[where] != 0).any()) for gradient, where in ways):
                raise PrivacyError(f"not a cut: {name} is computed from {', '.join(self.private)} around the privatised places")
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        before = [_gradients(x, list(trained.values())) for i in facing for x in run.seen[i][1]]
        found = (any(gradient is not None for gradient in ways) for ways in zip(*before, strict=True))
        unsafe = [name for name, reached in zip(trained, found, strict=True) if reached]
        if unsafe:
            shown = ", ".join(unsafe[:8]) + (f" and {len(unsafe) - 8} more" if len(unsafe) > 8 else "")
            raise PrivacyError(
                f"trained before the noise: {shown}. Their gradients are computed from private inputs without noise; freeze "
                "them (requires_grad_(False)), a weight that the output layer shares too"
            )

    def check_rows(self, first: _Run, generator: torch.Generator) -> None:
        """Raise PrivacyError if what a place is given of one row depends on another row.

        Of a place that has other rows than the batch (the sequence comes first, chunks), every call counts as one unit; and of
        all places, where the batch is one row, which shows nothing.
        """
        rows = {len(self.inputs[name]) for name in self.private}
        if len(rows) != 1:
            return
        n_rows = rows.pop()
        self.scope.whole = frozenset(
            place for place, given in first.seen if n_rows == 1 or any(len(x) != n_rows for x in given)
        )
        if n_rows == 1:
            return
        for row in (0, n_rows - 1):
            run = self.run_like(first, self.replaced(generator, row))
            kept = [i for i in range(n_rows) if i != row]
            for (place, given), (_, moved) in zip(first.seen, run.seen, strict=True):
                for x, y in zip(given, moved, strict=True):
                    if len(x) == n_rows and not _close(x[kept], y[kept]):
                        raise PrivacyError(
                            f"what {place} is given of one row depends on other rows, so a unit moves more than its own; "
                            "look for batch normalisation, or routing with a capacity, before it"
                        )

    def check_tokens(self, first: _Run, generator: torch.Generator) -> None:
        """Raise PrivacyError if a token changes what the place is given anywhere but in its own place."""
        for _ in range(4):
            other = self.replaced(generator, 0)
            changed = {name: (other[name][0] != self.inputs[name][0]).flatten().nonzero().flatten() for name in self.private}
            for name, positions in changed.items():
                one = self.inputs[name].clone()
                if len(positions):
                    at = positions[int(torch.randint(len(positions), (), generator=generator))]
                    one[0].view(-1)[at] = other[name][0].reshape(-1)[at]
                run = self.run_like(first, {**self.inputs, name: one})
                for (place, given), (_, moved) in zip(first.seen, run.seen, strict=True):
                    touched = {
                        int(i)
                        for x, y in zip(given, moved, strict=True)
                        for i in (~torch.isclose(x, y, rtol=0, atol=_slack(x))).any(3).any(1).nonzero()[:, 1]
                    }
                    if len(touched) > 1:
                        raise PrivacyError(
                            f"one token of {name} changes what {place} is given in {len(touched)} places: it is not given "
                            'embeddings alone, so its noise protects no token; use unit="sequence"'
                        )


def _whole_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(name, number) for the whole numbers of a config, at any depth."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _whole_numbers(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int):
                yield name, number


def _tensors(path: str, value: Any, known: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value: in containers, and in the attributes of caches and the like."""
    if isinstance(value, Tensor):
        yield path, value
    elif value is None or isinstance(value, str | int | float | torch.dtype | torch.device | type) or id(value) in known:
        return
    else:
        known.add(id(value))
        if isinstance(value, Mapping):
            items: Any = value.items()
        elif isinstance(value, Sequence | set):
            items = enumerate(value)
        else:
            items = getattr(value, "__dict__", {}).items()
        for name, inner in items:
            yield from _tensors(f"{path}.{name}", inner, known)


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _same_call(a: tuple[str, tuple[Tensor, ...]], b: tuple[str, tuple[Tensor, ...]]) -> bool:
    return all(_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def _slack(x: Tensor) -> float:
    return _ROUNDING * torch.finfo(x.dtype).eps * float(x.abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=_slack(a))


def _gradients(value: Tensor, sources: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of a random projection of `value`; None where autograd does not lead to a source."""
    if not sources or not value.requires_grad:
        return [None] * len(sources)
    direction = normals((0, 0), (1, 1, 1, value.numel()), value.device, value.dtype).view_as(value)
    return torch.autograd.grad(value, sources, direction, retain_graph=True, allow_unused=True)
