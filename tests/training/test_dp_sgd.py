"""The only door through which a gradient reaches the optimizer."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support.models import Toy, toy_batch, toy_loss
from tests.support.oracle import clipped_sum, each_row, unit_gradients
from tests.support.trainers import config

N, EXPECTED, STEPS = 50, 5, 3


def dpsgd(steps: int = STEPS, n: int = N, expected: int = EXPECTED, **changes: Any) -> DPSGD:
    chosen = config(**changes)
    return DPSGD(chosen, PrivacyPlan.from_config(chosen, n_units=n, expected_batch_size=expected, steps=steps))


def started(model: nn.Module, optimizer: Any = None, **changes: Any) -> tuple[DPSGD, ClippingEngine, Any]:
    mechanism = dpsgd(**changes)
    engine = ClippingEngine(model, max_grad_norm=mechanism.config.max_grad_norm)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    mechanism.start(engine, optimizer)
    return mechanism, engine, optimizer


def test_released_gradients_are_the_clipped_sum_over_the_expected_batch_size() -> None:
    model, batch = Toy(), toy_batch()
    wanted, _ = clipped_sum(unit_gradients(model, toy_loss(model), each_row(batch)), 1.0)
    mechanism, engine, _ = started(model, noise_multiplier=1e-9)
    engine.backward(toy_loss(model), batch)
    mechanism.release()
    for name, p in model.named_parameters():
        assert p.grad is not None
        # Noise of std 1e-9 / 5, of which no element in a few hundred exceeds 6 standard deviations.
        torch.testing.assert_close(p.grad, wanted[name] / EXPECTED, rtol=1e-12, atol=6e-9 / EXPECTED)


def test_every_step_is_counted_before_it_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, engine, _ = started(Toy())
    monkeypatch.setattr(engine, "take_sums", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mechanism.release()
    assert mechanism.account.steps == 1


def test_steps_out_of_order_update_nothing() -> None:
    model = Toy()
    mechanism, engine, optimizer = started(model)
    before = copy.deepcopy(model.state_dict())
    engine.backward(toy_loss(model), toy_batch())
    with pytest.raises(PrivacyError, match="without noise: call release"):
        optimizer.step()
    mechanism.release()
    with pytest.raises(PrivacyError, match="twice in one step"):
        mechanism.release()
    with pytest.raises(PrivacyError, match="without a closure"):
        optimizer.step(lambda: 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.step()
    with pytest.raises(PrivacyError, match="without noise: call release"):
        optimizer.step()  # the same noise a second time
    assert mechanism.account.steps == 1


def test_without_the_guard_unnoised_gradients_would_be_used() -> None:
    model = Toy()
    mechanism, engine, optimizer = started(model)
    mechanism.stop()
    before = model.head.weight.detach().clone()
    engine.backward(toy_loss(model), toy_batch())
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


def test_release_before_start_and_after_the_last_step() -> None:
    with pytest.raises(PrivacyError, match=r"before start\(\)"):
        dpsgd().release()
    mechanism, _, optimizer = started(Toy())
    for _ in range(STEPS):
        mechanism.release()
        optimizer.step()
        optimizer.zero_grad()
    assert mechanism.account.steps_left == 0
    with pytest.raises(PrivacyError, match="3 planned steps are spent"):
        mechanism.release()
    assert mechanism.account.steps == STEPS
    assert mechanism.epsilon() == mechanism.account.plan.epsilon() == mechanism.report().epsilon


def test_an_empty_draw_takes_a_noisy_step() -> None:
    model = Toy()
    mechanism, _, optimizer = started(model)
    before = model.head.weight.detach().clone()
    mechanism.release()
    optimizer.step()
    assert bool((model.head.weight != before).all())


@pytest.mark.parametrize("kind", ["missing", "foreign"])
def test_the_optimizer_has_exactly_the_engines_parameters(kind: str) -> None:
    model = Toy()
    parameters = list(model.parameters())
    wrong = parameters[1:] if kind == "missing" else [*parameters, nn.Parameter(torch.zeros(2))]
    with pytest.raises(PrivacyError, match=r"lacks \['table.weight'\]" if kind == "missing" else "1 are not the model's"):
        started(model, torch.optim.SGD(wrong, lr=1.0))


def test_frozen_parameters_may_stay_in_the_optimizer() -> None:
    model = Toy()
    model.table.requires_grad_(False)
    before = model.table.weight.clone()
    mechanism, engine, optimizer = started(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    engine.backward(toy_loss(model), toy_batch())
    mechanism.release()
    optimizer.step()
    assert torch.equal(before, model.table.weight)


def test_gradients_of_parameters_added_later_are_refused() -> None:
    model = Toy()
    mechanism, _, optimizer = started(model)
    late = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    mechanism.release()
    with pytest.raises(PrivacyError, match="1 parameters of the optimizer have gradients without noise"):
        optimizer.step()
    assert torch.equal(late, torch.zeros(2))
    mechanism.stop()
    optimizer.step()
    assert not torch.equal(late, torch.zeros(2))  # what the guard prevents


def test_state_is_public_json_and_continues() -> None:
    mechanism, _, optimizer = started(Toy())
    mechanism.release()
    optimizer.step()
    state = json.loads(json.dumps(mechanism.state_dict()))
    assert state.keys() == {"config", "sampler", "noise_multiplier", "steps", "ledgers", "taken", "checksum"}
    again = dpsgd()
    again.load_state_dict(state)
    assert (again.account.steps, again.account.steps_left, again.epsilon()) == (1, STEPS - 1, mechanism.epsilon())


def test_loading_never_forgets_what_was_spent() -> None:
    mechanism, _, optimizer = started(Toy())
    state = mechanism.state_dict()
    mechanism.release()
    optimizer.step()
    mechanism.load_state_dict(state)  # going back to an earlier checkpoint does not take a step back
    assert mechanism.account.steps == 1


def test_a_calibrated_plan_is_continued_with_its_own_noise() -> None:
    """Resumed with more steps, a run would otherwise be calibrated anew, and the two parts together exceed the budget."""
    first = dpsgd(target_epsilon=2.0, noise_multiplier=None)
    again = dpsgd(steps=5 * STEPS, target_epsilon=2.0, noise_multiplier=None)
    assert again.account.plan.noise_multiplier > 1.1 * first.account.plan.noise_multiplier
    again.load_state_dict(first.state_dict())
    assert (again.account.plan.noise_multiplier, again.account.plan.steps) == (first.account.plan.noise_multiplier, STEPS)
    assert again.account.plan.epsilon() <= 2.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n": 60}, "n_units: 50 in the checkpoint, 60 now"),
        ({"sampling": "truncated_poisson", "max_batch_size": 20}, "cannot add up steps of .*truncated.*set accountant='pld'"),
        ({"privacy_unit": "user", "max_examples_per_unit": 2}, "privacy_unit: None in the checkpoint, 'user' now"),
        ({"seed": 1}, "seed: None in the checkpoint, 1 now"),
    ],
    ids=str,
)
def test_what_cannot_be_added_up_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(PrivacyError, match=match):
        dpsgd(**changes).load_state_dict(taken(dpsgd(), 1).state_dict())


def taken(mechanism: DPSGD, steps: int) -> DPSGD:
    """The same after so many steps."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mechanism.start(ClippingEngine(model, max_grad_norm=mechanism.config.max_grad_norm), optimizer)
    for _ in range(steps):
        mechanism.release()
        optimizer.step()
        optimizer.zero_grad()
    return mechanism


@pytest.mark.parametrize(
    "changes",
    [
        {"expected": 6},
        {"noise_multiplier": 2.0},
        {"max_grad_norm": 3.0},
        {"unit_loss": "sum"},
        {"target_delta": 1e-4},
        {"sampling": "truncated_poisson", "max_batch_size": 20},
    ],
    ids=str,
)
def test_steps_of_other_kinds_are_added_up(changes: dict[str, Any]) -> None:
    """Both parts of a training count, and it goes on for the steps that were wanted."""
    first = taken(dpsgd(accountant="pld"), 2)
    again = dpsgd(steps=5, accountant="pld", **changes)
    delta = again.config.target_delta
    alone = again.account.plan.epsilon(3)
    again.load_state_dict(first.state_dict())
    assert (again.account.steps, again.account.steps_left) == (2, 3)
    assert again.epsilon() == first.account.ledger.epsilon(delta)
    report = taken(again, 3).report()
    assert (report.steps, report.planned_steps, report.lost_steps) == (5, 5, 0)
    by_hand = Ledger.total([first.account.ledger], "pld")
    by_hand.record(again.account.plan.sampler, again.account.plan.noise_multiplier, 3)
    assert (
        report.epsilon
        == by_hand.epsilon(delta)
        == again.account.plan.epsilon()
        > max(alone, first.account.ledger.epsilon(delta))
    )
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        again.release()


def test_the_noise_of_the_rest_keeps_a_changed_budget() -> None:
    first = taken(dpsgd(target_epsilon=2.0, noise_multiplier=None), 2)
    more = dpsgd(steps=10, target_epsilon=2.5, noise_multiplier=None)
    alone = more.account.plan.noise_multiplier
    more.load_state_dict(first.state_dict())
    assert more.account.steps_left == 8
    assert more.account.plan.noise_multiplier > alone
    assert 0.999 * 2.5 <= taken(more, 8).epsilon() <= 2.5
    less = dpsgd(steps=10, target_epsilon=0.9 * first.epsilon(), noise_multiplier=None)
    with pytest.raises(ValueError, match="target_epsilon: expected a budget that some noise keeps"):
        less.load_state_dict(first.state_dict())
    assert (less.account.steps, less.account.steps_left) == (2, 0)  # what was spent counts, and nothing may follow


@pytest.mark.parametrize("changes", [{"noise_multiplier": 2.0}, {"target_epsilon": 50.0, "noise_multiplier": None}])
def test_a_training_that_is_done_is_not_planned_anew(changes: dict[str, Any]) -> None:
    done = taken(dpsgd(), STEPS)
    again = dpsgd(**changes)
    again.load_state_dict(done.state_dict())
    assert (again.account.steps_left, again.epsilon()) == (0, done.epsilon())
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        taken(again, 1)


def test_books_of_several_origins_are_put_together_once() -> None:
    """A checkpoint that is loaded twice does not count twice; steps taken since, and elsewhere, are not forgotten."""
    first = taken(dpsgd(steps=20), 2)
    early = first.state_dict()
    late = taken(first, 1).state_dict()
    other = taken(dpsgd(steps=20), 4)
    for state in (late, early, late):
        other.load_state_dict(state)
    assert other.account.steps == 4 + 3
    assert other.account.taken == 3
    assert other.report().lost_steps == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("taken", 7),
        ("taken", "x"),
        ("steps", 0),
        ("noise_multiplier", -1.0),
        ("sampler", {"kind": "other"}),
        ("config", {}),
        ("ledgers", [1]),
        ("checksum", 5),
    ],
)
def test_damaged_state_is_refused_and_nothing_changed(key: str, value: Any) -> None:
    mechanism = taken(dpsgd(), 1)
    before = mechanism.state_dict()
    with pytest.raises(PrivacyError, match=r"damaged.*resume an older checkpoint"):
        mechanism.load_state_dict({**taken(dpsgd(), 2).state_dict(), key: value})
    assert mechanism.state_dict() == before


@pytest.mark.parametrize("missing", ["config", "sampler", "noise_multiplier", "steps", "ledgers", "taken", "checksum"])
def test_incomplete_state_is_refused(missing: str) -> None:
    state = dpsgd().state_dict()
    del state[missing]
    with pytest.raises(PrivacyError, match=rf"lacks \['{missing}'\].*start afresh"):
        dpsgd().load_state_dict(state)


@pytest.mark.parametrize("spoil", ["backward", "exchange", "fill"])
def test_gradients_changed_after_release_are_refused(spoil: str) -> None:
    model = Toy()
    mechanism, engine, optimizer = started(model)
    before = copy.deepcopy(model.state_dict())
    engine.backward(toy_loss(model), toy_batch())
    mechanism.release()
    parameter = next(iter(engine.parameters))
    assert parameter.grad is not None
    if spoil == "backward":
        toy_loss(model)(toy_batch()).backward()
    elif spoil == "exchange":
        parameter.grad = parameter.grad.clone()
    else:
        parameter.grad.zero_()
    with pytest.raises(PrivacyError, match="changed between release"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("options", [{"max_grad_norm": 2.0}, {"max_grad_norm": 1.0, "clipping": "per_layer"}])
def test_an_engine_that_clips_otherwise_than_the_report_says_is_refused(options: dict[str, Any]) -> None:
    model, mechanism = Toy(), dpsgd()
    engine = ClippingEngine(model, **options)
    name = "clipping" if "clipping" in options else "max_grad_norm"
    with pytest.raises(PrivacyError, match=f"make the engine with config.{name}"):
        mechanism.start(engine, torch.optim.SGD(model.parameters(), lr=1.0))
