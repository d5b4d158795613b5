"""The oracle itself: against torch's dense attention, against formulas written out, and on what it must not read."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dp_flash_hf.kernels.reference import attention

EPS = torch.finfo(torch.float64).eps
ATOL = 64 * EPS  # tens of products of numbers near 1


def qkv(
    batch: int = 2, heads: int = 3, kv_heads: int = 3, q: int = 5, k: int = 5, d: int = 4, e: int = 3
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (batch, heads, q, d), (batch, kv_heads, k, d), (batch, kv_heads, k, e)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def band(n: int, window: int) -> torch.Tensor:
    return torch.tensor([[0 <= i - j < window for j in range(n)] for i in range(n)])


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_with_its_gradients(causal: bool) -> None:
    tensors = qkv()
    bias = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~band(5, 5), -math.inf) if causal else 0.0
    ours = attention(*tensors, causal=causal, scale=0.3, bias=bias)
    query, key, value = tensors
    torchs = F.scaled_dot_product_attention(query, key, value, attn_mask=bias + hidden, scale=0.3)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=ATOL)
    seed = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, [*tensors, bias], seed) for out in (ours, torchs)]
    torch.testing.assert_close(*grads, rtol=0, atol=ATOL)


def test_query_heads_share_key_heads_in_order() -> None:
    q, k, v = qkv(heads=6, kv_heads=3)
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(attention(q, k, v), expected, rtol=0, atol=ATOL)
    with pytest.raises(ValueError, match="dividing 6"):
        attention(q, k[:, :2].repeat(1, 2, 1, 1), v)


def test_window_is_the_last_keys_up_to_the_diagonal() -> None:
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band(5, 2))
    torch.testing.assert_close(attention(q, k, v, causal=True, window=2), expected, rtol=0, atol=ATOL)
    both = band(5, 2) | band(5, 2).T
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=both)
    torch.testing.assert_close(attention(q, k, v, window=2), expected, rtol=0, atol=ATOL)


def test_causal_lines_up_the_last_query_with_the_last_key() -> None:
    q, k, v = qkv(q=2, k=5)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band(5, 5)[-2:])
    torch.testing.assert_close(attention(q, k, v, causal=True), expected, rtol=0, atol=ATOL)


def test_softcap_and_sink_by_hand() -> None:
    q, k = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.0], [-3.0]]]])
    v, sinks = torch.tensor([[[[10.0], [20.0]]]]), torch.tensor([0.5])
    a, b, s = math.exp(1.5 * math.tanh(2 / 1.5)), math.exp(1.5 * math.tanh(-6 / 1.5)), math.exp(0.5)
    expected = (10 * a + 20 * b) / (a + b + s)
    assert attention(q, k, v, scale=1.0, softcap=1.5, sinks=sinks).item() == pytest.approx(expected, rel=16 * EPS)


def test_segments_and_lengths_read_nothing_outside() -> None:
    q, k, v = qkv(batch=1, q=7, k=7)
    parts = [attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True) for a, b in ((0, 3), (3, 7))]
    ours = attention(q, k, v, causal=True, cu_seqlens_q=[0, 3, 7])
    torch.testing.assert_close(ours, torch.cat(parts, 2), rtol=0, atol=ATOL)

    poisoned = [x.detach().clone().index_fill_(2, torch.tensor([5, 6]), math.nan) for x in (q, k, v)]
    out = attention(*poisoned, lengths=[5])
    expected = attention(q[:, :, :5], k[:, :, :5], v[:, :, :5])
    torch.testing.assert_close(out[:, :, :5], expected, rtol=0, atol=ATOL)
    assert not out[:, :, 5:].any()  # queries beyond the length see nothing, and give zero


def test_a_mask_takes_keys_away() -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask[:, :, 0] = False
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | torch.tensor([True, *[False] * 4])[:, None])
    ours = attention(q, k, v, mask=mask)
    torch.testing.assert_close(ours[:, :, 1:], expected[:, :, 1:], rtol=0, atol=ATOL)
    assert not ours[:, :, 0].any()
