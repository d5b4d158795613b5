"""Nothing but released gradients changes what is saved."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dp_flash_hf.distributed import checksum
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.training.batches import UNITS
from dp_flash_hf.training.watched_state import checksums, differing
from tests.support.gates import started
from tests.support.loops import loop, run
from tests.support.models import Toy, tiny, toy_batch, toy_loss
from tests.support.trainers import attached, config, texts, trainer_for, without_dropout

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Remembering(nn.Module):
    """Hands its input on, and keeps something of it from the third training step on."""

    def __init__(self, inner: nn.Module, keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.inner, self.keep, self.active = inner, keep, False
        self.register_buffer("count", torch.zeros(1))
        self.average = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        if self.active:
            self.keep(self, x)
        return self.inner(x)


def count(self: Any, x: Tensor) -> None:
    self.count += 1


def averaged(self: Any, x: Tensor) -> None:
    self.average.data.mul_(0.9).add_(x.float().mean().detach(), alpha=0.1)  # as running averages are written: no version


def replaced(self: Any, x: Tensor) -> None:
    self.count = x.float().mean().detach().view(1)


def registered(self: Any, x: Tensor) -> None:
    self.register_buffer("seen", x.float().mean().detach())


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("keep", "name"), [(count, "count"), (averaged, "average"), (replaced, "count"), (registered, "seen")])
@pytest.mark.parametrize("public", [False, True])
def test_state_that_forward_writes_is_refused_unless_public(keep: Any, name: str, public: bool) -> None:
    model = without_dropout(tiny("gpt2"))
    layer = model.transformer.h[0].ln_1 = Remembering(model.transformer.h[0].ln_1, keep)
    if name == "seen" and public:
        layer.register_buffer("seen", torch.zeros(()))
    full = f"transformer.h.0.ln_1.{name}"
    private, _, optimizer = loop(model, public_state=[full] if public else [])
    batches = iter(private.loader)
    draw = next(batches)
    while not private.report().steps or not len(draw[UNITS]):  # an empty draw computes nothing that could be kept
        private.backward(draw)
        optimizer.step()
        optimizer.zero_grad()
        draw = next(batches)
    layer.active = True
    taken = private.report().steps
    if public:
        del batches
        run(private, optimizer)
        assert any(full in line for line in private.report().not_covered)
        return
    with pytest.raises(PrivacyError, match=rf"{full}.*public_state"):
        private.backward(draw)
    assert private.report().steps == taken
    with pytest.raises(PrivacyError, match="without noise"):
        optimizer.step()


def test_public_names_must_exist() -> None:
    with pytest.raises(ValueError, match=r"public_state.*counter"):
        loop(public_state=["counter"])


@pytest.mark.parametrize("how", ["copied", "one value", "scaled"])
def test_gradients_are_compared_by_value(how: str) -> None:
    """What is written through `.data` has no version."""
    model = Toy()
    mechanism, engine, optimizer = started(model)
    before = model.head.weight.detach().clone()
    engine.backward(toy_loss(model), toy_batch())
    mechanism.release()
    gradient = model.head.weight.grad
    assert gradient is not None
    if how == "copied":
        gradient.data.copy_(torch.ones_like(gradient))
    elif how == "one value":
        gradient.data.view(-1)[-1] += 1e-12
    else:
        gradient.data.mul_(2)
    with pytest.raises(PrivacyError, match="gradients changed between release"):
        optimizer.step()
    assert torch.equal(before, model.head.weight)


class During(hf.TrainerCallback):
    def __init__(self, event: str, act: Callable[[Any], None]) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: act(kwargs["model"]))


def nudge(model: Any) -> None:
    model.transformer.wte.weight.data.view(-1)[3] += 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("event", "steps"), [("on_substep_end", 0), ("on_step_end", 1), ("on_log", 1)])
def test_weights_change_in_the_optimizers_step_only(event: str, steps: int, tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, gradient_accumulation_steps=2, max_steps=3)
    trainer.add_callback(During(event, nudge))
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match=r"outside of optimizer.step\(\): \['transformer.wte.weight'\]"):
        trainer.train()
    assert dp.report().steps == steps


def test_weights_that_come_back_are_no_change(tmp_path: Path) -> None:
    """As averages do, which are put in for an evaluation."""

    def there_and_back(model: Any) -> None:
        weight = model.transformer.wte.weight
        own = weight.detach().clone()
        weight.data.zero_()
        weight.data.copy_(own)

    trainer = trainer_for("gpt2", tmp_path, max_steps=3, learning_rate=0.1)
    trainer.add_callback(During("on_step_end", there_and_back))
    dp = attached(trainer)
    trainer.train()
    assert dp.report().steps == 3


def test_loading_a_checkpoint_is_no_change() -> None:
    private, model, optimizer = loop(steps=4)
    state, weights = private.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    private.backward(next(iter(private.loader)))
    optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(weights)
    private.load_state_dict(state)
    assert run(private, optimizer) == 4  # as the checkpoint had left; the lost one counts


# What libraries change beside the optimizer.


def adalora() -> Any:
    setting = peft.AdaLoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, init_r=4, target_r=1, tinit=0, tfinal=1, deltaT=1, total_step=9,
        task_type="CAUSAL_LM", orth_reg_weight=0.0,
    )  # fmt: skip
    model = peft.get_peft_model(without_dropout(tiny("gpt2")), setting)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("within", [False, True])
def test_ranks_are_allocated_in_the_optimizers_step(within: bool) -> None:
    """AdaLoRA sets singular values to 0, by weights and gradients that were released; how, the message says."""
    model = adalora()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = itertools.count(1)

    def allocate(*args: Any) -> None:
        model.base_model.update_and_allocate(next(step))

    if within:
        optimizer.register_step_post_hook(allocate)
    private, _, _ = loop(model, optimizer=optimizer)
    if within:
        assert run(private, optimizer) == 3
        assert any(bool((p == 0).any()) for name, p in model.named_parameters() if "lora_E" in name)
        return
    batches = iter(private.loader)
    private.backward(next(batches))
    optimizer.step()
    allocate()
    optimizer.zero_grad()
    with pytest.raises(PrivacyError, match=r"lora_E.*optimizer.register_step_post_hook\(...\), before training begins"):
        private.backward(next(batches))


class ScheduleFree(torch.optim.SGD):
    """Weights for evaluation are other than those for training, as in the library of that name."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.training = True

    def _move(self, training: bool) -> None:
        if self.training != training:
            self.training = training
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(2.0 if training else 0.5)

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)


def test_an_optimizer_may_move_weights_between_steps(tmp_path: Path) -> None:
    """For evaluations and saving: what it changed then comes from weights that were released."""
    model = without_dropout(tiny("gpt2"))
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = trainer_for(model, tmp_path, evaluation=texts(3, seed=9), **settings)
    optimizer = ScheduleFree(model.parameters())
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)
    dp = attached(trainer)
    trainer.train()
    assert dp.report().steps == 3


def test_an_average_of_weights_in_a_buffer_is_public_by_name() -> None:
    """It comes from released weights alone, as `public_state` asks."""
    model = without_dropout(tiny("gpt2"))
    model.register_buffer("average", model.lm_head.weight.detach().clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *args: model.average.lerp_(model.lm_head.weight.detach(), 0.5))
    private, _, _ = loop(model, optimizer=optimizer, public_state=["average"])
    assert run(private, optimizer) == 3
    private.stop()
    private, _, _ = loop(model, optimizer=optimizer)
    with pytest.raises(PrivacyError, match=r"\['average'\].*or from released weights alone"):
        run(private, optimizer)


@pytest.mark.parametrize("what", ["plan replaced", "plan edited", "config", "bound", "bound of the engine", "clipping"])
def test_settings_are_those_of_the_start(what: str) -> None:
    model = Toy()
    mechanism, engine, _ = started(model)
    plan = mechanism.account.plan
    if what == "plan replaced":
        mechanism.account.plan = dataclasses.replace(plan, noise_multiplier=0.01)
    elif what == "plan edited":
        object.__setattr__(plan, "noise_multiplier", 0.01)
    elif what == "config":
        mechanism.config = config(noise_multiplier=0.5)
    elif what == "bound":
        object.__setattr__(mechanism.config, "max_grad_norm", 7.0)
    elif what == "bound of the engine":
        engine._clipper.max_grad_norm = 7.0
    else:
        engine._clipper.clipping = "automatic"
    with pytest.raises(PrivacyError, match=r"changed after they were made|the engine clips with"):
        mechanism.release()
    assert mechanism.account.steps == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("value", [False, True], ids=["frozen", "unfrozen"])
def test_what_is_trained_is_chosen_anew_between_trainings(value: bool, tmp_path: Path) -> None:
    """A frozen parameter would get noise alone, an unfrozen one none: stop, choose, attach, train; the budget goes on."""
    trainer = trainer_for("gpt2", tmp_path, max_steps=4)
    name, parameter = next(iter(trainer.model.transformer.h[0].ln_1.named_parameters()))
    parameter.requires_grad_(not value)

    def choose(model: Any) -> None:
        parameter.requires_grad_(value)

    choosing = During("on_step_end", choose)
    trainer.add_callback(choosing)
    dp = attached(trainer)
    with pytest.raises(PrivacyError, match=r"dp.detach\(\), dp.attach\(trainer\)") as caught:
        trainer.train()
    assert f"ln_1.{name}" in str(caught.value)
    assert dp.report().steps == 1
    dp.detach()
    trainer.remove_callback(choosing)
    trainer.optimizer = trainer.lr_scheduler = None
    again = DPCallback(config()).attach(trainer)
    trainer.train()
    assert again.report().steps == 5  # the step of before counts
    assert again.report().lost_steps == 1


def test_a_loop_says_so_too() -> None:
    private, model, optimizer = loop()
    batches = iter(private.loader)
    private.backward(next(batches))
    optimizer.step()
    optimizer.zero_grad()
    model.transformer.wpe.weight.requires_grad_(False)
    with pytest.raises(PrivacyError, match=r"wpe.weight'\] were frozen.*make_private"):
        private.backward(next(batches))
    assert private.report().steps == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (64, 33), (1009, 257)])  # the last has whole squares
def test_checksums_show_any_change(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    odd = torch.ones(tensor.numel() + 1).to(dtype)[1:].view(shape)
    views = [tensor, odd, *([tensor.t()] if len(shape) == 2 else [])]
    for view in views:
        before = checksums([("x", view)])
        assert not differing(before, checksums([("x", view.clone(memory_format=torch.preserve_format))]))
        changed = view.clone(memory_format=torch.preserve_format)
        changed[tuple(size - 1 for size in view.shape)] = 0
        assert differing(before, checksums([("x", changed)])) == ["x"]
        assert differing(before, {}) == ["x"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_checksums_show_values_that_change_places(dtype: torch.dtype) -> None:
    """Two of them anywhere, also where they differ in their sign alone; rows, columns, halves; all at random."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(1, 100, (1031, 520), generator=generator).to(dtype)
    before = checksum(tensor)
    for _ in range(50):
        a, b = torch.randint(tensor.numel(), (2,), generator=generator).tolist()
        flat = tensor.clone().view(-1)
        value = int(flat[a])
        flat[a], flat[b] = -value, value
        signed = checksum(flat)
        flat[a], flat[b] = value, -value
        assert a == b or signed != checksum(flat), (a, b)
    rows, columns = torch.arange(1031), torch.arange(520)
    for changed in (
        tensor[rows.roll(1)],
        tensor[:, columns.roll(1)],
        tensor[torch.randperm(1031, generator=generator)],
        tensor[:, columns.view(2, 260).flip(0).flatten()],
        tensor.flip(0),
        tensor.flip(1),
        tensor.view(520, 1031).t().reshape(1031, 520),
        tensor.view(-1)[torch.randperm(tensor.numel(), generator=generator)],
    ):
        assert checksum(changed.contiguous()) != before


@pytest.mark.parametrize("size", [2, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_checksums_tell_permutation_matrices_apart(size: int, dtype: torch.dtype) -> None:
    """All have the same sums of rows and columns."""
    one = torch.eye(size).to(dtype)
    generator = torch.Generator().manual_seed(0)
    found = {int(checksum(one))}
    for _ in range(20):
        a, b = torch.randperm(size, generator=generator)[:2].tolist()
        one[[a, b]] = one[[b, a]].clone()
        found.add(int(checksum(one)))
    assert len(found) == min(size, 21)


def test_checksums_show_bits_that_are_all_turned() -> None:
    for n in (1, 9, 70_000):
        zeros = torch.zeros(n, dtype=torch.int64)
        assert checksum(zeros) != checksum(~zeros)
