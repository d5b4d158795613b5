"""Random numbers that units of a batch would share: found, and then every unit is computed with its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from tests.support.loops import loop, run
from tests.support.models import tiny
from tests.support.trainers import draws, without_dropout

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Rescaled(nn.Module):
    """Scales what passes in training, by numbers that are drawn as one says."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x) if self.training else x


def gpt2(draw: Callable[[Tensor], Tensor]) -> Any:
    model = without_dropout(tiny("gpt2"))
    model.transformer.drop = Rescaled(draw)
    return model.train()


def opt(layerdrop: float) -> Any:
    model = without_dropout(tiny("opt")).train()
    model.model.decoder.layerdrop = layerdrop
    return model


def ones(x: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=x.dtype)


SHARED: dict[str, Callable[[], Any]] = {
    "layer drop": lambda: opt(0.01),
    "stochastic depth of a batch": lambda: gpt2(lambda x: (torch.rand(()) > 0.05).to(x) + 0.5),
    "one mask for all rows": lambda: gpt2(lambda x: F.dropout(ones(x, 1, 1, x.shape[2]), 0.2)),
    "a number of numpy": lambda: gpt2(lambda x: torch.tensor(1 + np.random.random(), dtype=x.dtype)),
    "normal numbers for all rows": lambda: gpt2(lambda x: 1 + torch.randn(x.shape[2], dtype=x.dtype)),
}
APART: dict[str, Callable[[], Any]] = {
    "dropout": lambda: tiny("gpt2").train(),
    "layer drop of probability 0, which draws": lambda: gpt2(lambda x: 1 + (torch.rand(()) < 0.0).to(x)),
    "stochastic depth by row": lambda: gpt2(lambda x: F.dropout(ones(x, len(x), 1, 1), 0.2)),
    "a number for every row, one after the other": lambda: gpt2(
        lambda x: torch.stack([1 + torch.rand((), dtype=x.dtype) for _ in x]).view(-1, 1, 1)
    ),
    "keys of a generator that counts by row": lambda: gpt2(lambda x: 1 + 0 * torch.randint(2**32, (2,)).sum()),
}


def sizes_of_batches(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    """Of the physical batches in which six units are computed, four at most in each."""
    draws(monkeypatch, [0, 1, 2, 3, 4, 5])
    found: list[int] = []
    private, _, optimizer = loop(model, steps=1, **options)
    backward = ClippingEngine.backward

    def counted(self: ClippingEngine, *args: Any, **kwargs: Any) -> Tensor:
        if private._training.checked:
            found.append(args[2].n)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(ClippingEngine, "backward", counted)
    run(private, optimizer)
    return found


@pytest.mark.parametrize("kind", SHARED)
def test_units_that_would_share_random_numbers_are_computed_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_batches(SHARED[kind](), monkeypatch) == [1] * 6


def test_so_they_are_within_a_budget_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_batches(SHARED["layer drop"](), monkeypatch, max_tokens_per_device=32) == [1] * 6


@pytest.mark.parametrize("kind", APART)
def test_units_with_numbers_of_their_own_are_computed_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_batches(APART[kind](), monkeypatch) == [3, 3]
