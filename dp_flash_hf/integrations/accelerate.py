"""Private training in a loop of one's own, with Accelerate: `make_private(...)`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.operations import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dp_flash_hf import validation
from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.model_loss import model_loss
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, invalid
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.draws import DRAW
from dp_flash_hf.training.refusals import accelerator_refusals, refuse, takes_metrics
from dp_flash_hf.training.session import PrivateTraining, unwrapped

LossFunction = Callable[[nn.Module, dict[str, Any]], Tensor]


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
    spend_log: str | Path | None = None,
    public_state: Collection[str] = (),
) -> PrivateLoop:
    """Make a training loop private, with the guarantee of `DPCallback`.

    The loop takes its batches and its gradients from what this returns::

        private = make_private(model=model, optimizer=optimizer, train_dataset=dataset, collate_fn=collate,
                               accelerator=accelerator, config=PrivacyConfig(...), expected_batch_size=64, epochs=3)
        for batch in private.loader:        # one Poisson draw for every step left, some of them empty
            loss = private.backward(batch)  # clipped and noised gradients are in .grad
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
        print(private.report())

    From now on `optimizer.step()` raises PrivacyError for gradients that are not those of `backward`, until `stop()`. The
    dataset is given here and not to `accelerator.prepare`, which would shuffle it into batches of one size: the guarantee is
    that of Poisson sampling.

    Args:
        model: before or after `accelerator.prepare`.
        optimizer: before or after `accelerator.prepare`; it updates exactly what the model trains.
        train_dataset: one example per row, read by `train_dataset[row]`.
        collate_fn: a list of examples -> a mapping of model inputs, one row for each example or all flattened into one.
        accelerator: its devices, processes and mixed precision ("bf16" or "no") are used.
        config: the privacy parameters.
        expected_batch_size: units in a step, on average, of all processes; how many a step draws varies.
        steps: how long.
        epochs: instead of steps, draws that see every unit once on average.
        max_rows_per_device: rows that are computed at once; a unit is never split.
        max_tokens_per_device: instead, tokens that are computed at once, padding included.
        num_workers: processes that read and collate, see torch's DataLoader.
        loss_fn: (model, batch) -> a scalar, a mean over the batch's rows or labels; None takes the loss that a Transformers
            model returns.
        strategy: see `ClippingEngine`. Like the two maxima it changes speed and memory, never what is released.
        spend_log: a file, best beside the checkpoints, to which every step is written before it is released, so that steps lost
            in a crash still count; earlier runs that it holds count too. Keep it private.
        public_state: as of `DPCallback`.

    Returns:
        The loop's loader, backward pass and report.

    Raises:
        UnsupportedError: for settings and data under which privacy would be lost.
        PrivacyError: the optimizer has other parameters, or the spend log cannot be continued.
        ValueError: an argument is out of range, or no noise keeps the budget.
    """
    _refuse_settings(accelerator)
    if not isinstance(config, PrivacyConfig):
        raise invalid("config", expected="a PrivacyConfig", actual=config, remedy="write config=PrivacyConfig(...)")
    if (steps is None) == (epochs is None):
        raise invalid("steps, epochs", expected="exactly one of them", actual=(steps, epochs), remedy="set one")
    if steps is not None:
        validation.whole_number("steps", steps, remedy="set steps")
    validation.whole_number("max_rows_per_device", max_rows_per_device, remedy="set max_rows_per_device")
    training = PrivateTraining(
        config,
        train_dataset,
        LoopAdapter(unwrapped(model), accelerator, loss_fn),
        expected_batch_size=expected_batch_size,
        steps=steps,
        epochs=epochs or 0.0,
        max_examples=max_rows_per_device,
        max_tokens=max_tokens_per_device,
        strategy=strategy,
        public_state=public_state,
    )
    try:
        if spend_log is not None:
            training.open_spend_log(spend_log)
        training.start(model, optimizer)
    except BaseException:
        training.stop()
        raise
    return PrivateLoop(training, Draws(training, collate_fn, num_workers), accelerator)


@dataclass(frozen=True)
class LoopAdapter:
    """The `TrainingAdapter` of a loop with Accelerate."""

    model: Any
    accelerator: Accelerator
    loss_fn: LossFunction | None

    @property
    def rows_per_example(self) -> int:
        """1: pairs of rows are TRL's."""
        return 1

    @property
    def reduced_precision(self) -> bool:
        """Whether the loop computes under bfloat16 autocast."""
        return bool(self.accelerator.mixed_precision == "bf16")

    def to_rows(self, collated: Mapping[str, Any]) -> dict[str, Any]:
        """The batch on the model's device."""
        return dict(send_to_device(collated, next(self.model.parameters()).device))  # type: ignore[no-untyped-call]

    def model_loss(self, batch: dict[str, Any], num_items: Tensor | None) -> Tensor:
        """What the user's loss function returns, or the model."""
        with self.accelerator.autocast():
            if self.loss_fn is None:
                return model_loss(self.model, batch, num_items)
            return self.loss_fn(self.model, batch)

    def without_metrics(self) -> AbstractContextManager[None]:
        """Nothing: such a loop logs for itself."""
        return nullcontext()


class PrivateLoop:
    """What `make_private` returns: the draws, the backward pass and the report of one's own training loop.

    It can be given to `accelerator.register_for_checkpointing`, which saves and loads what was spent with the weights.
    Schedulers that step once for every optimizer step work as they are. One that steps by a metric is refused where the
    accelerator has it, for the loss that `backward` returns has no noise; one that the loop steps itself is not seen. Gradient
    accumulation is not needed: a batch of `loader` is a whole step, computed in parts that fit.

    **Edge cases.** An empty draw must be given to `backward` like any other. A unit whose gradient is not finite adds zero.
    When computing a batch fails, the same batch may be given again; see `backward`.

    Args:
        training: started.
        draws: of this training.
        accelerator: whose settings are checked again at the first step.
    """

    def __init__(self, training: PrivateTraining, draws: Draws, accelerator: Accelerator) -> None:
        self._training, self._draws, self._accelerator = training, draws, accelerator

    @property
    def loader(self) -> Draws:
        """One Poisson draw, collated, for every step that is left; the next raises PrivacyError if one was left out.

        Iterating again begins with the draw that waits for `backward`, if there is one: to look at a draw leaves none out.
        """
        return self._draws

    @property
    def steps_left(self) -> int:
        """Steps that may still be taken."""
        return self._training.mechanism.account.steps_left

    def backward(self, batch: MutableMapping[str, Any]) -> Tensor:
        """Make the gradients of one step, clipped by unit and noised, of one batch of `loader`; batch and step are then spent.

        The first call proves on the data that the model and its loss keep units apart, see `preflight`. When computing fails,
        for want of memory, say, `.grad` is empty and the batch as before: it may be given again, unless several processes
        train. Where it can never be computed, no further step can be taken.

        Args:
            batch: as `loader` gave it.

        Returns:
            The mean loss per label, a scalar, which holds no noise: it is not private.

        Raises:
            PrivacyError: with nothing released, for a batch that is not fresh from the loader or was changed since, before the
                `optimizer.step()` of the step before, when `.grad` holds anything else, and beyond the planned steps; and where
                units are coupled.
            UnsupportedError: the model's loss or the layout of its batches is none of those known.
        """
        self._draws.require_going_on()
        mechanism = self._training.mechanism
        mechanism.require_next()
        self._draws.require_waiting(batch)
        try:
            loss = self._step(batch)
        except BaseException:
            if mechanism.released:  # an interrupt: what was released is a step, which can be taken
                self._draws.use_up(batch)
            else:
                self._training.drop_step()  # of a part of the draw, and without noise: another attempt would add to it
                if Ranks().size > 1:
                    self._draws.end()
            raise
        self._draws.use_up(batch)
        return loss

    def report(self) -> PrivacyReport:
        """What was spent so far, and on which assumptions."""
        return self._training.report()

    def stop(self) -> None:
        """Give model and optimizer back as they were; whatever they do from now on is not private.

        It also closes the spend log, which another run may then write.
        """
        self._training.stop()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to be continued: public values only."""
        return self._training.mechanism.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a checkpoint, also one with other noise or sampling: what both parts spend is then added up.

        Args:
            state: of `state_dict`.

        Raises:
            PrivacyError: it is damaged, or cannot be added up, see `RunAccount.load_state_dict`.
            ValueError: no noise keeps the budget after what was spent.
        """
        self._training.mechanism.load_state_dict(state)
        self._draws.renumber()

    def _step(self, inputs: Mapping[str, Any]) -> Tensor:
        if not self._training.checked:
            _refuse_settings(self._accelerator)  # again: they may have changed
            self._training.check(self._draws.loader())
        loss = self._training.add(inputs)
        self._training.mechanism.release()
        return loss


class Draws:
    """The draws of a loop, in order. None may be left out: a step that is not taken tells what was drawn.

    Iterating gives one draw for every step that is left, and each has to be used up before the next one is given. `len()` is
    the steps left.

    Args:
        training: whose data are drawn from.
        collate_fn: of the user.
        num_workers: processes that read and collate.
    """

    def __init__(self, training: PrivateTraining, collate_fn: Callable[[list[Any]], Any], num_workers: int) -> None:
        self._training, self._collate_fn, self._num_workers = training, collate_fn, num_workers
        self._waiting: dict[str, Any] | None = None  # the draw that `backward` did not take yet
        self._ended = False  # by an error after which going on would leave a draw out, or ranks out of step

    def __len__(self) -> int:
        return self._training.mechanism.account.steps_left

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.require_going_on()
        batches, draw = iter(self.loader()), self._waiting
        while draw is not None or (len(self) and (draw := self._next(batches)) is not None):
            yield draw
            if self._waiting is not None:
                raise PrivacyError(
                    "the last batch was not given to private.backward. Every batch has to be, an empty one too: skipping it "
                    "would reveal that it was empty. After an error give the same batch again, or iterate over private.loader "
                    "again, which begins with it"
                )
            draw = None

    def loader(self) -> DataLoader[Any]:
        """What reads and collates a draw for every step that is left, but for the one that waits."""
        waiting = int(self._waiting is not None)
        return self._training.loader(
            self._training.dataset,
            self._collate_fn,
            steps=len(self) - waiting,
            first_step=self._training.mechanism.account.taken + waiting,
            num_workers=self._num_workers,
            pin_memory=torch.accelerator.is_available(),
        )

    def require_going_on(self) -> None:
        """Raise PrivacyError where an error ended the loop."""
        if self._ended:
            raise PrivacyError(
                "the loop ended with an error: to go on could leave a draw out, or processes out of step. Fix what failed, "
                "and start again from the last checkpoint"
            )

    def require_waiting(self, batch: Mapping[str, Any]) -> None:
        """Raise PrivacyError unless this batch is the draw that waits to be used."""
        tag = batch.get(DRAW)
        if self._waiting is None or tag is None or not torch.equal(tag.cpu(), self._waiting[DRAW].cpu()):
            raise PrivacyError(
                "the batch is not the one that private.loader drew last, or was used before, so its sampling is not what is "
                "accounted: give backward each batch of private.loader once, in order"
            )

    def use_up(self, batch: MutableMapping[str, Any]) -> None:
        """Take this batch as the step of the draw that waits; neither it nor a copy of it is a draw any more."""
        del batch[DRAW]
        self._waiting = None

    def end(self) -> None:
        """Give no further draw."""
        self._ended = True

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next draw, which waits to be used from now on; None after the last one."""
        try:
            batch = next(batches, None)
        except Exception:
            self.end()  # examples that cannot be read or collated are part of a draw, which would be left out
            raise
        if batch is not None:
            self._waiting = batch
            self.renumber()  # draws that were read ahead of a checkpoint that was loaded have numbers of before
        return self._waiting

    def renumber(self) -> None:
        """The draw that waits, if there is one, is the next to be released."""
        if self._waiting is not None:
            self._waiting[DRAW][0] = self._training.mechanism.account.taken


def _refuse_settings(accelerator: Accelerator) -> None:
    refuse(
        {
            **accelerator_refusals(accelerator),
            "a learning rate schedule that steps by a metric: what private.backward returns has no noise, and would choose the "
            "learning rate; use one that steps by the number of steps, or leave it out of accelerator.prepare and step it "
            "yourself, by results on held-out data only": any(takes_metrics(one) for one in accelerator._schedulers),
            "gradient_accumulation_steps: every batch of the loader is a whole step already; leave it at 1": (
                accelerator.gradient_accumulation_steps != 1
            ),
        }
    )
