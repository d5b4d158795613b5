"""What stands at a privatised place: on attention, which clips and adds noise itself, or behind a block's hidden states."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from dp_flash_hf.attention.release import Call, finite, site_of
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.scope import Scope, arguments_of
from dp_flash_hf.forward_privacy.sensitivity import full_token_factor, token_factor
from dp_flash_hf.kernels.counter_noise import fresh_key, normals
from dp_flash_hf.kernels.types import Release


class AttentionSite:
    """On a module that calls dp_flash attention: an `attention.release.Site`."""

    def __init__(self, place: str, scope: Scope) -> None:
        self.place, self.scope = place, scope

    def open(self, call: Call) -> tuple[Release, float | None] | Tensor:
        """Account a call, and say how to release it; see `attention.release.Site`."""
        privacy, scope = self.scope.privacy, self.scope
        scope.refuse_replaying()
        softcap = self._cap(call)
        (batch, heads, queries, _), kv_heads = call.query.shape, call.key.shape[1]
        clip, std = _constants(privacy, scope.places, heads, kv_heads, call.query.device)
        if scope.is_observed:
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
        return Release(clip, std, fresh_key(secure=privacy.is_secure), exact=privacy.unit == "token"), softcap

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
        parts = [[float(part.queries) for part in row if part.visibility != "nothing"] for row in call.segments]
        return [sum(row) for row in parts], [rows for row in parts for rows in row]
    if call.fully_masked is None:
        return [float(queries)] * batch, [float(queries)] * batch
    seeing = (~call.fully_masked).flatten(1).sum(1).tolist()
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
                if part.visibility == "mask":
                    assert mask is not None
                    block = mask[b % len(mask), :, q : q + part.queries, k : k + part.keys]
                    rows[-1].append(float(token_factor(block[None], cap)))
                elif part.visibility != "nothing":
                    rows[-1].append(full_token_factor(part.queries, part.keys, cap, part.visibility == "causal"))
                q, k = q + part.queries, k + part.keys
        return [max(row, default=0.0) for row in rows], [factor for row in rows for factor in row]
    if mask is not None:
        factors = token_factor(mask.expand(*mask.shape[:2], queries, keys), cap).tolist()
        factors *= batch // len(factors)
    else:
        factors = [full_token_factor(queries, keys, cap, call.pattern.causal)] * batch
    return factors, factors


class ResidualSite:
    """Forward hook of a block: its hidden states, (B, S, D) or the first of a tuple, are clipped for each row and noised.

    What is clipped is the Frobenius norm of a row's hidden states X, to C: `X min(1, C / |X|_F)`. Two such points are at most
    2 C apart, so the sensitivity is 2 C, also for several units packed into one row. Hidden states of padding become zero;
    where no mask says what is padding, nothing is. Either way all that goes on is noised or zero.
    """

    def __init__(self, place: str, scope: Scope) -> None:
        self.place, self.scope = place, scope
        self.padding: Tensor | None = None

    def see_padding(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model that the block is part of."""
        mask = arguments_of(owner, args, kwargs).get("attention_mask")
        self.padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        """The block's output with its hidden states clipped and noised; UnsupportedError if it returns none."""
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise UnsupportedError(f"{self.place} does not return hidden states (B, S, D); choose another block")
        noised = self._release(states)
        return (noised, *output[1:]) if isinstance(output, tuple) else noised

    def _release(self, states: Tensor) -> Tensor:
        scope, privacy = self.scope, self.scope.privacy
        scope.refuse_replaying()
        if scope.is_observed:
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
        noise = normals(
            fresh_key(secure=privacy.is_secure), (batch, 1, *hidden.shape[1:]), hidden.device, secure=privacy.is_secure
        )
        noised: Tensor = hidden + 2 * norm * privacy.multiplier(scope.places) * noise[:, 0]
        if real is not None:
            noised = noised.masked_fill(~real, 0)
        return noised.to(states.dtype)


def is_private(module: nn.Module) -> bool:
    """Whether a site is on this module."""
    return site_of(module) is not None or any(isinstance(hook, ResidualSite) for hook in module._forward_hooks.values())
