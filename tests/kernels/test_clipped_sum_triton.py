"""Triton's weighted sums against the sum written out in float64; in the interpreter where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dp_flash_hf.kernels import clipped_sum
from dp_flash_hf.kernels import clipped_sum_triton as kernels
from tests.kernels.test_ghost_norm import gradients, tables
from tests.kernels.test_ghost_norm_triton import DTYPES, EPS, SIZES, records


def factors_for(units: Sequence[int] | Tensor, device: str) -> Tensor:
    """Every other number of a tensor, as the engine's factors of one clipping group of several are."""
    factors = torch.rand(len(units), 2) + 0.1
    return factors.to(device)[:, 0]


def weighted(factors: Tensor, parts: Sequence[Tensor]) -> Tensor:
    return sum((f * part for f, part in zip(factors.double().cpu(), parts, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_linear(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for d, p in ((37, 140), (1, 3)):
        a, g = records(sizes, d, p, dtype=dtype, device=device)
        factors = factors_for(sizes, device)
        wide = torch.ones(p + 2, d, device=device)
        out = wide[1:-1]
        assert kernels.add_linear_(out, a, g, factors, sizes) is out
        parts = gradients(a.cpu(), g.cpu(), sizes), gradients(a.cpu().abs(), g.cpu().abs(), sizes)
        # A sum of n terms rounds by less than n eps / 2 of the sum of their sizes; then once for each unit and for `out`.
        allowed = EPS * (max(sizes) + len(sizes) + 2) * (1 + weighted(factors, parts[1]))
        assert bool(((out.double().cpu() - 1 - weighted(factors, parts[0])).abs() <= allowed).all())
        assert bool((wide[[0, -1]] == 1).all())
        fresh = torch.full((p, d), math.nan, device=device)
        kernels.add_linear_(fresh, a, g, factors, sizes, replace=True)
        assert bool(((fresh.double().cpu() - weighted(factors, parts[0])).abs() <= allowed).all())


def test_no_units(device: str) -> None:
    out = torch.ones(2, 3, device=device)
    nothing = torch.zeros(0, device=device)
    kernels.add_linear_(out, torch.zeros(0, 3, device=device), torch.zeros(0, 2, device=device), nothing, ())
    kernels.add_embedding_(out, nothing.long(), torch.zeros(0, 3, device=device), nothing, ())
    kernels.add_per_unit_(out, torch.zeros(0, 2, 3, device=device), nothing)
    assert bool((out == 1).all())


def test_records_of_two_dtypes_and_any_strides(device: str) -> None:
    sizes = (3, 20)
    a = torch.randn(30, 23, device=device).mT[:, 3:27]
    (g,) = records(sizes, 20, dtype=torch.bfloat16, device=device)
    factors, out = factors_for(sizes, device), torch.zeros(20, 24, device=device)
    kernels.add_linear_(out, a, g, factors, sizes)
    wanted = weighted(factors, gradients(a.cpu(), g.cpu(), sizes))
    absolute = weighted(factors, gradients(a.cpu().abs(), g.cpu().abs(), sizes))
    assert bool(((out.double().cpu() - wanted).abs() <= 25 * EPS * absolute).all())


def test_factors_do_not_round_to_sixteen_bits(device: str) -> None:
    """A unit whose rows all have one direction, clipped: it has norm C to float32, not by up to 2^-9 more."""
    sizes, C = (64,), 0.7
    a, g = torch.ones(64, 24, device=device).bfloat16(), torch.ones(64, 32, device=device).bfloat16() * 1.5
    n = (g.double().mT @ a.double()).norm()
    out = kernels.add_linear_(torch.zeros(32, 24, device=device), a, g, (C / n).float().reshape(1), sizes)
    assert abs(float(out.double().norm()) / C - 1) <= 65 * EPS


def test_a_huge_unit_beside_tiny_ones(device: str) -> None:
    """Clipped to 1 each, all count alike: what the tiny ones add is not lost beside what the huge one was before its factor."""
    sizes = (5, 6, 7)
    a, g = records(sizes, 24, 17, dtype=torch.bfloat16, device=device)
    g[:5] *= 1e-12
    g[5:11] *= 1e12
    parts = gradients(a.cpu(), g.cpu(), sizes)
    factors = torch.tensor([1 / float(part.norm()) for part in parts], device=device)
    out = kernels.add_linear_(torch.zeros(17, 24, device=device), a, g, factors, sizes)
    absolute = weighted(factors, gradients(a.cpu().abs(), g.cpu().abs(), sizes))
    assert bool(((out.double().cpu() - weighted(factors, parts)).abs() <= 12 * EPS * absolute).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_embedding(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for d in (5, 150):
        ids = torch.randint(0, 4, (sum(sizes),))
        (g,) = records(sizes, d, dtype=dtype, device=device)
        factors = factors_for(sizes, device)
        wide = torch.ones(6, d + 2, device=device)
        kernels.add_embedding_(wide[:, 1:-1], ids.to(device) + 1, g, factors, sizes)
        parts = tables(ids, g.cpu(), sizes, 4), tables(ids, g.cpu().abs(), sizes, 4)
        allowed = EPS * (sum(sizes) + 2) * (1 + weighted(factors, parts[1]))
        got = wide[1:-1, 1:-1].double().cpu() - 1
        assert bool(((got - weighted(factors, parts[0])).abs() <= allowed).all())
        assert bool((wide[[0, -1]] == 1).all())
        assert bool((wide[:, [0, -1]] == 1).all())


@pytest.mark.parametrize("shape", [(5,), (40, 37)])
def test_per_unit(shape: tuple[int, ...], device: str) -> None:
    parts = torch.randn(4, *shape, device=device)
    factors, out = factors_for(parts, device), torch.ones(shape, device=device)
    kernels.add_per_unit_(out, parts, factors)
    wanted = 1 + weighted(factors, list(parts.double().cpu()))
    allowed = 5 * EPS * (1 + weighted(factors, list(parts.double().cpu().abs())))
    assert bool(((out.double().cpu() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "g", "both"])
def test_a_unit_of_factor_zero_leaves_no_trace(bad: float, where: str, device: str) -> None:
    """Bit for bit what the sum is without it, whichever side of the product holds NaN or infinity."""
    sizes = (2, 90, 3)
    a, g = records(sizes, 20, 30, dtype=torch.float32, device=device)
    ids = torch.randint(0, 4, (sum(sizes),), device=device)
    clean_a, clean_g = a.clone(), g.clone()
    clean_a[2:92], clean_g[2:92] = 0.0, 0.0
    if where != "g":
        a[2:92] = bad
    if where != "a":
        g[2:92] = bad
    factors = torch.tensor([0.5, 0.0, 1.0], device=device)
    parts = torch.randn(3, 30, 20, device=device)
    clean_parts = parts.clone()
    parts[1], clean_parts[1] = bad, 0.0
    sums = []
    for x, y, z in ((a, g, parts), (clean_a, clean_g, clean_parts)):
        table, whole = torch.zeros(4, 30, device=device), torch.zeros(30, 20, device=device)
        kernels.add_embedding_(table, ids, y, factors, sizes)
        kernels.add_per_unit_(whole, z, factors)
        sums.append((kernels.add_linear_(torch.zeros(30, 20, device=device), x, y, factors, sizes), table, whole))
    for got, wanted in zip(*sums, strict=True):
        assert bool(wanted.isfinite().all())
        assert torch.equal(got, wanted)


def test_the_same_bits_every_time(device: str) -> None:
    sizes = (70, 20, 100)
    a, g = records(sizes, 65, 33, dtype=torch.bfloat16, device=device)
    ids, factors = torch.randint(0, 3, (190,), device=device), factors_for(sizes, device)
    runs = []
    for _ in range(2):
        table = torch.zeros(3, 33, device=device)
        kernels.add_embedding_(table, ids, g, factors, sizes)
        runs.append((kernels.add_linear_(torch.zeros(33, 65, device=device), a, g, factors, sizes), table))
    assert all(map(torch.equal, *runs))


@pytest.mark.gpu
def test_cuda_tensors_are_computed_by_triton() -> None:
    sizes = (40, 3)
    a, g = records(sizes, 8, 16, dtype=torch.bfloat16, device="cuda")
    factors, ids = factors_for(sizes, "cuda"), torch.zeros(43, dtype=torch.int64, device="cuda")
    parts = torch.randn(2, 16, 8, device="cuda")
    sums = []
    for module in (clipped_sum, kernels):
        out, table, whole = (torch.ones(16, 8, device="cuda") for _ in range(3))
        table = torch.ones(1, 16, device="cuda")
        module.add_linear_(out, a, g, factors, sizes)
        module.add_embedding_(table, ids, g, factors, sizes)
        module.add_per_unit_(whole, parts, factors)
        sums.append((out, table, whole))
    assert all(map(torch.equal, *sums))
    fresh = kernels.add_linear_(torch.empty(16, 8, device="cuda"), a, g, factors, sizes, replace=True)
    assert torch.equal(clipped_sum.linear_clipped_sum(a, g, factors, sizes), fresh)


def test_gradients_of_more_numbers_than_an_int32_counts(tmp_path: Path, device: str) -> None:
    """Of units 2^30 numbers apart, in a sparse file: an int32 would lead from the third back to the file's start."""
    if device != "cpu":
        pytest.skip("a GPU cannot read a sparse file, and 16 GiB of its memory are not for every test")
    apart, path = 2**30, tmp_path / "numbers"
    with path.open("wb") as file:
        file.truncate(4 * (4 * apart + 8))
    numbers = torch.from_file(str(path), shared=True, size=4 * apart + 8)
    numbers[4 * apart :] = 3.0
    out, factors = torch.zeros(8), torch.tensor([0.0, 0.0, 2.0])
    kernels.units_sum_kernel[(1,)](numbers[2 * apart :], apart, 8, factors, out, 3, **kernels.UNITS_OPTIONS)
    assert out.tolist() == [6.0] * 8
