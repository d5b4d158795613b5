"""One draw, one release: whatever handles batches between the two, every drawn unit is added once, or nothing is released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.training.draws import DRAW, DrawInProgress, Part, fingerprint, tagged
from dp_flash_hf.training.losses import UnitLoss
from tests.support.fuzz import unchecked
from tests.support.loops import loop
from tests.support.oracle import distance
from tests.support.trainers import Pad, Seen, attached, draws, trainer_for, watch

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
DRAWN: tuple[list[int], ...] = ([0, 3, 4, 9], [5, 6], [7])


def trained(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    handle: Callable[[list[Any]], list[Any]] = lambda parts: parts,
    callback: hf.TrainerCallback | None = None,
    steps: int = 3,
    drawn: tuple[list[int], ...] = DRAWN,
    **settings: Any,
) -> Seen:
    """A training with two parts a draw, whose parts `handle` may exchange before they are computed."""

    class Handling(hf.Trainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            parts, items = super().get_batch_samples(*args, **kwargs)
            return handle(parts), items

    seen = watch(monkeypatch)
    draws(monkeypatch, *drawn)
    settings = {"gradient_accumulation_steps": 2, "max_steps": steps, "per_device_train_batch_size": 2, **settings}
    trainer = trainer_for("gpt2", path, cls=Handling, **settings)
    if callback is not None:
        trainer.add_callback(callback)
    dp = attached(trainer)
    try:
        trainer.train()
    finally:
        assert dp.report().steps == len(seen.released)
    return seen


def refused(path: Path, monkeypatch: pytest.MonkeyPatch, match: str, released: int = 0, **what: Any) -> None:
    """Nothing of the draw that was tampered with is released."""
    gone: list[Seen] = []
    watched = watch

    def noted(patch: pytest.MonkeyPatch) -> Seen:
        gone.append(watched(patch))
        return gone[-1]

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "watch", noted)
        with pytest.raises(PrivacyError, match=match):
            trained(path, patch, **what)
    assert len(gone[0].released) == released


def later(earlier: list[Any]) -> Callable[[list[Any]], list[Any]]:
    """A `handle` that gives what came a draw before, once there is one."""

    def handle(parts: list[Any]) -> list[Any]:
        earlier.append(parts)
        return list(earlier[max(0, len(earlier) - 2)])

    return handle


def overwritten(part: dict[str, Any]) -> dict[str, Any]:
    part["input_ids"][:] = part["input_ids"][:1]
    return part


def longer(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == DRAW else torch.cat([value, value]) for name, value in part.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("handle", "match"),
    [
        (lambda parts: [parts[0], parts[0]], "was added already"),
        (lambda parts: parts[:1] + parts[:1] + parts[1:], "was added already"),
        (lambda parts: [{name: value for name, value in part.items() if name != DRAW} for part in parts], "lost its entry"),
        (lambda parts: [parts[0], overwritten(parts[1])], "changed after it was drawn"),
        (lambda parts: [parts[0], longer(parts[1])], "changed after it was drawn"),
        (lambda parts: [parts[0], {**parts[1], "labels": parts[1]["labels"].flip(0)}], "changed after it was drawn"),
        (lambda parts: [parts[0], {**parts[1], "dp_units": torch.zeros_like(parts[1]["dp_units"])}], "changed after"),
        (lambda parts: [parts[0], {**parts[1], **{DRAW: parts[0][DRAW]}}], "was added already"),
    ],
    ids=["a a", "a a b", "no tag", "overwritten rows", "more rows", "exchanged labels", "one unit", "another tag"],
)
def test_parts_that_are_repeated_or_changed_are_refused(
    handle: Callable[[Any], Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tmp_path, monkeypatch, match, handle=handle)


def test_a_draw_is_not_stepped_on_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, monkeypatch, "draw 0 was given where parts of draw 1 are due", released=1, handle=later([]))


def test_empty_parts_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever passes over an empty part, or draw, tells that it was empty."""
    refused(
        tmp_path,
        monkeypatch,
        "part 1 of draw 1 was given where parts of draw 0",
        handle=lambda parts: [part for part in parts if len(part["dp_units"])],
        drawn=([], [1, 2], [3]),
    )


def test_parts_in_another_order_or_moved_are_the_same_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(parts: list[Any]) -> list[Any]:
        return [{name: value.clone() for name, value in part.items()} for part in reversed(parts)]

    seen: list[Seen] = []
    for handle in (list, moved):
        with monkeypatch.context() as patch:
            seen.append(trained(tmp_path / handle.__name__, patch, handle))
    for usual, other in zip(seen[0].sums, seen[1].sums, strict=True):
        assert distance(usual, other) <= 4 * float(torch.finfo(torch.float32).eps)


class During(hf.TrainerCallback):
    """Calls this at one of the trainer's events."""

    def __init__(self, event: str, act: Callable[[Any, Any], None]) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: act(args, control))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("before", "after", "match", "released"), [(2, 1, "1 of 2 parts", 1), (1, 2, "draw 3 was given where parts of draw 2", 2)]
)
def test_another_number_of_parts_during_training_is_refused(
    before: int, after: int, match: str, released: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(args: Any, control: Any) -> None:
        args.gradient_accumulation_steps = after

    refused(
        tmp_path,
        monkeypatch,
        match,
        released=released,
        callback=During("on_step_end", change),
        steps=5,
        gradient_accumulation_steps=before,
    )


def test_an_epoch_that_ends_between_two_parts_does_not_merge_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(args: Any, control: Any) -> None:
        control.should_epoch_stop = True

    match = "draw 1 was given where parts of draw 0"
    refused(tmp_path, monkeypatch, match, callback=During("on_substep_end", end), steps=8)  # 2 epochs


@pytest.mark.parametrize("how", ["adds", "empties"])
def test_what_else_runs_the_engine_is_refused(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that computes a batch with the engine, or begins the sums anew, would double or drop units."""
    draws(monkeypatch, *DRAWN)
    trainer = trainer_for("gpt2", tmp_path, gradient_accumulation_steps=2, max_steps=2)
    dp = attached(trainer)

    def act(args: Any, control: Any) -> None:
        assert dp.engine is not None
        if how == "empties":
            dp.engine.withhold_sums()
        else:
            batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[3, 4]])}
            dp.engine.backward(lambda part: trainer.model(**part).loss, batch)

    trainer.add_callback(During("on_substep_end", act))
    with pytest.raises(PrivacyError, match="were drawn: something else ran the engine, or emptied it"):
        trainer.train()
    assert dp.report().steps == 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["in place", "through data", "through numpy", "mixed", "longer", "labels"])
def test_a_loop_computes_what_was_drawn(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixing units in the loop, or overwriting rows, puts one unit's data into many rows."""
    draws(monkeypatch, *DRAWN)
    private, _, _ = loop()
    batch = next(iter(private.loader))
    ids = batch["input_ids"]
    if how == "in place":
        ids[1:] = ids[0]
    elif how == "through data":
        ids.data[1, 0] += 1
    elif how == "through numpy":
        ids.numpy()[0] = 7
    elif how == "mixed":
        batch["input_ids"] = torch.where(torch.rand(ids.shape) < 0.5, ids, ids.roll(1, 0))
    elif how == "longer":
        batch.update(longer(batch))
    else:
        batch["weights"] = torch.ones(len(ids))
    with pytest.raises(PrivacyError, match="changed after it was drawn"):
        private.backward(batch)
    assert private.report().steps == 0
    assert private._training.engine is not None
    assert not private._training.engine.holds_sums


VALUES: list[Any] = [
    torch.arange(6).view(2, 3),
    torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
    torch.ones(2, 2, dtype=torch.bfloat16),
    torch.zeros(0, 3),
    torch.tensor(True),
    torch.ones(2, dtype=torch.complex128),
    np.ones((2, 2)),
    ["a", "b"],
    {"inner": torch.ones(2)},
    3,
    None,
]


def test_fingerprints_tell_values_apart_and_nothing_else() -> None:
    found = [fingerprint({"x": value}) for value in VALUES]
    assert len({*found}) == len(VALUES)
    assert found == [fingerprint({"x": value.clone() if isinstance(value, torch.Tensor) else value}) for value in VALUES]
    picture = VALUES[1]
    for changed in (picture.roll(1, 0), picture + 1e-3, picture.flip(1)):
        assert fingerprint({"x": changed}) != found[1]
    assert fingerprint({"x": picture.to(memory_format=torch.channels_last)}) == found[1]


def test_a_draw_without_parts_is_not_whole() -> None:
    draw = DrawInProgress()
    with pytest.raises(PrivacyError, match="0 of 1 parts"):
        draw.require_whole(0)
    draw.arrive(tagged({"x": torch.ones(1)}, Part([], 4, 0, 1)), 4)
    draw.added()
    draw.require_whole(0)
    draw.end()
    with pytest.raises(PrivacyError, match="0 of 1 parts"):
        draw.require_whole(None)


def test_a_part_that_could_not_be_computed_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a unit too large for memory would keep all others of its part out of the sum: more than C."""
    draws(monkeypatch, *[[0, 3, 4, 9]] * 2)
    private, _, optimizer = loop("gpt2")
    training = private._training
    loader = training.loader(training.dataset, Pad(), steps=1, first_step=0, splits=2)
    with unchecked(UnitLoss(training.adapter.model_loss, "sum", "shifted labels")):
        training.check(loader)
    first, second = loader

    def too_large(self: ClippingEngine, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ClippingEngine, "backward", too_large)
        with pytest.raises(torch.OutOfMemoryError):
            training.add(first)
    training.add(second)
    with pytest.raises(PrivacyError, match="1 of 2 parts of a draw could not be computed"):
        training.mechanism.release()
    assert training.mechanism.account.steps == 0
    training.drop_step()
    for part in (first, second):
        training.add(part)
    training.mechanism.release()
    optimizer.step()
    assert training.mechanism.account.steps == 1
