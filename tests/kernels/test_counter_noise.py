"""The counter-based generators: published test vectors, the layout that the Triton kernels share, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from dp_flash_hf.kernels import counter_noise
from dp_flash_hf.kernels.counter_noise import chacha20, fresh_key, keep_mask, normals, philox

KEY = (0x12345678, 0x9ABCDEF0)
SECURE_KEY = tuple(range(1, 9))
# A test of a fixed key has one outcome: the bounds are such that a fair generator fails one key in a thousand.
ALPHA = 1e-3


def words(*values: int) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer tests (kat_vectors, philox4x32 10)
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert [int(word) for word in philox(key, words(*counter))] == list(expected)


def test_chacha20_gives_the_published_words() -> None:
    key = [int.from_bytes(bytes(range(i, i + 4)), "little") for i in range(0, 32, 4)]  # RFC 8439, section 2.3.2
    expected = """e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3
                  466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"""
    found = chacha20(key, words(1, 0x09000000, 0x4A000000, 0))
    assert [int(word) for word in found] == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize("secure", [False, True])
def test_each_element_has_the_word_of_its_place(secure: bool) -> None:
    key, per_block, generator = (SECURE_KEY, 16, chacha20) if secure else (KEY, 4, philox)
    batch, heads, rows, columns = 2, 3, 2, 37
    found = normals(key, (batch, heads, rows, columns), secure=secure, stream=5)
    for b, h, i, c in [(0, 0, 0, 0), (1, 2, 1, 36), (1, 0, 1, 17), (0, 2, 0, 20)]:
        even, odd = (
            int(generator(key, words(column // per_block, i, b * heads + h, 5))[column % per_block])
            for column in (c - c % 2, c - c % 2 + 1)
        )
        radius = math.sqrt(-2 * math.log((even + 0.5) / 2**32))
        expected = radius * (math.sin if c % 2 else math.cos)(2 * math.pi * odd / 2**32)
        # Of u, of which the logarithm is taken, and of the angle, float32 keeps 24 bits; |z| <= 6.76.
        assert float(found[b, h, i, c]) == pytest.approx(expected, abs=8 * 6.76 * 2**-24, rel=1e-5)


def test_dropout_keeps_the_weights_whose_word_is_high_enough() -> None:
    found = keep_mask(KEY, (2, 3, 4, 9), 0.3)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 8), (1, 0, 2, 5)]:
        word = int(philox(KEY, words(j // 4, i, b * 3 + h, 1))[j % 4])
        assert bool(found[b, h, i, j]) == (word >= round(0.3 * 2**32))
    assert keep_mask(KEY, (1, 1, 5, 5), 0.0).all()
    assert not keep_mask(KEY, (1, 1, 5, 5), 1.0).any()
    kept = int(keep_mask(KEY, (1, 2, 300, 301), 0.3).sum())
    assert stats.binomtest(kept, 2 * 300 * 301, 0.7).pvalue > ALPHA


@pytest.mark.parametrize("secure", [False, True])
def test_normals_are_normal_in_every_column_and_plane(secure: bool) -> None:
    key = SECURE_KEY if secure else KEY
    drawn = normals(key, (2, 2, 1500, 18), secure=secure).double()
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > ALPHA
    groups = [drawn[..., c] for c in range(18)] + list(drawn.flatten(0, 1))
    least = min(stats.kstest(group.flatten().numpy(), "norm").pvalue for group in groups)
    assert least > ALPHA / len(groups)
    assert stats.chi2(drawn.numel()).sf(float(drawn.square().sum())) > ALPHA
    assert stats.chi2(drawn.numel()).cdf(float(drawn.square().sum())) > ALPHA
    assert 4 < float(drawn.abs().max()) < 6.77  # 108,000 draws


def independent(a: Tensor, b: Tensor) -> bool:
    """Neither the numbers nor their squares are correlated: sqrt(n) r is standard normal for independent ones."""
    n = a.numel()
    pairs = [(a.flatten(), b.flatten()), (a.flatten() ** 2, b.flatten() ** 2)]
    scores = [math.sqrt(n) * float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    return max(map(abs, scores)) < float(stats.norm.isf(ALPHA / 4))


@pytest.mark.parametrize("secure", [False, True])
def test_normals_are_independent_across_everything(secure: bool) -> None:
    key = SECURE_KEY if secure else KEY
    drawn = normals(key, (2, 2, 400, 64), secure=secure).double()
    assert independent(drawn[0], drawn[1])  # rows of the batch
    assert independent(drawn[:, 0], drawn[:, 1])  # heads
    assert independent(drawn[:, :, 1:], drawn[:, :, :-1])  # queries
    assert independent(drawn[..., 0::2], drawn[..., 1::2])  # the two of a Box-Muller pair
    assert independent(drawn[..., 2:], drawn[..., :-2])  # pairs
    assert independent(drawn, normals(key, (2, 2, 400, 64), secure=secure, stream=1).double())
    for word in range(len(key)):  # calls: keys that differ in one bit
        other = tuple(value ^ (place == word) for place, value in enumerate(key))
        assert independent(drawn, normals(other, (2, 2, 400, 64), secure=secure).double())


def test_the_same_key_gives_the_same_numbers_and_a_fresh_one_does_not() -> None:
    assert torch.equal(normals(KEY, (2, 2, 3, 5)), normals(KEY, (2, 2, 3, 5)))
    assert torch.equal(normals(KEY, (2, 2, 3, 5)), normals(KEY, (2, 2, 4, 6))[:, :, :3, :5])
    assert len({fresh_key(secure=False) for _ in range(100)}) == 100
    assert len(fresh_key(secure=True)) == 8
    assert normals(KEY, (1, 1, 2, 3), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(("key", "secure"), [(KEY, True), (SECURE_KEY, False), ((1, 2**32), False)])
def test_a_key_of_another_kind_is_refused(key: tuple[int, ...], secure: bool) -> None:
    with pytest.raises(ValueError, match="key: expected"):
        normals(key, (1, 1, 1, 1), secure=secure)


def test_a_probability_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="p: expected"):
        keep_mask(KEY, (1, 1, 1, 1), 1.5)


def test_a_word_of_zero_is_not_where_normals_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2^-32 of all words are 0: here all of the first three levels.
    plain = counter_noise.philox

    def with_zeros(key: Sequence[int], counter: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        level = int(counter[3].flatten()[0]) >> 16
        return [word * (level > 2) if place % 2 == 0 else word for place, word in enumerate(plain(key, counter))]

    monkeypatch.setattr(counter_noise, "philox", with_zeros)
    far = normals(KEY, (1, 2, 50, 16)).double().unflatten(3, (8, 2)).square().sum(4)
    uniform = (3 * 64 * math.log(2) - far).div(2).exp()
    assert 3 * 64 * math.log(2) - 1e-4 <= float(far.min())
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.05)  # as in the first level
    monkeypatch.setattr(counter_noise, "philox", lambda key, counter: [0 * word for word in plain(key, counter)])
    assert float(normals(KEY, (1, 1, 1, 2)).max()) == pytest.approx(math.sqrt(2 * math.log(2) * (32 * 8 + 1)), rel=1e-6)
