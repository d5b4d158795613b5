from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.mechanisms.generators import fresh_generator
from dp_flash_hf.mechanisms.sampling import (
    PoissonSampler,
    TruncatedPoissonSampler,
    choose_rows,
    group_rows,
    sampler_from,
    sampler_from_dict,
)

SURPRISE = 1e-3  # draws come from a fixed seed: a sound sampler gives the same p-value on every run


def draws(sampler: PoissonSampler, count: int) -> Tensor:
    """bool[count, n_units]: who was drawn in each of `count` draws."""
    generator = fresh_generator(seed=7, stream=repr(sampler))
    drawn = torch.zeros(count, sampler.n_units, dtype=torch.bool)
    for row in drawn:
        units = sampler.draw(generator)
        assert units.dtype == torch.int64
        assert units.tolist() == sorted(set(units.tolist()))
        row[units] = True
    return drawn


def subset_probabilities(n: int, q: float, most: int) -> dict[tuple[int, ...], float]:
    """Probability of every outcome by the definition: include each unit with q, then keep a random subset of `most` of them."""
    outcome: dict[tuple[int, ...], float] = {}
    for size in range(n + 1):
        for included in combinations(range(n), size):
            kept = list(combinations(included, min(size, most)))
            for subset in kept:
                outcome[subset] = outcome.get(subset, 0.0) + q**size * (1 - q) ** (n - size) / len(kept)
    return outcome


@pytest.mark.parametrize(
    ("sampler", "most"),
    [
        (PoissonSampler(4, 1), 4),
        (PoissonSampler(3, 2), 3),
        (TruncatedPoissonSampler(4, 2, 2), 2),
        (TruncatedPoissonSampler(5, 2, 3), 3),
    ],
)
def test_every_subset_is_drawn_as_often_as_the_definition_says(sampler: PoissonSampler, most: int) -> None:
    expected = subset_probabilities(sampler.n_units, sampler.sampling_rate, most)
    counts = dict.fromkeys(expected, 0)
    total = 4000
    for row in draws(sampler, total):
        counts[tuple(row.nonzero().flatten().tolist())] += 1  # KeyError: a subset that cannot occur
    assert stats.chisquare(list(counts.values()), [total * p for p in expected.values()]).pvalue > SURPRISE


@pytest.mark.parametrize("most", [None, 13])
def test_sizes_are_binomial_cut_at_the_maximum(most: int | None) -> None:
    n, expected, total = 60, 12, 4000
    sampler = PoissonSampler(n, expected) if most is None else TruncatedPoissonSampler(n, expected, most)
    counts = torch.bincount(draws(sampler, total).sum(1), minlength=n + 1).double()
    frequencies = torch.tensor(stats.binom.pmf(range(n + 1), n, expected / n)) * total
    if most is not None:
        assert counts[most + 1 :].sum() == 0
        counts, frequencies = (torch.cat([x[:most], x[most:].sum()[None]]) for x in (counts, frequencies))
    common = frequencies >= 5  # chi-square needs some expected count in every cell: the rest is one cell
    cells = [torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, frequencies)]
    if cells[1][-1] == 0:
        cells = [x[:-1] for x in cells]
    assert stats.chisquare(cells[0].numpy(), cells[1].numpy()).pvalue > SURPRISE


def test_inclusion_is_uniform_and_independent_between_units_and_steps() -> None:
    n, total = 40, 8000
    q = 0.3
    z = (draws(PoissonSampler(n, 12), total).double() - q) / math.sqrt(q * (1 - q))
    # Each sum below is of `total` independent terms of mean 0 and variance 1, and all the sums are uncorrelated.
    units = z.sum(0) / math.sqrt(total)
    pairs = (z.T @ z)[torch.triu(torch.ones(n, n), 1).bool()] / math.sqrt(total)
    steps = (z[1:].T @ z[:-1]).flatten() / math.sqrt(total - 1)
    for sums in (units, pairs, steps):
        assert SURPRISE < stats.chi2.sf(float(sums.square().sum()), sums.numel()) < 1 - SURPRISE
        assert stats.norm.sf(float(sums.abs().max())) * 2 * sums.numel() > SURPRISE  # Bonferroni


def test_truncation_favours_no_unit() -> None:
    n, expected, most, total = 50, 20, 21, 6000
    drawn = draws(TruncatedPoissonSampler(n, expected, most), total)
    sizes = stats.binom.pmf(range(n + 1), n, expected / n)
    rate = sum(min(size, most) * p for size, p in enumerate(sizes)) / n
    full = drawn[drawn.sum(1) == most]  # truncated draws, mostly
    for rows, p in ((drawn, rate), (full, most / n)):
        z = (rows.double().mean(0) - p) / math.sqrt(p * (1 - p) / len(rows))
        assert stats.norm.sf(float(z.abs().max())) * 2 * n > SURPRISE


def test_uniforms_have_more_bits_than_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tensor] = []
    rand = torch.rand

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        used.append(rand(*args, **kwargs))
        return used[-1]

    monkeypatch.setattr(torch, "rand", spy)
    PoissonSampler(100, 1).draw(fresh_generator())
    fractions = torch.cat(used) * 2.0**24
    assert (fractions != fractions.floor()).all()  # each with probability 1 - 2^-29


def test_a_uniform_below_the_rate_includes_and_one_of_the_rate_does_not() -> None:
    """Uniforms begin at 0 and end below 1, so that the rate is the probability, of 0 and 1 too."""
    sampler = PoissonSampler(50, 5)
    assert sampler._included(torch.tensor([0.0, 0.1, 0.1 - 2**-50, 0.9], dtype=torch.float64)).tolist() == [0, 2]


def test_edges_of_a_draw() -> None:
    assert PoissonSampler(7, 7).draw(fresh_generator()).tolist() == list(range(7))
    generator = fresh_generator(seed=0)
    sizes = {len(PoissonSampler(20, 1).draw(generator)) for _ in range(200)}
    assert 0 in sizes  # an empty draw is a draw
    assert len(TruncatedPoissonSampler(9, 3, 30).draw(generator)) <= 9


@pytest.mark.parametrize(
    "arguments",
    [(0, 1), (10, 0), (10, 11), (10, 2.5), (10.0, 2), (True, True), (10, -1)],
)
def test_sampler_refuses_bad_sizes(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        PoissonSampler(*arguments)
    with pytest.raises(ValueError, match="expected"):
        TruncatedPoissonSampler(*arguments, 10)


@pytest.mark.parametrize("most", [0, 4, 5.5])
def test_truncated_sampler_refuses_a_maximum_below_the_expected_size(most: Any) -> None:
    with pytest.raises(ValueError, match="max_batch_size"):
        TruncatedPoissonSampler(10, 5, most)


def test_sampler_from_config_and_back_from_plain_data() -> None:
    config = PrivacyConfig(target_delta=1e-3, noise_multiplier=1.0)
    truncating = PrivacyConfig(target_delta=1e-3, noise_multiplier=1.0, sampling="truncated_poisson", max_batch_size=9)
    poisson = sampler_from(config, n_units=100, expected_batch_size=5)
    truncated = sampler_from(truncating, n_units=100, expected_batch_size=5)
    assert poisson == PoissonSampler(100, 5)
    assert truncated == TruncatedPoissonSampler(100, 5, 9)
    assert poisson != truncated
    assert poisson.sampling_rate == truncated.sampling_rate == 0.05
    for sampler in (poisson, truncated):
        assert sampler.kind in ("poisson", "truncated_poisson")
        assert sampler_from_dict(sampler.to_dict()) == sampler
    for data in (
        {},
        {"kind": "shuffle"},
        {**poisson.to_dict(), "max_batch_size": 9},
        {**truncated.to_dict(), "kind": "poisson"},
    ):
        with pytest.raises(ValueError, match="sampler"):
            sampler_from_dict(data)


def test_rows_are_grouped_by_unit() -> None:
    rows = group_rows(["ann", "bob", "ann", "cy", "bob", "ann"])
    assert [r.tolist() for r in rows] == [[0, 2, 5], [1, 4], [3]]
    assert [r.tolist() for r in group_rows([3, -1, 3])] == [[0, 2], [1]]
    assert group_rows([]) == []


@pytest.mark.parametrize("unknown", [None, float("nan"), 1.5, torch.tensor(3), ["ann"]])
def test_rows_without_a_usable_unit_are_refused(unknown: object) -> None:
    with pytest.raises(ValueError, match="unit of row 1"):
        group_rows(["ann", unknown])


def test_rows_of_a_unit_are_chosen_anew_and_uniformly() -> None:
    rows = [torch.tensor([10, 20, 30, 40]), torch.tensor([5]), torch.tensor([1, 2])]
    generator = fresh_generator(seed=3)
    counts = {pair: 0 for pair in combinations([10, 20, 30, 40], 2)}
    total = 3000
    for _ in range(total):
        many, one, none_dropped = choose_rows(rows, torch.tensor([0, 1, 2]), 2, generator)
        counts[tuple(many.tolist())] += 1
        assert one.tolist() == [5]
        assert none_dropped.tolist() == [1, 2]
    assert stats.chisquare(list(counts.values())).pvalue > SURPRISE
    assert choose_rows(rows, torch.tensor([], dtype=torch.int64), 2, generator) == []


@pytest.mark.parametrize(("n_units", "expected"), [(10, 1), (1000, 1), (1000, 100), (10**6, 5000), (64, 64)])
def test_hardly_more_is_exceeded_once_in_1e30_draws(n_units: int, expected: int) -> None:
    sampler = PoissonSampler(n_units, expected)
    assert PoissonSampler(50, 5).hardly_more == 104  # 5 + 12 sqrt(5) + 72, which the noise of sharded models is charged for
    assert stats.binom.logsf(sampler.hardly_more, n_units, sampler.sampling_rate) < math.log(1e-30)
