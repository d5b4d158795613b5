"""Convolutions over patches, and the kinds that are left to autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.layers.checks import how


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
    [{"groups": 3}, {"padding_mode": "circular", "padding": 1}, {"padding": "same"}],
    ids=lambda o: str(next(iter(o))),
)
def test_left_to_autograd(options: dict[str, Any]) -> None:
    model = nn.Conv2d(3, 6, 3, **options).double()
    for rows in (1, 3):
        assert how(model, torch.randn(rows, 3, 8, 8, dtype=torch.float64)) == "unit by unit"


def test_other_dimensions_and_missing_rows() -> None:
    assert how(nn.Conv1d(3, 4, 2).double(), torch.randn(3, 3, 8, dtype=torch.float64)) == "unit by unit"
    model = nn.Conv2d(3, 4, 2).double()
    weight = model.weight
    assert how(model, torch.randn(3, 3, 8, 8, dtype=torch.float64), strategy="bookkeeping") == "fast"
    weight.requires_grad_(False)
    assert how(model, torch.randn(3, 3, 8, 8, dtype=torch.float64)) == "fast"
