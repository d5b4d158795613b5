"""forward_privacy.sites."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dp_flash_hf.attention.backends import finite
from dp_flash_hf.attention.function import NAMES, SITE, Call
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.forward_privacy.sensitivity import full_token_factor, token_factor
from dp_flash_hf.kernels.counter_noise import fresh_key, normals
from dp_flash_hf.kernels.types import Release

# --- at work --------------------------------------------------------------------------------------------------------------

# Arguments of models that say where units and tokens lie, not what they hold.
STRUCTURE = frozenset(
    f"{side}{name}"
    for side in ("", "decoder_", "encoder_")
    for name in ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position", "inputs_mask")
)


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
