"""Random numbers that are a function of a key and a place: Philox4x32-10 and ChaCha20, in torch.

Nothing is kept between calls, so nothing can be replayed by a copy, a pickle or a fork: whoever draws a fresh key for every
use gets fresh numbers, and whoever holds the key gets the same ones again. The Triton kernels compute the same words; this file
is their specification.

- Philox: key (k0, k1), counter (block, row, plane, stream), 4 words of 32 bits; column c has word c % 4 of block c // 4.
- ChaCha20: key of 8 words, state words 12 to 15 are (block, row, plane, stream); column c has word c % 16 of block c // 16.

Streams are words of 32 bits too: the lower half says what for, the upper half how far into the tails of the normals.

For the element (b, h, i, c) of a (B, H, Q, D) tensor: row = i and plane = b * H + h.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dp_flash_hf.errors import invalid

NOISE, DROPOUT = 0, 1  # streams
LEVELS = 8  # words that a uniform number next to 0 is made of

_MASK = 0xFFFFFFFF
_CHACHA_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_CHACHA_ROUND = (  # the quarter rounds of a column round, then of a diagonal round
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)


def fresh_key(*, secure: bool) -> tuple[int, ...]:
    """A key from the operating system's cryptographic source.

    Example:
        >>> len(fresh_key(secure=True)), len(fresh_key(secure=False))
        (8, 2)

    Args:
        secure: Whether the key is for ChaCha20 (8 words of 32 bits) or for Philox (2 words), whose 64 bits are enough for
            what needs no secret, such as dropout.
    """
    return tuple(secrets.randbits(32) for _ in range(8 if secure else 2))


def philox(key: Sequence[int], counter: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi 10.1145/2063384.2063405).

    Fast and statistically sound, and not cryptographic: whoever sees enough of its words can find the key.

    Args:
        key: 2 words of 32 bits.
        counter: 4 int64 tensors of words, broadcastable to each other.

    Returns:
        4 int64 tensors of words.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # A product modulo 2^64 has the right bits also where int64 takes it for negative.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


# Not compiled: a compiler takes most of a minute for its 2,500 operations.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def chacha20(key: Sequence[int], counter: Sequence[Tensor]) -> list[Tensor]:
    """The ChaCha20 block function (RFC 8439, section 2.3), cryptographic: its words are indistinguishable from random ones.

    Args:
        key: 8 words of 32 bits.
        counter: 4 int64 tensors of words, the block counter and the nonce, broadcastable to each other.

    Returns:
        16 int64 tensors of words.
    """
    counter = torch.broadcast_tensors(*counter)
    start = [torch.full_like(counter[0], word) for word in (*_CHACHA_CONSTANTS, *key)] + list(counter)
    x = list(start)
    for _ in range(10):
        for a, b, c, d in _CHACHA_ROUND:
            for left, right, turned, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[left] = x[left] + x[right] & _MASK
                word = x[turned] ^ x[left]
                x[turned] = word << bits & _MASK | word >> 32 - bits
    return [word + first & _MASK for word, first in zip(x, start, strict=True)]


def normals(
    key: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    secure: bool = False,
    stream: int = NOISE,
) -> Tensor:
    """Independent N(0, 1) numbers by Box-Muller from the words of columns 2m and 2m + 1; computed in float32.

    With u = (even word + 1/2) / 2^32, r = sqrt(-2 ln u) and t = 2 pi (odd word) / 2^32, column 2m is r cos t and column 2m + 1
    is r sin t.
    Where the even word is 0, the next level's word (stream + level 2^16) says where below 2^-32 u lies, and so on for LEVELS
    words: numbers reach to sqrt(514 ln 2) = 18.9. One level would end at 6.76, and where the sensitivity is several standard
    deviations, as for epsilon = 64, most of what one input gives would be what the other cannot.

    Example:
        >>> bool((normals((1, 2), (1, 2, 3, 5)) == normals((1, 2), (1, 2, 3, 5))).all())
        True

    Args:
        key: 2 words of 32 bits (Philox), or 8 with `secure` (ChaCha20).
        shape: (B, H, Q, D).
        device: Where the numbers are computed; the words are the same everywhere, logarithms and sines to their last bit.
        dtype: Of the result.
        secure: Whether to use the cryptographic generator.
        stream: Numbers of different streams are independent under one key.

    Returns:
        (B, H, Q, D).

    Raises:
        ValueError: A key of another length.
    """
    batch, heads, rows, columns = shape
    whole_pairs = (batch, heads, rows, columns + columns % 2)
    words = _words(key, whole_pairs, device, secure, stream)
    even, odd = words[..., 0::2], words[..., 1::2].float()
    levels = torch.zeros_like(odd)
    for level in range(1, LEVELS):
        zero = even == 0
        if not bool(zero.any()):  # nearly always: 2^-32 of them are
            break
        even = torch.where(zero, _words(key, whole_pairs, device, secure, stream | level << 16)[..., 0::2], even)
        levels = levels + zero
    radius = (-2 * (even.float() * 2.0**-32 + 2.0**-33).log() + 64 * math.log(2) * levels).sqrt()
    angle = odd * 2.0**-32 * (2 * math.pi)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return pairs.flatten(-2)[..., :columns].to(dtype)


def keep_mask(key: Sequence[int], shape: Sequence[int], p: float, device: torch.device | str = "cpu") -> Tensor:
    """Which attention weights `attention.flash_attention` keeps with dropout, for whoever has to compute the same without it.

    Example:
        >>> keep_mask((1, 2), (1, 1, 2, 3), 0.0).all()
        tensor(True)

    Args:
        key: 2 words of 32 bits; dropout needs no cryptographic generator.
        shape: (B, H, Q, K).
        p: Probability of dropping a weight; the one used is round(p 2^32) / 2^32.
        device: Where the mask is computed.

    Returns:
        bool (B, H, Q, K), True where a weight is kept.

    Raises:
        ValueError: Unless 0 <= p <= 1, or for a key of another length.
    """
    if not 0 <= p <= 1:
        raise invalid("p", expected="a probability", actual=p, remedy="give the share of weights to drop")
    kept: Tensor = _words(key, shape, device, False, DROPOUT) >= round(p * 2**32)
    return kept


def _words(key: Sequence[int], shape: Sequence[int], device: torch.device | str, secure: bool, stream: int) -> Tensor:
    """int64 of this shape (B, H, Q, columns): the word that belongs to each element."""
    n_words = 8 if secure else 2
    if len(key) != n_words or not all(0 <= word <= _MASK for word in key):
        raise invalid("key", expected=f"{n_words} words of 32 bits", actual=len(key), remedy="draw one with fresh_key()")
    generator: Callable[..., list[Tensor]] = chacha20 if secure else philox
    batch, heads, rows, columns = shape
    per_block = 16 if secure else 4
    block = torch.arange(-(-columns // per_block), device=device)
    row = torch.arange(rows, device=device)[:, None]
    plane = torch.arange(batch * heads, device=device)[:, None, None]
    words = torch.stack(generator(key, (block, row, plane, torch.full_like(block, stream))), -1)
    return words.flatten(-2)[..., :columns].reshape(batch, heads, rows, columns)
