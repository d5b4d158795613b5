"""What strategy="auto" does with whole batches. When it works unit by unit, tests/layers/test_cost_model.py says."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import WholeBatchStrategy
from dp_flash_hf.errors import PrivacyError
from tests.support.engines import backward
from tests.support.models import Batch, Toy, toy_batch, toy_loss
from tests.support.oracle import distance, grads


def test_auto_computes_in_two_passes_where_it_is_told_to() -> None:
    model, batch = Toy(), toy_batch()
    engine = ClippingEngine(model, max_grad_norm=0.7)
    calls = 0

    def counted(part: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return toy_loss(model)(part)

    engine.backward(counted, batch)
    expected: dict[WholeBatchStrategy, int] = {"bookkeeping": 1, "two_pass": 2}
    for whole, passes in expected.items():
        engine.choose(whole)
        calls = 0
        with engine.without_microbatching():
            engine.backward(counted, batch)
        assert calls == passes


def test_auto_uses_book_keeping_for_what_two_passes_cannot_compute() -> None:
    model, batch = Toy(), toy_batch()
    own = random.Random(0)  # the global generators are repeated
    model.norm.register_forward_hook(lambda module, args, out: out * (1 + own.random() * module.training))
    engine = ClippingEngine(model, max_grad_norm=0.7)
    engine.choose("two_pass")
    with pytest.warns(UserWarning, match="uses book-keeping from now on"):
        engine.backward(toy_loss(model), batch)
    assert str(engine.chosen) == "bookkeeping"
    assert grads(model)
    model.eval()
    model.zero_grad()
    engine.backward(toy_loss(model), batch)
    found = grads(model)
    engine.detach()
    model.zero_grad()
    assert distance(found, backward(model, toy_loss(model), batch, C=0.7)[0]) < 1e-12


def test_a_second_pass_that_finds_a_use_outside_the_rules_adds_nothing_twice() -> None:
    """The batch would be computed again, on top of what the failed pass had added."""
    model = Toy()
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy="auto")
    engine.choose("two_pass")
    loss, batch = toy_loss(model), toy_batch()
    engine.backward(loss, batch)
    passes = 0

    def differs(batch: Batch) -> Tensor:
        nonlocal passes
        passes += 1
        total = loss(batch)
        if passes == 2:  # as one that routes by random numbers of its own may
            total = total + 0 * torch.einsum("i,i->", model.norm._parameters["weight"], model.norm._parameters["weight"])
        return total

    with pytest.raises(PrivacyError, match="may hold parts of it"):
        engine.backward(differs, batch)
    with pytest.raises(PrivacyError, match="may hold parts of it"):
        engine.take_sums()
