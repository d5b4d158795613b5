"""Masks and windows: the one mask that the arguments of a call add up to."""

from __future__ import annotations

from typing import Any

import torch

from dp_flash_hf.kernels import reference
from tests.support.attention import B, H, S, assert_same, causal_mask, for_oracle, run, tensors, trainable


def test_sliding_window(extra: dict[str, Any]) -> None:
    qkv, positions = tensors(), torch.tensor([[*range(5), *range(4)]])
    oracle = reference.attention(*qkv, causal=True, window=3, **for_oracle(extra))
    inputs = trainable(qkv, extra)
    assert_same(run(qkv, sliding_window=3, **extra), oracle, inputs)
    assert_same(run(qkv, causal_mask(S, 3)[None, None], sliding_window=3, **extra), oracle, inputs)
    oracle = reference.attention(*qkv, causal=True, window=3, cu_seqlens_q=[0, 5, S], **for_oracle(extra))
    assert_same(run(qkv, sliding_window=3, position_ids=positions, **extra), oracle, inputs)


def test_arbitrary_masks() -> None:
    qkv = tensors()
    mask = torch.rand(B, H, S, S) < 0.4
    assert_same(run(qkv, mask), reference.attention(*qkv, mask=mask), qkv)
    added = torch.randn(B, 1, S, S, dtype=torch.float64, requires_grad=True)
    assert_same(run(qkv, added), reference.attention(*qkv, bias=added), [*qkv, added])
    picked = torch.stack([torch.randperm(S)[:3] for _ in range(B * S)]).view(B, S, 3)
    allowed = torch.zeros(B, 1, S, S, dtype=torch.bool).scatter(-1, picked[:, None], True) & causal_mask(S)
    assert_same(run(qkv, indices=picked.int()), reference.attention(*qkv, mask=allowed), qkv)
    assert_same(run(qkv, causal_mask(S)[None, None], indices=picked), reference.attention(*qkv, mask=allowed), qkv)
