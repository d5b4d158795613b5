"""No input moves a call further than its bound, and some move it nearly as far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.sensitivity import (
    full_token_factor,
    sequence_sensitivity,
    token_factor,
    token_sensitivity,
    weight_bound,
)
from tests.support.forward_privacy import EPS64, SILENT, band, call, private_layer, random_qkv

RESTARTS, STEPS = 64, 120


def ascend(parameters: list[Tensor], distance: Any) -> float:
    """The largest distance that gradient ascent finds, from all restarts (the first dimension) at once."""
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=0.2)
    best = torch.zeros(())
    for step in range(STEPS):
        moved = distance()
        best = torch.maximum(best, moved.detach().max())
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / STEPS)
        optimizer.zero_grad()
        (-moved.sum()).backward()
        optimizer.step()
    return float(best)


def norm_per_restart(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms


SEQUENCES: dict[str, dict[str, Any]] = {
    "one head": {"heads": 1, "groups": 1, "tokens": 3},
    "causal": {"heads": 2, "groups": 2, "tokens": 4, "clip": [0.5, 2.0]},
    "bidirectional": {"heads": 2, "groups": 2, "tokens": 4, "causal": False},
    "grouped": {"heads": 4, "groups": 2, "tokens": 3, "clip": [0.3, 1.5]},
    "window": {"heads": 2, "groups": 1, "tokens": 5, "window": 2},
    "capped": {"heads": 2, "groups": 2, "tokens": 4, "cap": 1.0},
    "across": {"heads": 2, "groups": 2, "tokens": 3, "keys": 5, "causal": False},
    "sinks": {"heads": 2, "groups": 2, "tokens": 4, "sinks": -4.0},
    "bias": {"heads": 2, "groups": 2, "tokens": 4, "bias": True},
}


def adversary(shape: dict[str, Any], unit: str) -> tuple[nn.Module, AttentionPrivacy, dict[str, Any]]:
    """The privatised layer of a shape, without noise, and what its calls are given besides query, key and value."""
    heads, tokens, keys = shape["heads"], shape["tokens"], shape.get("keys", shape["tokens"])
    privacy = AttentionPrivacy(
        clip_norm=shape.get("clip", 1.0),
        noise_multiplier=SILENT,
        max_length=tokens,
        logit_cap=shape.get("cap"),
        unit=unit,  # type: ignore[arg-type]
    )
    module, _ = private_layer(privacy, causal=shape.get("causal", True), rows=RESTARTS)
    extra: dict[str, Any] = {"scaling": 1.0}
    if "window" in shape:
        extra["mask"] = band(tokens, shape["window"], shape.get("causal", True))[None, None]
    if "sinks" in shape:
        extra["s_aux"] = torch.full((heads,), shape["sinks"], dtype=torch.float64)
    if "bias" in shape:
        extra["position_bias"] = torch.randn(1, heads, tokens, keys, dtype=torch.float64)
    return module, privacy, extra


def clips(shape: dict[str, Any]) -> list[float]:
    """C of each query head."""
    clip = shape.get("clip", 1.0)
    each = clip if isinstance(clip, list) else [clip] * shape["groups"]
    return [norm for norm in each for _ in range(shape["heads"] // shape["groups"])]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", SEQUENCES)
def test_no_two_sequences_are_further_apart_than_the_bound_and_some_are_nearly_as_far(name: str) -> None:
    shape = SEQUENCES[name]
    module, _, extra = adversary(shape, "sequence")
    size = shape["heads"], shape["groups"], shape["tokens"]
    one, other = (random_qkv(RESTARTS, *size, keys=shape.get("keys")) for _ in range(2))
    found = ascend([*one, *other], lambda: norm_per_restart(call(module, one, **extra) - call(module, other, **extra)))
    bound = sequence_sensitivity(shape["tokens"], clips(shape))
    assert found <= bound * (1 + 100 * EPS64)
    assert found >= 0.95 * bound


TOKENS: dict[str, dict[str, Any]] = {
    "causal": {"heads": 1, "groups": 1, "tokens": 5, "cap": 0.5},
    "flat": {"heads": 2, "groups": 2, "tokens": 6, "cap": 0.05},
    "steep": {"heads": 1, "groups": 1, "tokens": 4, "cap": 3.0},
    "bidirectional": {"heads": 2, "groups": 2, "tokens": 4, "cap": 1.0, "causal": False},
    "grouped": {"heads": 4, "groups": 2, "tokens": 4, "cap": 0.7, "clip": [0.5, 2.0]},
    "window": {"heads": 1, "groups": 1, "tokens": 7, "cap": 0.5, "window": 3},
    "window both ways": {"heads": 1, "groups": 1, "tokens": 6, "cap": 0.5, "window": 2, "causal": False},
    "sinks": {"heads": 2, "groups": 2, "tokens": 4, "cap": 0.5, "sinks": -6.0},
    "one": {"heads": 2, "groups": 2, "tokens": 1, "cap": 1.0, "causal": False},
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", TOKENS)
def test_no_token_moves_the_output_further_than_the_bound(name: str) -> None:
    shape = TOKENS[name]
    module, _, extra = adversary(shape, "token")
    size = shape["heads"], shape["groups"]
    base, token = random_qkv(RESTARTS, *size, shape["tokens"]), random_qkv(RESTARTS, *size, 1)
    place = torch.arange(RESTARTS)[:, None] % shape["tokens"] == torch.arange(shape["tokens"])  # every place in its turn

    def distance() -> Tensor:
        other = [torch.where(place[:, None, :, None], new, old) for new, old in zip(token, base, strict=True)]
        return norm_per_restart(call(module, base, **extra) - call(module, other, **extra))

    found = ascend([*base, *token], distance)
    bound = token_sensitivity(
        shape["tokens"], clips(shape), shape["cap"], causal=shape.get("causal", True), window=shape.get("window")
    )
    assert found <= bound * (1 + 100 * EPS64)
    assert found >= 0.8 * bound  # not every row can put its largest weight on the token while its own row moves by 2 C
    assert bound < sequence_sensitivity(shape["tokens"], clips(shape)) or shape["tokens"] == 1


def test_the_search_starts_from_a_thousand_places() -> None:
    assert RESTARTS * (len(SEQUENCES) + len(TOKENS)) >= 1000


def test_a_key_has_at_most_the_weight_of_the_bound() -> None:
    for keys, cap in ((1, 2.0), (2, 0.3), (9, 1.7)):
        logits = torch.full((keys,), -cap, dtype=torch.float64)
        logits[0] = cap
        assert float(torch.softmax(logits, 0)[0]) == pytest.approx(weight_bound(keys, cap), rel=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_the_factor_without_a_mask_is_that_of_the_mask(causal: bool) -> None:
    for n in (1, 2, 7):
        visible = torch.ones(n, n, dtype=torch.bool)
        factor = float(token_factor((visible.tril() if causal else visible)[None, None], 0.4))
        assert full_token_factor(n, n, 0.4, causal) == pytest.approx(factor, rel=1e-14)
    across = float(token_factor(torch.ones(1, 1, 4, 7, dtype=torch.bool), 0.4))
    assert full_token_factor(4, 7, 0.4, False) == pytest.approx(across, rel=1e-14)
