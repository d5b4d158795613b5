"""Methods of subclasses that DPCallback takes the place of are judged by what they do when they run."""

from __future__ import annotations

import contextlib
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, WeightedRandomSampler

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.integrations import own_methods
from tests.integrations.test_trainer import ROUNDING, C, sums_of
from tests.support.attributes import attributes, differing
from tests.support.models import loss_of, tiny
from tests.support.oracle import clipped_sum, distance, unit_gradients
from tests.support.trainers import Pad, attached, texts, trainer_for, without_dropout

Method = Callable[..., Any]


def subclass(**methods: Method) -> type[Any]:
    return types.new_class("Theirs", (hf.Trainer,), exec_body=lambda names: names.update(methods))


def refused(path: Path, data: Any = None, **methods: Method) -> list[str]:
    """What `attach` would refuse; nothing of the trainer may have changed."""
    trainer = trainer_for("gpt2", path, data, cls=subclass(**methods), max_steps=4)
    before = attributes(trainer)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    found = [reason for reason, present in own_methods.refusals(trainer, own_methods.methods_of(trainer)).items() if present]
    assert differing(before, attributes(trainer)) == set()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    return found


# Steps.


def calls_super(self: Any, *args: Any, **kwargs: Any) -> Any:
    return hf.Trainer.training_step(self, *args, **kwargs)


def within_a_context(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
    with contextlib.nullcontext():
        return hf.Trainer.training_step(self, model, inputs, num_items_in_batch)


def same_by_hand(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
    model.train()
    inputs = self._prepare_inputs(inputs)
    with self.compute_loss_context_manager():
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
    self.accelerator.backward(loss / self.args.gradient_accumulation_steps)
    return loss.detach() / self.args.gradient_accumulation_steps


def throws_a_die(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
    """Which never shows a six, so that it does nothing; losses that are made up for it do not come from the same dice."""
    return None if random.random() > 1 else hf.Trainer.training_step(self, model, inputs, *args)


@pytest.mark.parametrize("step", [calls_super, within_a_context, same_by_hand, throws_a_die])
def test_steps_that_do_what_the_stock_one_does_are_accepted(step: Method, tmp_path: Path) -> None:
    assert refused(tmp_path, training_step=step) == []


def own_factor(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
    loss = self.compute_loss(model.train(), self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
    self.accelerator.backward(2 * loss)
    return loss.detach()


def adversarial(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
    loss = hf.Trainer.training_step(self, model, inputs, *args)
    with torch.no_grad():
        model.transformer.wte.weight.add_(0.1)
    hf.Trainer.training_step(self, model, inputs, *args)
    return loss


def mixes_late(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
    if self.state.global_step > 100:
        inputs = {name: value.flip(0) for name, value in inputs.items()}
    return hf.Trainer.training_step(self, model, inputs, *args)


def mixes_at_random(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
    if torch.rand(()) < 0.5:
        inputs = {**inputs, "labels": inputs["labels"].flip(0)}
    return hf.Trainer.training_step(self, model, inputs, *args)


def regularizes(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
    model(**inputs).loss.backward()
    return hf.Trainer.training_step(self, model, inputs, *args)


def counts(self: Any, *args: Any) -> Any:
    self.beta = getattr(self, "beta", 0.0) + 0.1
    return hf.Trainer.training_step(self, *args)


def accumulates(self: Any, *args: Any) -> Any:
    return hf.Trainer.training_step(self, *args) + hf.Trainer.training_step(self, *args)


def skips(self: Any, *args: Any) -> Any:
    return torch.zeros(())


def fails(self: Any, *args: Any) -> Any:
    return self.nothing_like_that


LOST = {
    own_factor: "something else than the loss on to backward",
    adversarial: "it changes weights",
    mixes_late: "something else than the batch",
    mixes_at_random: "something else than the batch",
    regularizes: "it runs the model beside compute_loss",
    counts: "it changes beta of the trainer",
    accumulates: "calls compute_loss 2 times",
    skips: "calls compute_loss 0 times",
    fails: "it raises AttributeError",
}


@pytest.mark.parametrize("step", LOST, ids=lambda step: step.__name__)
def test_what_a_step_does_besides_would_be_lost_and_is_named(step: Method, tmp_path: Path) -> None:
    (reason,) = refused(tmp_path, training_step=step)
    assert reason.startswith("Theirs.training_step: ")
    assert LOST[step] in reason
    assert "do it in compute_loss, which runs, or in a callback" in reason


def test_a_step_set_on_the_trainer_itself_is_looked_at_too(tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path)
    trainer.training_step = types.MethodType(accumulates, trainer)
    with pytest.raises(UnsupportedError, match="training_step that was set on the trainer: it calls compute_loss 2 times"):
        attached(trainer)


# Samplers.


def sampled_by(sampler: Callable[[Any], Any]) -> Method:
    def _get_train_sampler(self: Any, dataset: Any = None) -> Any:
        return sampler(self.train_dataset)

    return _get_train_sampler


class Easiest(SequentialSampler):
    """Short texts first, as a curriculum."""

    def __iter__(self) -> Any:
        rows: Any = self.data_source
        return iter(sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"])))


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (lambda rows: None, "SequentialSampler"),
        (RandomSampler, None),
        (lambda rows: RandomSampler(rows, replacement=True), None),
        (SequentialSampler, "SequentialSampler"),
        (Easiest, "Easiest"),
    ],
)
def test_samplers_that_choose_an_order_only_are_replaced(sampler: Any, order: str | None, tmp_path: Path) -> None:
    trainer = trainer_for("gpt2", tmp_path, cls=subclass(_get_train_sampler=sampled_by(sampler)))
    assert own_methods.training_data(trainer, own_methods.methods_of(trainer)).order == order


@pytest.mark.parametrize(
    "sampler",
    [
        lambda rows: WeightedRandomSampler([1.0 + row % 3 for row in range(len(rows))], len(rows)),
        lambda rows: range(10),  # leaves rows out
        lambda rows: [*range(len(rows)), 3],  # takes one twice
    ],
)
def test_samplers_that_take_some_rows_more_often_are_refused_with_what_to_do(sampler: Any, tmp_path: Path) -> None:
    (reason,) = refused(tmp_path, _get_train_sampler=sampled_by(sampler))
    assert reason.startswith("Theirs._get_train_sampler: ")
    assert "does not take all rows equally often" in reason
    assert "Weight each row's loss in compute_loss" in reason


# Loaders.


def loads(make: Callable[[Any], Any]) -> Method:
    def get_train_dataloader(self: Any) -> Any:
        self._train_dataloader = self.accelerator.prepare(make(self))  # as frameworks do
        return self._train_dataloader

    return get_train_dataloader


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda self: DataLoader(self.train_dataset.select(range(9)), collate_fn=Pad()), "reads other data (9 rows"),
        (lambda self: DataLoader(self.train_dataset.shuffle(seed=0), collate_fn=Pad()), "reads other data (24 rows"),
        (lambda self: DataLoader(Subset(self.train_dataset, range(24)), collate_fn=Pad()), "reads other data (a Subset"),
        (lambda self: iter([Pad()(texts(3))]), "it makes a "),
        (lambda self: DataLoader(self.no_data, collate_fn=Pad()), "it raises AttributeError"),
    ],
)
def test_loaders_of_other_data_are_refused(make: Any, says: str, tmp_path: Path) -> None:
    (reason,) = refused(tmp_path, datasets.Dataset.from_list(texts()), get_train_dataloader=loads(make))
    assert reason.startswith("Theirs.get_train_dataloader: ")
    assert says in reason


def test_the_collator_and_columns_of_a_loader_of_their_own_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not those of the trainer, which could not collate these rows: the sums are those of single units."""

    def own(self: Any) -> DataLoader[Any]:
        rows = self.train_dataset.remove_columns("note")
        return DataLoader(rows, collate_fn=Pad(), sampler=SequentialSampler(rows), batch_size=self.args.train_batch_size)

    drawn = [0, 3, 4, 9, 11, 17, 20]
    table = datasets.Dataset.from_list([{**example, "note": "x"} for example in texts()])
    cls = subclass(get_train_dataloader=loads(own), training_step=calls_super)
    model = without_dropout(tiny("bert"))
    sums = sums_of(model, tmp_path, monkeypatch, drawn, data=table, cls=cls, collator=lambda rows: {"note": rows})
    assert [record.message for record in caplog.records if "order" in record.message] == [
        "rows are not taken in the order of SequentialSampler: each step draws its units at random, all alike"
    ]
    parts = [Pad()([texts()[row]]) for row in drawn]
    scale = [1 / int((part["labels"] != -100).sum()) for part in parts]
    wanted, norms = clipped_sum(unit_gradients(model.eval(), loss_of("bert", model), parts), C, scale=scale)
    assert norms.min() < C < norms.max()
    assert distance(sums[0], wanted) <= ROUNDING


def named(rows: list[Any]) -> dict[str, Any]:
    """The columns that a collator is shown."""
    return {name: rows for name in rows[0]}


def needs_users(rows: list[Any]) -> dict[str, Any]:
    return {"user": [row["user"] for row in rows], **named(rows)}


@pytest.mark.parametrize(("collate", "shown"), [(named, False), (needs_users, True)], ids=["makes texts", "needs it"])
@pytest.mark.parametrize("table", [False, True], ids=["list", "datasets"])
def test_a_loader_of_all_columns_is_not_shown_the_one_of_units(collate: Any, shown: bool, table: bool, tmp_path: Path) -> None:
    def own(self: Any) -> DataLoader[Any]:
        rows = self.train_dataset
        return DataLoader(rows, collate_fn=collate, sampler=RandomSampler(rows), batch_size=2)

    rows: Any = [{**example, "user": row // 2} for row, example in enumerate(texts())]
    rows = datasets.Dataset.from_list(rows) if table else rows
    trainer = trainer_for("gpt2", tmp_path, rows, cls=subclass(get_train_dataloader=own))
    for unit, expected in (("user", shown), (None, True)):
        data = own_methods.training_data(trainer, own_methods.methods_of(trainer), unit)
        batch = data.collate([data.dataset[0], data.dataset[1]])
        assert ("user" in batch) is expected
        assert "input_ids" in batch


def test_the_columns_of_the_stock_loader_are_those_that_it_chose(tmp_path: Path) -> None:
    """Where the model takes whose text it is, it gets that."""
    rows: Any = [{**example, "user": row // 2} for row, example in enumerate(texts())]
    trainer = trainer_for("gpt2", tmp_path, rows, collator=named)
    data = own_methods.training_data(trainer, own_methods.methods_of(trainer), "user")
    assert "user" in data.collate([data.dataset[0]])
