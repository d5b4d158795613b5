from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.gaussian_noise import add_gaussian_noise_, fresh_generator

SURPRISE = 1e-3  # as in test_sampling: fixed seeds, so never by chance


def noise(generator: torch.Generator, *, std: float = 1.0, size: int = 50, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.zeros(size, dtype=dtype, device=generator.device)
    add_gaussian_noise_([tensor], std=std, generator=generator)
    return tensor


@pytest.mark.parametrize("std", [1e-4, 0.7, 300.0])
@pytest.mark.parametrize("shape", [(), (3,), (17, 5), (0, 4)])
def test_noise_is_gaussian_of_the_right_scale_and_independent(std: float, shape: tuple[int, ...]) -> None:
    repeats = 4000 // max(1, math.prod(shape))
    tensors = [torch.zeros(shape) for _ in range(repeats)]
    add_gaussian_noise_(tensors, std=std, generator=fresh_generator(seed=1, stream=f"{std} {shape}"))
    drawn = torch.stack(tensors).flatten()
    if drawn.numel() == 0:
        return
    assert stats.kstest(drawn.double().numpy() / std, "norm").pvalue > SURPRISE
    total = drawn.numel()
    assert SURPRISE < stats.chi2.sf(float((drawn.double() / std).square().sum()), total) < 1 - SURPRISE
    lag = float((drawn[1:].double() * drawn[:-1].double()).sum()) / (std**2 * math.sqrt(total - 1))
    assert abs(lag) < stats.norm.isf(SURPRISE / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_draws_are_float32_and_rounded_once(dtype: torch.dtype) -> None:
    std = 0.7
    base = torch.linspace(-3, 3, 101).to(dtype)
    tensor = base.clone()
    add_gaussian_noise_([tensor], std=std, generator=fresh_generator(seed=2))
    drawn = noise(fresh_generator(seed=2), size=101).double()
    exact = base.double() + std * drawn
    # Float32 arithmetic (a product and a sum: 3 half-ulps) before one rounding to the dtype (half an ulp).
    bound = exact.abs() * (torch.finfo(dtype).eps / 2) + (exact.abs() + 3 * std) * 2 * torch.finfo(torch.float32).eps
    assert ((tensor.double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all()


def test_noise_is_added_in_place_also_to_views_and_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    view = torch.zeros(6, 4).T
    add_gaussian_noise_([parameter, view], std=1.0, generator=fresh_generator())
    assert (parameter != 1).all()
    assert parameter.grad_fn is None
    assert (view != 0).all()
    still = torch.arange(5.0)
    add_gaussian_noise_([still], std=0.0, generator=fresh_generator())
    assert still.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("std", [-1.0, math.inf, math.nan])
def test_bad_std_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        noise(fresh_generator(), std=std)


def test_nothing_is_noised_if_one_tensor_cannot_be() -> None:
    first = torch.zeros(3)
    with pytest.raises(ValueError, match="int64"):
        add_gaussian_noise_([first, torch.zeros(3, dtype=torch.int64)], std=1.0, generator=fresh_generator())
    assert first.tolist() == [0, 0, 0]


def test_noise_is_never_replayed() -> None:
    torch.manual_seed(0)
    first = noise(fresh_generator())
    torch.manual_seed(0)  # what Trainer does at the start, and again on resume
    second = noise(fresh_generator())
    assert not torch.isclose(first, second).any()
    generator = fresh_generator()
    assert not torch.isclose(noise(generator), noise(generator)).any()


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise(fresh_generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_replays_one_stream_only() -> None:
    def drawn(seed: int, stream: str) -> Tensor:
        return noise(fresh_generator(seed=seed, stream=stream))

    assert torch.equal(drawn(3, "noise step 1"), drawn(3, "noise step 1"))
    for seed, stream in [(3, "noise step 2"), (3, "sampling step 1"), (4, "noise step 1"), (3 + 2**32, "noise step 1")]:
        assert not torch.isclose(drawn(3, "noise step 1"), drawn(seed, stream)).any()


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


@pytest.mark.gpu
def test_noise_on_a_gpu_is_gaussian_and_never_replayed() -> None:
    torch.cuda.manual_seed_all(0)
    first = noise(fresh_generator("cuda"), std=2.0, size=5000)
    torch.cuda.manual_seed_all(0)
    second = noise(fresh_generator("cuda"), std=2.0, size=5000)
    assert not torch.equal(first, second)
    seeded = [noise(fresh_generator("cuda", seed=1, stream=s), std=2.0, size=5000).cpu() for s in ("a", "a", "b")]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.isclose(seeded[0], seeded[2], atol=1e-6).all()
    assert stats.kstest(seeded[0].double().numpy() / 2.0, "norm").pvalue > SURPRISE
