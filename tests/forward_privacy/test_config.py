"""Privatised attention: no input moves a call further than its bound, the noise hides that much, and the ledger adds it up."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp_flash_hf.attention.backends import use
from dp_flash_hf.attention.function import SITE, dp_flash_attention
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.forward_privacy import privatize as privatizing
from dp_flash_hf.forward_privacy.config import AttentionPrivacy, calibrations
from dp_flash_hf.forward_privacy.gaussian import gaussian_delta, sampled_delta, sampled_epsilon
from dp_flash_hf.forward_privacy.ledger import AttentionLedger
from dp_flash_hf.forward_privacy.sensitivity import (
    full_token_factor,
    sequence_sensitivity,
    token_factor,
    token_sensitivity,
    weight_bound,
)
from dp_flash_hf.forward_privacy.sites import _AttentionSite, _Scope
from dp_flash_hf.kernels import reference

EPS64 = torch.finfo(torch.float64).eps
SILENT = 1e-30  # a noise multiplier that leaves float64 outputs as they are


def private_layer(
    privacy: AttentionPrivacy, *, causal: bool = True, rows: int | None = None
) -> tuple[nn.Module, AttentionLedger]:
    """A module with a site on it, as in a model that was given a batch of `rows` rows; and its ledger."""
    module, ledger = nn.Module(), AttentionLedger()
    scope = _Scope(privacy, 1, ledger, [])
    scope.rows = rows
    module.is_causal = causal  # type: ignore[assignment]
    setattr(module, SITE, _AttentionSite("layer", scope))
    return module, ledger


def call(module: nn.Module, qkv: list[Tensor], mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """(B, H, Q, E)."""
    query, key, value = qkv
    output, _ = dp_flash_attention(module, query, key, value, mask, **kwargs)
    return output.transpose(1, 2)


def random_qkv(
    batch: int, heads: int, groups: int, tokens: int, d: int = 3, e: int = 2, keys: int | None = None
) -> list[Tensor]:
    shapes = (batch, heads, tokens, d), (batch, groups, keys or tokens, d), (batch, groups, keys or tokens, e)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def band(n: int, window: int, causal: bool) -> Tensor:
    away = torch.arange(n)[:, None] - torch.arange(n)
    return (away.abs() < window) & (away >= 0 if causal else torch.ones(n, n, dtype=torch.bool))


# --- the bounds -----------------------------------------------------------------------------------------------------------

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


# --- the Gaussian mechanism -----------------------------------------------------------------------------------------------


def test_delta_is_the_inverse_of_the_epsilon_of_dp_accounting() -> None:
    for mu in (0.05, 0.7, 3.0):
        for delta in (1e-9, 1e-5, 1e-2):
            epsilon = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
            if epsilon > 0:
                assert float(gaussian_delta(epsilon, torch.tensor(mu))) == pytest.approx(delta, rel=1e-6)


def test_calibrations_are_the_published_ones_and_say_where_the_textbook_fails() -> None:
    one = calibrations(1.0, 1e-5)
    assert one.analytic == pytest.approx(3.7306, abs=1e-4)  # Balle and Wang 2018
    assert one.classic == pytest.approx(math.sqrt(2 * math.log(1.25e5)))
    assert one.classic_is_proven
    assert one.waste == pytest.approx(one.classic / one.analytic)
    assert calibrations(0.1, 1e-5).waste > one.waste > 1
    far = calibrations(50.0, 1e-5)
    assert not far.classic_is_proven
    assert far.waste < 1
    assert dp_accounting.get_epsilon_gaussian(far.classic, 1e-5) > 50
    with pytest.raises(ValueError, match="epsilon: expected"):
        calibrations(0.0, 1e-5)


def test_sampled_passes_cost_the_mixture_over_how_many_were_joined() -> None:
    epsilon, squared_mu, q, passes, certain = 1.3, 0.4, 0.2, 12, 0.1
    expected = 0.0
    for k in range(passes + 1):
        mu = math.sqrt(certain + k * squared_mu)
        above, below = stats.norm.cdf(mu / 2 - epsilon / mu), stats.norm.cdf(-mu / 2 - epsilon / mu)
        expected += stats.binom.pmf(k, passes, q) * (above - math.exp(epsilon) * below)
    found = sampled_delta(epsilon, squared_mu=squared_mu, sampling_rate=q, passes=passes, certain=certain)
    assert found == pytest.approx(expected, rel=1e-9)
    assert sampled_epsilon(expected, squared_mu=squared_mu, sampling_rate=q, passes=passes, certain=certain) == pytest.approx(
        epsilon, rel=1e-6
    )
    always = sampled_epsilon(1e-5, squared_mu=squared_mu, sampling_rate=1.0, passes=passes)
    assert always == pytest.approx(dp_accounting.get_epsilon_gaussian(1 / math.sqrt(passes * squared_mu), 1e-5), rel=1e-9)
    rarely = sampled_epsilon(1e-5, squared_mu=squared_mu, sampling_rate=0.01, passes=passes)
    one = dp_accounting.get_epsilon_gaussian(1 / math.sqrt(squared_mu), 1e-5)
    assert 0.5 * one < rarely < always  # far more than 0.01 of it: who takes part is seen


# --- the settings ---------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 2.0, "max_length": 8}
TARGET: dict[str, Any] = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-6}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("clip_norm", {"clip_norm": 0.0}),
        ("clip_norm", {"clip_norm": [1.0, math.nan]}),
        ("clip_norm", {"clip_norm": []}),
        ("head_shares", {"head_shares": [0.5, 0.6]}),
        ("head_shares", {"head_shares": [1.5, -0.5]}),
        ("max_length", {"max_length": 0}),
        ("noise_multiplier", {"noise_multiplier": None}),
        ("noise_multiplier", {"noise_multiplier": 0.0}),
        ("noise_multiplier", {"target_epsilon": 1.0, "target_delta": 1e-5}),
        ("noise_multiplier", {**TARGET, "target_delta": None}),
        ("target_epsilon", {**TARGET, "target_epsilon": -1.0}),
        ("target_delta", {**TARGET, "target_delta": 1.0}),
        ("passes", {"passes": 3}),
        ("passes", {**TARGET, "passes": 0}),
        ("sampling_rate", {**TARGET, "sampling_rate": 0.0}),
        ("unit", {"unit": "word"}),
        ("logit_cap", {"logit_cap": -1.0}),
        ("logit_cap", {"unit": "token"}),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        AttentionPrivacy(**{**GOOD, **changed})


@pytest.mark.parametrize(("passes", "rate"), [(1, 1.0), (7, 1.0), (40, 0.1)])
def test_a_target_is_met_by_all_places_and_passes_together(passes: int, rate: float) -> None:
    privacy = AttentionPrivacy(**{**GOOD, **TARGET, "passes": passes, "sampling_rate": rate})
    places, ledger = 3, AttentionLedger()
    for _ in range(passes):
        with ledger.sampled(rate):
            for place in range(places):
                ledger.record(str(place), [privacy.multiplier(places) ** -2])
    assert 3.0 * (1 - 1e-5) <= ledger.epsilon(1e-6) <= 3.0


def test_sampling_alone_is_no_privacy() -> None:
    privacy = AttentionPrivacy(**{**GOOD, **TARGET, "target_delta": 0.1, "passes": 3, "sampling_rate": 0.01})
    with pytest.raises(ValueError, match="takes part at all"):
        privacy.multiplier(1)


def test_noise_is_the_same_for_all_heads_unless_shares_say_otherwise() -> None:
    privacy = AttentionPrivacy(clip_norm=[0.5, 2.0], noise_multiplier=1.5, max_length=9)
    expected = 1.5 * sequence_sensitivity(9, [0.5, 0.5, 2.0, 2.0])
    assert privacy.noise_std(4, 2, 1) == pytest.approx([expected] * 4)
    shared = AttentionPrivacy(clip_norm=[0.5, 2.0], noise_multiplier=1.5, max_length=9, head_shares=[0.1, 0.2, 0.3, 0.4])
    squared_mus = [(2 * c) ** 2 * 9 / std**2 for c, std in zip([0.5, 0.5, 2.0, 2.0], shared.noise_std(4, 2, 1), strict=True)]
    assert squared_mus == pytest.approx([share / 1.5**2 for share in (0.1, 0.2, 0.3, 0.4)])
    with pytest.raises(ValueError, match="clip_norm"):
        shared.noise_std(4, 4, 1)
    with pytest.raises(ValueError, match="head_shares"):
        shared.noise_std(2, 2, 1)
    token = AttentionPrivacy(clip_norm=1.0, noise_multiplier=1.0, max_length=9, unit="token", logit_cap=0.5)
    assert token.noise_std(1, 1, 1)[0] == pytest.approx(token_sensitivity(9, [1.0], 0.5))


# --- a call ---------------------------------------------------------------------------------------------------------------


def clipped(value: Tensor, norms: list[float]) -> Tensor:
    limits = torch.tensor(norms, dtype=value.dtype)[:, None, None]
    factors: Tensor = (limits / torch.linalg.vector_norm(value, dim=-1, keepdim=True)).clamp(max=1)
    return value * factors


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
def test_a_call_attends_to_clipped_values_with_capped_logits(implementation: Any) -> None:
    privacy = AttentionPrivacy(clip_norm=[0.5, 2.0], noise_multiplier=SILENT, max_length=5, logit_cap=0.8)
    module, _ = private_layer(privacy, rows=2)
    qkv = [3 * x for x in random_qkv(2, 4, 2, 5)]
    for x in qkv:
        x.requires_grad_()
    with use(implementation):
        output = call(module, qkv)
    query, key, value = qkv
    expected = reference.attention(query, key, clipped(value, [0.5, 2.0]), causal=True, softcap=0.8)
    atol = 64 * 8 * EPS64  # as in tests/test_attention.py
    torch.testing.assert_close(output, expected, rtol=0, atol=atol)
    seed = torch.randn_like(output)
    grads = [torch.autograd.grad(out, qkv, seed) for out in (output, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=8 * atol)  # values and so gradients are up to 8 times as large


def test_a_value_of_zero_has_a_gradient() -> None:
    module, _ = private_layer(AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT}))
    qkv = random_qkv(1, 1, 1, 3)
    qkv[2] = torch.zeros_like(qkv[2], requires_grad=True)
    call(module, qkv).sum().backward()
    assert qkv[2].grad is not None
    assert qkv[2].grad.isfinite().all()


@pytest.mark.parametrize("secure", [False, True])
def test_noise_has_its_scale_in_every_head_and_none_goes_to_padding(secure: bool) -> None:
    shares = [0.7, 0.3]
    privacy = AttentionPrivacy(clip_norm=0.5, noise_multiplier=2.0, max_length=64, head_shares=shares, secure=secure)
    module, _ = private_layer(privacy, rows=64)
    qkv = random_qkv(64, 2, 2, 64, e=8)
    lengths = torch.arange(64) % 63 + 2
    padding = torch.arange(64) < lengths[:, None]
    noise = call(module, qkv, padding) - call_plain(qkv, 0.5, padding)
    real = padding[:, None, :, None].expand_as(noise)
    assert (noise[~real] == 0).all()
    for head, std in enumerate(privacy.noise_std(2, 2, 1)):
        drawn = noise[:, head][real[:, head]] / std
        # 16,000 squares: their mean is within 4 standard deviations of 1 but once in 16,000 runs.
        assert abs(float(drawn.square().mean()) - 1) < 4 * math.sqrt(2 / drawn.numel())
        assert abs(float(drawn.mean())) < 4 / math.sqrt(drawn.numel())


def call_plain(qkv: list[Tensor], clip: float, mask: Tensor | None) -> Tensor:
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    return call(module, [*qkv[:2], clipped(qkv[2], [clip] * qkv[2].shape[1])], mask)


def test_half_precision_is_computed_in_float32_also_under_autocast() -> None:
    module, _ = private_layer(AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT}), rows=2)
    qkv = [x.to(torch.bfloat16) for x in random_qkv(2, 2, 1, 7)]
    output = call(module, qkv)
    assert output.dtype == torch.bfloat16
    exact = call(module, [x.float() for x in qkv])
    assert torch.equal(output, exact.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(module, [x.float() for x in qkv]), exact)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_sequence_of_nan_or_infinity_stays_within_the_bound(bad: float, which: int) -> None:
    module, _ = private_layer(AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT}), rows=2)
    qkv = random_qkv(2, 2, 2, 5)
    clean = call(module, qkv)
    qkv[which][0, :, 2] = torch.tensor([bad, -bad, bad])[: qkv[which].shape[-1]]
    output = call(module, qkv)
    assert torch.equal(output[1], clean[1])
    assert (output.norm(dim=-1) <= 1 + 8 * EPS64).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_token_of_nan_or_infinity_stays_within_the_bound_of_a_token(bad: float, which: int) -> None:
    privacy = AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT}, unit="token", logit_cap=0.3)
    module, _ = private_layer(privacy, rows=1)
    one = random_qkv(1, 2, 2, 6)
    other = [x.clone() for x in one]
    other[which][0, :, 0] = torch.tensor([bad, -bad, bad])[: one[which].shape[-1]]
    if which == 1:
        one[0][:] = other[0][:] = 1e200  # logits of infinity minus infinity
    moved = float((call(module, one) - call(module, other)).norm())
    assert moved <= token_sensitivity(6, [1.0, 1.0], 0.3)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_so_does_a_token_in_the_kernels(which: int, device: str) -> None:
    pytest.importorskip("triton")
    privacy = AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT, "max_length": 30}, unit="token", logit_cap=0.1)
    module, _ = private_layer(privacy, rows=1)
    one = [x.bfloat16().to(device) for x in random_qkv(1, 1, 1, 30, d=16, e=16)]
    one[2][:] = one[2][:, :, :1]  # all alike, so that rows that become zero move far
    other = [x.clone() for x in one]
    other[which][0, :, 0] = math.nan
    with use("triton"):
        moved = float((call(module, one).float() - call(module, other).float()).norm())
    assert moved <= token_sensitivity(30, [1.0], 0.1)


def test_numbers_added_to_the_logits_cannot_make_a_row_infinite() -> None:
    module, _ = private_layer(AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT}))
    bias = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    bias[0, 0, 1, 0], bias[0, 0, 2, 0] = math.nan, math.inf
    output = call(module, random_qkv(1, 1, 1, 4), position_bias=bias)
    assert (output.norm(dim=-1) <= 1 + 8 * EPS64).all()


def test_no_two_calls_have_the_same_noise_wherever_the_module_goes() -> None:
    module, _ = private_layer(AttentionPrivacy(**GOOD))
    qkv = random_qkv(1, 1, 1, 3)
    torch.manual_seed(0)
    outputs = [call(module, qkv)]
    torch.manual_seed(0)
    outputs += [call(twin, qkv) for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)))]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        outputs += [torch.tensor(found) for found in pool.starmap(_in_a_fork, [(module, qkv)] * 3)]
    for i, one in enumerate(outputs):
        assert not any(torch.equal(one, other) for other in outputs[:i])


def _in_a_fork(module: nn.Module, qkv: list[Tensor]) -> Any:
    return call(module, qkv).tolist()


def test_what_has_no_known_sensitivity_is_refused_before_anything_is_released() -> None:
    qkv = random_qkv(1, 2, 1, 4)
    bias = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    token = AttentionPrivacy(**GOOD, unit="token", logit_cap=1.0)
    refused: list[tuple[AttentionPrivacy, str, dict[str, Any]]] = [
        (AttentionPrivacy(**GOOD), "dropout", {"dropout": 0.1}),
        (AttentionPrivacy(**GOOD, logit_cap=2.0), "raise logit_cap", {"softcap": 3.0}),
        (AttentionPrivacy(**{**GOOD, "max_length": 3}), "made for 3", {}),
        (token, "adds to its logits", {"position_bias": bias}),
        (token, "adds to its logits", {"mask": bias}),
        (token, "picks keys", {"indices": torch.zeros(1, 4, 1, dtype=torch.long)}),
    ]
    for privacy, message, extra in refused:
        module, ledger = private_layer(privacy, rows=1)
        with pytest.raises(UnsupportedError, match=message):
            call(module, qkv, **extra)
        assert not ledger.calls


def test_of_two_caps_the_models_own_holds_if_it_is_the_smaller() -> None:
    module, _ = private_layer(AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT}, logit_cap=2.0))
    query, key, value = random_qkv(1, 1, 1, 4)
    expected = reference.attention(query, key, clipped(value, [1.0]), causal=True, softcap=0.5)
    torch.testing.assert_close(call(module, [query, key, value], softcap=0.5), expected, rtol=0, atol=64 * 8 * EPS64)


def test_a_recomputed_forward_is_refused() -> None:
    module, _ = private_layer(AttentionPrivacy(**GOOD))
    qkv = [x.requires_grad_() for x in random_qkv(1, 1, 1, 3)]
    output = checkpoint(lambda *x: call(module, list(x)), *qkv, use_reentrant=False)
    assert isinstance(output, Tensor)
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        output.sum().backward()


def test_a_compiled_call_draws_noise_anew_and_is_recorded() -> None:
    torch._dynamo.reset()
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=3)
    padding = torch.arange(6) < torch.tensor([[2], [5], [1]])
    qkv, compiled = random_qkv(3, 2, 1, 6), torch.compile(call, backend="aot_eager")
    first, second = (compiled(module, qkv, padding) for _ in range(2))
    assert bool((first != second)[0, :, :2].all())
    assert ledger.squared_mu == pytest.approx(2 * cost(AttentionPrivacy(**GOOD), 5))


# --- what is recorded -----------------------------------------------------------------------------------------------------


def cost(privacy: AttentionPrivacy, factor: float) -> float:
    """mu^2 of a call with this factor."""
    assert privacy.noise_multiplier is not None
    return factor / privacy.factor / privacy.noise_multiplier**2


def test_a_call_costs_what_the_rows_of_its_longest_unit_cost() -> None:
    privacy = AttentionPrivacy(**GOOD)
    qkv = random_qkv(3, 2, 1, 6)
    padding = torch.arange(6) < torch.tensor([[2], [5], [1]])
    for rows, expected in ((3, 5), (None, 8), (6, 8)):  # where rows are not known to be units, all are taken for one
        module, ledger = private_layer(privacy, rows=rows)
        call(module, qkv, padding)
        assert ledger.squared_mu == pytest.approx(cost(privacy, expected))
        assert ledger.rho == pytest.approx(ledger.squared_mu / 2)
    module, ledger = private_layer(privacy, causal=False, rows=3)
    call(module, random_qkv(3, 2, 1, 4, keys=7))  # across: the queries are what is released
    assert ledger.squared_mu == pytest.approx(cost(privacy, 4))
    assert sum(ledger.calls.values()) == 1


def test_packed_parts_are_one_unit_unless_they_are_named() -> None:
    privacy = AttentionPrivacy(**GOOD)
    ends = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    module, ledger = private_layer(privacy, rows=1)
    call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 8))
    module, ledger = private_layer(privacy, rows=1)
    with ledger.units(["a", "b", "c"]):
        call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 4))
    with ledger.units(["a", "b"]), pytest.raises(PrivacyError, match="2 ids"):
        call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert sum(ledger.calls.values()) == 1


def test_named_units_are_charged_for_their_own_rows_and_the_worst_is_reported() -> None:
    privacy = AttentionPrivacy(**GOOD)
    module, ledger = private_layer(privacy, rows=3)
    qkv, padding = random_qkv(3, 1, 1, 6), torch.arange(6) < torch.tensor([[2], [5], [4]])
    with ledger.units(torch.tensor([7, 8, 7])):  # unit 7 holds two rows
        call(module, qkv, padding)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 6))
    with ledger.units([8, 9, 10]):
        call(module, qkv, padding)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 7))
    call(module, qkv, padding)
    assert ledger.squared_mu == pytest.approx(cost(privacy, 12))
    assert ledger.epsilon(1e-5) == dp_accounting.get_epsilon_gaussian(1 / math.sqrt(ledger.squared_mu), 1e-5)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 3), (False, 2)])
def test_a_token_costs_what_the_pattern_of_the_call_lets_it_move(causal: bool, window: int | None) -> None:
    privacy = AttentionPrivacy(**GOOD, unit="token", logit_cap=0.5)
    module, ledger = private_layer(privacy, causal=causal, rows=2)
    mask = None if window is None else band(6, window, causal)[None, None]
    call(module, random_qkv(2, 2, 1, 6), mask)
    expected = (token_sensitivity(6, [1.0], 0.5, causal=causal, window=window) / 2) ** 2
    assert ledger.squared_mu == pytest.approx(cost(privacy, expected))


def test_a_token_of_a_packed_or_padded_row_costs_what_its_own_text_lets_it_move() -> None:
    privacy = AttentionPrivacy(**GOOD, unit="token", logit_cap=0.5)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    module, ledger = private_layer(privacy, rows=1)
    call(module, random_qkv(1, 1, 1, 8), cu_seq_lens_q=ends)
    assert ledger.squared_mu == pytest.approx(cost(privacy, full_token_factor(5, 5, 0.5, True)))
    module, ledger = private_layer(privacy, rows=1)
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool()[None, None]
    call(module, random_qkv(1, 1, 1, 6), blocks.tril(1))  # neither causal nor full: the mask is looked at
    expected = max(float(token_factor(blocks.tril(1)[..., a:b, a:b], 0.5)) for a, b in ((0, 4), (4, 6)))
    assert ledger.squared_mu == pytest.approx(cost(privacy, expected))
    module, ledger = private_layer(privacy, rows=2)
    call(module, random_qkv(2, 1, 1, 8), torch.arange(8) < torch.tensor([[6], [2]]))
    assert ledger.squared_mu == pytest.approx(cost(privacy, full_token_factor(6, 6, 0.5, True)))


def test_the_ledger_agrees_with_pld_composition() -> None:
    # dp-accounting doubles the sensitivity when it is told that one is replaced; here it is that of replacing one already.
    ledger, accountant = AttentionLedger(), PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for place, mu in (("0", 0.3), ("1", 0.5), ("0", 0.2), ("0", 0.3)):
        ledger.record(place, [mu**2])
        accountant.compose(dp_accounting.GaussianDpEvent(1 / mu))
    for delta in (1e-8, 1e-5, 1e-2):
        assert ledger.epsilon(delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-3)
    assert ledger.calls == {("0", 0.09): 2, ("1", 0.25): 1, ("0", 0.2**2): 1}


def test_sampled_passes_are_taken_for_the_dearest_and_add_to_the_rest() -> None:
    ledger = AttentionLedger()
    for squared_mu in (0.1, 0.3):
        with ledger.sampled(0.2):
            ledger.record("0", [squared_mu / 2])
            ledger.record("1", [squared_mu / 2, 0.01])
    ledger.record("0", [0.05])
    expected = sampled_epsilon(1e-5, squared_mu=0.3, sampling_rate=0.2, passes=2, certain=0.05)
    assert ledger.epsilon(1e-5) == pytest.approx(expected)
    assert ledger.squared_mu == pytest.approx(0.45)
    with ledger.sampled(0.2):
        ledger.record("0", [0.3])
        within = ledger.epsilon(1e-5)
    assert within == ledger.epsilon(1e-5) > expected


def test_a_call_is_counted_in_one_way() -> None:
    ledger = AttentionLedger()
    with ledger.units([1]), pytest.raises(PrivacyError, match="another context"), ledger.sampled(0.5):
        pass
    with pytest.raises(ValueError, match="sampling_rate"), ledger.sampled(0.0):
        pass
    with pytest.raises(ValueError, match="delta"):
        ledger.epsilon(0.0)
    assert ledger.epsilon(1e-5) == 0
    assert not ledger.knows_units


def test_a_thread_of_its_own_is_in_nobody_elses_context() -> None:
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=1)
    with ledger.units(["a"]), ThreadPoolExecutor(1) as pool, pytest.raises(PrivacyError, match="another thread"):
        pool.submit(call, module, random_qkv(1, 1, 1, 3)).result()
    assert not ledger.calls


def test_ids_are_compared_by_what_they_are() -> None:
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=2)
    for _ in range(3):
        with ledger.units(list(torch.tensor([4, 5]))):
            call(module, random_qkv(2, 1, 1, 3))
    assert ledger.squared_mu == pytest.approx(3 * cost(AttentionPrivacy(**GOOD), 3))
    with pytest.raises(ValueError, match="equal to themselves"), ledger.units([math.nan]):
        pass


def test_a_copy_records_in_the_same_ledger() -> None:
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=1)
    call(copy.deepcopy(module), random_qkv(1, 1, 1, 3))
    assert sum(ledger.calls.values()) == 1


# --- the whole mechanism, from outside ------------------------------------------------------------------------------------


def audited_epsilon(one: Tensor, other: Tensor, delta: float) -> float:
    """A lower bound on epsilon from the scores of two neighbours, right but once in a thousand audits (Clopper-Pearson)."""
    thresholds = torch.quantile(torch.cat([one, other]), torch.linspace(0.01, 0.99, 50, dtype=one.dtype))
    n, alpha, best = len(one), 1e-3 / 100, 0.0
    for threshold in thresholds:
        hits, alarms = int((one > threshold).sum()), int((other > threshold).sum())
        least = float(stats.beta.ppf(alpha, hits, n - hits + 1)) if hits else 0.0
        most = float(stats.beta.isf(alpha, alarms + 1, n - alarms)) if alarms < n else 1.0
        if least > delta:
            best = max(best, math.log((least - delta) / most))
    return best


@pytest.mark.parametrize("shares", [None, [0.2, 0.8]])
@pytest.mark.parametrize("secure", [False, True])
def test_an_attacker_who_knows_everything_gains_what_is_reported(
    shares: list[float] | None, secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likelihood ratio of two sequences that are as far apart as can be, over two calls."""
    keys = count()  # so that the audit always finds the same
    monkeypatch.setattr(privatizing, "fresh_key", lambda *, secure: (next(keys),) * (8 if secure else 2))
    clip, delta, trials, rows = [1.0, 0.5], 0.05, 60_000, 2
    privacy = AttentionPrivacy(clip_norm=clip, noise_multiplier=1.3, max_length=rows, head_shares=shares, secure=secure)
    module, ledger = private_layer(privacy, rows=trials)
    ratio = torch.tensor([c / std**2 for c, std in zip(clip, privacy.noise_std(2, 2, 1), strict=True)], dtype=torch.float64)

    def score(value: float) -> Tensor:
        """(trials,): the logarithm of the likelihood ratio, but for a factor, of two calls."""
        zeros = torch.zeros(trials, 2, rows, 1, dtype=torch.float64)
        outputs = torch.stack([call(module, [zeros, zeros, zeros + value]) for _ in range(2)])
        return (outputs.sum((0, 3, 4)) * ratio).sum(1)

    scores = score(100.0), score(-100.0)
    assert ledger.squared_mu == pytest.approx(4 / 1.3**2)
    reported = dp_accounting.get_epsilon_gaussian(1 / math.sqrt(ledger.squared_mu / 2), delta)  # of the two calls of one
    found = audited_epsilon(*scores, delta)
    assert 0.85 * reported < found <= reported
