"""The only way a gradient reaches the optimizer."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.kernels.keystream import Keystream
from dp_flash_hf.mechanisms.gaussian_noise import SENSITIVITY, spacing
from dp_flash_hf.training import dp_sgd
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support.engines import STRATEGIES
from tests.support.forks import forked
from tests.support.gates import EXPECTED, STEPS, dpsgd, started, step
from tests.support.models import Toy, toy_batch, toy_loss
from tests.support.oracle import clipped_sum, each_row, unit_gradients


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


def test_a_step_whose_gradients_are_not_the_engines_is_not_counted() -> None:
    model = Toy()
    mechanism, _, optimizer = started(model)
    mechanism.release()  # of nobody
    optimizer.step()  # without zero_grad(): what was released is still there
    with pytest.raises(PrivacyError, match="not made by the engine"):
        mechanism.release()
    assert mechanism.account.steps == 1
    optimizer.zero_grad()
    mechanism.release()
    assert mechanism.account.steps == 2


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_in_grad_before_noise_is_on_it(strategy: Strategy) -> None:
    """Whoever looks between two parts of a draw, as `on_substep_end` of a callback, finds nothing."""
    model = Toy()
    mechanism, engine, optimizer = started(model, strategy=strategy)
    for _ in range(3):
        engine.backward(toy_loss(model), toy_batch())
        assert all(p.grad is None for p in model.parameters())
    mechanism.release()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    mechanism.stop()
    engine.backward(toy_loss(model), toy_batch())  # an engine without a mechanism shows its sums
    assert all(p.grad is not None for p in model.parameters())


def released(mechanism: DPSGD, model: nn.Module) -> bytes:
    mechanism.release()
    return b"".join(p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("noise", ["secure", "fast"])
def test_noise_is_fresh_in_a_fork(noise: str) -> None:
    """A process and its forks are one another's copies, and release different noise."""
    model = Toy()
    mechanism, _, _ = started(model, noise=noise)
    torch.manual_seed(0)
    elsewhere = [forked(partial(released, mechanism, model)) for _ in range(2)]
    assert len({*elsewhere, released(mechanism, model)}) == 3


@pytest.mark.parametrize("noise", ["secure", "fast"])
def test_a_fixed_seed_replays_the_noise_of_a_step_and_of_no_other(noise: str) -> None:
    drawn: list[list[bytes]] = []
    for seed in (1, 1, 2):
        model = Toy()
        mechanism, _, optimizer = started(model, noise=noise, seed=seed)
        drawn.append([])
        for _ in range(2):
            drawn[-1].append(released(mechanism, model))
            optimizer.step()
            optimizer.zero_grad()
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 4


def test_noise_is_of_the_keystream_unless_it_is_to_be_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    words = Keystream.__call__

    def counted(self: Keystream, n: int) -> torch.Tensor:
        asked.append(n)
        return words(self, n)

    monkeypatch.setattr(Keystream, "__call__", counted)
    for noise, expected in (("fast", False), ("secure", True)):
        model = Toy()
        mechanism, _, _ = started(model, noise=noise)
        mechanism.release()
        assert bool(asked) == expected
        assert mechanism.report().noise == noise
        assert (noise == "fast") == any("PyTorch's random generators" in line for line in mechanism.report().not_covered)


@pytest.mark.parametrize(("ranks", "wider"), [(2, 0.0), (4096, (4096 * 104 - 2**13) / 2**23)])
def test_noise_of_a_sharded_model_is_wider_where_ranks_round_its_sums(
    ranks: int, wider: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw of 5 expected units hardly has more than 104: 5 + 12 sqrt(5) + 72. Half the charge is for adding up over ranks."""
    mechanism, _, _ = started(Toy(), noise_multiplier=1.5, max_grad_norm=2.0)
    monkeypatch.setattr(ClippingEngine, "sharded", True)
    monkeypatch.setattr(mechanism._ranks, "size", ranks)
    assert mechanism._std() == pytest.approx(3.0 * (SENSITIVITY + wider), rel=1e-12)


@pytest.mark.parametrize(
    ("elsewhere", "wide"),
    [((4096, False), False), ((4097, False), True), ((1, True), True)],
    ids=["few", "many", "wide already"],
)
def test_ranks_add_up_in_float64_what_float32_would_round_too_far(
    elsewhere: tuple[int, bool], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks may add up 2^13 / 2 units in float32, and have to add up alike."""
    mechanism, engine, _ = started(Toy())
    monkeypatch.setattr(mechanism._ranks, "size", 2)
    monkeypatch.setattr(mechanism._ranks, "gathered", lambda own: [own, elsewhere])
    mechanism._sum_alike()
    assert engine.rounding[1] == wide


def test_a_sharded_model_needs_the_number_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far its sums are rounded is bounded by how many are drawn."""
    monkeypatch.setattr(ClippingEngine, "sharded", True)
    with pytest.raises((PrivacyError, UnsupportedError), match="public_n_units with a sharded model"):
        started(Toy(), public_n_units=50)


def test_a_new_start_lets_go_of_the_optimizer_before() -> None:
    mechanism, _, first = started(Toy())
    other = Toy()
    second = torch.optim.SGD(other.parameters(), lr=1.0)
    engine = ClippingEngine(other, max_grad_norm=1.0)
    for _ in range(2):  # again with the same one: it is guarded once
        mechanism.start(engine, second)
    (parameter, *_), *_ = (group["params"] for group in first.param_groups)
    parameter.grad = torch.ones_like(parameter)
    first.step()
    mechanism.stop()
    engine.backward(toy_loss(other), toy_batch())
    second.step()


def test_what_is_released_waits_for_one_optimizer_step() -> None:
    mechanism, _, optimizer = started(Toy())
    assert not mechanism.released
    mechanism.release()
    assert mechanism.released
    optimizer.step()
    assert not mechanism.released


def test_ranks_agree_on_a_writer_and_on_all_parameters_at_the_start_and_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[torch.Tensor]]] = []

    def compared_by(self: Ranks, tensors: list[tuple[str, torch.Tensor]], what: str) -> None:
        asked.append((what, [tensor for _, tensor in tensors]))

    monkeypatch.setattr(Ranks, "shared", lambda self, value: "of the first rank")
    monkeypatch.setattr(Ranks, "require_equal", compared_by)
    model = Toy()
    mechanism, _, optimizer = started(model)
    assert mechanism.account.writer == "of the first rank"
    for _ in range(STEPS):
        mechanism.release()
        optimizer.step()
        optimizer.zero_grad()
    every = list(model.parameters())
    whats, compared = zip(*asked, strict=True)
    assert whats == ("parameters", *["parameters after a step"] * STEPS)
    for tensors, wanted in zip(compared, (every, every, every[1:2], every[2:3]), strict=True):  # one further for each step
        assert all(tensor is parameter for tensor, parameter in zip(tensors, wanted, strict=True))


def test_ranks_with_another_configuration_are_refused_and_nothing_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, model = dpsgd(), Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    gathered = Ranks.gathered
    monkeypatch.setattr(Ranks, "gathered", lambda self, own: [own, own if own is False else "another"])
    with pytest.raises(PrivacyError, match="ranks have different privacy parameters"):
        mechanism.start(ClippingEngine(model, max_grad_norm=1.0), optimizer)
    monkeypatch.setattr(Ranks, "gathered", gathered)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    optimizer.step()


class Draw:
    """What `release` asks of a draw in progress."""

    def __init__(self) -> None:
        self.asked: list[int | str | None] = []

    def require_whole(self, units: int | None) -> None:
        self.asked.append(units)

    def end(self) -> None:
        self.asked.append("ended")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_draw_is_whole_before_its_release_and_ends_with_it(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its units are compared with those in the sums, but for a sharded model, where every rank holds those of all."""
    model, mechanism, draw = Toy(), dpsgd(), Draw()
    engine = ClippingEngine(model, max_grad_norm=1.0)
    mechanism.start(engine, torch.optim.SGD(model.parameters(), lr=1.0), draw)  # type: ignore[arg-type]
    engine.backward(toy_loss(model), toy_batch())
    units = engine.rounding[0]
    assert units > 0
    monkeypatch.setattr(ClippingEngine, "sharded", sharded)
    mechanism.release()
    assert draw.asked == [None if sharded else units, "ended"]


def test_ranks_sum_alike_before_anything_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, engine, _ = started(Toy())
    wide: list[bool] = []
    take = engine.take_sums

    def taken() -> dict[nn.Parameter, torch.Tensor]:
        wide.append(engine.rounding[1])
        return take()

    monkeypatch.setattr(mechanism, "_sum_alike", engine.sum_in_float64)
    monkeypatch.setattr(engine, "take_sums", taken)
    mechanism.release()
    assert wide == [True]


def test_parts_of_a_sharded_model_have_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one seed: what is whole has the same noise on all ranks, what is split has another for each part."""
    noise: list[dict[str, torch.Tensor]] = []
    for part in ("0", "1"):
        model = Toy()
        split = model.table.weight
        monkeypatch.setattr(dp_sgd, "part_of", lambda p, split=split, part=part: part if p is split else "")
        mechanism, _, _ = started(model, seed=3)
        mechanism.release()
        noise.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(noise[0]) == len(list(Toy().parameters()))
    for name, gradient in noise[0].items():
        assert gradient.count_nonzero() > 0, name
        assert torch.equal(gradient, noise[1][name]) == (name != "table.weight"), name


def test_public_n_units_is_for_models_that_are_whole() -> None:
    started(Toy(), public_n_units=50)


def test_weights_may_not_change_once_the_first_part_of_a_draw_was_computed() -> None:
    model = Toy()
    mechanism, engine, _ = started(model)
    mechanism.before_forward()
    engine.backward(toy_loss(model), toy_batch())
    model.head.weight.data.add_(1.0)
    with pytest.raises(PrivacyError, match=r"outside of optimizer.step\(\): \['head.weight'\]"):
        mechanism.release()
    assert mechanism.account.steps == 0


def test_an_optimizer_may_be_set_up_by_zeros_and_by_nothing_else() -> None:
    """As torch's distributed checkpoints do before they load it, where some parameters may have no gradient."""
    model = Toy()
    mechanism, engine, optimizer = started(model)
    before = copy.deepcopy(model.state_dict())

    def zeros(last: float = 0.0) -> None:
        for p in list(model.parameters())[1:]:
            p.grad = torch.zeros_like(p)
            p.grad.view(-1)[-1] = last

    zeros()
    optimizer.step()
    assert mechanism.account.steps == 0
    zeros(1.0)
    with pytest.raises(PrivacyError, match="without noise: call release"):
        optimizer.step()
    optimizer.zero_grad()
    engine.backward(toy_loss(model), toy_batch())
    zeros()
    with pytest.raises(PrivacyError, match="without noise: call release"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_grid_is_that_of_the_bound_and_of_the_noise() -> None:
    values = sum(p.numel() for p in Toy().parameters())
    for sigma in (1e-3, 1.5):  # little noise needs a finer grid than many values do
        mechanism, _, _ = started(Toy(), noise_multiplier=sigma, max_grad_norm=4.0)
        assert mechanism._spacing() == spacing(values, 4.0, 4.0 * sigma)


def test_a_checkpoint_that_is_loaded_counts_and_may_bring_other_weights() -> None:
    taken = dpsgd()
    taken.account.count_step()
    taken.account.complete_step()
    state = taken.state_dict()
    before = dpsgd()  # loaded before the start
    before.load_state_dict(state)
    assert before.account.steps == 1
    model = Toy()
    mechanism, _, optimizer = started(model)
    step(mechanism, optimizer)
    model.head.weight.data.add_(1.0)
    mechanism.load_state_dict(state)
    mechanism.release()
    assert mechanism.account.steps == 3


def test_the_report_names_the_state_that_was_called_public() -> None:
    for public in ((), ("norm.running",)):
        model = Toy()
        model.norm.register_buffer("running", torch.zeros(1))
        mechanism = dpsgd()
        engine = ClippingEngine(model, max_grad_norm=1.0)
        mechanism.start(engine, torch.optim.SGD(model.parameters(), lr=1.0), public_state=public)
        named = [line for line in mechanism.report().not_covered if "named public" in line]
        assert len(named) == len(public)
        assert all("norm.running" in line for line in named)
