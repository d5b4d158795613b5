"""What an engine and its layers share: norms of layers that share an input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.kernels.ghost_norm import linear_squared_norms
from dp_flash_hf.layers import gradient_records as records
from tests.support.layer_checks import squares
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients

WIDTH = 4


class Projections(nn.Module):
    """Three layers that see one input, and one that sees another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, 12), nn.Linear(width, 20)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.q(x)) * self.k(x).sum(-1, keepdim=True) + self.v(x).sum(-1, keepdim=True)
        out: Tensor = self.out(mixed)
        return out


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_norms_of_layers_that_share_an_input_are_computed_in_one_go(
    strategy: Any, clipping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []

    def counted(a: Tensor, gs: list[Tensor], *rest: Any) -> Tensor:
        shared.append(len(gs))
        return linear_squared_norms(a, gs, *rest)

    monkeypatch.setattr(records, "linear_squared_norms", counted)
    model, batch = Projections(32).double(), {"x": torch.randn(3, 4, 32, dtype=torch.float64)}
    wanted, norms = clipped_sum(unit_gradients(model, squares(model), each_row(batch)), 0.5, clipping)
    engine = ClippingEngine(model, max_grad_norm=0.5, strategy=strategy, clipping=clipping)
    engine.backward(squares(model), batch)
    assert sorted(shared) == [1, 3]
    assert distance(grads(model), wanted) < 1e-10
    torch.testing.assert_close(engine.norms, norms, rtol=1e-10, atol=0.0)
    assert {method for name, method in engine.norm_methods().items() if name.endswith("weight")} == {"ghost norm (Gram)"}


# Records by themselves.
