"""The keystream: known answers of its ciphers, and words that never come twice."""

from __future__ import annotations

import struct

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.kernels import keystream
from dp_flash_hf.kernels.keystream import KEY_BYTES, Keystream, derived_key
from tests.support.forks import forked

KEY = bytes(range(32))


def int64(octets: bytes) -> Tensor:
    return torch.frombuffer(bytearray(octets), dtype=torch.int64)


@pytest.mark.parametrize("sizes", [(1,), (7, 1, 1000), (2, 3)])
def test_words_on_a_cpu_are_those_of_aes(sizes: tuple[int, ...]) -> None:
    stream = Keystream(KEY)
    words = torch.cat([stream(size) for size in sizes])
    cipher = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    assert torch.equal(words, int64(cipher.update(bytes(8 * sum(sizes)))))


def test_aes_gives_the_known_answer_of_the_standard() -> None:
    """NIST SP 800-38A, F.5.5: key and first counter block of CTR-AES256, whose keystream is AES of the block."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    cipher = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
    assert cipher.update(bytes(16)).hex() == "0bdf7df1591716335e9a8b15c860c502"


@pytest.mark.parametrize("n", [1, 16, 1000, 9001])
def test_words_on_a_gpu_are_those_of_chacha20(n: int, device: torch.device) -> None:
    pytest.importorskip("triton")
    from dp_flash_hf.kernels.keystream_triton import STREAM, chacha_stream

    key = torch.frombuffer(bytearray(KEY), dtype=torch.int32).tolist()
    words = chacha_stream(key, 5, n, device).cpu()
    assert words.shape == (n,)
    blocks = 2 * -(-n // 16)
    found = torch.cat([words, words.new_zeros(8 * blocks - n)]).view(torch.int32).view(16, blocks)
    for block in {0, blocks - 1, blocks // 2}:
        cipher = Cipher(algorithms.ChaCha20(KEY, struct.pack("<4I", block, 0, 5, STREAM)), None).encryptor()
        expected = torch.frombuffer(bytearray(cipher.update(bytes(64))), dtype=torch.int32)
        given = torch.arange(16) * blocks + block < 2 * n  # the others lie beyond what was asked for
        assert torch.equal(found[:, block][given], expected[given])


def test_a_cuda_device_has_chacha20_with_a_block_of_its_own_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """And AES where Triton is not there."""
    pytest.importorskip("triton")
    from dp_flash_hf.kernels import keystream_triton

    asked: list[tuple[object, ...]] = []

    def chacha(*arguments: object) -> Tensor:
        asked.append(arguments)
        return torch.zeros(3)

    monkeypatch.setattr(keystream_triton, "chacha_stream", chacha)
    monkeypatch.setattr(keystream, "has_triton", lambda device: True)
    stream = Keystream(KEY, "cuda:1")
    for _ in range(2):
        stream(3)
    words = torch.frombuffer(bytearray(KEY), dtype=torch.int32).tolist()
    assert asked == [(words, call, 3, torch.device("cuda:1")) for call in (1, 2)]
    monkeypatch.setattr(keystream, "has_triton", lambda device: False)
    Keystream(KEY, "meta")(3)
    assert len(asked) == 2


def test_no_word_comes_twice() -> None:
    streams = [Keystream(KEY), Keystream(derived_key(KEY, "a")), Keystream(derived_key(KEY, "b")), Keystream(Ranks().secret())]
    words = torch.cat([part for stream in streams for part in (stream(1000), stream(1000))])
    assert len(words.unique()) == len(words)


def test_every_bit_is_even() -> None:
    words = Keystream(KEY)(2**14)
    ones = torch.stack([(words >> bit & 1).sum() for bit in range(64)]).double()
    assert float(((ones - 2**13) / 2**6).abs().max()) < 5  # standard deviations, of 64 bits


@pytest.mark.parametrize("key", [b"", bytes(KEY_BYTES - 1), bytes(KEY_BYTES + 1)])
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="key: expected 32 bytes"):
        Keystream(key)


def test_secrets_are_fresh_forked() -> None:
    secret = Ranks().secret
    assert len({secret(), secret(), forked(secret), forked(secret)}) == 4
