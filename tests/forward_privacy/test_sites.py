"""A privatised call: what it computes, how much noise it has, what it refuses, and what an attacker gains from it."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
from itertools import count
from typing import Any, get_args

import dp_accounting
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp_flash_hf.attention.backends import use
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.forward_privacy import sites
from dp_flash_hf.forward_privacy.config import AttentionPrivacy
from dp_flash_hf.forward_privacy.privatize import privatize
from dp_flash_hf.forward_privacy.sensitivity import token_sensitivity
from dp_flash_hf.kernels import reference
from dp_flash_hf.kernels.counter_noise import fresh_key
from dp_flash_hf.mechanisms.config import Noise
from tests.support.forward_privacy import (
    EPS64,
    GOOD,
    NOISE,
    SILENT,
    call,
    clipped,
    cost,
    llama,
    plain_output,
    private_layer,
    random_qkv,
    texts,
)


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
    atol = 64 * 8 * EPS64  # as in tests/support/attention.py
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


@pytest.mark.parametrize("noise", get_args(Noise))
def test_noise_has_its_scale_in_every_head_and_none_goes_to_padding(noise: Noise) -> None:
    shares = [0.7, 0.3]
    privacy = AttentionPrivacy(clip_norm=0.5, noise_multiplier=2.0, max_length=64, head_shares=shares, noise=noise)
    module, _ = private_layer(privacy, rows=64)
    qkv = random_qkv(64, 2, 2, 64, e=8)
    lengths = torch.arange(64) % 63 + 2
    padding = torch.arange(64) < lengths[:, None]
    added = call(module, qkv, padding) - call_plain(qkv, 0.5, padding)
    real = padding[:, None, :, None].expand_as(added)
    assert (added[~real] == 0).all()
    for head, std in enumerate(privacy.noise_std(2, 2, 1)):
        drawn = added[:, head][real[:, head]] / std
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


def test_a_bias_added_to_the_logits_cannot_make_a_row_infinite() -> None:
    module, _ = private_layer(AttentionPrivacy(**{**GOOD, "noise_multiplier": SILENT}))
    bias = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    bias[0, 0, 1, 0], bias[0, 0, 2, 0] = math.nan, math.inf
    output = call(module, random_qkv(1, 1, 1, 4), position_bias=bias)
    assert (output.norm(dim=-1) <= 1 + 8 * EPS64).all()


def test_noise_is_cryptographic_unless_it_was_asked_to_be_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """At both kinds of place, under a new key for every call."""
    drawn: list[tuple[int, ...]] = []

    def fresh(*, secure: bool) -> tuple[int, ...]:
        drawn.append(fresh_key(secure=secure))
        return drawn[-1]

    monkeypatch.setattr(sites, "fresh_key", fresh)
    for options, words in (({}, 8), ({"noise": "secure"}, 8), ({"noise": "fast"}, 2)):
        module, _ = private_layer(AttentionPrivacy(**{**GOOD, **options}))
        model = llama()
        privatize(model, AttentionPrivacy(**{**NOISE, **options}), layers=[0], placement="residual")
        for _ in range(2):
            call(module, random_qkv(1, 1, 1, 3))
            plain_output(model, texts())
        assert [len(key) for key in drawn[-4:]] == [words] * 4
    assert len(set(drawn)) == 12


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


@pytest.mark.complete
def test_a_compiled_call_draws_noise_anew_and_is_recorded() -> None:
    torch._dynamo.reset()
    module, ledger = private_layer(AttentionPrivacy(**GOOD), rows=3)
    padding = torch.arange(6) < torch.tensor([[2], [5], [1]])
    qkv, compiled = random_qkv(3, 2, 1, 6), torch.compile(call, backend="aot_eager")
    first, second = (compiled(module, qkv, padding) for _ in range(2))
    assert bool((first != second)[0, :, :2].all())
    assert ledger.squared_mu == pytest.approx(2 * cost(AttentionPrivacy(**GOOD), 5))


# --- the whole mechanism, from outside --------------------------------------------------------------------------------------


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shares", [None, [0.2, 0.8]])
@pytest.mark.parametrize("noise", get_args(Noise))
def test_an_attacker_who_knows_everything_gains_what_is_reported(
    shares: list[float] | None, noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likelihood ratio of two sequences that are as far apart as can be, over two calls."""
    keys = count()  # so that the audit always finds the same
    monkeypatch.setattr(sites, "fresh_key", lambda *, secure: (next(keys),) * (8 if secure else 2))
    clip, delta, trials, rows = [1.0, 0.5], 0.05, 60_000, 2
    privacy = AttentionPrivacy(clip_norm=clip, noise_multiplier=1.3, max_length=rows, head_shares=shares, noise=noise)
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
