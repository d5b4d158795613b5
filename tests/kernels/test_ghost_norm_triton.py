"""Triton's squared norms against gradients formed one by one in float64; in the interpreter where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dp_flash_hf.kernels import ghost_norm
from dp_flash_hf.kernels import ghost_norm_triton as kernels
from dp_flash_hf.kernels.numerics import hidden_by_rounding, runs_on_triton
from tests.kernels.test_ghost_norm import gradients, squares, tables

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(4, 4), (1, 0, 7), (0, 0), (131,), (33, 1, 200)]  # no rows, one row, and more rows than a block has


def records(sizes: tuple[int, ...], *widths: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(sum(sizes), width).to(dtype).to(device) for width in widths]


def bounds(a: Tensor, g: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """sum_t |a_t| |g_t| of each unit, float64: what the norm would be if nothing cancelled."""
    lengths = a.double().norm(dim=1) * g.double().norm(dim=1)
    return torch.stack([unit.sum() for unit in lengths.split(sizes)]).cpu()


def assert_norms(got: Tensor, a: Tensor, g: Tensor, sizes: tuple[int, ...], longest_gram: float = math.inf) -> None:
    """Rounding as in tests of the torch code; of a gradient formed also what it adds for what may be hidden."""
    bound = bounds(a, g, sizes)
    wanted = squares(gradients(a.cpu(), g.cpu(), sizes))
    hidden = hidden_by_rounding(bound.float(), torch.tensor(sizes)).double()
    allowed = 8 * EPS * bound.square() + torch.where(torch.tensor(sizes) > longest_gram, hidden, 0.0)
    assert got.dtype == torch.float32
    assert got.shape == (len(sizes),)
    assert bool(((got.double().cpu() - wanted).abs() <= allowed).all())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_linear(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for d, p in ((37, 70), (1, 3)):
        a, g = records(sizes, d, p, dtype=dtype, device=device)
        for longest_gram in (math.inf, 32, 0):  # Gram for all, some, none
            (got,) = kernels.linear_squared_norms(a, [g], sizes, longest_gram)
            assert_norms(got, a, g, sizes, longest_gram)


def test_no_units(device: str) -> None:
    assert kernels.linear_squared_norms(torch.zeros(0, 3, device=device), [torch.zeros(0, 2, device=device)], (), 9).shape == (
        1,
        0,
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_layers_that_share_an_input(count: int, device: str) -> None:
    """One launch for several, and the same bits as one at a time; dtypes and widths may differ, and strides."""
    sizes = (40, 3, 0, 20)
    (a,) = records(sizes, 50, dtype=torch.bfloat16, device=device)
    gs = [torch.randn(2 * p, sum(sizes), device=device).to(torch.bfloat16).mT[:, :p] for p in (9, 20, 64, 3, 30)[:count]]
    gs[-1] = gs[-1].float()
    got = kernels.linear_squared_norms(a, gs, sizes, 35)
    assert got.shape == (count, len(sizes))
    for g, norms in zip(gs, got, strict=True):
        assert_norms(norms, a, g, sizes, 35)
        if g.dtype == a.dtype and count <= kernels.SHARING and gs[-1].dtype == a.dtype:
            assert torch.equal(norms, kernels.linear_squared_norms(a, [g], sizes, 35)[0])


@pytest.mark.parametrize("longest_gram", [math.inf, 32])
def test_the_same_bits_every_time(longest_gram: float, device: str) -> None:
    sizes = (70, 20, 100)
    a, g, h = records(sizes, 65, 33, 40, dtype=torch.float16, device=device)
    first = kernels.linear_squared_norms(a, [g, h], sizes, longest_gram)
    assert torch.equal(first, kernels.linear_squared_norms(a, [g, h], sizes, longest_gram))


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e37])
@pytest.mark.parametrize("longest_gram", [math.inf, 5, 0])
def test_units_do_not_see_each_other(longest_gram: float, bad: float, device: str) -> None:
    """Bit for bit what it is beside zeros, whatever stands in the rows before and after; inside a tile or not."""
    sizes = (3, 20, 4, 1)
    a, g = records(sizes, 18, 20, dtype=torch.float32, device=device)
    ids = torch.randint(0, 3, (sum(sizes),), device=device)
    clean_a, clean_g = a.clone(), g.clone()
    for x, clean in ((a, clean_a), (g, clean_g)):
        for rows in (slice(0, 3), slice(23, 27)):
            x[rows], clean[rows] = bad, 0.0
    for got, wanted in (
        (
            kernels.linear_squared_norms(a, [g, g], sizes, longest_gram),
            kernels.linear_squared_norms(clean_a, [clean_g, clean_g], sizes, longest_gram),
        ),
        (kernels.embedding_squared_norms(ids, g, sizes), kernels.embedding_squared_norms(ids, clean_g, sizes)),
        (kernels.row_sums(g, sizes).T, kernels.row_sums(clean_g, sizes).T),
    ):
        assert torch.equal(got[..., [1, 3]], wanted[..., [1, 3]])
        assert bool(wanted[..., [1, 3]].isfinite().all())
        assert got.isfinite().all() == (bad == 3e37 and got.shape == (20, 4))  # the others' own norms do show it


def test_a_huge_unit_beside_tiny_ones(device: str) -> None:
    sizes = (5, 6, 7)
    a, g = records(sizes, 24, 17, dtype=torch.bfloat16, device=device)
    g[:5] *= 1e-12
    g[5:11] *= 1e12
    for longest_gram in (math.inf, 0):
        assert_norms(kernels.linear_squared_norms(a, [g], sizes, longest_gram)[0], a, g, sizes, longest_gram)


@pytest.mark.parametrize("scale", [1.0, 1e5, 1e8])
def test_a_cancelled_sum_is_never_underestimated(scale: float, device: str) -> None:
    """As the torch code: larger by what rounding hides, never smaller; and units that did not cancel stay as they were."""
    for sizes in ((6, 6), (6, 2, 40)):
        a, g = torch.randn(sum(sizes), 30), torch.randn(sum(sizes), 30)
        for first in range(0, 8, 2):
            a[first : first + 2] *= scale
            a[first + 1], g[first + 1] = a[first] * (1 + 1e-6 * torch.randn(30)), -g[first]
        (squared,) = kernels.linear_squared_norms(a.to(device), [g.to(device)], sizes, math.inf)
        got, wanted = squared.double().cpu().sqrt(), squares(gradients(a, g, sizes)).sqrt()
        hidden = hidden_by_rounding(bounds(a, g, sizes).float(), torch.tensor(sizes)).double().sqrt()
        assert bool((got >= 0.99 * wanted).all())
        assert bool((got <= wanted + 2 * hidden).all())
        # A gradient of rank 0 but for rounding: Gram sums alone say anything from a negative number to eps bound^2.
        exact = torch.cat([a[:1], a[:1]]), torch.cat([g[:1], -g[:1]])
        (squared,) = kernels.linear_squared_norms(exact[0].to(device), [exact[1].to(device)], (2,), math.inf)
        hidden = hidden_by_rounding(bounds(*exact, (2,)).float(), 2)
        torch.testing.assert_close(squared.cpu(), hidden, rtol=1e-4, atol=0.0)  # of the bound: lengths and a sum, a few eps


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_embedding(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for d in (5, 150):
        ids = torch.randint(0, 4, (sum(sizes),)) * 40000
        (g,) = records(sizes, d, dtype=dtype, device=device)
        got = kernels.embedding_squared_norms(ids.to(device), g, sizes).double().cpu()
        wanted = squares(tables(ids // 40000, g.cpu(), sizes, 4))
        bound = torch.stack([unit.sum() for unit in g.double().norm(dim=1).split(sizes)]).cpu()
        hidden = hidden_by_rounding(bound.float(), torch.tensor(sizes)).double()
        # A sum of n rows rounds by less than n eps / 2 of the sum of their norms, and its square by twice that.
        rounding = EPS * (torch.tensor(sizes) + 16) * bound * wanted.sqrt()
        assert bool(((got - wanted).abs() <= rounding + hidden).all())
        assert torch.equal(got, kernels.embedding_squared_norms(ids.to(device), g, sizes).double().cpu())


def test_embedding_rows_that_cancel(device: str) -> None:
    g = torch.randn(2, 40).repeat_interleave(2, 0) * torch.tensor([[1.0], [-1.0], [1.0], [1.0]])
    got = kernels.embedding_squared_norms(torch.tensor([7, 7, 7, 7], device=device), g.to(device), (2, 2)).cpu()
    hidden = hidden_by_rounding(2 * g[0].norm(), 2)
    torch.testing.assert_close(got[0], hidden, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(got[1], 4 * g[2].square().sum(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_row_sums(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    (g,) = records(sizes, 130, dtype=dtype, device=device)
    got = kernels.row_sums(g, sizes).double().cpu()
    wanted = torch.stack([unit.sum(0) for unit in g.double().cpu().split(sizes)])
    absolute = torch.stack([unit.abs().sum(0) for unit in g.double().cpu().split(sizes)])
    assert bool(((got - wanted).abs() <= EPS * max(sizes) * absolute).all())


@pytest.mark.gpu
def test_cuda_tensors_are_computed_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (40, 3)
    a, g = records(sizes, 8, 16, dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros(43, dtype=torch.int64, device="cuda")
    got = ghost_norm.linear_squared_norms(a, [g], sizes), ghost_norm.row_sums(g, sizes)
    assert torch.equal(got[0], kernels.linear_squared_norms(a, [g], sizes, math.inf))
    assert torch.equal(got[1], kernels.row_sums(g, sizes))
    assert torch.equal(ghost_norm.embedding_squared_norms(ids, g, sizes), kernels.embedding_squared_norms(ids, g, sizes))


def test_what_goes_to_triton(device: str) -> None:
    here = torch.zeros(1, device=device)
    assert runs_on_triton(here, here.bfloat16(), here.half()) == (device == "cuda")
    assert not runs_on_triton(here, here.double())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_unit_gradients(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for d, p in ((40, 17), (3, 150)):
        a, g = records(sizes, d, p, dtype=dtype, device=device)
        wanted = torch.stack(gradients(a.cpu(), g.cpu(), sizes))
        absolute = torch.stack(gradients(a.cpu().abs(), g.cpu().abs(), sizes))
        got = kernels.unit_gradients(a, g, sizes)
        assert bool(((got.double().cpu() - wanted).abs() <= EPS * max(sizes) * absolute).all())
        wide = torch.zeros(len(sizes), p + 2, d, device=device)
        kernels.unit_gradients(a, g, sizes, wide[:, 1:-1].fill_(1.0))
        assert torch.equal(wide[:, 1:-1], got + 1)
        assert not wide[:, [0, -1]].any()


def test_launches_are_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Triton launches on the current device, whatever its arguments lie on."""
    from dp_flash_hf.kernels import clipped_sum_triton, linear_cross_entropy_triton
    from dp_flash_hf.kernels.types import Head

    entered: list[torch.device] = []
    device_of = torch.cuda.device_of

    def spy(x: Tensor) -> Any:
        entered.append(x.device)
        return device_of(x)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(torch.cuda, "device_of", spy)
    a, g, rows = torch.randn(6, 4, device=device), torch.randn(6, 5, device=device), torch.ones(6, device=device)
    sizes, factors, ids = (2, 4), torch.ones(2, device=device), torch.arange(6, device=device) % 4
    head = Head(torch.randn(5, 4, device=device))
    for launches in (
        lambda: kernels.linear_squared_norms(a, [g] * 4, sizes, 3),
        lambda: kernels.unit_gradients(a, g, sizes),
        lambda: kernels.row_sums(g, sizes),
        lambda: kernels.embedding_squared_norms(ids, g, sizes),
        lambda: clipped_sum_triton.add_linear_(torch.zeros(5, 4, device=device), a, g, factors, sizes),
        lambda: clipped_sum_triton.add_embedding_(torch.zeros(4, 5, device=device), ids, g, factors, sizes),
        lambda: clipped_sum_triton.add_per_unit_(torch.zeros(3, 5, device=device), g.view(2, 3, 5), factors),
        lambda: linear_cross_entropy_triton.log_sum_exp(a, head),
        lambda: linear_cross_entropy_triton.logit_gradients(a, head, ids, rows, rows, 0, 5),
    ):
        entered.clear()
        launches()
        assert entered
        assert set(entered) == {a.device}
