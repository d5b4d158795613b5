"""Records of per-unit gradients: every way to keep them gives the same norms and clipped sums."""

from __future__ import annotations

import pytest
import torch

from dp_flash_hf.kernels.linear_cross_entropy import LogitGradients, gradients, linear_cross_entropy
from dp_flash_hf.kernels.types import Head
from dp_flash_hf.layers.gradient_records import EmbeddingUse, GradientRecord, HeadUse, LinearUse

WIDTH = 4


def _uses(sizes: tuple[int, ...], d: int, p: int) -> LinearUse:
    return LinearUse(torch.randn(sum(sizes), d, dtype=torch.float64), torch.randn(sum(sizes), p, dtype=torch.float64), sizes)


@pytest.mark.parametrize("sizes", [(3, 3), (40, 40), (2, 0, 5), (1,)])
def test_every_way_to_keep_a_record_has_the_same_norm_and_sum(sizes: tuple[int, ...]) -> None:
    """One, two and three uses, as a linear layer, as a table, or both, against the gradients formed one by one."""
    vocabulary, d = 9, 6
    linear, again = _uses(sizes, d, vocabulary), _uses(sizes, d, vocabulary)
    looked_up = tuple(size + 1 for size in sizes)
    table = EmbeddingUse(
        torch.randint(0, vocabulary, (sum(looked_up),)), torch.randn(sum(looked_up), d, dtype=torch.float64), looked_up
    )
    factors = torch.rand(len(sizes), dtype=torch.float64)
    combinations: list[list[LinearUse | EmbeddingUse]] = [[linear], [table], [linear, again], [table, table], [linear, table]]
    combinations.append([table, linear, again])
    for uses in combinations:
        record = GradientRecord(torch.Size((vocabulary, d)), len(sizes))
        wanted = torch.zeros(len(sizes), vocabulary, d, dtype=torch.float64)
        for use in uses:
            record.add(use)
            use.add_to_units_(wanted)
        torch.testing.assert_close(record.squared_norms(), wanted.square().sum((1, 2)), rtol=1e-11, atol=1e-12)
        total = torch.zeros(vocabulary, d, dtype=torch.float64)
        record.add_clipped_sum_(total, factors)
        torch.testing.assert_close(total, torch.einsum("u,uvd->vd", factors, wanted), rtol=1e-11, atol=1e-12)


def head_use(sizes: tuple[int, ...], size: int, width: int) -> HeadUse:
    """Of a cross entropy over `size` words, in float64."""
    rows = sum(sizes)
    head, labels = Head(torch.randn(size, width, dtype=torch.float64)), torch.randint(0, size, (rows,))
    hidden, weights = torch.randn(rows, width, dtype=torch.float64), torch.rand(rows, dtype=torch.float64)
    g = LogitGradients(hidden, head, labels, linear_cross_entropy(hidden, head, labels)[1], weights)
    return HeadUse(g, sizes, gradients(g, sizes, hidden=False, norms=True).squared_norms)


@pytest.mark.parametrize("others", ["none", "a product", "a product before", "a table", "a table that cancels", "all"])
def test_logits_in_blocks_are_a_linear_use(others: str) -> None:
    sizes, size, width = (3, 0, 5), 40, 6
    head = head_use(sizes, size, width)
    product = LinearUse(torch.randn(8, width, dtype=torch.float64), torch.randn(8, size, dtype=torch.float64), sizes)
    table = EmbeddingUse(torch.randint(0, size, (9,)), torch.randn(9, width, dtype=torch.float64), (4, 3, 2))
    if others == "a table that cancels":
        formed = torch.zeros(3, size, width, dtype=torch.float64)
        head.add_to_units_(formed)
        table = EmbeddingUse(torch.arange(size).repeat(3), -formed.flatten(0, 1) * (1 + 1e-7), (size,) * 3)
    own: dict[str, list[LinearUse | EmbeddingUse]] = {"none": [], "a product": [product], "a product before": [product]}
    own |= {"a table": [table], "a table that cancels": [table], "all": [table, product]}
    record, wanted = (GradientRecord(torch.Size((size, width)), 3) for _ in range(2))
    for use in own[others] if others == "a product before" else [head, *own[others]]:
        record.add(use)
    if others == "a product before":
        record.add(head)
    for use in (head.formed(), *own[others]):
        wanted.add(use)
    assert wanted.per_unit is None
    factors = torch.tensor([0.5, 0.1, 1.0], dtype=torch.float64)
    # Where all but a share of 1e-7 cancels, the rounding of a dozen additions is that much larger beside the rest.
    rounding = 2 * 12 * float(torch.finfo(torch.float64).eps) / 1e-7 if others == "a table that cancels" else 1e-10
    torch.testing.assert_close(record.squared_norms(), wanted.squared_norms(), rtol=rounding, atol=0.0)
    torch.testing.assert_close(record.clipped_sum(factors), wanted.clipped_sum(factors), rtol=1e-10, atol=1e-12)
    assert ("blocks" in record.norm_method) == ("product" not in others and others != "all")
    record.add_per_unit(torch.ones(3, size, width, dtype=torch.float64))
    wanted.add_per_unit(torch.ones(3, size, width, dtype=torch.float64))
    torch.testing.assert_close(record.squared_norms(), wanted.squared_norms(), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("shape", [(20_000, 400), (1_000_000,), (200, 20, 25, 25)])
def test_norms_of_many_elements_keep_their_digits(shape: tuple[int, ...]) -> None:
    record = GradientRecord(torch.Size(shape), 2)
    record.add_per_unit(torch.full((2, *shape), 0.1))
    wanted = torch.Size(shape).numel() * float(torch.tensor(0.1)) ** 2
    # Of equal numbers every addition rounds alike: 512 one after the other, in pairs from there on.
    assert bool((record.squared_norms() / wanted - 1).abs().max() < 512 * 2.0**-24)
