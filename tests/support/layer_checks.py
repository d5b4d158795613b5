"""One layer in a model of its own, against the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from tests.support.oracle import clipped_sum, distance, each_row, grads, unit_gradients


def how(
    model: nn.Module,
    *inputs: Tensor,
    forward: Callable[..., Tensor] | None = None,
    tolerance: float = 1e-11,
    strategy: Any = "auto",
) -> str:
    """'fast' or 'unit by unit', once norms and clipped sum of a weighted sum of squares agree with the oracle's."""
    run = forward or model

    def loss(batch: Any) -> Tensor:
        out = run(*batch.values())
        weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view(out[0].shape)
        total: Tensor = (out.square() * weights + out * weights).sum()
        return total

    batch = {str(i): x for i, x in enumerate(inputs)}
    gradients = unit_gradients(model, loss, each_row(batch))
    C = float(clipped_sum(gradients, 1.0)[1].median())
    wanted, norms = clipped_sum(gradients, C)
    engine = ClippingEngine(model, max_grad_norm=C, strategy=strategy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.backward(loss, batch)
    out = "unit by unit" if engine.uncovered else "fast"
    assert distance(grads(model), wanted) < tolerance
    torch.testing.assert_close(engine.norms.double(), norms, rtol=tolerance, atol=1e-12)
    engine.detach()
    model.zero_grad()
    return out


def squares(model: nn.Module) -> Callable[[Any], Tensor]:
    """A loss: the squares of all outputs, added up."""

    def loss(batch: Any) -> Tensor:
        total: Tensor = model(*batch.values()).square().sum()
        return total

    return loss
