from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.generators import fresh_generator, generator_words

SURPRISE = 1e-3  # as in test_sampling: fixed seeds, so never by chance


def drawn(generator: torch.Generator) -> Tensor:
    return generator_words(generator, 50)


def test_all_bits_of_words_are_random() -> None:
    words = generator_words(fresh_generator(seed=6), 2**14)
    ones = torch.stack([(words >> bit & 1).sum() for bit in range(64)]).double()
    assert float(((ones - 2**13) / 2**6).abs().max()) < 5  # standard deviations, of 64 bits


def test_words_are_never_replayed() -> None:
    torch.manual_seed(0)
    first = drawn(fresh_generator())
    torch.manual_seed(0)  # what Trainer does at the start, and again on resume
    second = drawn(fresh_generator())
    assert not torch.eq(first, second).any()
    generator = fresh_generator()
    assert not torch.eq(drawn(generator), drawn(generator)).any()


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(fresh_generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_replays_one_stream_only() -> None:
    def of(seed: int, stream: str) -> Tensor:
        return drawn(fresh_generator(seed=seed, stream=stream))

    assert torch.equal(of(3, "noise step 1"), of(3, "noise step 1"))
    for seed, stream in [(3, "noise step 2"), (3, "sampling step 1"), (4, "noise step 1"), (3 + 2**32, "noise step 1")]:
        assert not torch.eq(of(3, "noise step 1"), of(seed, stream)).any()


def test_cpu_generator_holds_more_than_32_bits_of_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.Generator().manual_seed keeps 32 bits of a seed; collect how much of the state follows the entropy instead.
    words = []
    for byte in (b"a", b"b"):
        monkeypatch.setattr(os, "urandom", lambda count, byte=byte: byte * count)
        words.append(fresh_generator().get_state()[24 : 24 + 8 * 624].view(torch.int64))
    expected = torch.frombuffer(bytearray(hashlib.shake_256(b"a" * 32).digest(4 * 624)), dtype=torch.int32).long() & 0xFFFFFFFF
    assert torch.equal(words[0], expected)
    assert (words[0] != words[1]).sum() > 600


def test_the_filled_state_is_the_one_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    # The Mersenne Twister itself (numpy's), started from the same words, draws the same 64-bit integers.
    import numpy as np

    generator = fresh_generator(seed=5)
    words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64).numpy().astype(np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    pairs = twister.random_raw(40).astype(np.uint64).reshape(20, 2)
    drawn = torch.empty(20, dtype=torch.int64).random_(-(2**63), None, generator=generator)  # all 64 bits
    ours = drawn.numpy().view(np.uint64)
    assert (np.sort(np.stack([ours >> np.uint64(32), ours & np.uint64(0xFFFFFFFF)], 1), axis=1) == np.sort(pairs, axis=1)).all()


def test_an_unknown_generator_layout_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.Generator):
        def get_state(self) -> Tensor:
            return torch.zeros(5056, dtype=torch.uint8)

    def other(device: Any) -> torch.Generator:
        return Other(device)

    monkeypatch.setattr(torch, "Generator", other)
    with pytest.raises(PrivacyError, match="version of torch"):
        fresh_generator()


def test_nothing_but_the_words_of_the_state_is_filled() -> None:
    ours, usual = fresh_generator(seed=5).get_state(), torch.Generator().manual_seed(1).get_state()
    assert torch.equal(ours[24 + 8 * 624 :], usual[24 + 8 * 624 :])
    assert torch.equal(ours[8:24], usual[8:24])  # the first 8 hold the seed that the words replaced


def test_a_gpu_is_seeded_with_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    class Gpu:
        def __init__(self, device: Any) -> None:
            self.device = torch.device(device)

        def manual_seed(self, seed: int) -> None:
            seeds.append(seed)

    monkeypatch.setattr(torch, "Generator", Gpu)
    for seed in (None, None, *range(60)):
        fresh_generator("cuda", seed=seed)
    assert len(set(seeds)) == 62
    assert 2**60 < max(seeds) < 2**64


@pytest.mark.gpu
def test_words_of_a_gpu_are_never_replayed() -> None:
    torch.cuda.manual_seed_all(0)
    first = drawn(fresh_generator("cuda"))
    torch.cuda.manual_seed_all(0)
    assert not torch.eq(first, drawn(fresh_generator("cuda"))).any()
    seeded = [drawn(fresh_generator("cuda", seed=1, stream=stream)).cpu() for stream in ("a", "a", "b")]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.eq(seeded[0], seeded[2]).any()
