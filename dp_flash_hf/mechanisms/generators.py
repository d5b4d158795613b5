"""The random generators that draws, and fast noise, come from."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor

from dp_flash_hf.errors import PrivacyError

# Where torch keeps the Mersenne Twister's 624 words of 32 bits, one per int64, in the state of a CPU generator.
_WORDS, _WORDS_AT = 624, 24


def fresh_generator(
    device: torch.device | str = "cpu", *, seed: int | bytes | None = None, stream: str = ""
) -> torch.Generator:
    """A generator whose draws cannot be foreseen: it starts from the operating system's entropy.

    Without a seed every call is a stream of its own. On the CPU all 624 words of the generator's state are filled, because
    `torch.Generator.manual_seed` uses 32 bits, few enough to try them all. On a GPU the seed has 64 bits.

    Never save or restore a generator's state: whoever reads it can subtract the noise.

    >>> a, b = fresh_generator(), fresh_generator()
    >>> bool(torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b)))
    False

    Args:
        device: Where draws are made.
        seed: For tests, and for ranks that must draw the same and have shared a secret of any size. Draws of a seed that others
            know are not private.
        stream: With a seed: what is drawn ("noise step 7 rank 0"). One seed gives unrelated draws to different streams, so name
            the step in it and a resumed run does not replay earlier noise.

    Returns:
        A new generator on that device.

    Raises:
        PrivacyError: A version of torch whose CPU generator cannot be filled.
    """
    secret = os.urandom(32) if seed is None else repr((seed, stream)).encode()
    generator = torch.Generator(device)
    if generator.device.type == "cpu":
        _fill_state(generator, secret)
    else:
        generator.manual_seed(int.from_bytes(hashlib.shake_256(secret).digest(8), "little"))
    return generator


def generator_words(generator: torch.Generator, n: int) -> Tensor:
    """The generator's next n words: int64 (n,) on its device, all 64 bits of each random, and not cryptographic."""
    words = torch.empty(n, dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator)


def _fill_state(generator: torch.Generator, secret: bytes) -> None:
    """Fill the whole state of a CPU generator."""
    probe = 0x5EED5EED
    state = generator.manual_seed(probe).get_state()
    words = state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].view(torch.int64)
    if words.numel() != _WORDS or int(words[0]) != probe:
        raise PrivacyError("this version of torch lays out its CPU generator in another way, so it cannot be seeded safely")
    drawn = torch.frombuffer(bytearray(hashlib.shake_256(secret).digest(4 * _WORDS)), dtype=torch.int32)
    words.copy_(drawn.to(torch.int64) & 0xFFFFFFFF)
    generator.set_state(state)
