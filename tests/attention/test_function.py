"""dp_flash attention as a function: exact against the oracle, and isolated, which NaN poisoning shows."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_hf.attention.backends import use
from dp_flash_hf.kernels import reference
from tests.support.attention import (
    CUTS,
    NAN,
    B,
    D,
    E,
    H,
    S,
    assert_same,
    causal_mask,
    for_oracle,
    padding,
    run,
    tensors,
    trainable,
)


@pytest.mark.parametrize("causal", [True, False])
def test_unmasked(extra: dict[str, Any], causal: bool) -> None:
    qkv = tensors()
    oracle = reference.attention(*qkv, causal=causal, **for_oracle(extra))
    assert_same(run(qkv, causal=causal, **extra), oracle, trainable(qkv, extra))
    assert_same(run(qkv, causal=not causal, is_causal=causal, **extra), oracle, trainable(qkv, extra))  # the argument wins


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(extra: dict[str, Any], side: str) -> None:
    qkv, real = tensors(), padding([5, S], side)
    mask = causal_mask(S) & real[:, None, None, :] & real[:, None, :, None]
    oracle = reference.attention(*qkv, mask=mask, **for_oracle(extra))
    assert_same(run(qkv, mask, **extra), oracle, trainable(qkv, extra))
    assert_same(run(qkv, real, **extra), oracle, trainable(qkv, extra))  # the same mask in 2-D
    if side == "right":
        assert_same(run(qkv, mask, **extra), reference.attention(*qkv, causal=True, lengths=[5, S], **for_oracle(extra)), qkv)


def test_cross_attention() -> None:
    qkv, real = tensors(q=4, k=7), padding([7, 3], size=7)
    assert_same(run(qkv, causal=False), reference.attention(*qkv), qkv)
    oracle = reference.attention(*qkv, mask=real[:, None, None, :])
    assert_same(run(qkv, real[:, None, None, :].expand(-1, 1, 4, -1), causal=False), oracle, qkv)
    assert_same(run(qkv, real, causal=False), oracle, qkv)
    packed = tensors(batch=1, q=4, k=7)
    cuts = torch.tensor([0, 3, 4]), torch.tensor([0, 2, 7])
    oracle = reference.attention(*packed, cu_seqlens_q=[0, 3, 4], cu_seqlens_k=[0, 2, 7])
    assert_same(run(packed, causal=False, cu_seq_lens_q=cuts[0], cu_seq_lens_k=cuts[1]), oracle, packed)


def test_one_query_sees_all_keys() -> None:
    qkv = tensors(q=1, k=7)
    assert_same(run(qkv), reference.attention(*qkv), qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kwargs", [{}, {"softcap": 1.3}, {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}], ids=str
)
def test_half_precision(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    qkv = [x.detach().to(dtype) for x in tensors()]
    out = run(qkv, **kwargs)
    assert out.dtype == dtype
    with use("reference"):
        oracle = run(qkv, **kwargs)
    # Weights sum to one: rounding weights and values costs one eps of the largest value each, the output and oracle one more.
    atol = 4 * torch.finfo(dtype).eps * qkv[2].abs().max().item()
    torch.testing.assert_close(out, oracle, rtol=0, atol=atol)


@pytest.mark.parametrize("kwargs", [{}, {"softcap": 2.0}, {"cu_seq_lens_q": torch.tensor([0, 100, 400])}], ids=str)
def test_dropout_keeps_the_mean_and_drops_the_right_share(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(3)
    n, p = 400, 0.25
    query, key = torch.zeros(1, 1, n, D), torch.zeros(1, 1, n, D)
    out = run([query, key, torch.ones(1, 1, n, 1)], causal=False, dropout=p, **kwargs)[0, 0, :, 0]
    # Query i averages n_i kept-or-dropped ones: mean 1, variance p / (1-p) / n_i.
    lengths = torch.tensor([100] * 100 + [300] * 300) if kwargs.get("cu_seq_lens_q") is not None else torch.full((n,), n)
    z = (out - 1) / (p / (1 - p) / lengths).sqrt()
    assert abs(z.mean().item()) < 5 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"sinks": torch.zeros(1)}, "sinks"),
        ({"block_indices": torch.zeros(1)}, "block_indices"),
        ({"output_attentions": True}, "weights"),
        ({"is_causal": False, "sliding_window": 3}, "not causal"),
        ({"mask": causal_mask(S)[None, None], "sliding_window": 3}, "mask ignores"),
        ({"cu_seq_lens_q": torch.tensor([0, S])}, "batch of one"),
        ({"batch": 1, "cu_seq_lens_q": torch.tensor([0, S - 1])}, "rising from 0 to 9"),
        ({"batch": 1, "cu_seq_lens_q": torch.tensor([0, 5, 4, S])}, "rising"),
        ({"batch": 1, "cu_seq_lens_q": torch.tensor([0, 4, S]), "cu_seq_lens_k": torch.tensor([0, 5, S])}, "different numbers"),
        ({"k": S + 1}, "line up"),
        ({"k": S + 1, "mask": torch.ones(B, S + 1)}, "line up"),
        ({"mask": torch.ones(B, S, S)}, "2 or 4 dimensions"),
        ({"mask": causal_mask(S)[None, None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "see each other"),
        ({"mask": torch.zeros(1, 1, S, S), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "see each other"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refuses_what_it_would_get_wrong(kwargs: dict[str, Any], match: str) -> None:
    qkv = tensors(batch=kwargs.pop("batch", B), k=kwargs.pop("k", S))
    with pytest.raises(ValueError, match=match):
        run(qkv, **kwargs)


# --- isolation: NaN in one unit reaches no other -----------------------------------------------------------------------------


def poisoned_run(
    units: list[tuple[int, slice]], bad: int, where: str, mask: Tensor | None, extra: dict[str, Any], **kwargs: Any
) -> None:
    """Poison one unit's inputs or output gradient: all other units' outputs and gradients stay bit for bit the same."""
    batch = 1 + max(row for row, _ in units)

    def once(poison: bool) -> tuple[Tensor, list[Tensor]]:
        qkv = tensors(batch=batch)
        torch.manual_seed(4)
        seed = torch.zeros(batch, H, S, E, dtype=torch.float64)
        for row, span in units:
            seed[row, :, span] = torch.randn(H, span.stop - span.start, E, dtype=torch.float64)
        row, span = units[bad]
        with torch.no_grad():
            for name, x in zip("qkv", qkv, strict=True):
                if poison and name in where:
                    x[row, :, span] = NAN
            if poison and "gradient" in where:
                seed[row, :, span] = NAN
        out = run(qkv, mask, **kwargs, **extra)
        return out.detach(), list(torch.autograd.grad(out, qkv, seed))

    clean, grads = once(poison=False)
    dirty, dirty_grads = once(poison=True)
    for unit, (row, span) in enumerate(units):
        if unit != bad:
            for before, after in zip([clean, *grads], [dirty, *dirty_grads], strict=True):
                assert after[row, :, span].isfinite().all(), f"unit {unit}"
                torch.testing.assert_close(after[row, :, span], before[row, :, span], rtol=0, atol=0)
    if where != "gradient":
        row, span = units[bad]
        assert dirty[row, :, span].isnan().any()  # the poison was there


POISON = ["q", "k", "v", "qkv", "gradient"]
PACKED = [(0, slice(0, 3)), (0, slice(3, 4)), (0, slice(4, S))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("where", POISON)
def test_packed_units_are_isolated(extra: dict[str, Any], bad: int, where: str) -> None:
    cuts, positions = torch.tensor(CUTS), torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4]])
    blocks = torch.block_diag(*(causal_mask(b - a) for a, b in pairwise(CUTS))).bool()[None, None]
    if where == "q" and bad == 1 and "s_aux" not in extra:  # one token attending to itself: its weight is 1 whatever the query
        where = "kv"
    poisoned_run(PACKED, bad, where, None, extra, cu_seq_lens_q=cuts)
    poisoned_run(PACKED, bad, where, None, extra, position_ids=positions)
    poisoned_run(PACKED, bad, where, None, extra, position_ids=positions, sliding_window=2)
    poisoned_run(PACKED, bad, where, blocks, extra)
    poisoned_run(PACKED, bad, where, blocks & causal_mask(S, 2), extra)
    poisoned_run(PACKED, bad, where, causal_mask(S)[None, None], extra, cu_seq_lens_q=cuts)


@pytest.mark.parametrize("where", POISON)
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_padded_units_are_isolated(extra: dict[str, Any], where: str, side: str) -> None:
    lengths = [S, 4, 6]
    spans = [slice(0, n) if side == "right" else slice(S - n, S) for n in lengths] if side != "none" else [slice(0, S)] * 3
    mask = padding(lengths, side) if side != "none" else None
    for bad in (0, 1):
        poisoned_run(list(enumerate(spans)), bad, where, mask, extra)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_reaches_no_token(extra: dict[str, Any], side: str) -> None:
    real = padding([5, S], side)

    def once(poison: bool) -> tuple[Tensor, list[Tensor]]:
        qkv = tensors()
        with torch.no_grad():
            for x in qkv:
                x.transpose(1, 2)[~real] = NAN if poison else 0.5
        out = run(qkv, real, **extra).transpose(1, 2)
        return out[real], [g.transpose(1, 2)[real] for g in torch.autograd.grad(out[real].square().sum(), qkv)]

    torch.testing.assert_close(once(poison=True), once(poison=False), rtol=0, atol=0)


def test_cross_attention_padding_reaches_no_token() -> None:
    real = padding([7, 3], size=7)[:, None, None, :]
    qkv = tensors(q=4, k=7)
    clean = run(qkv, real, causal=False)
    grads = torch.autograd.grad(clean.square().sum(), qkv)
    with torch.no_grad():
        qkv[1][1, :, 3:] = qkv[2][1, :, 3:] = NAN
    out = run(qkv, real, causal=False)
    torch.testing.assert_close(out, clean, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), qkv), grads, rtol=0, atol=0)


# --- on a GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [{}, {"softcap": 2.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_on_gpu(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    """Segment by segment or in torch's varlen kernel: equal to the oracle, and NaN stays in its segment."""
    cuts = [0, 3, 70, 200]
    qkv = [x.detach().to("cuda", dtype).requires_grad_() for x in tensors(batch=1, q=200, k=200, e=D)]
    out = run(qkv, cu_seq_lens_q=torch.tensor(cuts, device="cuda"), **kwargs)
    softcap = kwargs.get("softcap")
    oracle = reference.attention(*(x.cpu() for x in qkv), causal=kwargs.get("causal", True), cu_seqlens_q=cuts, softcap=softcap)
    atol = 4 * torch.finfo(dtype).eps * qkv[2].abs().max().item()
    torch.testing.assert_close(out.detach().cpu().double(), oracle.detach(), rtol=0, atol=atol)

    grads = torch.autograd.grad(out.square().sum(), qkv)
    with torch.no_grad():
        for x in qkv:
            x[:, :, 3:70] = NAN
    dirty = run(qkv, cu_seq_lens_q=torch.tensor(cuts, device="cuda"), **kwargs)
    keep = [*range(3), *range(70, 200)]
    torch.testing.assert_close(dirty[:, :, keep], out[:, :, keep], rtol=0, atol=0)
    for after, before in zip(torch.autograd.grad(dirty.square().sum(), qkv), grads, strict=True):
        assert after[:, :, keep].isfinite().all()
        torch.testing.assert_close(after[:, :, keep], before[:, :, keep])
