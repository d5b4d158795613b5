"""What was found out about a tensor is kept as long as the tensor lives unchanged, and no longer."""

from __future__ import annotations

import gc

import torch
from transformers import AutoModelForCausalLM

from dp_flash_hf.attention import tensor_cache
from dp_flash_hf.kernels import reference
from tests.support.attention import CAUSAL, B, S, assert_same, build, causal_mask, packed_inputs, padded, run, tensors


def test_masks_are_not_kept_alive() -> None:
    model = build(AutoModelForCausalLM, "mistral", CAUSAL["mistral"])
    gc.collect()
    before = tensor_cache.size()
    for inputs in (padded("right")[1], packed_inputs([4, 5])[0]):
        with torch.no_grad():
            model(**inputs, use_cache=False)
    del inputs
    gc.collect()
    assert tensor_cache.size() == before


def test_a_changed_mask_is_read_again() -> None:
    qkv, mask = tensors(), torch.block_diag(causal_mask(4), causal_mask(S - 4)).bool().expand(B, 1, S, S).clone()
    run(qkv, mask)
    mask[:, :, 4:, :4] = True
    assert_same(run(qkv, mask), reference.attention(*qkv, mask=mask), qkv)
