"""Words that nobody can foresee: a cryptographic keystream, on CPUs and GPUs.

A keystream is made for one use, of a key that was drawn for that use from the operating system. Nothing outlives it: no copy of
a process, no fork, checkpoint or second run can give the same words again.
"""

from __future__ import annotations

import hashlib

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from dp_flash_hf.errors import invalid
from dp_flash_hf.kernels.numerics import has_triton

KEY_BYTES = 32


class Keystream:
    """Called with n, it gives the next n words: int64 (n,) on its device, none of them twice.

    On CPUs, and on devices without Triton, AES-256 in counter mode (NIST SP 800-38A), from OpenSSL; on CUDA devices ChaCha20
    (RFC 8439). Both are indistinguishable from random words for whoever does not have the key.

    >>> stream = Keystream(bytes(32))
    >>> stream(2).tolist() == Keystream(bytes(32))(2).tolist() != stream(2).tolist()
    True

    Args:
        key: 32 bytes, derived from what the operating system gave for this use, and maybe shared by ranks; never used again.
        device: where the words are wanted.

    Raises:
        ValueError: a key of another length.
    """

    def __init__(self, key: bytes, device: torch.device | str = "cpu") -> None:
        if len(key) != KEY_BYTES:
            raise invalid("key", expected=f"{KEY_BYTES} bytes", actual=len(key), remedy="draw it with secrets.token_bytes(32)")
        self._device = torch.device(device)
        self._words_of_key: list[int] = torch.frombuffer(bytearray(key), dtype=torch.int32).tolist()
        self._calls = 0  # of ChaCha20, which begins a block of its own for each
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def __call__(self, n: int) -> Tensor:
        """The next n words."""
        if self._device.type == "cuda" and has_triton(self._device):
            from dp_flash_hf.kernels.keystream_triton import chacha_stream

            self._calls += 1
            return chacha_stream(self._words_of_key, self._calls, n, self._device)
        out = bytearray(8 * n + 15)  # what the cipher asks for: a block more than it writes
        self._encryptor.update_into(bytes(8 * n), out)
        return torch.frombuffer(out, dtype=torch.int64, count=n).to(self._device)


def derived_key(secret: bytes, purpose: str) -> bytes:
    """A key of one secret for one purpose; those for others tell nothing of it (SHAKE-256, FIPS 202).

    >>> derived_key(b"secret", "noise") == derived_key(b"secret", "draws")
    False
    """
    return hashlib.shake_256(len(secret).to_bytes(8, "little") + secret + purpose.encode()).digest(KEY_BYTES)
