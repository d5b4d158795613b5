"""The check that units are apart: whom it passes, and whom it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from tests.support.models import Toy, batch_of, loss_of, tiny, toy_batch, toy_loss


def test_check_passes_models_whose_units_are_apart_and_changes_nothing() -> None:
    model, batch = tiny("gpt2").train(), batch_of("gpt2")
    engine = ClippingEngine(model, max_grad_norm=0.7)
    engine.backward(loss_of("gpt2", model), batch)
    held: Any = {p: (p.grad, p.grad.clone()) for p in engine.parameters if p.grad is not None}
    engine.check(loss_of("gpt2", model), batch)
    assert model.training
    assert all(p.grad is gradient and gradient.equal(value) for p, (gradient, value) in held.items())
    engine.backward(loss_of("gpt2", model), batch)


class Coupled(Toy):
    def forward(self, input_ids: Tensor) -> Tensor:
        out = super().forward(input_ids)
        return out - 0.5 * out.mean(0, keepdim=True)


def test_check_refuses_units_that_see_each_other() -> None:
    batch = toy_batch()
    coupled, mean, unused, broken = Coupled(), Toy(), Toy(), Toy()
    unused.spare = nn.Linear(2, 2).double()
    with pytest.raises(PrivacyError, match="units"):
        ClippingEngine(coupled, max_grad_norm=1.0).check(toy_loss(coupled), batch)
    with pytest.raises(PrivacyError, match="couples units"):
        ClippingEngine(mean, max_grad_norm=1.0).check(lambda b: toy_loss(mean)(b) / len(b["input_ids"]), batch)
    with pytest.raises(PrivacyError, match="couples units"):  # what is not a number is no agreement
        ClippingEngine(broken, max_grad_norm=1.0).check(lambda b: toy_loss(broken)(b) * float("nan"), batch)
    with pytest.raises(PrivacyError, match="does not depend on them"):
        ClippingEngine(unused, max_grad_norm=1.0).check(toy_loss(unused), batch)
