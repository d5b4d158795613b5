"""Units packed into one row: equal to the oracle segment by segment, however the row says where they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from dp_flash_hf.attention.backends import use
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.kernels import reference
from tests.support.attention import CUTS, S, assert_same, causal_mask, for_oracle, run, tensors, trainable


@pytest.mark.parametrize("causal", [True, False])
def test_packed(extra: dict[str, Any], causal: bool) -> None:
    qkv, cuts = tensors(batch=1), torch.tensor(CUTS, dtype=torch.int32)
    positions = torch.tensor([[i - start for start, stop in pairwise(CUTS) for i in range(start, stop)]])
    unit = torch.bucketize(torch.arange(S), cuts[1:], right=True)
    mask = (unit[:, None] == unit[None, :])[None, None] & (causal_mask(S) if causal else True)
    oracle = reference.attention(*qkv, causal=causal, cu_seqlens_q=CUTS, **for_oracle(extra))
    inputs = trainable(qkv, extra)
    assert_same(run(qkv, causal=causal, cu_seq_lens_q=cuts, cu_seq_lens_k=cuts, max_length_q=5, **extra), oracle, inputs)
    assert_same(run(qkv, causal=causal, position_ids=positions, **extra), oracle, inputs)
    assert_same(run(qkv, mask, causal=causal, **extra), oracle, inputs)
    assert_same(run(qkv, mask, causal=causal, cu_seq_lens_q=cuts, **extra), oracle, inputs)
    assert_same(run(qkv, causal_mask(S)[None, None] if causal else None, causal, cu_seq_lens_q=cuts, **extra), oracle, inputs)


def test_a_query_whose_keys_are_all_in_other_segments_gives_zero(extra: dict[str, Any]) -> None:
    qkv, mask = tensors(batch=1), causal_mask(S).tril(-1)[None, None]
    oracle = reference.attention(*qkv, mask=mask, cu_seqlens_q=CUTS, **for_oracle(extra))
    assert_same(run(qkv, mask, cu_seq_lens_q=torch.tensor(CUTS), **extra), oracle, trainable(qkv, extra))


def test_packed_rows_of_a_batch(extra: dict[str, Any]) -> None:
    qkv = tensors()
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [5, 6, 7, 7, 9, 10, 3, 4, 5]])
    cuts = [[0, 3, 5, S], [0, 6, S]]
    oracle = torch.cat(
        [
            reference.attention(*(x[b : b + 1] for x in qkv), causal=True, cu_seqlens_q=cuts[b], **for_oracle(extra))
            for b in (0, 1)
        ]
    )
    assert_same(run(qkv, position_ids=positions, **extra), oracle, trainable(qkv, extra))
    unit = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 6 + [1] * 3])
    mask = (unit[:, :, None] == unit[:, None, :])[:, None] & causal_mask(S)
    assert_same(run(qkv, mask, **extra), oracle, trainable(qkv, extra))


def test_packed_row_with_padding_at_its_end(extra: dict[str, Any]) -> None:
    qkv = tensors(batch=1)
    mask = torch.block_diag(causal_mask(3), causal_mask(4), torch.zeros(2, 2)).bool()[None, None]
    oracle = reference.attention(*qkv, causal=True, cu_seqlens_q=[0, 3, 7], **for_oracle(extra))
    assert_same(run(qkv, mask, **extra), oracle, trainable(qkv, extra))


def test_a_block_whose_first_query_sees_nothing(device: str) -> None:
    """Everything before itself, and not itself: alone in its row, and before two other texts."""
    before = causal_mask(S).tril(-1)
    for mask in (before, torch.block_diag(before[:3, :3], causal_mask(4), torch.ones(2, 2)).bool()):
        qkv = tensors(batch=1)
        assert_same(run(qkv, mask[None, None]), reference.attention(*qkv, mask=mask[None, None]), qkv)
        single = [x.detach().float().to(device) for x in qkv]
        with use("triton"), pytest.raises(UnsupportedError, match="such a mask"):  # and not zeros
            run(single, mask[None, None].to(device))
