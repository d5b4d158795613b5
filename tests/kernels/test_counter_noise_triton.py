"""Counter-based words inside Triton, bit for bit against published answers and against the formulas in numpy."""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from dp_flash_hf.kernels.attention_tiles import signed
from dp_flash_hf.kernels.counter_noise_triton import (
    CHACHA,
    PHILOX,
    _deeper,
    _squared_radius,
    chacha_words,
    kept,
    normals,
    philox_words,
)

KEY = (0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89, 1, 0xFFFFFFFF, 0x80000000, 16)


def philox(key: Sequence[int], block: Any, row: Any, plane: Any, stream: int) -> list[Any]:
    """Four uint32 arrays; Salmon et al. 2011, written out."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (block, row, plane, stream)))
    k0, k1, low = key[0], key[1], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), p1 & low, high0 ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c.astype(np.uint32) for c in (c0, c1, c2, c3)]


def chacha(key: Sequence[int], block: Any, row: Any, plane: Any, stream: int) -> list[Any]:
    """Sixteen uint32 arrays; RFC 8439, written out."""
    words = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key, block, row, plane, stream)
    start = [x.astype(np.uint32) for x in np.broadcast_arrays(*words)]
    x = [word.copy() for word in start]

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for to, other, turned, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[to] = x[to] + x[other]
            mixed = x[turned] ^ x[to]
            x[turned] = (mixed << np.uint32(by)) | (mixed >> np.uint32(32 - by))

    with np.errstate(over="ignore"):
        for _ in range(10):
            for a in range(4):
                quarter(a, a + 4, a + 8, a + 12)
            for a in range(4):
                quarter(a, (a + 1) % 4 + 4, (a + 2) % 4 + 8, (a + 3) % 4 + 12)
        return [word + first for word, first in zip(x, start, strict=True)]


def columns(words: list[Any]) -> Any:
    """Word w of block b belongs to column b * len(words) + w."""
    stacked = np.stack(words, -1)
    return stacked.reshape(*stacked.shape[:-2], -1)


def keep_mask(key: Sequence[int], shape: tuple[int, int, int, int], p: float) -> torch.Tensor:
    """(B, H, Q, K) bool: the attention weights that dropout keeps."""
    batch, heads, queries, keys = shape
    plane, row, block = np.ogrid[: batch * heads, :queries, : -(-keys // 4)]
    words = columns(philox(key, block, row, plane, 1))[..., :keys]
    return torch.from_numpy(words >= np.uint32(round(p * 2**32))).view(shape)


def standard_normals(key: Sequence[int], shape: tuple[int, int, int, int]) -> torch.Tensor:
    """(B, H, Q, E) float64."""
    batch, heads, queries, width = shape
    per_block = 4 if len(key) == 2 else 16
    plane, row, block = np.ogrid[: batch * heads, :queries, : -(-width // per_block)]
    words = columns((philox if len(key) == 2 else chacha)(key, block, row, plane, 0)).astype(np.float32).astype(np.float64)
    u = (words[..., 0::2] * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    r, t = np.sqrt(-2 * np.log(u)), 2 * math.pi * 2.0**-32 * words[..., 1::2]
    z = columns([r * np.cos(t), r * np.sin(t)])
    return torch.from_numpy(z[..., :width].copy()).view(shape)


NUMBERS = ["plane", *(f"key{n}" for n in range(8))]


@triton.jit(do_not_specialize=NUMBERS)
def _words(
    out,
    rows,
    plane,
    key0,
    key1,
    key2,
    key3,
    key4,
    key5,
    key6,
    key7,
    SECURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.load(rows + tl.arange(0, ROWS))
    tile = out + tl.arange(0, ROWS)[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    if SECURE:
        words = chacha_words(key0, key1, key2, key3, key4, key5, key6, key7, 0, row, plane, 0, ROWS, BLOCKS)
    else:
        words = philox_words(key0, key1, 0, row, plane, 0, ROWS, BLOCKS)
    for w in tl.static_range(16 if SECURE else 4):
        tl.store(tile + w * ROWS * BLOCKS, words[w].to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=NUMBERS)
def _normals(
    out, first, plane, key0, key1, key2, key3, key4, key5, key6, key7,
    GENERATOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    z = normals(key0, key1, key2, key3, key4, key5, key6, key7, row, plane, GENERATOR, ROWS, 0, COLUMNS)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], z)


@triton.jit(do_not_specialize=[*NUMBERS, "drop_below"])
def _kept(out, first, column, plane, key0, key1, drop_below, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    keep = kept(key0, key1, first + tl.arange(0, ROWS), column, plane, drop_below, ROWS, COLUMNS)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.int8))


def triton_words(key: Sequence[int], rows: list[int], plane: int, blocks: int, device: str) -> Any:
    """(words, rows, blocks) uint32."""
    out = torch.empty(4 if len(key) == 2 else 16, len(rows), blocks, dtype=torch.int32, device=device)
    row = torch.tensor(rows, device=device)
    _words[(1,)](out, row, plane, *signed(key), SECURE=len(key) == 8, ROWS=len(rows), BLOCKS=blocks)
    return out.cpu().numpy().view(np.uint32)


def test_published_answers(device: str) -> None:
    # Random123's kat_vectors for philox4x32-10; only rows and planes can be given to the kernel, so it is checked on zeros.
    zeros = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert [int(w) for w in philox((0, 0), 0, 0, 0, 0)] == zeros
    assert [int(w) for w in philox((0xA4093822, 0x299F31D0), 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)] == pi
    assert triton_words((0, 0), [0, 1], 0, 2, device)[:, 0, 0].tolist() == zeros
    # RFC 8439, 2.3.2: key 00 01 .. 1f, block 1, nonce 00 00 00 09 00 00 00 4a 00 00 00 00.
    key = np.arange(32, dtype=np.uint8).view("<u4").tolist()
    wanted = [
        0xE4E7F110, 0x15593BD1, 0x1FDD0F50, 0xC47120A3, 0xC7F4D1C7, 0x0368C033, 0x9AAA2204, 0x4E6CD4C3,
        0x466482D2, 0x09AA9F07, 0x05D7C214, 0xA2028BD9, 0xD19C12B5, 0xB94E16DE, 0xE883D0CB, 0x4E3C50A2,
    ]  # fmt: skip
    assert [int(w) for w in chacha(key, 1, 0x09000000, 0x4A000000, 0)] == wanted
    assert triton_words(key, [0, 0x09000000], 0x4A000000, 2, device)[:, 1, 1].tolist() == wanted


@pytest.mark.parametrize("words", [2, 8])
def test_words_are_those_of_the_formula(words: int, device: str) -> None:
    key, rows = KEY[:words], [0, 5, 2**31 - 1, 70_000]
    row, block = np.array(rows)[:, None], np.arange(8)[None, :]
    wanted = np.stack((philox if words == 2 else chacha)(key, block, row, 77, 0))
    assert (triton_words(key, rows, 77, 8, device) == wanted).all()


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("words", [2, 8])
def test_normals(words: int, width: int, device: str) -> None:
    key, first, plane = KEY[:words], 3, 1
    z = torch.empty(16, width, device=device)
    generator = (PHILOX if words == 2 else CHACHA).value
    _normals[(1,)](z, first, plane, *signed(key), GENERATOR=generator, ROWS=16, COLUMNS=width)
    wanted = standard_normals(key, (1, 2, 16 + first, width))[0, plane, first:]
    r = wanted.unflatten(1, (-1, 2)).norm(dim=2).repeat_interleave(2, 1)
    eps = torch.finfo(torch.float32).eps
    # The angle is rounded at up to 2 pi, cosine and root by a few eps; a hardware logarithm is off by 2^-22 where it is small.
    bound = 16 * eps * r + 2 * eps / r.clamp(min=eps**0.5)
    assert bool(((z.cpu().double() - wanted).abs() <= bound).all())


@triton.jit
def _radii(out, words, LEVELS: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, N)
    squared = _squared_radius(tl.load(words + place).to(tl.uint32, bitcast=True))
    for level in range(1, LEVELS):
        squared = _deeper(squared, tl.load(words + level * N + place).to(tl.uint32, bitcast=True), level)
    tl.store(out + place, squared)


def test_words_of_zero_go_deeper(device: str) -> None:
    levels = [[0, 0, 0, 1, 2**32 - 1, 7, 0, 0], [1, 0, 0, 0, 0, 0, 2**32 - 1, 0], [5, 0, 9, 0, 5, 5, 0, 2**31]]
    wanted = []
    for first, *rest in zip(*levels, strict=True):
        level = next((i for i, word in enumerate([first, *rest]) if word), 2)
        wanted.append(-2 * math.log(((first, *rest)[level] + 0.5) / 2**32 / 2 ** (32 * level)))
    words = torch.tensor([signed([*level]) for level in levels], dtype=torch.int32, device=device)
    out = torch.empty(8, device=device)
    _radii[(1,)](out, words, LEVELS=3, N=8)
    assert out.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_kept_weights(device: str) -> None:
    key, p = KEY[:2], 0.3
    out = torch.empty(16, 32, dtype=torch.int8, device=device)
    _kept[(1,)](out, 5, 8, 1, *signed(key)[:2], signed([round(p * 2**32)])[0], ROWS=16, COLUMNS=32)
    assert torch.equal(out.cpu().bool(), keep_mask(key, (1, 2, 21, 41), p)[0, 1, 5:, 8:40])
    share = keep_mask(key, (1, 2, 100, 100), p).double().mean().item()
    assert abs(share - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 20_000)
