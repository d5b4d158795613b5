"""The three strategies: what each computes exactly, and what it refuses."""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.fresh_randomness import same_randomness
from tests.support.engines import FAST, STRATEGIES, Functional, Hidden, backward
from tests.support.models import Batch, Toy, batch_of, loss_of, tiny, toy_batch, toy_loss
from tests.support.oracle import clipped_sum, distance, each_row, grads, total_norm, unit_gradients


class InPlace(nn.Module):
    """Writes what it computed from a parameter into the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.shift = Toy(), nn.Parameter(torch.randn(11, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.body(input_ids) * 1.0
        out[:, 0] = self.shift.exp()
        return out


class Recurrent(nn.Module):
    """A layer that keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(11, 6), nn.LSTM(6, 11, batch_first=True)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.cell(self.table(input_ids))[0]
        return out


def _weight_norm() -> nn.Module:
    model = Toy()
    torch.nn.utils.parametrizations.weight_norm(model.inner)
    return model


def _bare_parameter() -> nn.Module:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale = Toy(), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.body(input_ids) * self.scale
            return out

    return Scale()


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "functional": lambda: Functional(False),
    "functional_and_called": lambda: Functional(True),
    "weight_norm": _weight_norm,
    "bare_parameter": _bare_parameter,
}


LEFTOVERS: dict[str, Callable[[], nn.Module]] = {
    "hidden": lambda: Hidden(False),
    "hidden_and_called": lambda: Hidden(True),
    "in_place": InPlace,
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_parameters_used_without_calling_their_layer(kind: str, clipping: Any) -> None:
    """They are followed to the operation that combines them with activations: exact in one backward pass."""
    model, batch = FOLLOWED[kind](), toy_batch()
    loss = toy_loss(model)
    wanted, norms = clipped_sum(unit_gradients(model, loss, each_row(batch)), 0.7, clipping)
    for strategy in FAST:
        engine = ClippingEngine(model, max_grad_norm=0.7, clipping=clipping, strategy=strategy)
        engine.backward(loss, batch)
        assert distance(grads(model), wanted) < 1e-12
        torch.testing.assert_close(engine.norms, norms)
        engine.detach()
        model.zero_grad()


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("kind", LEFTOVERS)
def test_parameters_used_outside_any_rule(kind: str, clipping: Any) -> None:
    """Exact with auto; an error, with `.grad` as it was, with any strategy asked for by name and with `batch`."""
    model, batch = LEFTOVERS[kind](), toy_batch()
    loss = toy_loss(model)
    wanted, norms = clipped_sum(unit_gradients(model, loss, each_row(batch)), 0.7, clipping)
    engine = ClippingEngine(model, max_grad_norm=0.7, clipping=clipping)
    with pytest.warns(UserWarning, match="no rule covers"):
        engine.backward(loss, batch)
    assert distance(grads(model), wanted) < 1e-12
    torch.testing.assert_close(engine.norms, norms)
    engine.detach()
    model.zero_grad()
    for strategy in FAST:
        engine = ClippingEngine(model, max_grad_norm=0.7, clipping=clipping, strategy=strategy)
        with pytest.raises(PrivacyError, match="no rule covers"):
            engine.backward(loss, batch)
        with pytest.raises(PrivacyError, match="no rule covers"), engine.batch():
            loss(batch).backward()
        assert not grads(model)
        engine.detach()


@pytest.mark.parametrize("rows", [1, 4])
def test_a_loss_that_takes_gradients_itself(rows: int) -> None:
    """Gradient penalties and adversarial losses run layers' backward early, with gradients that are not the loss's."""
    model, batch = Toy(), toy_batch(rows)

    def loss(part: Batch) -> Tensor:
        hidden = model.table(part["input_ids"])
        logits = model.head(torch.tanh(model.norm(model.inner(hidden))))
        plain = F.cross_entropy(logits.flatten(0, 1), part["input_ids"].flatten(), reduction="sum")
        (slope,) = torch.autograd.grad(plain, hidden, create_graph=True)
        total: Tensor = plain + slope.square().sum()
        return total

    wanted, norms = clipped_sum(unit_gradients(model, loss, each_row(batch)), 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7)
    with pytest.warns(UserWarning, match="takes gradients itself"):
        engine.backward(loss, batch)
    assert distance(grads(model), wanted) < 1e-12
    torch.testing.assert_close(engine.norms, norms)
    engine.detach()
    model.zero_grad()
    for strategy in FAST:
        engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
        with pytest.raises(PrivacyError, match="takes gradients itself"):
            engine.backward(loss, batch)
        engine.detach()


def test_norms_do_not_take_the_users_shortcuts_in_matrix_products() -> None:
    """float32 products may run in TF32 or bfloat16 if the user allows it; the bounds on rounding assume that sums do not."""
    seen: list[str] = []
    model, batch = Toy(dtype=torch.float32), toy_batch()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    original = torch.bmm

    def bmm(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return original(*args, **kwargs)

    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "bmm", bmm)
            engine.backward(toy_loss(model), batch)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(chosen)
    assert seen
    assert set(seen) == {"highest"}


@pytest.mark.parametrize("also_called", [True, False])
def test_leftovers_under_autocast(also_called: bool) -> None:
    """Autocast keeps a cast copy of each weight: one made where there are no gradients must not hide a leftover."""
    model, batch = Hidden(also_called).float(), toy_batch()
    loss = toy_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [unit_gradients(model, loss, [part])[0] for part in each_row(batch)]
    wanted, _ = clipped_sum(parts, 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="no rule covers"):
        engine.backward(loss, batch)
    assert distance(grads(model), wanted) < 8 * 2**-9


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_dropout_is_the_same_in_both_passes(strategy: Strategy) -> None:
    model = Toy()
    model.norm.register_forward_hook(lambda module, args, out: F.dropout(out, 0.5, module.training))
    batch = toy_batch()
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        engine.backward(toy_loss(model), batch)
        results.append((grads(model), engine.norms))
        model.zero_grad()
    assert distance(results[0][0], results[1][0]) == 0.0  # learning, in the first call, drew nothing from the user's generator
    clipped_norms = results[0][1].clamp(max=0.7)
    assert total_norm(results[0][0]) <= float(clipped_norms.sum()) + 1e-9


def test_strategies_agree_under_dropout() -> None:
    results = []
    model, batch = Toy(), toy_batch()
    model.norm.register_forward_hook(lambda module, args, out: F.dropout(out, 0.5, module.training))
    for strategy in FAST:
        torch.manual_seed(5)
        results.append(backward(model, toy_loss(model), batch, C=0.7, strategy=strategy))
    assert distance(results[0][0], results[1][0]) < 1e-12
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("strategy", FAST)
@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.uniform())])
def test_random_numbers_of_python_and_numpy_are_the_same_in_both_passes(draw: Callable[[], float], strategy: Strategy) -> None:
    """What is added is what was clipped: as one pass would."""
    model, batch = Toy(), toy_batch()
    model.norm.register_forward_hook(lambda module, args, out: out * (1 + 5 * draw() * module.training))
    with same_randomness(None):
        found = backward(model, toy_loss(model), batch, C=0.7, strategy=strategy)
    with same_randomness(None):
        wanted = backward(model, toy_loss(model), batch, C=0.7, strategy="bookkeeping")
    assert distance(found[0], wanted[0]) < 1e-12
    torch.testing.assert_close(found[1], wanted[1])


def test_two_pass_refuses_randomness_that_is_not_replayed() -> None:
    model, batch, secret = Toy(), toy_batch(), random.SystemRandom()
    model.norm.register_forward_hook(lambda module, args, out: out * (1 + secret.random() * module.training))
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy="two_pass")
    with pytest.raises(PrivacyError, match=r"two_pass.*random numbers"):
        engine.backward(toy_loss(model), batch)
    assert not grads(model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_with_no_layer_any_rule_knows(strategy: Strategy) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(11, 11, dtype=torch.float64))
            self.hidden = [self.matrix]

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.hidden[0][input_ids]

    model, batch = Bare(), toy_batch()
    wanted, _ = clipped_sum(unit_gradients(model, toy_loss(model), each_row(batch)), 0.7)
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    if strategy in FAST:
        with pytest.raises(PrivacyError, match="no rule covers how the model uses matrix"):
            engine.backward(toy_loss(model), batch)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.backward(toy_loss(model), batch)
    assert distance(grads(model), wanted) < 1e-12


def test_two_passes_need_no_second_set_of_sums() -> None:
    """New sums become `.grad` themselves, those that are there are added to, and what `zero_grad` gave up is let go."""
    model, batch = tiny("gpt2").float(), batch_of("gpt2")
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy="two_pass")
    loss = loss_of("gpt2", model)
    engine.backward(loss, batch)
    held = {p: (p.grad, p.grad.clone()) for p in engine.parameters if p.grad is not None}
    assert all(engine.clipped_sum(p) is p.grad for p in engine.parameters)
    engine.backward(loss, batch)
    for p, (gradient, once) in held.items():
        assert p.grad is gradient
        torch.testing.assert_close(gradient, 2 * once)
    model.zero_grad()
    gone = [weakref.ref(gradient) for gradient, _ in held.values()]
    held.clear()
    del gradient

    def looked(batch: Any) -> Tensor:
        assert all(ref() is None for ref in gone)
        return loss(batch)

    engine.backward(looked, batch)
