"""What `.grad` may hold, and that no batch is ever in it by half."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_flash_hf.engine import gradient_buffer
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.gradient_buffer import MOST_ROUNDING, GradientBuffer
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.layers.recorder import Recorder
from tests.support.engines import STRATEGIES, Hidden, backward, interrupted_at
from tests.support.models import Toy, toy_batch, toy_loss
from tests.support.oracle import distance, grads


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_backward_calls_add_up(strategy: Strategy, dtype: torch.dtype, set_to_none: bool) -> None:
    model = Toy(dtype=dtype)
    batches = [toy_batch(seed=seed) for seed in range(3)]
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy)
    sums = []
    for batch in batches:
        engine.backward(toy_loss(model), batch)
        sums.append({p: engine.clipped_sum(p).clone() for p in engine.parameters})
        model.zero_grad(set_to_none=set_to_none)
    for batch in batches:
        engine.backward(toy_loss(model), batch)
    for p in engine.parameters:
        total = engine.clipped_sum(p)
        assert total.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(total, sums[0][p] + sums[1][p] + sums[2][p])
        assert p.grad is not None
        assert p.grad.dtype == dtype
        assert torch.equal(p.grad, total.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_foreign_origin_is_refused(dtype: torch.dtype) -> None:
    model, batch = Toy(dtype=dtype), toy_batch()
    weight = next(model.head.parameters())
    engine = ClippingEngine(model, max_grad_norm=0.7)
    toy_loss(model)(batch).backward()  # before
    before = grads(model)
    with pytest.raises(PrivacyError, match="not made by the engine"):
        engine.backward(toy_loss(model), batch)
    assert distance(grads(model), before) == 0.0
    model.zero_grad()
    engine.backward(toy_loss(model), batch)
    toy_loss(model)(batch).backward()  # after: added in place
    for use in (
        lambda: engine.backward(toy_loss(model), batch),
        lambda: engine.clipped_sum(weight),
        engine.take_sums,
    ):
        with pytest.raises(PrivacyError, match="changed since"):
            use()
    model.zero_grad(set_to_none=False)
    engine.backward(toy_loss(model), batch)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(PrivacyError, match="changed since"):
        engine.backward(toy_loss(model), batch)


def test_sums_taken_are_the_callers() -> None:
    model, batch = Toy(), toy_batch()
    engine = ClippingEngine(model, max_grad_norm=0.7)
    engine.backward(toy_loss(model), batch)
    wanted = {p: p.grad.clone() for p in engine.parameters if p.grad is not None}
    sums = engine.take_sums()
    assert all(torch.equal(sums[p], wanted[p]) for p in engine.parameters)
    with pytest.raises(PrivacyError, match="not made by the engine"):
        engine.backward(toy_loss(model), batch)


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exception_changes_nothing_and_the_engine_goes_on(strategy: Strategy, learnt: bool) -> None:
    """The user's loss fails at its first call, its second, ...: while learning, in the first pass, in the second."""
    model, batch = Toy(), toy_batch()
    loss = toy_loss(model)
    wanted, norms, _ = backward(model, loss, batch, strategy=strategy)
    failures = 0
    for successes in range(12):
        calls = 0

        def failing(part: Any, allowed: int = successes) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise KeyError("the user's own")
            return loss(part)

        engine = ClippingEngine(model, max_grad_norm=1.0, strategy=strategy)
        if learnt:
            engine.backward(loss, batch)
        held = {p: (p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()}
        with contextlib.suppress(KeyError):
            engine.backward(failing, batch)
        if calls > successes:
            failures += 1
            for p, (gradient, value) in held.items():
                assert p.grad is gradient
                assert gradient is None or (value is not None and value.equal(gradient))
        model.zero_grad()
        engine.backward(loss, batch)
        assert distance(grads(model), wanted) < 1e-12
        torch.testing.assert_close(engine.norms, norms)
        engine.detach()
        model.zero_grad()
    assert failures >= {"two_pass": 2, "microbatch": 4}.get(strategy, 1)


def test_parameters_unfrozen_or_replaced_behind_the_engines_back() -> None:
    """They would get ordinary, unclipped gradients."""
    batch = toy_batch()
    for late in ("unfrozen", "replaced", "added"):
        model = Toy()
        model.head.requires_grad_(late != "unfrozen")
        engine = ClippingEngine(model, max_grad_norm=1.0)
        if late == "unfrozen":
            model.head.requires_grad_(True)
        elif late == "replaced":
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        else:
            model.norm.extra = nn.Parameter(torch.zeros(3))
        with pytest.raises(PrivacyError, match="trainable since"):
            engine.backward(toy_loss(model), batch)
        with pytest.raises(PrivacyError, match="trainable since"), engine.batch():
            toy_loss(model)(batch).backward()
        assert not grads(model)


def test_hooks_that_take_gradients_before_they_are_clipped() -> None:
    model = Hidden(False)
    handle = model.first.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    engine = ClippingEngine(model, max_grad_norm=1.0)
    with pytest.raises(UnsupportedError, match=r"first\.weight"):
        engine.backward(toy_loss(model), toy_batch())
    handle.remove()
    with pytest.warns(UserWarning, match=r"first\.weight"):
        engine.backward(toy_loss(model), toy_batch())


def test_hooks_on_parameters_would_not_run() -> None:
    model = Toy()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    handle = next(iter(engine.parameters)).register_hook(torch.zeros_like)
    with pytest.raises(UnsupportedError, match="register_hook on"):
        engine.backward(toy_loss(model), toy_batch())
    handle.remove()
    engine.backward(toy_loss(model), toy_batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_that_fails_leaves_sums_that_are_not_handed_over(dtype: torch.dtype) -> None:
    model, batch = Toy().to(dtype), toy_batch()
    loss = toy_loss(model)
    backwards = 0
    fails = False

    def failing(gradient: Tensor) -> None:
        nonlocal backwards
        backwards += 1
        if fails and backwards % 2 == 0:
            raise ArithmeticError("no more")

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad and type(out) is Tensor:
            out.register_hook(failing)

    engine = ClippingEngine(model, max_grad_norm=0.7, strategy="two_pass")
    model.table.register_forward_hook(hook)
    engine.backward(loss, batch)
    wanted = grads(model)
    model.zero_grad()
    fails = True
    with pytest.raises(ArithmeticError):
        engine.backward(loss, batch)
    assert not grads(model)  # nothing was there before, and nothing is now
    fails = False
    engine.backward(loss, batch)
    fails = True
    with pytest.raises(ArithmeticError):
        engine.backward(loss, batch)
    for use in (lambda: engine.backward(loss, batch), engine.take_sums):
        with pytest.raises(PrivacyError, match="may hold parts of it"):
            use()
    fails = False
    model.zero_grad()
    engine.backward(loss, batch)
    assert distance(grads(model), wanted) == 0.0


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("before", [0, 1], ids=["nothing before", "after a batch"])
@pytest.mark.parametrize(
    ("strategy", "place", "number"),
    [
        ("bookkeeping", (GradientBuffer, "add_record"), 3),  # between two parameters
        ("microbatch", (GradientBuffer, "add"), 3),
        ("two_pass", (GradientBuffer, "add_all"), 1),  # after its second backward pass
        ("bookkeeping", (Recorder, "stop"), 1),  # all is added, and no caller knows
    ],
)
def test_half_of_a_batch_is_never_handed_over(
    strategy: Any, place: tuple[Any, str], number: int, before: int, set_to_none: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is computed again would be in the sums twice."""
    model, batch = Toy(), toy_batch()
    engine, loss = ClippingEngine(model, max_grad_norm=0.7, strategy=strategy), toy_loss(model)
    engine.backward(loss, batch)
    wanted = grads(model)
    model.zero_grad()
    for _ in range(before):
        engine.backward(loss, batch)
    with monkeypatch.context() as patch:
        method = interrupted_at(number, KeyboardInterrupt, getattr(*place))
        patch.setattr(*place, lambda self, *args: method(self, *args))
        with pytest.raises(KeyboardInterrupt):
            engine.backward(loss, batch)
    if grads(model):
        for use in (lambda: engine.backward(loss, batch), engine.take_sums, lambda: engine.clipped_sum(model.norm.weight)):
            with pytest.raises(PrivacyError, match="may hold parts of it"):
                use()
    model.zero_grad(set_to_none=set_to_none)
    engine.backward(loss, batch)
    assert distance(grads(model), wanted) == 0.0


Values = float | list[float]  # of one parameter


def buffer_of(*values: Values) -> tuple[GradientBuffer, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.tensor(value).view(-1)) for value in values]
    model = nn.ParameterList(parameters)
    return GradientBuffer(model, {p: str(n) for n, p in enumerate(parameters)}), parameters


def add(buffer: GradientBuffer, parameters: list[nn.Parameter], value: Values, units: int) -> None:
    with buffer.apart():
        buffer.put_back()
        with buffer.adding(units):
            buffer.add_all({p: torch.tensor(value).view(-1) for p in parameters})


def test_sums_that_are_withheld_show_nothing_until_they_are_taken() -> None:
    buffer, parameters = buffer_of(0.0, 0.0)
    buffer.withhold(True)
    add(buffer, parameters, 1.0, units=1)
    add(buffer, parameters, 2.0, units=1)
    assert all(p.grad is None for p in parameters)
    assert buffer.holds
    assert [float(total) for total in buffer.take().values()] == [3.0, 3.0]
    assert not buffer.holds
    add(buffer, parameters, 1.0, units=1)
    buffer.withhold(False)
    assert not buffer.holds
    add(buffer, parameters, 4.0, units=1)
    assert all(float(p.grad) == 4.0 for p in parameters if p.grad is not None)


def test_a_gradient_beside_withheld_sums_is_refused() -> None:
    buffer, parameters = buffer_of(0.0)
    buffer.withhold(True)
    add(buffer, parameters, 1.0, units=1)
    parameters[0].grad = torch.ones(1)
    with pytest.raises(PrivacyError, match="grad was"):
        buffer.take()


def test_sums_become_float64_before_float32_rounds_further_than_is_charged_for() -> None:
    """One unit at a time: 2 + 3 + ... + n units of rounding."""
    buffer, parameters = buffer_of(0.0)
    buffer.withhold(True)
    for number in range(1, 190):
        add(buffer, parameters, 1.0, units=1)
        assert buffer.wide == (sum(range(2, number + 1)) > MOST_ROUNDING), number


def test_a_wide_sum_keeps_what_float32_would_lose() -> None:
    buffer, parameters = buffer_of(0.0)
    buffer.withhold(True)
    add(buffer, parameters, 1.0, units=MOST_ROUNDING)
    add(buffer, parameters, 2.0**-40, units=1)
    assert buffer.wide
    (total,) = buffer.take().values()
    assert float(total) == 1.0 + 2.0**-40
    assert not buffer.wide  # the next sums begin in float32


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("again", [False, True], ids=["new", "after sums that were given up"])
def test_float64_begins_where_all_ranks_together_would_round_too_far(
    ranks: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ranks half is left for adding their sums up, and each has its share of the rest; the first part rounds nothing."""
    most = MOST_ROUNDING if ranks == 1 else MOST_ROUNDING // 2 // ranks
    monkeypatch.setattr(gradient_buffer, "Ranks", lambda: SimpleNamespace(size=ranks))
    for further, wide in ((most - 5, False), (most - 4, True)):
        for direct in (False, True):  # added, or to be added by the second backward pass of two_pass
            buffer, parameters = buffer_of(0.0)
            if again:
                add(buffer, parameters, 1.0, units=7)
                parameters[0].grad = None
            add(buffer, parameters, 1.0, units=5)
            assert not buffer.wide
            if direct:
                assert bool(buffer.in_place(further)) == (not wide)
            else:
                add(buffer, parameters, 1.0, units=further)
            assert buffer.wide == wide, (further, direct)


def test_while_a_batch_may_be_in_the_sums_by_half_none_is_added_and_none_taken() -> None:
    buffer, parameters = buffer_of([0.0, 0.0])
    add(buffer, parameters, [0.0, 5.0], units=1)  # a zero hides nothing
    buffer.begin()
    with pytest.raises(PrivacyError, match="may hold parts"):
        buffer.in_place(1)
    with pytest.raises(PrivacyError, match="may hold parts"), buffer.adding(1):
        pass
    with pytest.raises(PrivacyError, match="may hold parts"):
        buffer.take()
    with buffer.adding(1, begun=True):
        pass
    assert not buffer.interrupted
    buffer.begin()
    parameters[0].grad = None
    buffer.require_whole()  # given up
    assert not buffer.interrupted
    assert not buffer


def test_sums_that_were_shown_are_dropped_when_they_are_to_be_withheld() -> None:
    buffer, parameters = buffer_of(0.0)
    add(buffer, parameters, 1.0, units=1)
    buffer.withhold(True)
    assert parameters[0].grad is None
    assert not buffer


def test_a_sum_of_which_some_values_were_set_to_zero_is_refused() -> None:
    buffer, parameters = buffer_of([0.0, 0.0])
    add(buffer, parameters, [1.0, 2.0], units=1)
    assert parameters[0].grad is not None
    parameters[0].grad[0] = 0.0
    with pytest.raises(PrivacyError, match="was changed since"):
        buffer.total(parameters[0])


def test_a_batch_that_adds_nothing_to_a_parameter_gives_it_a_sum_of_zeros() -> None:
    buffer, parameters = buffer_of(1.0)
    with buffer.apart():
        buffer.put_back()
        with buffer.adding(1):
            buffer.add_all({})
    assert buffer
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [0.0]


def test_a_trial_begins_without_sums_and_leaves_those_of_before() -> None:
    buffer, parameters = buffer_of(0.0)
    add(buffer, parameters, 1.0, units=3)
    gradient = parameters[0].grad
    with buffer.afresh():
        assert not buffer
        assert (buffer.units, parameters[0].grad) == (0, None)
        add(buffer, parameters, 7.0, units=1)
    assert parameters[0].grad is gradient
    assert (buffer.units, buffer.total(parameters[0]).tolist()) == (3, [1.0])


def test_records_are_added_to_sums_in_float64() -> None:
    model, batch = Toy(dtype=torch.float32), toy_batch()
    engine = ClippingEngine(model, max_grad_norm=0.7, strategy="bookkeeping")
    engine.backward(toy_loss(model), batch)
    once = {p: engine.clipped_sum(p).double() for p in engine.parameters}
    engine.sum_in_float64()
    engine.backward(toy_loss(model), batch)
    for p in engine.parameters:
        assert engine.clipped_sum(p).dtype == torch.float64
        assert torch.equal(engine.clipped_sum(p), 2 * once[p])  # the same batch, added without a rounding
