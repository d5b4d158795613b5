"""Noise: exact on its grid, Gaussian to the far tails, and as precise as its proof assumes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from dp_flash_hf.engine.gradient_buffer import MOST_ROUNDING
from dp_flash_hf.mechanisms import gaussian_noise
from dp_flash_hf.mechanisms.gaussian_noise import (
    ETA,
    MOST_VALUES,
    SENSITIVITY,
    Words,
    add_gaussian_noise_,
    closeness,
    spacing,
    whole_noise,
)
from dp_flash_hf.mechanisms.generators import fresh_generator, generator_words

SURPRISE = 1e-3  # as in test_sampling: fixed seeds, so never by chance
UNIT = 2.0**-53


def words_of(seed: int) -> Words:
    generator = fresh_generator(seed=seed)
    return lambda n: generator_words(generator, n)


def noise(size: int = 50, *, std: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.zeros(size, dtype=dtype)
    add_gaussian_noise_([tensor], std=std, spacing=spacing(size, 1.0, std), words=words_of(seed))
    return tensor


@pytest.mark.sampled(4)
@pytest.mark.parametrize("std", [1e-4, 0.7, 300.0])
@pytest.mark.parametrize("shape", [(), (3,), (17, 5), (0, 4)])
def test_noise_is_gaussian_of_the_right_scale_and_independent(std: float, shape: tuple[int, ...]) -> None:
    repeats = 4000 // max(1, math.prod(shape))
    tensors = [torch.zeros(shape) for _ in range(repeats)]
    add_gaussian_noise_(tensors, std=std, spacing=spacing(4000, 1.0, std), words=words_of(1))
    drawn = torch.stack(tensors).flatten()
    if drawn.numel() == 0:
        return
    assert stats.kstest(drawn.double().numpy() / std, "norm").pvalue > SURPRISE
    total = drawn.numel()
    assert SURPRISE < stats.chi2.sf(float((drawn.double() / std).square().sum()), total) < 1 - SURPRISE
    lag = float((drawn[1:].double() * drawn[:-1].double()).sum()) / (std**2 * math.sqrt(total - 1))
    assert abs(lag) < stats.norm.isf(SURPRISE / 2)


def test_moments_of_many() -> None:
    """Mean, variance, skewness and kurtosis, and the products of both numbers of one transform, within 4 standard errors."""
    n = 2**20
    z = whole_noise(n, 2.0**20, words_of(2)) / 2.0**20
    wider = 1 + (1 / 16) ** 2 / 12  # the coarse lattice's own variance
    for power, mean, square in ((1, 0, 1), (2, wider, 2), (3, 0, 15), (4, 3 * wider**2, 96)):
        assert abs(float((z**power).mean()) - mean) < 4 * math.sqrt(square / n)
    first, second = z.view(2, -1)
    assert abs(float((first * second).mean())) < 4 / math.sqrt(n / 2)
    assert abs(float(((first**2 - wider) * (second**2 - wider)).mean())) < 4 * 2 / math.sqrt(n / 2)


@pytest.mark.parametrize("sigmas", [4.0, 6.0, 8.0, 9.3])
def test_tails_are_full(sigmas: float) -> None:
    """Given that u is below exp(-sigmas^2 / 2), what the radius has beyond is exponential: half its square, memoryless."""
    beyond = math.exp(-(sigmas**2) / 2)
    draw = words_of(3)

    def far(n: int) -> Tensor:
        if n != 20_000:  # what is asked for where 63 bits are zeros
            return draw(n)
        words = draw(n).view(5, -1)
        words[0] = (words[0].bitwise_and(2**63 - 1).double() * beyond).long()
        return words.flatten()

    found = whole_noise(2 * 4000, 2.0**20, far).view(2, -1) / 2.0**20
    excess = found.square().sum(0) / 2 - sigmas**2 / 2
    # Both numbers of a transform are moved by the coarse lattice, by 1/16 at most, that is the radius by 1/11.
    assert float(excess.min()) > -(sigmas / 11 + 1)
    again = excess[excess > sigmas / 11]
    assert stats.kstest((again - sigmas / 11).numpy(), "expon").pvalue > SURPRISE


def test_tails_have_no_end() -> None:
    """Where 63 bits are zeros, further words go on, however many are zeros again."""
    calls: list[int] = []
    draw = words_of(4)

    def zeros_thrice(n: int) -> Tensor:
        calls.append(n)
        words = draw(n)
        if len(calls) <= 3:
            words[: n // 5 if len(calls) == 1 else n // 2] = 0
        return words

    found = whole_noise(2, 2.0**20, zeros_thrice) / 2.0**20
    assert calls == [5, 2, 2, 2]
    assert math.sqrt(2 * 3 * 63 * math.log(2)) <= float(found.norm()) + 1 / 11 < 18  # 16.2 and what the last words add


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9),
    std=st.floats(0.01, 10),
    seed=st.integers(0, 2**32),
)
def test_the_release_is_exact(values: list[float], std: float, seed: int) -> None:
    """(round(S / D) + n) D in rational arithmetic, rounded once to the tensor's dtype."""
    grid = spacing(len(values), 1.0, std)
    added = whole_noise(len(values), std / grid, words_of(seed)).tolist()
    on_grid = [round(Fraction(value) / Fraction(grid)) + Fraction(n) for value, n in zip(values, added, strict=True)]
    exact = [number * Fraction(grid) for number in on_grid]
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(values, dtype=dtype)
        add_gaussian_noise_([tensor], std=std, spacing=grid, words=words_of(seed))
        assert tensor.tolist() == torch.tensor([float(value) for value in exact], dtype=torch.float64).to(dtype).tolist()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    s=st.integers(-(2**20), 2**20),
    z=st.fractions(-8, 8),
    cells=st.fractions(8, 16),
    log_coarse=st.integers(0, 12),
    data=st.data(),
)
def test_the_noise_is_the_gaussian_mechanism_rounded_with_a_random_offset(
    s: int, z: Fraction, cells: Fraction, log_coarse: int, data: st.DataObject
) -> None:
    """The lemma: what is added to a whole number s is, for offset (t - s) mod a, the rounding of s + R z for offset t."""
    coarse = 2**log_coarse
    t = data.draw(st.integers(0, coarse - 1))
    scaled = cells * coarse * z

    def rounded(x: Fraction, offset: int) -> Any:
        nearest: int = ((x - offset) / coarse + Fraction(1, 2)) // 1
        return coarse * nearest + offset

    assert s + rounded(scaled, (t - s) % coarse) == rounded(s + scaled, t)


@pytest.mark.parametrize(
    ("n_values", "bound", "std"), [(1, 1.0, 1.0), (10**6, 0.1, 0.05), (MOST_VALUES, 1.0, 1.0), (7, 3.0, 300.0)]
)
def test_the_grid_moves_neighbours_by_a_thousandth_at_most(n_values: int, bound: float, std: float) -> None:
    grid = spacing(n_values, bound, std)
    assert math.log2(grid).is_integer()
    assert grid * math.sqrt(n_values) <= 2.0**-10 * bound
    assert std / grid >= 2**10
    assert grid > min(2.0**-10 * bound / math.sqrt(n_values), std / 2**10) / 2  # and is no finer than it has to be


def test_more_values_than_are_charged_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n_values.*LoRA"):
        spacing(MOST_VALUES + 1, 1.0, 1.0)


@pytest.mark.parametrize("n_values", [0, -1, 2.5])
def test_something_has_to_be_trained(n_values: Any) -> None:
    with pytest.raises(ValueError, match=r"n_values.*train something"):
        spacing(n_values, 1.0, 1.0)


def test_numbers_are_as_precise_as_the_charge_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against 60 digits: every number within 2^-53 (16 r + 2 / r) of the ideal one, for small, usual and large radii r."""
    draw = words_of(5)
    asked: list[Tensor] = []

    def kept(n: int) -> Tensor:
        words = draw(n).view(5, -1)
        pairs = words.shape[1]
        small = 2 ** torch.randint(1, 62, (pairs // 4,)) - 1
        words[0, : pairs // 4] = words[0, : pairs // 4].bitwise_and(small).bitwise_or(1)  # far out
        words[0, pairs // 4 : pairs // 2] = 2**63 - 1 - words[0, pairs // 4 : pairs // 2].bitwise_and(small)  # near 0
        asked.append(words)
        return words.flatten()

    torch.manual_seed(0)
    pairs = 1000
    # On a lattice of 2^-48 rounding shows nearly the number itself.
    monkeypatch.setattr(gaussian_noise, "_CELLS", 2**48)
    found = (whole_noise(2 * pairs, 2.0**48, kept) * 2.0**-48).view(2, -1)
    (words,) = asked
    monkeypatch.setattr(mpmath.mp, "dps", 60)
    for pair in range(pairs):
        high, low, angle = words[:3, pair].tolist()
        u = ((high & 2**63 - 1) + ((low & 2**63 - 1) + mpmath.mpf("0.5")) / 2**63) / 2**63
        radius, turn = mpmath.sqrt(-2 * mpmath.log(u)), mpmath.pi * angle / 2**63
        for row, ideal in ((0, radius * mpmath.cos(turn)), (1, radius * mpmath.sin(turn))):
            off = abs(mpmath.mpf(float(found[row, pair])) - ideal)
            assert off <= UNIT * (16 * radius + 2 / radius) + mpmath.mpf(2) ** -49, (pair, row, float(radius))


@pytest.mark.parametrize("R", [520.0, 1000.0])
def test_every_number_lies_on_the_lattice_of_its_own_offset(R: float) -> None:
    """n = a round((R z - t) / a) + t, with a between R / 16 and R / 8, z of three words, and t of the low bits of two more."""
    pairs = 500
    given = words_of(6)(5 * pairs)
    found = whole_noise(2 * pairs - 1, R, lambda n: given[:n])
    high, low, angle, *offsets = given.view(5, pairs)
    u = ((high & 2**63 - 1).double() + (low & 2**63 - 1).double() / 2**63) / 2**63
    radius, turn = (-2 * u.log()).sqrt(), math.pi * angle.double() / 2**63
    z = torch.cat([radius * turn.cos(), radius * turn.sin()])[:-1]
    t = torch.cat(offsets)[:-1] & 63
    assert bool(((found.long() - t) % 64 == 0).all())
    assert float((found - R * z).abs().max()) <= 32 * (1 + 1e-9)


def test_noise_is_wider_by_all_that_rounds_a_sum() -> None:
    """The grid; two neighbours' sums, as parts are added up in float32; and what is allowed for products inside a part."""
    assert SENSITIVITY == 1 + 2.0**-10 + 2 * MOST_ROUNDING * 2.0**-24 + 2.0**-10


def test_the_charge_is_that_of_the_proof() -> None:
    """n ETA^2 + ETA sqrt(2 n L) + 2^10 ETA L / 3 with ETA = 2^-42, and n = 2^36 transforms a step."""
    steps, L = 400, 27.0
    charge = steps * 2.0**-48 + 2.0**-24 * math.sqrt(2 * steps * L) + 2.0**-32 * L / 3
    assert closeness(steps, L) == pytest.approx(charge, rel=1e-12)


def test_the_charge_is_small_and_grows_as_the_root() -> None:
    log_inverse = math.log(1e12)
    assert closeness(400, log_inverse) < 1e-5
    assert closeness(40_000, log_inverse) == pytest.approx(10 * closeness(400, log_inverse), rel=0.01)
    assert closeness(1, 0.0) == pytest.approx(MOST_VALUES / 2 * ETA**2)


def test_noise_is_added_in_place_also_to_views_and_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    view = torch.zeros(6, 4).T
    add_gaussian_noise_([parameter, view], std=1.0, spacing=2.0**-20, words=words_of(0))
    assert (parameter != 1).all()
    assert parameter.grad_fn is None
    assert (view != 0).all()


def test_tensors_of_any_size_are_noised_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_noise, "_CHUNK", 7)
    drawn = noise(50)
    assert len(drawn.unique()) == 50


@pytest.mark.parametrize("std", [-1.0, 0.0, math.inf, math.nan])
def test_bad_std_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        add_gaussian_noise_([torch.zeros(3)], std=std, spacing=2.0**-20, words=words_of(0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_nothing_is_noised_if_one_tensor_cannot_be(dtype: torch.dtype) -> None:
    first = torch.zeros(3)
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        add_gaussian_noise_([first, torch.zeros(3, dtype=dtype)], std=1.0, spacing=2.0**-20, words=words_of(0))
    assert first.tolist() == [0, 0, 0]


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise()
    assert torch.equal(torch.get_rng_state(), before)
