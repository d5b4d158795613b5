"""Engines and models that several tests of `dp_flash_hf.engine` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from tests.support.models import Batch
from tests.support.oracle import grads

STRATEGIES: tuple[Strategy, ...] = ("auto", "bookkeeping", "two_pass", "microbatch")


FAST: tuple[Strategy, ...] = ("bookkeeping", "two_pass")


def backward(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batch: Batch,
    *,
    C: float = 1.0,
    strategy: Strategy = "bookkeeping",
    **options: Any,
) -> tuple[dict[str, Tensor], Tensor, int]:
    """(clipped sum, norms, dropped units) of one batch by a fresh engine; the model is left clean."""
    engine = ClippingEngine(model, max_grad_norm=C, strategy=strategy, **options)
    engine.backward(loss, batch)
    out = grads(model), engine.norms, engine.dropped_units
    engine.detach()
    model.zero_grad()
    return out


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer, and perhaps by calling it too."""

    def __init__(self, also_called: bool) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.also_called = also_called
        self.double()

    def parameters_used(self) -> tuple[Tensor, Tensor]:
        return self.first.weight, self.first.bias

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.second(self.table(input_ids)))
        if self.also_called:
            x = torch.tanh(self.first(x))
        return F.linear(F.linear(x, *self.parameters_used()), self.table.weight)


class Hidden(Functional):
    """The same, through references the modules know nothing of: no rule sees the parameters go by."""

    def __init__(self, also_called: bool) -> None:
        super().__init__(also_called)
        self.kept = (self.first.weight, self.first.bias)

    def parameters_used(self) -> tuple[Tensor, Tensor]:
        return self.kept


def interrupted_at(number: int, error: type[BaseException], original: Any) -> Any:
    """A method that raises at its call of this number."""
    calls = 0

    def method(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error("interrupted")
        return original(*args, **kwargs)

    return method
