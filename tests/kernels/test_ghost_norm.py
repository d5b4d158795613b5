"""Squared norms from records against the gradients formed one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dp_flash_hf.kernels.ghost_norm import (
    embedding_squared_norms,
    linear_squared_norms,
    row_sums,
    tied_cross_terms,
    unit_gradients,
)
from dp_flash_hf.kernels.numerics import hidden_by_rounding, is_uniform, upcast

SIZES = [(4, 4, 4), (1, 1), (3,), (5, 0, 2), (0, 0), (1, 7, 40), (64, 64), (51, 51, 51), (131,)]


def gradients(a: Tensor, g: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    return [g_u.mT @ a_u for a_u, g_u in zip(a.double().split(sizes), g.double().split(sizes), strict=True)]


def tables(ids: Tensor, g: Tensor, sizes: tuple[int, ...], rows: int) -> list[Tensor]:
    out = []
    for ids_u, g_u in zip(ids.split(sizes), g.double().split(sizes), strict=True):
        table = torch.zeros(rows, g.shape[1], dtype=torch.float64)
        for i, row in zip(ids_u.tolist(), g_u, strict=True):
            table[i] += row
        out.append(table)
    return out


def squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "p"), [(3, 5), (17, 2), (1, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_linear(sizes: tuple[int, ...], d: int, p: int, dtype: torch.dtype) -> None:
    a, g = torch.randn(sum(sizes), d).to(dtype), torch.randn(sum(sizes), p).to(dtype)
    got = linear_squared_norms(a, [g], sizes)[0]
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.shape == (len(sizes),)
    wanted = squares(gradients(a, g, sizes))
    # Every product and sum rounds by eps / 2 of its size, and the sum of a unit's terms is at most the square of this.
    lengths = a.double().norm(dim=1) * g.double().norm(dim=1)
    bound = torch.stack([unit.sum() for unit in lengths.split(sizes)]).square()
    assert bool(((got.double() - wanted).abs() <= 8 * torch.finfo(got.dtype).eps * bound).all())


@pytest.mark.parametrize("sizes", [(4, 4), (5, 0, 3), (40, 90)])
def test_layers_that_share_an_input(sizes: tuple[int, ...]) -> None:
    a = torch.randn(sum(sizes), 6, dtype=torch.float64)
    gs = [torch.randn(sum(sizes), p, dtype=torch.float64) for p in (3, 1, 8)]
    for longest_gram in (math.inf, 4, 0):  # Gram for all, some, none
        got = linear_squared_norms(a, gs, sizes, longest_gram)
        for g, norms in zip(gs, got, strict=True):
            torch.testing.assert_close(norms, squares(gradients(a, g, sizes)), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("longest_gram", [math.inf, 70])
def test_units_of_many_lengths(longest_gram: float) -> None:
    """Those of like lengths are padded to one: what pads them adds nothing, and no unit gets another's norm."""
    sizes = (100, 3, 65, 0, 1, 130, 5, 64, 2, 97, 0, 200, 9)
    a, g = torch.randn(sum(sizes), 6, dtype=torch.float64), torch.randn(sum(sizes), 3, dtype=torch.float64)
    wanted = squares(gradients(a, g, sizes))
    torch.testing.assert_close(linear_squared_norms(a, [g], sizes, longest_gram)[0], wanted, rtol=1e-11, atol=0.0)
    for unit, start in ((0, 0), (5, 169), (9, 370)):  # its first row: what padding is made of
        for x in (a, g):
            x[start] = math.nan
        got = linear_squared_norms(a, [g], sizes, longest_gram)[0]
        wanted[unit] = math.nan
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 0, 3)])
def test_unit_gradients(sizes: tuple[int, ...]) -> None:
    a, g = torch.randn(sum(sizes), 6, dtype=torch.float64), torch.randn(sum(sizes), 3, dtype=torch.float64)
    wanted = torch.stack(gradients(a, g, sizes))
    torch.testing.assert_close(unit_gradients(a, g, sizes), wanted)
    torch.testing.assert_close(unit_gradients(a, g, sizes, torch.ones_like(wanted)), wanted + 1)
    torch.testing.assert_close(row_sums(g, sizes), torch.stack([g_u.sum(0) for g_u in g.split(sizes)]))


@pytest.mark.parametrize("scale", [1.0, 1e5, 1e8])
def test_a_cancelled_sum_is_never_underestimated(scale: float) -> None:
    """Pairs of tokens that cancel but for a remainder: the norm may come out larger by what rounding hides, never smaller."""
    for sizes in ((6, 6), (6, 2)):
        a, g = torch.randn(sum(sizes), 30), torch.randn(sum(sizes), 30)
        for first in range(0, sum(sizes), 2):
            a[first : first + 2] *= scale
            a[first + 1], g[first + 1] = a[first] * (1 + 1e-6 * torch.randn(30)), -g[first]
        got, wanted = linear_squared_norms(a, [g], sizes)[0].double().sqrt(), squares(gradients(a, g, sizes)).sqrt()
        bound = torch.stack([x.sum() for x in (a.norm(dim=1) * g.norm(dim=1)).split(sizes)]).double()
        hidden = hidden_by_rounding(bound.float(), torch.tensor(sizes)).double().sqrt()
        assert bool((got >= 0.99 * wanted).all())
        assert bool((got <= wanted + 2 * hidden).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_embedding(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    ids, g = torch.randint(0, 4, (sum(sizes),)), torch.randn(sum(sizes), 5).to(dtype)
    got = embedding_squared_norms(ids, g, sizes)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        got.double(), squares(tables(ids, g, sizes, 4)), rtol=1e-10 if dtype == torch.float64 else 1e-4, atol=0.0
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_tied(sizes: tuple[int, ...]) -> None:
    d, vocabulary = 5, 7
    looked_up = tuple(2 * size for size in sizes)
    a, g = torch.randn(sum(sizes), d, dtype=torch.float64), torch.randn(sum(sizes), vocabulary, dtype=torch.float64)
    ids, rows = torch.randint(0, vocabulary, (sum(looked_up),)), torch.randn(sum(looked_up), d, dtype=torch.float64)
    wanted = [
        (head * table).sum()
        for head, table in zip(gradients(a, g, sizes), tables(ids, rows, looked_up, vocabulary), strict=True)
    ]
    torch.testing.assert_close(tied_cross_terms(a, g, ids, rows, sizes, looked_up), torch.stack(wanted))


def test_helpers() -> None:
    assert [is_uniform(s) for s in ((), (0, 0), (2,), (2, 2), (2, 3))] == [False, False, True, True, False]
    assert [upcast(torch.zeros(1, dtype=t)).dtype for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32,
        torch.float32,
        torch.float32,
        torch.float64,
    ]
