"""Private training in a loop of one's own, with Accelerate: `make_private(...)`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.operations import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.refusals import accelerator_refusals, refuse
from dp_flash_hf.training.session import PrivateTraining, unwrapped

LossFunction = Callable[[nn.Module, dict[str, Any]], Tensor]

_DRAW = "dp_draw"  # key of a batch, until it is used: which draw it is


def make_private(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_dataset: Any,
    collate_fn: Callable[[list[Any]], Any],
    accelerator: Accelerator,
    config: PrivacyConfig,
    expected_batch_size: int,
    steps: int | None = None,
    epochs: float | None = None,
    max_rows_per_device: int = 8,
    max_tokens_per_device: int | None = None,
    num_workers: int = 0,
    loss_fn: LossFunction | None = None,
    strategy: Strategy = "auto",
    spend_record: str | Path | None = None,
) -> PrivateLoop:
    """Make a training loop private, with the guarantee of `DPCallback`.

        private = make_private(model=model, optimizer=optimizer, train_dataset=dataset, collate_fn=collate,
                               accelerator=accelerator, config=PrivacyConfig(...), expected_batch_size=64, epochs=3)
        for batch in private.loader:        # one Poisson draw for every step left, some of them empty
            loss = private.backward(batch)  # clipped and noised gradients are in .grad
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
        print(private.report())

    From now on `optimizer.step()` raises PrivacyError for gradients that are not those of `backward`.

    model, optimizer: before or after `accelerator.prepare`; the optimizer updates exactly what the model trains.
    train_dataset: one example per row, read by `train_dataset[row]`.
    collate_fn: a list of examples -> a mapping of model inputs.
    expected_batch_size: units in a step, on average, of all processes together.
    steps, or epochs (draws that see every unit once on average): how long.
    max_rows_per_device, max_tokens_per_device: what is computed at once, in rows, or instead in tokens, padding included.
    loss_fn: (model, batch) -> a scalar, a mean over the batch's rows or labels; default: the loss of a Transformers model.
    strategy: see `ClippingEngine`.
    spend_record: a file, best beside the checkpoints, to which every step is written before it is released, so that steps lost
        in a crash still count; earlier runs that it holds count too. Keep it private. `stop()` lets another run write it.

    Raises UnsupportedError for settings and data under which privacy would be lost, PrivacyError for an optimizer of other
    parameters, ValueError for arguments out of range and a budget that cannot be met.
    """
    _refuse_settings(accelerator)
    if not isinstance(config, PrivacyConfig):
        raise invalid("config", expected="a PrivacyConfig", actual=config, remedy="make one")
    if (steps is None) == (epochs is None):
        raise invalid("steps, epochs", expected="exactly one of them", actual=(steps, epochs), remedy="give one")
    for name, value in (("steps", steps), ("max_rows_per_device", max_rows_per_device)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise invalid(name, expected="a whole number >= 1", actual=value, remedy=f"set {name}")
    training = PrivateTraining(
        config,
        train_dataset,
        expected_batch_size=expected_batch_size,
        steps=steps,
        epochs=epochs or 0.0,
        max_examples=max_rows_per_device,
        max_tokens=max_tokens_per_device,
        strategy=strategy,
    )
    if spend_record is not None:
        training.open_spend_log(spend_record)
    try:
        training.start(model, optimizer)
    except BaseException:
        training.mechanism.account.close()
        raise
    return PrivateLoop(training, model, collate_fn, accelerator, num_workers, loss_fn)


class PrivateLoop:
    """What `make_private` returns; it can be given to `accelerator.register_for_checkpointing`."""

    def __init__(
        self,
        training: PrivateTraining,
        model: nn.Module,
        collate_fn: Callable[[list[Any]], Any],
        accelerator: Accelerator,
        num_workers: int,
        loss_fn: LossFunction | None,
    ) -> None:
        self._training, self._model, self._accelerator = training, unwrapped(model), accelerator
        self._collate_fn, self._num_workers = collate_fn, num_workers
        self._loss_fn = loss_fn or _ModelLoss(self._model)
        self._checked = False
        self.waiting: dict[str, Any] | None = None  # the draw of `loader` that `backward` did not take yet
        self.ended = False  # by an error after which going on would leave a draw out, or ranks out of step
        self._draws = itertools.count()

    @property
    def loader(self) -> Draws:
        """One Poisson draw, collated, for every step that is left; the next raises PrivacyError if one was left out.

        Iterating anew begins with the draw that waits for `backward`, if there is one: to look at a draw leaves none out.
        """
        return Draws(self, self._loader())

    @property
    def steps_left(self) -> int:
        """Steps that may still be taken."""
        return self._training.mechanism.account.steps_left

    def backward(self, batch: MutableMapping[str, Any]) -> Tensor:
        """Make the gradients of one step, clipped by unit and noised, of one batch of `loader`; batch and step are then spent.

        Returns the mean loss per label, which holds no noise: it is not private. The first call proves on the data that the
        model and its loss keep units apart.

        Raises PrivacyError, with nothing released, for a batch that is not fresh from the loader, before the `optimizer.step()`
        of the step before, when `.grad` holds anything else, and beyond the planned steps; UnsupportedError and PrivacyError
        for what the proof finds. When computing fails, for want of memory, say, `.grad` is empty and the batch as before: it
        may be given again, unless several processes train. Where it can never be computed, no further step can be taken.
        """
        self.require_going_on()
        self._training.mechanism.require_next()
        if self.waiting is None or int(batch.get(_DRAW, -1)) != int(self.waiting[_DRAW]):
            raise PrivacyError(
                "the batch is not the one that private.loader drew last, or was used before: its sampling would not be what is "
                "accounted"
            )
        try:
            loss = self._step({name: value for name, value in batch.items() if name != _DRAW})
        except BaseException:
            if self._training.mechanism.released:  # an interrupt: what was released is a step, which can be taken
                self._use_up(batch)
            else:
                self._model.zero_grad()  # of a part of the draw, and without noise: another attempt would add to it
                self.ended = Ranks().size > 1
            raise
        self._use_up(batch)
        return loss

    def report(self) -> PrivacyReport:
        """What was spent so far, and on which assumptions."""
        return self._training.report()

    def stop(self) -> None:
        """Give model and optimizer back as they were; whatever they do from now on is not private."""
        self._training.stop()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: public numbers only."""
        return self._training.mechanism.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the books of a checkpoint, also one with other noise or sampling: both parts are then added up.

        Raises PrivacyError where they cannot be, see `DPSGD.load_state_dict`.
        """
        self._training.mechanism.load_state_dict(state)

    def require_going_on(self) -> None:
        """Raise PrivacyError where an error ended the loop."""
        if self.ended:
            raise PrivacyError(
                "the loop ended with an error: to go on could leave a draw out, or processes out of step. Mend what failed, "
                "and start again from the last checkpoint"
            )

    def draw(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next draw, which waits for `backward` from now on; None after the last one."""
        try:
            batch = next(batches, None)
        except Exception:
            self.ended = True  # examples that cannot be read or collated are part of a draw, which would be left out
            raise
        if batch is not None:
            self.waiting = {**batch, _DRAW: torch.tensor(next(self._draws))}
        return self.waiting

    def _use_up(self, batch: MutableMapping[str, Any]) -> None:
        del batch[_DRAW]
        self.waiting = None

    def _step(self, inputs: dict[str, Any]) -> Tensor:
        if not self._checked:
            _refuse_settings(self._accelerator)  # again: they may have changed
            move = cast(Callable[..., dict[str, Any]], send_to_device)
            self._training.check(
                self._loader(),
                self._loss,
                lambda collated: move(collated, next(self._model.parameters()).device),
                reduced_precision=self._accelerator.mixed_precision == "bf16",
            )
            self._checked = True
        loss = self._training.add(inputs)
        self._training.mechanism.release()
        return loss

    def _loader(self) -> DataLoader[Any]:
        return self._training.loader(
            self._training.dataset,
            self._collate_fn,
            steps=self.steps_left,
            num_workers=self._num_workers,
            pin_memory=torch.accelerator.is_available(),
        )

    def _loss(self, batch: dict[str, Any], num_items: Tensor | None) -> Tensor:
        with self._accelerator.autocast():
            if isinstance(self._loss_fn, _ModelLoss):
                return self._loss_fn(batch, num_items)
            loss: Tensor = self._loss_fn(self._model, batch)
            return loss


class Draws:
    """The draws of a loop, in order, of which none may be left out: a step that is not taken tells what was drawn."""

    def __init__(self, loop: PrivateLoop, loader: DataLoader[Any]) -> None:
        self._loop, self._loader = loop, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loop = self._loop
        loop.require_going_on()
        batches, draw = iter(self._loader), loop.waiting
        while draw is not None or (loop.steps_left and (draw := loop.draw(batches)) is not None):
            yield draw
            if loop.waiting is not None:
                raise PrivacyError(
                    "the last draw was left out: also an empty one takes a noisy step, or its absence would tell that it was "
                    "empty. Call private.backward(batch) for every batch, and after an error again with the same batch, which "
                    "iterating anew hands out again"
                )
            draw = None


class _ModelLoss:
    """The loss of a Transformers model, which is told what to divide by where it takes that."""

    def __init__(self, model: Any) -> None:
        self.model = model
        inner = getattr(model, "_orig_mod", model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT's forward takes anything
        parameters = inspect.signature(type(inner).forward).parameters
        # With a cache, models do not look for the texts of a flattened row.
        self.always = {"use_cache": False} if "use_cache" in parameters else {}
        self.takes_count = any(
            name == "num_items_in_batch" or parameter.kind is parameter.VAR_KEYWORD for name, parameter in parameters.items()
        )

    def __call__(self, batch: dict[str, Any], num_items: Tensor | None) -> Tensor:
        count = {"num_items_in_batch": num_items} if self.takes_count and num_items is not None else {}
        loss = getattr(self.model(**{**self.always, **batch, **count}), "loss", None)
        if not isinstance(loss, Tensor):
            raise UnsupportedError("the model returns no loss for these inputs: give it labels, or make_private a loss_fn")
        return loss


def _refuse_settings(accelerator: Accelerator) -> None:
    refuse(
        {
            **accelerator_refusals(accelerator),
            "gradient_accumulation_steps: every batch of the loader is a whole step already; leave it at 1": (
                accelerator.gradient_accumulation_steps != 1
            ),
        }
    )
