"""Weighted sums of per-unit gradients against the sum written out, and units of factor 0, which must leave no trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dp_flash_hf.kernels.clipped_sum import add_embedding_, add_linear_, add_per_unit_, weighted_rows

SIZES = [(4, 4, 4), (1, 0, 5), (2, 0, 3)]


def factors_for(sizes: tuple[int, ...]) -> Tensor:
    return torch.rand(len(sizes), dtype=torch.float64) + 0.1


@pytest.mark.parametrize(("d", "p"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("sizes", SIZES)
def test_linear(sizes: tuple[int, ...], d: int, p: int) -> None:
    a, g = torch.randn(sum(sizes), d, dtype=torch.float64), torch.randn(sum(sizes), p, dtype=torch.float64)
    factors, start = factors_for(sizes), torch.randn(p, d, dtype=torch.float64)
    wanted = start.clone()
    for factor, a_u, g_u in zip(factors, a.split(sizes), g.split(sizes), strict=True):
        wanted += factor * (g_u.mT @ a_u)
    add_linear_(start, a, g, factors, sizes)
    torch.testing.assert_close(start, wanted)


@pytest.mark.parametrize("sizes", SIZES)
def test_embedding(sizes: tuple[int, ...]) -> None:
    ids, g = torch.randint(0, 4, (sum(sizes),)), torch.randn(sum(sizes), 5, dtype=torch.float64)
    factors, start = factors_for(sizes), torch.randn(4, 5, dtype=torch.float64)
    wanted = start.clone()
    for factor, ids_u, g_u in zip(factors, ids.split(sizes), g.split(sizes), strict=True):
        for i, row in zip(ids_u.tolist(), g_u, strict=True):
            wanted[i] += factor * row
    add_embedding_(start, ids, g, factors, sizes)
    torch.testing.assert_close(start, wanted)


def test_per_unit() -> None:
    gradients, factors = torch.randn(3, 2, 4, dtype=torch.float64), factors_for((1, 1, 1))
    start = torch.randn(2, 4, dtype=torch.float64)
    wanted = start + sum(f * g for f, g in zip(factors, gradients, strict=True))
    add_per_unit_(start, gradients, factors)
    torch.testing.assert_close(start, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("d", "p"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("where", ["a", "g", "both"])
def test_a_unit_of_factor_zero_leaves_no_trace(bad: float, d: int, p: int, where: str) -> None:
    """Bit for bit what the sum is without it, whichever side of the product holds NaN or infinity."""
    sizes = (2, 3, 2)
    a, g = torch.randn(7, d), torch.randn(7, p)
    clean_a, clean_g = a.clone(), g.clone()
    clean_a[2:5], clean_g[2:5] = 0.0, 0.0
    if where != "g":
        a[2:5] = bad
    if where != "a":
        g[2:5] = bad
    factors = torch.tensor([0.5, 0.0, 1.0])
    got, wanted = torch.zeros(p, d), torch.zeros(p, d)
    add_linear_(got, a, g, factors, sizes)
    add_linear_(wanted, clean_a, clean_g, factors, sizes)
    assert torch.equal(got, wanted)
    table, clean = torch.zeros(4, p), torch.zeros(4, p)
    ids = torch.tensor([0, 1, 1, 2, 3, 3, 0])
    add_embedding_(table, ids, g, factors, sizes)
    add_embedding_(clean, ids, clean_g, factors, sizes)
    assert torch.equal(table, clean)
    total, kept = torch.zeros(2), torch.zeros(2)
    add_per_unit_(total, torch.tensor([[1.0, 2.0], [bad, bad], [3.0, 4.0]]), factors)
    add_per_unit_(kept, torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]), factors)
    assert torch.equal(total, kept)


def test_sums_accumulate_in_float32_whatever_the_records_are() -> None:
    """4000 equal bf16 rows: a bf16 sum would stop growing at 256."""
    ones = torch.ones(4000, 2, dtype=torch.bfloat16)
    out, table = torch.zeros(2, 2), torch.zeros(1, 2)
    sizes, factors = (1,) * 4000, torch.ones(4000)
    add_linear_(out, ones, ones, factors, sizes)
    add_embedding_(table, torch.zeros(4000, dtype=torch.long), ones, factors, sizes)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full((2, 2), 4000.0))
    torch.testing.assert_close(table, torch.full((1, 2), 4000.0))


def test_weighted_rows() -> None:
    x = torch.arange(8.0).view(4, 2)
    assert weighted_rows(x, torch.tensor([2.0, 0.0, 1.0]), (1, 2, 1)).tolist() == [
        [0.0, 2.0],
        [0.0, 0.0],
        [0.0, 0.0],
        [6.0, 7.0],
    ]
