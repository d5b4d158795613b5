"""Clip factors, by their definitions and by what they guarantee."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dp_flash_hf.mechanisms.clipping import STABILITY, clip_factors, groups_of

CLIPPINGS: tuple[Any, ...] = ("flat", "automatic", "per_layer")


def test_factors_by_hand() -> None:
    squared = torch.tensor([[9.0, 16.0], [0.0, 0.04], [0.0, 0.0]], dtype=torch.float64)  # norms 5, 0.2 and 0
    flat, automatic, per_layer = (clip_factors(squared, 2.0, clipping) for clipping in CLIPPINGS)
    torch.testing.assert_close(flat, torch.tensor([[0.4, 0.4], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(automatic[:, 0], 2.0 / torch.tensor([5.01, 0.21, 0.01], dtype=torch.float64))
    assert torch.equal(automatic[:, 0], automatic[:, 1])
    share = math.sqrt(2.0)  # 2 / sqrt(two layers)
    torch.testing.assert_close(per_layer, torch.tensor([[share / 3, share / 4], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    assert STABILITY == 0.01


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_unit_that_is_not_finite_in_one_group_is_dropped_from_all(clipping: Any, bad: float) -> None:
    factors = clip_factors(torch.tensor([[1.0, bad, 1.0], [1.0, 1.0, 1.0]]), 1.0, clipping)
    assert torch.equal(factors[0], torch.zeros(3))
    assert bool((factors[1] > 0).all())


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_shapes_and_dtypes(clipping: Any) -> None:
    for shape in ((0, 1), (3, 1), (2, 5)):
        for dtype in (torch.float32, torch.float64):
            factors = clip_factors(torch.rand(shape, dtype=dtype), 1.0, clipping)
            assert factors.shape == shape
            assert factors.dtype == dtype


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    norms=st.lists(st.one_of(st.floats(0.0, 1e18), st.sampled_from([1e-22, 1e-18, 1e19, 1e30])), min_size=1, max_size=5),
    C=st.floats(1e-3, 1e3),
    clipping=st.sampled_from(CLIPPINGS),
)
def test_a_clipped_unit_is_never_longer_than_the_bound(norms: list[float], C: float, clipping: Any) -> None:
    """|factor * gradient| over all groups, also where float32 squares underflow or overflow."""
    norms = torch.tensor(norms).tolist()
    squared = torch.tensor([norms]).square()
    factors = clip_factors(squared, C, clipping)
    assert bool(torch.isfinite(factors).all())
    assert bool((factors >= 0).all())
    length = math.sqrt(sum((float(f) * n) ** 2 for f, n in zip(factors[0], norms, strict=True)))
    assert length <= C * (1 + 8 * torch.finfo(torch.float32).eps)


def test_a_group_is_a_module_that_owns_trained_parameters() -> None:
    """Frozen parameters make none, a shared one belongs to the first, and groups are numbered without gaps."""
    first, frozen, inner, last = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(first, nn.Sequential(frozen, inner), last)
    last.weight = first.weight
    frozen.requires_grad_(False)
    trained = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    owners = {first.weight: 0, first.bias: 0, inner.weight: 1, inner.bias: 1, last.bias: 2}
    assert groups_of(model, trained, "per_layer") == owners
    for clipping in ("flat", "automatic"):
        assert groups_of(model, trained, clipping) == dict.fromkeys(owners, 0)
