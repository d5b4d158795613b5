"""A keystream of ChaCha20 on the GPU (Triton): what `keystream.Keystream` gives there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_flash_hf.kernels.counter_noise_triton import chacha_words

STREAM = 2  # beside those of `counter_noise`
OPTIONS = {"BLOCKS": 256, "num_warps": 4}


@triton.jit(do_not_specialize=["key0", "key1", "key2", "key3", "key4", "key5", "key6", "key7", "call", "n_blocks"])
def keystream_kernel(
    key0, key1, key2, key3, key4, key5, key6, key7, call, out, n_blocks, STREAM: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Word w of block b of this call to out[w, b], int32. Grid: (blocks of BLOCKS,)."""
    first = tl.program_id(0) * BLOCKS
    row = tl.zeros((1,), tl.int32)
    words = chacha_words(key0, key1, key2, key3, key4, key5, key6, key7, first, row, call, STREAM, 1, BLOCKS)
    block = (first + tl.arange(0, BLOCKS))[None, :]
    for w in tl.static_range(16):
        tl.store(out + w * n_blocks.to(tl.int64) + block, words[w].to(tl.int32, bitcast=True), mask=block < n_blocks)


def chacha_stream(key: Sequence[int], call: int, n: int, device: torch.device) -> Tensor:
    """The first n words of one call: int64 (n,) on the device.

    Args:
        key: 8 words, int32 with the bits of the unsigned ones.
        call: below 2^31; each has blocks of its own.
        n: below 2^34.
        device: where Triton runs.
    """
    n_blocks = 2 * (-(-n // 16))  # an even number, so that a row of one word is whole words of 64 bits
    out = torch.empty(16, n_blocks, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        keystream_kernel[(triton.cdiv(n_blocks, OPTIONS["BLOCKS"]),)](*key, call, out, n_blocks, STREAM=STREAM, **OPTIONS)
    return out.view(torch.int64).flatten()[:n]
