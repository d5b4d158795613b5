"""Linear layers in every shape they are called in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.support.layer_checks import how

conv1d: Callable[..., nn.Module] = Conv1D

INPUTS = [(3, 4), (3, 1, 4), (3, 5, 4), (2, 3, 5, 4), (1, 5, 4), (3, 90, 4)]


@pytest.mark.parametrize("shape", INPUTS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).double()
    assert how(model, torch.randn(shape, dtype=torch.float64)) == "fast"
    model[0].weight.requires_grad_(False)
    assert how(model, torch.randn(shape, dtype=torch.float64)) == "fast"


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_conv1d_of_gpt2(shape: tuple[int, ...], width: int) -> None:
    model = nn.Sequential(conv1d(width, 4), nn.Tanh(), conv1d(5, width)).double()
    assert how(model, torch.randn(shape, dtype=torch.float64)) == "fast"


def test_a_layer_wide_enough_for_the_ghost_norm() -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 40)).double()
    for strategy in ("bookkeeping", "two_pass"):
        assert how(model, torch.randn(3, 4, 40, dtype=torch.float64), strategy=strategy) == "fast"


class Mixer(nn.Module):
    """One square weight over features and over tokens, with as many of the one as of the other."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shared = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.shared(torch.tanh(self.shared(x)).mT)
        return mixed.mT


@pytest.mark.parametrize("rows", [1, 3])
def test_one_weight_used_along_two_dimensions(rows: int) -> None:
    for size in (4, 30):
        assert how(Mixer(size).double(), torch.randn(rows, size, size, dtype=torch.float64)) == "fast"


class Rescaled(nn.Linear):
    """A subclass that changes what goes in and out."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input * 3.0)


class Tampered(nn.Linear):
    """A subclass that uses the weight by itself too."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.sum()


def test_subclasses() -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    assert how(Rescaled(4, 6).double(), x) == "fast"
    assert how(Tampered(4, 6).double(), x) == "fast"


def test_a_weight_frozen_under_a_trained_bias_and_the_other_way_round() -> None:
    for frozen in ("weight", "bias"):
        model = nn.Linear(4, 6).double()
        getattr(model, frozen).requires_grad_(False)
        assert how(model, torch.randn(3, 5, 4, dtype=torch.float64)) == "fast"


@pytest.mark.parametrize("hooked", ["save_on_cpu", "non_reentrant"])
def test_saved_tensors_that_come_back_as_others(hooked: str) -> None:
    """Checkpointing and offloading hand backward copies of what was saved: the weight is then not the parameter itself."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        return out

    if hooked == "non_reentrant":
        assert how(model, x, forward=forward) == "fast"
    else:
        with torch.autograd.graph.save_on_cpu():
            assert how(model, x) == "fast"
