"""Cross entropy in blocks of logits against autograd in float64, one unit at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_flash_hf.kernels import linear_cross_entropy as kernels
from dp_flash_hf.kernels.linear_cross_entropy import (
    Gradients,
    LogitGradients,
    add_cross_entropy_,
    gradients,
    head_cross_terms,
    linear_cross_entropy,
)
from dp_flash_hf.kernels.types import Head

SIZES = [(3, 3, 3), (7,), (5, 0, 2, 1), (0, 0), (40, 40), (1, 64)]
HEADS: dict[str, dict[str, Any]] = {"plain": {}, "scaled": {"scale": 0.37}, "soft-capped": {"scale": 1.3, "softcap": 2.5}}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTH, VOCABULARY = 13, 301


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEWEST_COLUMNS", 64)
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 1)


class Case(NamedTuple):
    hidden: Tensor
    head: Head
    labels: Tensor
    weights: Tensor
    sizes: tuple[int, ...]


def case(sizes: tuple[int, ...], dtype: torch.dtype, *, bias: bool = False, width: int = WIDTH, **head: float) -> Case:
    """Labels include the first and the last word, and ignored ones; every row has a weight of its own."""
    rows = sum(sizes)
    labels = torch.randint(0, VOCABULARY, (rows,))
    labels[::4], labels[1::4], labels[2::7] = VOCABULARY - 1, 0, -100
    weight = torch.randn(VOCABULARY, width).to(dtype)
    own_bias = torch.randn(VOCABULARY).to(dtype) if bias else None
    return Case(torch.randn(rows, width).to(dtype), Head(weight, own_bias, **head), labels, torch.rand(rows) + 0.5, sizes)


class Truth(NamedTuple):
    losses: Tensor
    hidden: Tensor
    weight: list[Tensor]  # for each unit
    bias: list[Tensor]


def truth(c: Case) -> Truth:
    """By autograd, in float64."""
    losses, hidden, weights, biases = [], [], [], []
    split = (c.hidden.double().split(c.sizes), c.labels.split(c.sizes), c.weights.double().split(c.sizes))
    for h, labels, upstream in zip(*split, strict=True):
        h = h.clone().requires_grad_()
        w = c.head.weight.double().clone().requires_grad_()
        b = torch.zeros(VOCABULARY, dtype=torch.float64) if c.head.bias is None else c.head.bias.double().clone()
        b.requires_grad_()
        logits = (h @ w.mT + b) * c.head.scale
        if c.head.softcap is not None:
            logits = c.head.softcap * torch.tanh(logits / c.head.softcap)
        own = F.cross_entropy(logits, labels, reduction="none")
        (own * upstream).sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        assert b.grad is not None
        losses.append(own.detach())
        hidden.append(h.grad)
        weights.append(w.grad)
        biases.append(b.grad)
    return Truth(torch.cat(losses), torch.cat(hidden), weights, biases)


def logit_gradients(c: Case) -> tuple[Tensor, LogitGradients]:
    losses, lse = linear_cross_entropy(c.hidden, c.head, c.labels)
    weights = c.weights.to(lse.dtype).masked_fill(c.labels == -100, 0.0)
    return losses, LogitGradients(c.hidden, c.head, c.labels, lse, weights)


def run(c: Case, *, keep: bool = False) -> tuple[Tensor, LogitGradients, Gradients]:
    losses, g = logit_gradients(c)
    found = gradients(g, c.sizes, hidden=True, norms=True, bias=True, keep=keep)
    return losses, replace(g, kept=found.kept), found


def close(got: Tensor, wanted: Tensor, c: Case) -> None:
    """Gradients of logits are rounded to the dtype; exp(logit) has the error of the logit, which its terms have."""
    longest = max(c.hidden.double().norm(dim=1).tolist(), default=0.0)
    terms = 1 + abs(c.head.scale) * longest * float(c.head.weight.double().norm(dim=1).max())
    bound = torch.finfo(c.hidden.dtype).eps + 2 * torch.finfo(got.dtype).eps * terms
    error = (got.double() - wanted).norm()
    assert bool(error <= bound * wanted.norm() + 1e-30), (float(error / wanted.norm()), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_gradients(sizes: tuple[int, ...], bias: bool, kind: str, dtype: torch.dtype) -> None:
    c = case(sizes, dtype, bias=bias, **HEADS[kind])
    wanted = truth(c)
    for keep in (False, True):
        losses, g, found = run(c, keep=keep)
        assert losses.dtype == torch.promote_types(dtype, torch.float32)
        close(losses, wanted.losses, c)
        assert found.hidden is not None
        assert found.bias is not None
        assert found.squared_norms is not None
        close(found.hidden, wanted.hidden, c)
        close(found.bias, torch.stack(wanted.bias), c)
        close(found.squared_norms.sqrt(), torch.stack([w.norm() for w in wanted.weight]), c)
        factors = torch.rand(len(sizes)).to(losses.dtype)
        total = sum((f * w for f, w in zip(factors.double(), wanted.weight, strict=True)), torch.zeros(VOCABULARY, WIDTH))
        out = torch.zeros(VOCABULARY, WIDTH, dtype=losses.dtype)
        for times in (1, 2):  # it adds
            add_cross_entropy_(out, g, factors, sizes)
            close(out, times * total, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(30, 30), (9, 30, 0)], ids=str)
def test_norm_and_clipped_sum_speak_of_the_same_rounded_gradient(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    c = case(sizes, dtype, softcap=3.0)
    for keep in (True, False):
        _, g, found = run(c, keep=keep)
        assert found.squared_norms is not None
        for unit in range(len(sizes)):
            alone = torch.zeros(VOCABULARY, WIDTH)
            add_cross_entropy_(alone, g, torch.eye(len(sizes))[unit], sizes)
            # Rounding of float32 only, whatever the dtype: a Gram sum's, relative to the sum of the lengths of all rows.
            bound = (g.hidden.split(sizes)[unit].float().norm(dim=1) * g.whole().split(sizes)[unit].float().norm(dim=1)).sum()
            assert abs(float(alone.square().sum() - found.squared_norms[unit])) <= 8 * 2.0**-24 * float(bound) ** 2


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cross_terms_with_an_embedding(dtype: torch.dtype, keep: bool) -> None:
    c = case((5, 0, 2, 9), dtype, bias=True, softcap=4.0)
    row_sizes = (3, 4, 0, 11)
    ids, g_rows = torch.randint(0, VOCABULARY, (sum(row_sizes),)), torch.randn(sum(row_sizes), WIDTH, dtype=dtype)
    ids[:3] = VOCABULARY - 1  # a label of the same unit, over and over
    wanted = []
    for weight, ids_u, rows_u in zip(truth(c).weight, ids.split(row_sizes), g_rows.double().split(row_sizes), strict=True):
        wanted.append((torch.zeros_like(weight).index_add_(0, ids_u, rows_u) * weight).sum())
    _, g, _ = run(c, keep=keep)
    close(head_cross_terms(g, ids, g_rows, c.sizes, row_sizes), torch.stack(wanted), c)


def test_long_units_take_the_direct_form() -> None:
    c = case((50, 50), torch.float64, width=3)
    _, _, found = run(c)
    assert found.squared_norms is not None
    torch.testing.assert_close(
        found.squared_norms, torch.stack([w.square().sum() for w in truth(c).weight]), rtol=1e-12, atol=0.0
    )


def test_all_ignored() -> None:
    c = case((4, 3), torch.float32)
    c = c._replace(labels=torch.cat([torch.full((4,), -100), c.labels[4:]]))
    losses, g, found = run(c)
    assert found.squared_norms is not None
    assert found.hidden is not None
    assert bool((losses[:4] == 0).all())
    assert bool((found.hidden[:4] == 0).all())
    assert float(found.squared_norms[0]) == 0.0
    assert float(found.squared_norms[1]) > 0.0
    assert bool((g.whole()[:4] == 0).all())


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 5, 3)], ids=str)
def test_a_unit_that_is_not_a_number_keeps_to_itself(sizes: tuple[int, ...]) -> None:
    c = case(sizes, torch.float32, softcap=3.0)
    clean = run(c)
    poisoned = c._replace(hidden=c.hidden.clone())
    poisoned.hidden[5] = float("nan")
    losses, g, found = run(poisoned)
    others = torch.tensor([row for row in range(len(c.hidden)) if not 4 <= row < 4 + sizes[1]])
    for got, wanted in ((losses, clean[0]), (found.hidden, clean[2].hidden)):
        assert got is not None
        assert wanted is not None
        assert torch.equal(got[others], wanted[others])
    assert found.squared_norms is not None
    assert clean[2].squared_norms is not None
    assert torch.equal(found.squared_norms[[0, 2]], clean[2].squared_norms[[0, 2]])
    assert bool(found.squared_norms[1].isnan())
    factors = torch.tensor([0.7, 0.0, 0.3])
    sums = [torch.zeros(VOCABULARY, WIDTH) for _ in range(2)]
    for out, own in zip(sums, (g, clean[1]), strict=True):
        add_cross_entropy_(out, own, factors, sizes)
    assert torch.equal(*sums)


def test_an_ignored_row_may_hold_anything() -> None:
    c = case((4, 4), torch.float32)
    poisoned = c._replace(hidden=c.hidden.clone())
    poisoned.hidden[2] = float("nan")
    assert int(c.labels[2]) == -100
    (losses, g), (clean, g_clean) = logit_gradients(poisoned), logit_gradients(c)
    assert torch.equal(losses, clean)
    assert torch.equal(g.whole(), g_clean.whole())


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_labels_that_are_no_words_are_refused(label: int) -> None:
    c = case((4,), torch.float32)
    c.labels[0] = label
    with pytest.raises(IndexError):
        linear_cross_entropy(c.hidden, c.head, c.labels)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in HEADS),
        *(("plain", torch.float16), ("soft-capped", torch.bfloat16)),
        *(
            pytest.param(kind, dtype, marks=pytest.mark.complete)
            for kind, dtype in (
                *(("scaled", torch.float16), ("soft-capped", torch.float16)),
                *(("plain", torch.bfloat16), ("scaled", torch.bfloat16)),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN, in the interpreter
def test_triton(kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of odd sizes, with more than one block along every dimension, and a unit that is not a number."""
    from dp_flash_hf.kernels import linear_cross_entropy_triton as triton

    monkeypatch.setattr(triton, "COLUMNS", 128)
    monkeypatch.setattr(kernels, "runs_on_triton", lambda x: True)
    for sizes, bias, width in (((5, 0, 40, 90), False, 67), ((3, 3, 3), True, 130)):
        c = case(sizes, dtype, bias=bias, width=width, **HEADS[kind])
        head = c.head._replace(weight=c.head.weight / 4)
        on_device = [None if x is None else x.to(device) for x in (c.hidden, c.labels, c.weights, head.weight, head.bias)]
        hidden, labels, weights, weight, own_bias = on_device
        assert hidden is not None
        assert labels is not None
        assert weights is not None
        assert weight is not None
        c = c._replace(head=head)
        there = Case(hidden, head._replace(weight=weight, bias=own_bias), labels, weights, sizes)
        wanted = truth(c)
        losses, g, found = run(there)
        close(losses.cpu(), wanted.losses, c)
        assert found.hidden is not None
        close(found.hidden.cpu(), wanted.hidden, c)
        again = run(there)[1].whole()
        assert torch.equal(g.whole(), again)
        hidden[1:3] = float("nan")
        assert c.labels[1:3].tolist() == [0, -100]
        poisoned = run(there)[1].whole()
        assert torch.equal(poisoned[sizes[0] :], again[sizes[0] :])
        assert bool(poisoned[1].isnan().all())
        assert bool((poisoned[2] == 0).all())


def test_triton_reads_a_head_of_another_dtype(device: str) -> None:
    from dp_flash_hf.kernels import linear_cross_entropy_triton as triton

    hidden, weight = torch.randn(5, 20, device=device).half(), torch.randn(33, 20, device=device)
    got = triton.log_sum_exp(hidden, Head(weight))
    assert torch.equal(got, triton.log_sum_exp(hidden, Head(weight.half())))
    assert triton.log_sum_exp(hidden[:0], Head(weight)).shape == (0,)


def test_triton_takes_a_bias_of_minus_infinity_for_words_that_are_none(device: str) -> None:
    from dp_flash_hf.kernels import linear_cross_entropy_triton as triton

    hidden, weight, bias = torch.randn(5, 20), torch.randn(200, 20), torch.zeros(200)
    bias[:150] = -torch.inf
    got = triton.log_sum_exp(hidden.to(device), Head(weight.to(device), bias.to(device)))
    torch.testing.assert_close(got.cpu(), (hidden @ weight.mT + bias).logsumexp(1))


def test_blocks_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 4 * 70 * 40)
    c = case((35, 35), torch.float32)
    widths = {columns.stop - columns.start for columns, _ in logit_gradients(c)[1].blocks()}
    assert widths == {64, 301 % 64}  # the fewest columns
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 4 * 70 * 100)
    assert {columns.stop - columns.start for columns, _ in logit_gradients(c)[1].blocks()} == {100, 1}
