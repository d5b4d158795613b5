"""Gaussian noise, and the random generators that noise and sampling draw from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from dp_flash_hf import validation
from dp_flash_hf.errors import PrivacyError, invalid

# Where torch keeps the Mersenne Twister's 624 words of 32 bits, one per int64, in the state of a CPU generator.
_WORDS, _WORDS_AT = 624, 24


def fresh_generator(device: torch.device | str = "cpu", *, seed: int | None = None, stream: str = "") -> torch.Generator:
    """A generator whose draws cannot be foreseen: it starts from the operating system's entropy.

    Without a seed every call is a stream of its own. On the CPU all 624 words of the generator's state are filled, because
    `torch.Generator.manual_seed` uses 32 bits, few enough to try them all. On a GPU the seed has 64 bits.

    Never save or restore a generator's state: whoever reads it can subtract the noise.

    >>> a, b = fresh_generator(), fresh_generator()
    >>> bool(torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b)))
    False

    Args:
        device: Where draws are made.
        seed: For tests, and for ranks that must draw the same noise and have shared a secret of any size. Draws of a seed that
            others know are not private.
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


def add_gaussian_noise_(tensors: Iterable[Tensor], *, std: float, generator: torch.Generator) -> None:
    """Add independent N(0, std^2) to every element, in place: the Gaussian mechanism (Dwork and Roth 2014, appendix A).

    Draws are float32, and the sum is rounded once, to the tensor's dtype. For a sum of per-unit gradients clipped to norm C,
    std = noise multiplier * C, because adding or removing one unit moves the sum by at most C (flat, automatic and per-layer
    clipping alike). That floating-point Gaussians are not exactly Gaussian is not accounted for (Mironov 2012).

    =========================== ====================================================
    Case                        Result
    =========================== ====================================================
    std = 0                     tensors as they were
    std negative, NaN or inf    ValueError, nothing changed
    a tensor of whole numbers   ValueError, nothing changed
    no tensors, empty tensors   nothing is drawn
    NaN or inf in a tensor      stays: clip first, which leaves such units out
    DTensor                     the local shard's elements; give `local(tensor)`
    =========================== ====================================================

    Args:
        tensors: Of real floating dtypes, of any shape, on the generator's device; also views and parameters.
        std: Standard deviation, finite and at least 0, in the unit of the tensors' values.
        generator: From `fresh_generator`.

    Raises:
        ValueError: std or a dtype is out of range; nothing was changed.
    """
    validation.non_negative("std", std, remedy="give noise multiplier * max_grad_norm")
    tensors = list(tensors)
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise invalid("tensors", expected="real floating dtypes", actual=tensor.dtype, remedy="noise gradients, not counts")
    with torch.no_grad():
        for tensor in tensors:
            noise = torch.randn(tensor.shape, dtype=torch.float32, device=tensor.device, generator=generator)
            tensor.add_(noise, alpha=std)


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
