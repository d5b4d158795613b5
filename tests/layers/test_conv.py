"""Convolutions over patches, depthwise ones, and all the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from tests.support.layer_checks import how


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "bias": False},
        {"kernel_size": 8},
        {"kernel_size": 1},
    ],
)
def test_covered(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, **options), nn.Tanh(), nn.Conv2d(4, 2, 1)).double()
    for rows in (1, 3):
        assert how(model, torch.randn(rows, 3, 8, 8, dtype=torch.float64)) == "fast"


@pytest.mark.parametrize(
    "options",
    [{"groups": 3}, {"groups": 3, "bias": False, "stride": 2}, {"padding_mode": "circular", "padding": 1}, {"padding": "same"}],
    ids=str,
)
def test_of_any_kind(options: dict[str, Any]) -> None:
    model = nn.Conv2d(3, 6, 3, **options).double()
    for rows in (1, 3):
        assert how(model, torch.randn(rows, 3, 8, 8, dtype=torch.float64)) == "fast"


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 2}, {"kernel_size": 4, "groups": 4, "padding": 3}, {"kernel_size": 3, "groups": 2, "stride": 2}],
    ids=str,
)
def test_along_a_sequence(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, **options), nn.Tanh()).double()
    for rows in (1, 3):
        assert how(model, torch.randn(rows, 4, 9, dtype=torch.float64)) == "fast"


def test_a_frozen_weight_under_a_trained_bias() -> None:
    model = nn.Conv2d(3, 4, 2).double()
    assert how(model, torch.randn(3, 3, 8, 8, dtype=torch.float64), strategy="bookkeeping") == "fast"
    model.weight.requires_grad_(False)
    assert how(model, torch.randn(3, 3, 8, 8, dtype=torch.float64)) == "fast"


@pytest.mark.parametrize("groups", [1, 3])
def test_one_unit_of_several_rows(groups: int) -> None:
    """Everything belongs to it, so nothing is laid out by rows."""
    model, x = nn.Conv2d(3, 6, 3, groups=groups).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    wanted = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    model.zero_grad()
    engine = ClippingEngine(model, max_grad_norm=1e9, strategy="bookkeeping")
    engine.backward(lambda batch: model(batch["x"]).square().sum(), {"x": x}, torch.zeros(3, dtype=torch.long))
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(engine.clipped_sum(parameter), gradient)
