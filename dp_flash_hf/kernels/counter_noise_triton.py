"""Counter-based random numbers inside Triton kernels: Philox and ChaCha20 words, normals and dropout words made of them.

Every number is a function of a key and of where it is used (query, plane = batch row * heads + head, column), so backward draws
the dropout of forward again and nothing is stored. Words are bit-exact with `counter_noise.py`; keys are int32 with the bits of
the unsigned words (Triton types a number by its value, and would compile a kernel again for keys above 2^31).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

PHILOX = tl.constexpr(1)
CHACHA = tl.constexpr(2)
NOISE_STREAM = tl.constexpr(0)
DROPOUT_STREAM = tl.constexpr(1)
LEVELS = tl.constexpr(8)
BEYOND = tl.constexpr(64 * math.log(2))  # what a level adds to the square of a radius


@triton.jit
def philox_words(key0, key1, first_block, row, plane, stream, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Four tiles (ROWS, BLOCKS) uint32: words 0..3 of blocks first_block.. of the rows `row` (ROWS,).

    Philox4x32-10 (Salmon et al. 2011, doi 10.1145/2063384.2063405), counter (block, row, plane, stream).
    """
    zero = tl.zeros((ROWS, BLOCKS), tl.uint32)
    block = zero + (first_block + tl.arange(0, BLOCKS)).to(tl.uint32)[None, :]
    row = zero + row.to(tl.uint32)[:, None]
    plane, stream = zero + plane.to(tl.uint32), tl.full([ROWS, BLOCKS], stream, tl.uint32)
    key0, key1 = zero + key0.to(tl.uint32, bitcast=True), zero + key1.to(tl.uint32, bitcast=True)
    return tl.philox_impl(block, row, plane, stream, key0, key1)


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def chacha_words(
    key0, key1, key2, key3, key4, key5, key6, key7, first_block, row, plane, stream, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Sixteen tiles (ROWS, BLOCKS) uint32: words 0..15 of the blocks first_block.. of the rows `row` (ROWS,).

    ChaCha20 (RFC 8439, 20 rounds), words 12..15 of the state = (block, row, plane, stream).
    """
    zero = tl.zeros((ROWS, BLOCKS), tl.uint32)
    s0, s1, s2, s3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    s4, s5 = zero + key0.to(tl.uint32, bitcast=True), zero + key1.to(tl.uint32, bitcast=True)
    s6, s7 = zero + key2.to(tl.uint32, bitcast=True), zero + key3.to(tl.uint32, bitcast=True)
    s8, s9 = zero + key4.to(tl.uint32, bitcast=True), zero + key5.to(tl.uint32, bitcast=True)
    s10, s11 = zero + key6.to(tl.uint32, bitcast=True), zero + key7.to(tl.uint32, bitcast=True)
    s12 = zero + (first_block + tl.arange(0, BLOCKS)).to(tl.uint32)[None, :]
    s13 = zero + row.to(tl.uint32)[:, None]
    s14, s15 = zero + plane.to(tl.uint32), tl.full([ROWS, BLOCKS], stream, tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7 = s0, s1, s2, s3, s4, s5, s6, s7
    x8, x9, x10, x11, x12, x13, x14, x15 = s8, s9, s10, s11, s12, s13, s14, s15
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    return (
        x0 + s0, x1 + s1, x2 + s2, x3 + s3, x4 + s4, x5 + s5, x6 + s6, x7 + s7,
        x8 + s8, x9 + s9, x10 + s10, x11 + s11, x12 + s12, x13 + s13, x14 + s14, x15 + s15,
    )  # fmt: skip


@triton.jit
def _squared_radius(word):
    u = word.to(tl.float32) * 2.0**-32 + 2.0**-33
    # The hardware's logarithm is an approximation that may come out above 0 just below u = 1.
    return tl.maximum(-2.0 * tl.log(u), 0.0)


@triton.jit
def _deeper(squared, word, level):
    """Where the word of the level before was 0, this level's says the squared radius: a word of 1 is 2.2 nearer than 0."""
    reach = level * BEYOND
    return tl.where(squared > reach + 0.2, reach + _squared_radius(word), squared)


@triton.jit
def _largest(tile):
    return tl.max(tl.max(tile, 1), 0)


@triton.jit
def box_muller(squared, word):
    """Two float32 tiles of independent standard normals from one of squared radii and one of uint32.

    The angle's upper two bits are its quadrant, and Taylor's series of the rest, within a quadrant, are off by less than 1e-7:
    sines and cosines of any number would reserve local memory for angles that do not occur.
    """
    r = tl.sqrt(squared)
    t = (word & 0x3FFFFFFF).to(tl.float32) * (1.5707963267948966 * 2.0**-30)
    t2 = t * t
    sine = 1 - t2 / 42 * (1 - t2 / 72 * (1 - t2 / 110))
    sine = t * (1 - t2 / 6 * (1 - t2 / 20 * sine))
    cosine = 1 - t2 / 56 * (1 - t2 / 90 * (1 - t2 / 132))
    cosine = 1 - t2 / 2 * (1 - t2 / 12 * (1 - t2 / 30 * cosine))
    turned = (word & 0x40000000) != 0
    x, y = tl.where(turned, -sine, cosine), tl.where(turned, cosine, sine)
    r = tl.where((word & 0x80000000) != 0, -r, r)
    return r * x, r * y


@triton.jit
def _merge(a, b, c, d):
    """Columns a0 b0 c0 d0 a1 b1 ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def normals(
    key0, key1, key2, key3, key4, key5, key6, key7, row, plane,
    GENERATOR: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) float32 standard normals of the rows `row` (ROWS,) of `plane`, from column FIRST on.

    FIRST and COLUMNS are multiples of 16.
    """
    if GENERATOR == PHILOX:
        w0, w1, w2, w3 = philox_words(key0, key1, FIRST // 4, row, plane, NOISE_STREAM, ROWS, COLUMNS // 4)
        s0, s2 = _squared_radius(w0), _squared_radius(w2)
        if _largest(tl.maximum(s0, s2)) > BEYOND + 0.2:  # nearly never; see `counter_noise.normals`
            for level in range(1, LEVELS):
                v0, _v1, v2, _v3 = philox_words(
                    key0, key1, FIRST // 4, row, plane, NOISE_STREAM + level * 65536, ROWS, COLUMNS // 4
                )
                s0, s2 = _deeper(s0, v0, level), _deeper(s2, v2, level)
        z0, z1 = box_muller(s0, w1)
        z2, z3 = box_muller(s2, w3)
        z = _merge(z0, z1, z2, z3)
    else:
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15 = chacha_words(
            key0, key1, key2, key3, key4, key5, key6, key7, FIRST // 16, row, plane, NOISE_STREAM, ROWS, COLUMNS // 16
        )
        s0, s2 = _squared_radius(w0), _squared_radius(w2)
        s4, s6 = _squared_radius(w4), _squared_radius(w6)
        s8, s10 = _squared_radius(w8), _squared_radius(w10)
        s12, s14 = _squared_radius(w12), _squared_radius(w14)
        largest = tl.maximum(
            tl.maximum(tl.maximum(s0, s2), tl.maximum(s4, s6)), tl.maximum(tl.maximum(s8, s10), tl.maximum(s12, s14))
        )
        if _largest(largest) > BEYOND + 0.2:
            for level in range(1, LEVELS):
                v0, _v1, v2, _v3, v4, _v5, v6, _v7, v8, _v9, v10, _v11, v12, _v13, v14, _v15 = chacha_words(
                    key0, key1, key2, key3, key4, key5, key6, key7,
                    FIRST // 16, row, plane, NOISE_STREAM + level * 65536, ROWS, COLUMNS // 16,
                )  # fmt: skip
                s0, s2 = _deeper(s0, v0, level), _deeper(s2, v2, level)
                s4, s6 = _deeper(s4, v4, level), _deeper(s6, v6, level)
                s8, s10 = _deeper(s8, v8, level), _deeper(s10, v10, level)
                s12, s14 = _deeper(s12, v12, level), _deeper(s14, v14, level)
        z0, z1 = box_muller(s0, w1)
        z2, z3 = box_muller(s2, w3)
        z4, z5 = box_muller(s4, w5)
        z6, z7 = box_muller(s6, w7)
        z8, z9 = box_muller(s8, w9)
        z10, z11 = box_muller(s10, w11)
        z12, z13 = box_muller(s12, w13)
        z14, z15 = box_muller(s14, w15)
        z = _merge(_merge(z0, z4, z8, z12), _merge(z1, z5, z9, z13), _merge(z2, z6, z10, z14), _merge(z3, z7, z11, z15))
    return z


@triton.jit
def kept(key0, key1, row, first_column, plane, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) bool: whether dropout keeps the attention weights of the rows `row` (ROWS,) at columns first_column..

    `first_column` and COLUMNS are multiples of 4; `threshold` has the bits of the unsigned round(p 2^32).
    """
    w0, w1, w2, w3 = philox_words(key0, key1, first_column // 4, row, plane, DROPOUT_STREAM, ROWS, COLUMNS // 4)
    return _merge(w0, w1, w2, w3) >= threshold.to(tl.uint32, bitcast=True)
