"""`make_private`: a loop of one's own, with the guarantee of `DPCallback`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import DistributedType
from torch import Tensor, nn

from dp_flash_hf import PrivacyConfig
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.integrations.accelerate import PrivateLoop
from dp_flash_hf.mechanisms.gaussian_noise import SENSITIVITY
from dp_flash_hf.training import dp_sgd as mechanism_module
from dp_flash_hf.training.batches import UNITS
from tests.support.loops import loop, run
from tests.support.models import tiny
from tests.support.oracle import distance
from tests.support.trainers import Pad, Seen, attached, config, draws, texts, trainer_for, watch, without_dropout

ROUNDING = 4 * float(torch.finfo(torch.float32).eps)
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
DRAWS: tuple[list[int], ...] = ([0, 3, 4, 9, 11, 17, 20], [], [5])


# Training.


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_rows_per_device": 2},
        {"max_tokens_per_device": 20},
        {"num_workers": 2},
        {"strategy": "microbatch"},
        {"collate_fn": hf.DataCollatorWithFlattening()},  # type: ignore[no-untyped-call]
        {"loss_fn": lambda model, batch: model(**batch).loss},
    ],
    ids=lambda changes: " ".join(changes) or "none",
)
def test_the_sums_are_those_of_the_callback(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Seen] = []
    for ours in (False, True):
        with monkeypatch.context() as patch:
            seen.append(watch(patch))
            draws(patch, *DRAWS)
            if ours:
                model = without_dropout(tiny("llama"))
                still = torch.optim.SGD(model.parameters(), lr=0.0)
                private, _, _ = loop(model, optimizer=still, privacy=config(max_grad_norm=3.5), **changes)
                assert run(private, still) == 3
            else:
                trainer = trainer_for("llama", tmp_path, max_steps=3)
                attached(trainer, max_grad_norm=3.5)
                trainer.train()
    callbacks, loops = seen
    assert distance(loops.sums[0], callbacks.sums[0]) <= ROUNDING
    assert len(loops.sums) == 3
    assert not any(float(value.abs().max()) for value in loops.sums[1].values())
    assert distance(loops.sums[2], callbacks.sums[2]) <= ROUNDING


def test_with_one_seed_the_weights_are_those_of_the_callback(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, max_steps=3, learning_rate=0.5, lr_scheduler_type="constant")
    attached(trainer, seed=3)
    trainer.train()
    model = without_dropout(tiny("gpt2"))
    private, _, optimizer = loop(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), privacy=config(seed=3))
    run(private, optimizer)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_epochs_spend_the_budget_and_no_more() -> None:
    private, model, optimizer = loop(privacy=PrivacyConfig(target_epsilon=8.0, target_delta=1e-3), epochs=1.5)
    before = model.lm_head.weight.clone()
    assert (len(private.loader), private.steps_left) == (9, 9)
    batches = iter(private.loader)
    assert run(private, optimizer) == 9
    assert not torch.equal(before, model.lm_head.weight)
    report = private.report()
    assert report.steps == report.planned_steps == 9
    assert 0.998 * 8.0 <= report.epsilon <= 8.0
    assert report.private
    weights = copy.deepcopy(model.state_dict())
    assert next(batches, None) is None
    with pytest.raises(PrivacyError, match="9 planned steps are spent"):
        private.backward({})
    with pytest.raises(PrivacyError, match="without noise"):
        optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(private.loader) == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("first", [True, False])
def test_prepared_before_or_after(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = without_dropout(tiny("gpt2", torch.float32))
    raw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(raw)
    if first:
        prepared, optimizer, scheduler = accelerator.prepare(model, raw, scheduler)  # type: ignore[no-untyped-call]
        private, _, _ = loop(prepared, optimizer=optimizer, accelerator=accelerator)
    else:
        private, _, _ = loop(model, optimizer=raw, accelerator=accelerator)
        _, optimizer, scheduler = accelerator.prepare(model, raw, scheduler)  # type: ignore[no-untyped-call]
    before = model.lm_head.weight.clone()
    for batch in private.loader:
        loss = private.backward(batch)
        assert math.isfinite(float(loss))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert private.report().steps == len(seen.released) == 3
    assert not torch.equal(before, model.lm_head.weight)
    with pytest.raises(PrivacyError, match="without noise"):
        optimizer.step()


def test_a_draw_may_not_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping empty batches, as loops do, would show which steps drew no unit."""
    draws(monkeypatch, [1, 2], [], *[[3]] * 9)
    private, _, optimizer = loop()

    def skipping() -> None:
        for batch in private.loader:
            if "input_ids" in batch:
                private.backward(batch)
                optimizer.step()
                optimizer.zero_grad()

    for _ in range(3):  # nor by beginning again
        with pytest.raises(PrivacyError, match=r"an empty one too.*which begins with it"):
            skipping()
        assert private.report().steps == 1
    assert [len(batch[UNITS]) for batch in stepping(private, optimizer)] == [0, 1]


def stepping(private: PrivateLoop, optimizer: Any) -> Iterator[dict[str, Any]]:
    """The draws of a loop, each before its step."""
    for batch in private.loader:
        yield {**batch}
        private.backward(batch)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("taken", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_that_is_looked_at_is_the_next_step(taken: int, workers: int) -> None:
    private, _, optimizer = loop(num_workers=workers)
    for _ in zip(range(taken + 1), stepping(private, optimizer), strict=False):
        pass  # the last of these draws is only looked at
    first, second = (next(iter(private.loader)) for _ in range(2))
    assert first is second
    assert len(private.loader) == private.steps_left == 3 - taken
    units = first[UNITS]
    assert next(stepping(private, optimizer))[UNITS] is units
    copied = {**first}
    assert run(private, optimizer) == 3 - taken
    assert "dp_draw" not in first
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        private.backward(copied)


def test_a_copy_of_a_draw_is_no_draw() -> None:
    private, _, optimizer = loop()
    batch = next(iter(private.loader))
    copied = {**batch}
    private.backward(batch)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="used before"):
        private.backward(copied)
    assert private.report().steps == 1


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """As if memory ran out in this call, counted from now, and in no other."""
    real, calls = getattr(owner, name), itertools.count(1)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise MemoryError("in the test")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("iterates_again", [False, True])
@pytest.mark.parametrize("where", ["second part", "sums", "noise"])
def test_a_draw_whose_backward_failed_is_taken_later(where: str, iterates_again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone, once: what the attempt had added up is gone, and not in the sum of another draw."""
    seen = watch(monkeypatch)
    model = without_dropout(tiny("gpt2"))
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    for fails in (False, True):
        draws(monkeypatch, [5], DRAWS[0], *[[0, 3, 4]] * 9)
        private, _, _ = loop(model, optimizer=still, max_rows_per_device=3, steps=9)
        batches = iter(private.loader)
        private.backward(next(batches))
        still.step()
        still.zero_grad()
        batch = next(batches)
        if not fails:
            private.backward(batch)
            private.stop()
    owner, name, call = {
        "second part": (private._training.engine, "backward", 2),
        "sums": (private._training.engine, "take_sums", 1),
        "noise": (mechanism_module, "add_gaussian_noise_", 1),
    }[where]
    fail_once(monkeypatch, owner, name, call)
    with pytest.raises(MemoryError, match="in the test"):
        private.backward(batch)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(PrivacyError, match="without noise"):
        still.step()
    private.backward(next(iter(private.loader)) if iterates_again else batch)
    assert distance(seen.sums[-1], seen.sums[1]) <= ROUNDING
    assert private.report().steps == (2 if where == "second part" else 3)  # an attempt that came to noise counts


def test_a_draw_waits_on_when_a_checkpoint_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """To save and load again would be a way to choose among draws."""
    draws(monkeypatch, [1, 2], [3])
    private, _, _ = loop()
    state = private.state_dict()
    old = next(iter(private.loader))
    private.load_state_dict(state)
    assert next(iter(private.loader)) is old


def test_the_last_draw_may_not_be_left_out_either() -> None:
    private, _, optimizer = loop(steps=2)
    batches = stepping(private, optimizer)
    next(batches), next(batches)
    with pytest.raises(PrivacyError, match="the last batch was not given"):
        list(private.loader)


def test_another_draw_than_the_one_that_waits_is_refused() -> None:
    private, _, optimizer = loop()
    batches = iter(private.loader)
    first = next(batches)
    kept = {**first}
    private.backward(first)
    optimizer.step()
    optimizer.zero_grad()
    second = next(batches)
    with pytest.raises(PrivacyError, match="not the one that private"):
        private.backward(kept)
    private.backward({name: value.clone() for name, value in second.items()})  # as when it is moved
    assert private.report().steps == 2


def test_examples_that_cannot_be_collated_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else draws of which the collator makes nothing would be left out, which may depend on what is in them."""

    class Failing(Pad):
        def __call__(self, examples: Any) -> Any:
            if [example["input_ids"] for example in examples] == failing:
                raise MemoryError("in the test")
            return super().__call__(examples)

    failing = [texts()[row]["input_ids"] for row in (3, 7, 8)]
    draws(monkeypatch, [1, 2], [3, 7, 8], *[[4]] * 9)
    private, _, optimizer = loop(collate_fn=Failing())
    with pytest.raises(MemoryError, match="in the test"):
        run(private, optimizer)
    for use in (lambda: next(iter(private.loader)), lambda: private.backward({})):
        with pytest.raises(PrivacyError, match="start again from the last checkpoint"):
            use()
    assert private.report().steps == 1


def test_an_error_on_one_of_several_processes_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have gone on: another attempt would find them at another place."""
    private, _, _ = loop()
    batch = next(iter(private.loader))
    monkeypatch.setattr("dp_flash_hf.integrations.accelerate.Ranks", lambda: SimpleNamespace(size=2))
    fail_once(monkeypatch, private._training, "add", 1)
    with pytest.raises(MemoryError, match="in the test"):
        private.backward(batch)
    for use in (lambda: private.backward(batch), lambda: next(iter(private.loader))):
        with pytest.raises(PrivacyError, match="start again from the last checkpoint"):
            use()
    assert private.report().steps == 0


def test_an_interrupt_after_the_release_leaves_a_step_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    private, model, optimizer = loop(steps=2)
    batch, before = next(iter(private.loader)), model.lm_head.weight.clone()
    release = private._training.mechanism.release

    def interrupted() -> None:
        release()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(private._training.mechanism, "release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            private.backward(batch)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(before, model.lm_head.weight)
    assert run(private, optimizer) == 1
    assert private.report().steps == 2


def test_a_step_that_counted_twice_shortens_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    private, _, optimizer = loop(steps=4)
    batches = stepping(private, optimizer)
    next(batches), next(batches)
    fail_once(monkeypatch, private._training.engine, "take_sums", 1)
    with pytest.raises(MemoryError):
        next(batches)
    assert run(private, optimizer) == 2
    assert private.report().steps == 4
    assert private.state_dict()["taken"] == 3


# Mistakes.


def test_an_optimizer_without_backward_is_stopped() -> None:
    _, model, optimizer = loop()
    before = model.lm_head.weight.clone()
    model(**Pad()(texts()[:2])).loss.backward()
    with pytest.raises(PrivacyError, match="gradients without noise"):
        optimizer.step()
    assert torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize("when", ["before", "before an empty draw", "after"])
def test_a_gradient_of_ones_own_is_refused(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws(monkeypatch, [] if "empty" in when else [1, 2])
    private, model, optimizer = loop(steps=1)
    before = model.lm_head.weight.clone()
    batch = next(iter(private.loader))
    if when == "after":
        private.backward(batch)
    model(**Pad()(texts()[:2])).loss.backward()
    if when == "after":
        with pytest.raises(PrivacyError, match="changed between release"):
            optimizer.step()
    else:
        with pytest.raises(PrivacyError, match="not made by the engine"):
            private.backward(batch)
        with pytest.raises(PrivacyError, match="without noise"):
            optimizer.step()
    assert torch.equal(before, model.lm_head.weight)


def test_without_the_guard_that_gradient_would_be_used() -> None:
    private, model, optimizer = loop()
    before = model.lm_head.weight.clone()
    private.stop()
    model(**Pad()(texts()[:2])).loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)


def test_gradients_changed_after_backward_are_refused() -> None:
    private, model, optimizer = loop()
    private.backward(next(iter(private.loader)))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(PrivacyError, match="changed between release"):
        optimizer.step()


def test_a_batch_is_one_draw_used_once() -> None:
    private, _, optimizer = loop()
    with pytest.raises(PrivacyError, match="not the one that private"):
        private.backward(Pad()(texts()[:4]))
    batch = next(iter(private.loader))
    private.backward(batch)
    with pytest.raises(PrivacyError, match=r"twice in one step"):
        private.backward(next(iter(private.loader)))
    optimizer.step()
    with pytest.raises(PrivacyError, match="used before"):
        private.backward(batch)
    with pytest.raises(PrivacyError, match=r"zero_grad\(\) first"):  # forgotten
        private.backward(next(iter(private.loader)))
    optimizer.zero_grad()
    private.backward(next(iter(private.loader)))
    assert private.report().steps == 2


@pytest.mark.parametrize("kind", ["missing", "foreign"])
def test_the_optimizer_trains_exactly_the_model(kind: str) -> None:
    model = without_dropout(tiny("gpt2"))
    parameters = list(model.parameters())
    wrong = parameters[1:] if kind == "missing" else [*parameters, nn.Parameter(torch.zeros(2))]
    with pytest.raises(PrivacyError, match="the optimizer must update exactly the trained parameters"):
        loop(model, optimizer=torch.optim.SGD(wrong, lr=1.0))


def contrastive(model: Any, batch: dict[str, Any]) -> Tensor:
    hidden = model.transformer(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return F.cross_entropy(hidden[:, 0] @ hidden.mean(1).T, torch.arange(len(hidden)))


class MeanOfRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * x.mean(0, keepdim=True)


def test_what_couples_units_is_found_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of `DPCallback`; without them the same model trains."""
    private, _, _ = loop(loss_fn=contrastive)
    with pytest.raises((PrivacyError, UnsupportedError), match="units"):
        private.backward(next(iter(private.loader)))
    model = without_dropout(tiny("gpt2"))
    model.transformer.drop = MeanOfRows()
    private, _, optimizer = loop(model)
    with pytest.raises(PrivacyError, match="unit"):
        private.backward(next(iter(private.loader)))
    with pytest.raises(PrivacyError, match="without noise"):
        optimizer.step()
    assert private.report().steps == 0
    private.stop()
    monkeypatch.setattr(ClippingEngine, "check", lambda *args, **kwargs: None)
    for check in ("check_training_mode", "check_alone", "check_interaction"):
        monkeypatch.setattr(f"dp_flash_hf.training.preflight.{check}", lambda *args, **kwargs: None)
    private, _, optimizer = loop(model)
    assert run(private, optimizer) == 3


class Streaming(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(texts())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 3, "epochs": 2.0}, "steps, epochs: expected exactly one"),
        ({"steps": None}, "steps, epochs: expected exactly one"),
        ({"steps": 0}, "steps: expected a whole number"),
        ({"max_rows_per_device": 0}, "max_rows_per_device: expected a whole number"),
        ({"max_tokens_per_device": 0}, "max_tokens_per_device: expected"),
        ({"expected_batch_size": 25}, "expected_batch_size: expected at most the 24 units"),
        ({"privacy": {"target_epsilon": 1.0}}, "config: expected a PrivacyConfig"),
        ({"train_dataset": Streaming()}, "with a length and random access"),
        (
            {"train_dataset": [{**example, "seq_lengths": [2, 3]} for example in texts()]},
            "packed rows.*DataCollatorWithFlattening",
        ),
        ({"privacy": config(privacy_unit="user", max_examples_per_unit=1), "train_dataset": texts()}, "user"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(list(value)),
)
def test_bad_arguments_are_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, KeyError), match=match):
        loop(**changes)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("distributed_type", DistributedType.DEEPSPEED, "DEEPSPEED: its engine owns backward.*use FSDP2"),
        ("distributed_type", DistributedType.FSDP, "FSDP version 1.*use FSDP2"),
        ("distributed_type", DistributedType.XLA, "XLA: not supported; use DDP or FSDP2"),
        ("mixed_precision", "fp16", "its scaling depends on other units"),
        ("gradient_accumulation_steps", 2, "a whole step already"),
    ],
)
def test_settings_of_accelerate_are_refused_by_name(name: str, value: Any, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, name, property(lambda self: value))
    with pytest.raises(UnsupportedError, match=match):
        loop()


@pytest.mark.parametrize("late", [False, True])
def test_schedules_by_results_are_refused_where_the_accelerator_has_them(late: bool) -> None:
    model = tiny("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer))  # type: ignore[no-untyped-call]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    if not late:
        accelerator.prepare(plateau)  # type: ignore[no-untyped-call]
        with pytest.raises(UnsupportedError, match=r"steps by a metric.*private.backward returns has no noise.*held-out data"):
            loop(model, optimizer=optimizer, accelerator=accelerator)
        return
    private, _, _ = loop(model, optimizer=optimizer, accelerator=accelerator)
    accelerator.prepare(plateau)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedError, match="steps by a metric"):
        private.backward(next(iter(private.loader)))


def test_settings_changed_later_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    private, _, _ = loop()
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    with pytest.raises(UnsupportedError, match="mixed_precision='fp16'"):
        private.backward(next(iter(private.loader)))


@pytest.mark.complete
def test_a_compiled_model_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    seen: list[Seen] = []
    for compiled in (False, True):
        with monkeypatch.context() as patch:
            seen.append(watch(patch))
            draws(patch, *DRAWS)
            model = without_dropout(tiny("llama"))
            still = torch.optim.SGD(model.parameters(), lr=0.0)
            private, _, _ = loop(torch.compile(model, backend="aot_eager") if compiled else model, optimizer=still)
            assert run(private, still) == 3
    engine = private._training.engine
    assert engine is not None
    assert engine.runs_compiled
    assert distance(seen[1].sums[0], seen[0].sums[0]) <= ROUNDING
    assert distance(seen[1].sums[2], seen[0].sums[2]) <= ROUNDING


def test_a_model_without_a_loss_is_named() -> None:
    data = [{"input_ids": example["input_ids"]} for example in texts()]

    def unlabelled(chosen: Any) -> dict[str, Tensor]:
        batch = Pad()([{**example, "labels": example["input_ids"]} for example in chosen])
        return {name: value for name, value in batch.items() if name != "labels"}

    private, _, _ = loop(train_dataset=data, collate_fn=unlabelled)
    with pytest.raises(UnsupportedError, match="make_private a loss_fn"):
        private.backward(next(iter(private.loader)))


# Noise and checkpoints.


def test_noise_is_added_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    add = vars(mechanism_module)["add_gaussian_noise_"]

    def recorded(tensors: Any, *, std: float, **kwargs: Any) -> None:
        added.append(std)
        add(tensors, std=std, **kwargs)

    monkeypatch.setattr(mechanism_module, "add_gaussian_noise_", recorded)
    private, _, optimizer = loop(max_rows_per_device=1, privacy=config(noise_multiplier=1.5, max_grad_norm=2.0))
    run(private, optimizer)
    assert added == [3.0 * SENSITIVITY] * 3


def test_a_checkpoint_continues_the_books(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    private, _, optimizer = loop(accelerator=accelerator, privacy=config(target_epsilon=4.0, noise_multiplier=None))
    accelerator.register_for_checkpointing(private)  # type: ignore[no-untyped-call]
    for _, batch in zip(range(2), private.loader, strict=False):
        private.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path))
    private.stop()

    another = Accelerator(cpu=True)
    again, _, optimizer = loop(accelerator=another, privacy=config(target_epsilon=4.0, noise_multiplier=None))
    another.register_for_checkpointing(again)  # type: ignore[no-untyped-call]
    another.load_state(str(tmp_path))
    assert (again.report().steps, again.steps_left, len(again.loader)) == (2, 1, 1)
    assert run(again, optimizer) == 1
    assert again.report().epsilon == again.report().epsilon <= 4.0
    assert again.report().steps == again.report().planned_steps == 3


def test_a_checkpoint_of_other_units_is_refused() -> None:
    private, _, _ = loop()
    other, _, _ = loop(train_dataset=texts(25))
    with pytest.raises(PrivacyError, match="n_units: 24 in the checkpoint, 25 now"):
        other.load_state_dict(private.state_dict())


def test_a_loop_that_cannot_be_made_leaves_model_and_log_free(tmp_path: Path) -> None:
    model = without_dropout(tiny("gpt2"))
    classes = [type(module) for module in model.modules()]
    some = torch.optim.SGD(list(model.parameters())[:1], lr=1.0)
    with pytest.raises(PrivacyError, match="the optimizer must update exactly"):
        loop(model, optimizer=some, spend_log=tmp_path / "spend.jsonl")
    assert [type(module) for module in model.modules()] == classes
    private, _, optimizer = loop(model, spend_log=tmp_path / "spend.jsonl")  # its lock is free
    assert run(private, optimizer) == 3
    private.stop()


def test_a_seeded_loop_that_iterates_anew_repeats_no_draw() -> None:
    """A draw that waits is handed out again; the one behind it is another one, also where all draws follow from a seed."""
    drawn: list[list[int]] = []
    for iterates_again in (False, True):
        private, _, optimizer = loop(privacy=config(seed=3), steps=4)
        seen = []
        batches = iter(private.loader)
        for _ in range(4):
            batch = next(batches)
            if iterates_again:
                batches = iter(private.loader)
                batch = next(batches)
            seen.append(batch.get("input_ids", torch.zeros(0, dtype=torch.long)).flatten().tolist())
            private.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
        drawn.append(seen)
    assert drawn[0] == drawn[1]
