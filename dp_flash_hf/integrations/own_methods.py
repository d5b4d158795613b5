"""Methods of a trainer that `DPCallback` takes the place of, where a subclass has its own: judged by what they do when run.

A loader of their own is built and looked at. A step of their own is taken beside the stock one, with the loss and the backward
pass replaced by records of how they are reached. Neither leaves a trace in the trainer. What is no different is replaced like
the stock one; what is different would be lost, and is a reason to refuse.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset as Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import Trainer

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.integrations.replacing import replace_attribute
from dp_flash_hf.mechanisms.fresh_randomness import fresh_randomness, same_randomness
from dp_flash_hf.training.batches import is_empty

REPLACED = ("training_step", "get_train_dataloader", "_get_train_sampler")
Methods = Mapping[str, Callable[..., Any]]

_ROUNDS = 8  # of steps that are compared
_LATE = 1_000_000  # a step after any that a schedule may wait for


def methods_of(trainer: Trainer) -> dict[str, Callable[..., Any]]:
    """The methods that `DPCallback` takes the place of, as this trainer has them."""
    return {name: getattr(trainer, name) for name in REPLACED}


def refusals(trainer: Any, own: Methods) -> dict[str, bool]:
    """What of the trainer's own methods would be lost that changes what is trained, and what to do instead.

    Args:
        trainer: with its data.
        own: `methods_of` the trainer, before anything was replaced.

    Returns:
        For `refuse`; empty where they are Transformers' own, or do the same.
    """
    if trainer.train_dataset is None or isinstance(trainer.train_dataset, Mapping):  # of which no units are drawn
        return {}
    if not any(_overridden(method, name) for name, method in own.items()):
        return {}
    try:
        data = training_data(trainer, own)
        if not _overridden(own["training_step"], "training_step"):
            return {}
        found = _lost_of_step(trainer, own["training_step"], data)
    except UnsupportedError as error:
        return {str(error): True}
    except Exception:  # of Transformers' own loader, which raises it again when training begins
        return {}
    return {
        f"{_owner(trainer, 'training_step')}: {found}, which would be lost, as DPCallback takes the steps itself; do it in "
        "compute_loss, which runs, or in a callback": found is not None
    }


@dataclass(frozen=True)
class TrainingData:
    """What the trainer would train with.

    Attributes:
        dataset: the rows of its `train_dataset`, in their order.
        collate: a list of them -> a mapping of model inputs.
        order: where it would take rows in an order of its own, what makes that order; it is given up for Poisson sampling.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    order: str | None


def training_data(trainer: Any, own: Methods, unit_column: str | None = None) -> TrainingData:
    """The data and collator of the loader that the trainer itself makes, which may leave out columns and wrap the collator.

    Transformers' own loader leaves out columns that the model does not take. One of another class may make a text of every
    column: where its collator works without the column that says whose a row is, it is not shown that.

    Args:
        trainer: with its data.
        own: `methods_of` the trainer, before anything was replaced.
        unit_column: `PrivacyConfig.privacy_unit`.

    Raises:
        UnsupportedError: the loader reads other data than `train_dataset`, or some rows more often than others.
    """
    by_default = not any(_overridden(own[name], name) for name in REPLACED[1:])
    with _a_look(trainer) as undo:
        replace_attribute(undo, trainer.accelerator, "prepare", lambda *given, **_: given if len(given) > 1 else given[0])
        if by_default:  # it may read all rows to know their lengths
            replace_attribute(undo, trainer, "_get_train_sampler", lambda *_: None)
        if by_default:
            loader = own["get_train_dataloader"]()
            return TrainingData(loader.dataset, loader.collate_fn, None)
        name = next(name for name in REPLACED[1:] if _overridden(own[name], name))
        where = _owner(trainer, name)
        try:
            with same_randomness(trainer.train_dataset):
                loader = own["get_train_dataloader"]()
                _require_same_rows(loader, trainer.train_dataset, where)
                order = _order(loader, where)
                collate = _without_column(loader, unit_column)
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(f"{where}: it cannot be looked at, as it raises {type(error).__name__}: {error}") from error
    return TrainingData(loader.dataset, collate, order)


@dataclass(frozen=True)
class _WithoutColumn:
    """A collator that is given rows without this column."""

    collate: Callable[[list[Any]], Any]
    name: str

    def __call__(self, rows: list[Any]) -> Any:
        return self.collate([{name: value for name, value in row.items() if name != self.name} for row in rows])


def _without_column(loader: Any, name: str | None) -> Callable[[list[Any]], Any]:
    """The loader's collator, without this column if its rows have that and it works without."""
    given: Callable[[list[Any]], Any] = loader.collate_fn
    rows = [copy.deepcopy(loader.dataset[row]) for row in range(min(2, len(loader.dataset)))] if name is not None else []
    if name is None or not rows or not all(isinstance(row, Mapping) and name in row for row in rows):
        return given
    without = _WithoutColumn(given, name)
    try:
        with same_randomness(given):
            without(rows)
    except Exception:  # it needs the column
        return given
    return without


def _require_same_rows(loader: Any, dataset: Any, where: str) -> None:
    if not isinstance(loader, DataLoader):
        raise UnsupportedError(
            f"{where}: it makes a {type(loader).__name__}, of which it is unknown what it reads; let it make a DataLoader of "
            "train_dataset"
        )
    found: Any = loader.dataset
    if found is dataset:
        return
    differs = f"a {type(found).__name__}"
    if isinstance(found, Table) and isinstance(dataset, Table):
        common = [name for name in found.column_names if name in dataset.column_names]
        tables = [table.select_columns(common).with_format("arrow")[:] for table in (found, dataset)]
        if common and tables[0].equals(tables[1]):
            return
        differs = f"{len(found)} rows with columns {found.column_names}"
    raise UnsupportedError(
        f"{where}: its loader reads other data ({differs}) than train_dataset ({len(dataset)} rows), from which units are "
        "drawn; prepare the data before the trainer is made, and give it what is to be read as train_dataset"
    )


def _order(loader: Any, where: str) -> str | None:
    """The sampler of a loader, unless its order is chance. Raises UnsupportedError where it takes some rows more often."""
    batches = loader.batch_sampler
    plain = batches is None or (type(batches) is BatchSampler and not batches.drop_last)
    if plain and isinstance(loader.sampler, RandomSampler):
        return None
    sampler = loader.sampler if plain else batches
    taken = Counter(tree_leaves(list(sampler)))
    if Ranks().size > 1:
        taken = sum(Ranks().gathered(taken), Counter())
    times = [taken[row] for row in range(len(loader.dataset))]
    if min(times) != max(times) or sum(times) != sum(taken.values()):
        most, least = times.index(max(times)), times.index(min(times))
        raise UnsupportedError(
            f"{where}: its {type(sampler).__name__} does not take all rows equally often (in one epoch, row {most} "
            f"{times[most]} times and row {least} {times[least]} times), which would be lost: every unit is drawn at the one "
            "rate that is accounted. Weight each row's loss in compute_loss instead, (weights * losses_of_rows).mean(), or "
            "give the trainer the rows that are to be trained on as train_dataset"
        )
    return None if isinstance(getattr(sampler, "sampler", None), RandomSampler) else type(sampler).__name__


def _lost_of_step(trainer: Any, step: Callable[..., Any], data: TrainingData) -> str | None:
    """What a `training_step` does that Transformers' own does not, in words; None for nothing.

    Both are run with equal batches and random numbers, at early and late steps. What it does at other steps only, or for
    batches unlike the first rows, is not seen: that would be lost, and no privacy with it.
    """
    with same_randomness(data.collate):
        rows = (copy.deepcopy(data.dataset[row]) for row in range(len(data.dataset)))
        try:
            batch = data.collate(list(islice((row for row in rows if not is_empty(row)), 2)))
        except Exception:  # so does the first batch of training, which says so
            return None
    for number in range(_ROUNDS):
        at = (0, 1, _LATE)[number % 3]
        found = []
        for taken in (step, lambda *given: Trainer.training_step(trainer, *given)):
            with fresh_randomness(seed=number, stream="a look at a step"):
                try:
                    found.append(_record(trainer, taken, copy.deepcopy(dict(batch)), at, random.Random(number)))
                except _LostError as error:
                    return str(error)
                except Exception as error:
                    return f"it raises {type(error).__name__} ({error}) where it is tried"
        one, stock = found
        if len(one.given) != 1:
            return f"it calls compute_loss {len(one.given)} times"
        if not _equal(one.given, stock.given):
            return "it gives compute_loss something else than the batch"
        if not _equal(one.gradients, stock.gradients):
            return "it passes something else than the loss on to backward"
        if not _equal(one.returned, stock.returned):
            return "it returns something else than the loss"
        if changed := sorted(one.changed - stock.changed):
            return f"it changes {', '.join(changed)} of the trainer"
    return None


@dataclass(frozen=True)
class _Record:
    """What was reached in one step: what `compute_loss` was given, what came back to its losses, and was left behind."""

    given: list[Any]
    gradients: list[Any]
    returned: Any
    changed: set[str]


class _LostError(Exception):
    """A step does something that cannot be let run."""


def _record(trainer: Any, step: Callable[..., Any], batch: dict[str, Any], at: int, chance: random.Random) -> _Record:
    model, losses, given = trainer.model, [], []

    def compute_loss(called: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        context = (
            called is model,
            model.training,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(trainer.args.device.type),
        )
        given.append((dict(inputs), args, kwargs, context))
        losses.append(torch.tensor(chance.uniform(1, 2), device=trainer.args.device, requires_grad=True))
        return losses[-1]

    def forward(*_: Any) -> None:
        raise _LostError("it runs the model beside compute_loss")

    with _a_look(trainer) as undo:
        state = copy.copy(trainer.state)
        for owner, name, value in (
            (state, "global_step", at),
            (state, "epoch", float(at)),
            (trainer, "state", state),
            (trainer, "compute_loss", compute_loss),
            (trainer.accelerator, "backward", lambda loss, **_: loss.backward()),
        ):
            replace_attribute(undo, owner, name, value)
        parts = trainer.args.gradient_accumulation_steps
        replace_attribute(undo, trainer, "current_gradient_accumulation_steps", parts, may_be_new=True)  # `train` makes it
        undo.callback(model.register_forward_pre_hook(forward).remove)
        for module, training in [(module, module.training) for module in model.modules()]:
            undo.callback(setattr, module, "training", training)
        undo.enter_context(_NoWrites(value for value in vars(trainer).values() if isinstance(value, nn.Module)))
        before = dict(vars(trainer))
        returned = step(model, batch, None)
        changed = {name for name, value in vars(trainer).items() if before.get(name, vars) is not value}
    return _Record(given, [loss.grad for loss in losses], returned, changed)


class _NoWrites(TorchDispatchMode):
    """Within it nothing is written into the parameters and buffers of these modules."""

    def __init__(self, modules: Iterator[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = {value.data_ptr() for module in modules for value in (*module.parameters(), *module.buffers())} - {0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and any(
            isinstance(value, Tensor) and value.data_ptr() in self._kept for value in tree_leaves(args)
        ):
            raise _LostError("it changes weights")
        return func(*args, **(kwargs or {}))


@contextmanager
def _a_look(trainer: Any) -> Iterator[ExitStack]:
    """Within the context the trainer's methods may run; afterwards it and its accelerator have the attributes that they had."""
    before = [(vars(owner), dict(vars(owner))) for owner in (trainer, trainer.accelerator)]
    try:
        with ExitStack() as undo:
            yield undo
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)


def _overridden(method: Any, name: str) -> bool:
    return getattr(method, "__func__", None) is not getattr(Trainer, name)


def _owner(trainer: Any, name: str) -> str:
    """Where the trainer's method comes from: `Class.method`."""
    owner = next(base.__name__ for base in type(trainer).__mro__ if name in vars(base))
    return f"{owner}.{name}" if owner != "Trainer" else f"{name} that was set on the trainer"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
