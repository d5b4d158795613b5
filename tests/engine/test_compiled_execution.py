"""When a batch runs compiled, and what is left of one whose compiled code showed too little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from tests.support.oracle import clipped_sum, distance, grads, unit_gradients


class Used(nn.Module):
    """A product; `elsewhere`, its weight is used once more, without the layer and to no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.elsewhere = nn.Linear(6, 4), False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(x)
        return y + 0.0 * F.linear(x, self.out.weight) if self.elsewhere else y


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_units_of_a_batch_that_is_computed_again_are_dropped_once(bad: float) -> None:
    """The first of two passes drops the unit, and the second finds that compiled code does not show every use."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Used().double()
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=True)
    engine = ClippingEngine(compiled, max_grad_norm=0.3, strategy="two_pass")

    def loss(batch: Any) -> Tensor:
        model.elsewhere = engine.runs_compiled and engine._recorder.phase == "sum"
        rows: Tensor = compiled(batch["x"]).square().sum(1)
        weighted: Tensor = rows * batch["factors"]
        return weighted.sum()

    batch = {"x": torch.randn(4, 6, dtype=torch.float64), "factors": torch.tensor([1.0, 1.0, bad, 1.0], dtype=torch.float64)}
    with pytest.warns(UserWarning, match="runs eagerly from now on"):
        engine.backward(loss, batch)
    assert not engine.runs_compiled
    assert engine.dropped_units == 1
    assert torch.isfinite(engine.norms).tolist() == [True, True, False, True]
    found = grads(model)
    engine.detach()
    model.zero_grad()
    wanted, _ = clipped_sum(
        unit_gradients(model, lambda x: model(x).square().sum(), [batch["x"][[row]] for row in (0, 1, 3)]), 0.3
    )
    assert distance(found, wanted) < 1e-12
