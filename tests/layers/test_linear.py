"""Linear layers in every shape they are called in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.kernels.ghost_norm import linear_squared_norms
from dp_flash_hf.layers import cost_model, gradient_records
from dp_flash_hf.layers.recorder import Recorder
from tests.support.layer_checks import how
from tests.support.oracle import distance, grads

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


class Attention(nn.Module):
    """Layers that share an input, one of them also used for another input, over positions of which `mask` hides some."""

    def __init__(self, *, tied: bool, sequence_first: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        if tied:
            self.o = self.q
        self.sequence_first = sequence_first

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.sequence_first:
            x, mask = x.transpose(0, 1), mask.transpose(0, 1)
        keep = mask.unsqueeze(-1).to(x.dtype)
        mixed = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        out: Tensor = torch.tanh(self.o(mixed * keep)) * keep
        return out.transpose(0, 1) if self.sequence_first else out


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_rows_whose_gradient_is_zero_are_left_out(
    strategy: str, tied: bool, sequence_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding adds nothing: norms and sums are the oracle's without it, also where layers share an input or a weight."""
    recorded: list[tuple[int, ...]] = []
    shared: list[int] = []
    linear = Recorder.linear_rows

    def watched(self: Recorder, parameter: nn.Parameter, a: Tensor, g: Tensor, sizes: tuple[int, ...], part: Any) -> None:
        recorded.append(sizes)
        linear(self, parameter, a, g, sizes, part)

    def counted(a: Tensor, gs: list[Tensor], *rest: Any) -> Tensor:
        shared.append(len(gs))
        return linear_squared_norms(a, gs, *rest)

    monkeypatch.setattr(Recorder, "linear_rows", watched)
    monkeypatch.setattr(gradient_records, "linear_squared_norms", counted)
    monkeypatch.setattr(cost_model, "leaves_out_zero_rows", lambda zero, *_: zero > 0)
    monkeypatch.setattr(cost_model, "keeps_gradients", lambda *_: False)
    torch.manual_seed(0)
    lengths = (7, 3, 5, 0, 1)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    model = Attention(tied=tied, sequence_first=sequence_first).double()
    assert how(model, torch.randn(5, 7, 6, dtype=torch.float64), mask, strategy=strategy) == "fast"
    assert set(recorded) == {lengths}
    assert 3 in shared or tied or sequence_first


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_a_unit_adds_does_not_depend_on_whether_rows_are_left_out(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero times infinity is NaN, for which a unit is dropped: also where padding of others makes leaving rows out pay."""
    keep = (torch.arange(6) < torch.tensor([6, 2, 4]).unsqueeze(1)).double().unsqueeze(-1)
    hidden = torch.randn(3, 6, 4, dtype=torch.float64)
    hidden[1, 5] = value

    def ignoring(batch: Any) -> Tensor:
        out: Tensor = torch.where(batch["keep"] == 0, 0.0, model(batch["x"])).sum()
        return out

    found = []
    for pays in (False, True):
        monkeypatch.setattr(cost_model, "leaves_out_zero_rows", lambda zero, *_, pays=pays: pays and zero > 0)
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        engine = ClippingEngine(model, max_grad_norm=1.0)
        engine.backward(ignoring, {"x": hidden, "keep": keep})
        assert engine.dropped_units == 1
        found.append(grads(model))
    assert distance(*found) < 1e-11
