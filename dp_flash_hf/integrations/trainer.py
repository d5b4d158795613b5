"""Private training with `Trainer`: `DPCallback(config).attach(trainer)`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from dp_flash_hf.accounting.spend_log import FILE_NAME
from dp_flash_hf.distributed import Ranks, logger_of_all_ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.integrations import checkpoints, own_methods
from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.integrations.attaching import SelfAttaching, require_transformers_trainer
from dp_flash_hf.integrations.checkpoints import Checkpoint
from dp_flash_hf.integrations.evaluation import EvaluationData
from dp_flash_hf.integrations.logs import PrivateLogs, show_epsilon
from dp_flash_hf.integrations.replacing import put_first, replace_attribute
from dp_flash_hf.integrations.trainer_adapter import TrainerAdapter
from dp_flash_hf.integrations.trainer_settings import refuse_search, refuse_settings, trained_module
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.batches import UNITS, PoissonBatches, WithUnits, steps_per_epoch
from dp_flash_hf.training.dp_sgd import DPSGD
from dp_flash_hf.training.session import PrivateTraining, require_finite_weights
from dp_flash_hf.training.tried_units import lengths_of_units
from dp_flash_hf.training.unused import start_without_unused

logger = logger_of_all_ranks(__name__)


class DPCallback(SelfAttaching, ExportableState):
    """Differentially private training for a `Trainer` or `Seq2SeqTrainer`, and TRL's trainers of examples and pairs.

    Two lines are added to a training::

        dp = DPCallback(PrivacyConfig(target_epsilon=8.0, target_delta=1e-6)).attach(trainer)
        trainer.train()
        print(dp.report().to_text())

    Where a framework builds the trainer, hand it over like any other callback (`callbacks=[DPCallback(config)]`, or
    `add_callback`): it attaches itself when `train` is called. See also `private`.

    **Guarantee.** The weights after training, and all checkpoints on the way to them, are as a whole (epsilon,
    delta)-differentially private under adding or removing one unit, an example or all rows of one `privacy_unit`. Each step
    sums the units' gradients, clipped to `PrivacyConfig.max_grad_norm`, adds Gaussian noise, and divides by the expected batch
    size: DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133). Steps are drawn by Poisson sampling, which is what is
    accounted. Losses that are logged hold no noise, and are named `not_private/...`. Evaluation on held-out data is the
    trainer's own; results on rows that are found to be training data choose nothing, and are named like losses. The
    accountant's assumptions are in `report()`.

    **What settings of** `TrainingArguments` **mean.**

    - `per_device_train_batch_size * gradient_accumulation_steps`, times the number of processes, is the *expected* batch
      size; how many units a step draws varies. They are computed in physical batches of at most `per_device_train_batch_size`
      rows, and a unit is never split. With DDP or FSDP2 every process computes its share of one draw.
    - `max_steps`, or `num_train_epochs` (draws that see every unit once on average), is what the noise is calibrated for.
      Training ends there, or earlier where steps were lost after a checkpoint and count.
    - `max_grad_norm` is not used: `PrivacyConfig.max_grad_norm` clips every unit instead.
    - Optimizer, learning rate schedule, weight decay, precision (bfloat16, not float16), gradient checkpointing and logging
      are as always. Settings under which the guarantee would not hold are refused, all in one message.

    **Edge cases.**

    - Every noisy step is written to a spend log in `output_dir` before it is released. A run that is killed has its steps
      there, and they count, with those of earlier trainings in that folder.
    - `trainer.train(resume_from_checkpoint=True)` continues the newest checkpoint that is whole. Steps after it are lost
      from the weights and not from the account: with a target epsilon, training ends so many steps early, or has more noise.
    - An empty draw takes a noisy step like any other, or its absence would tell that it was empty.
    - A unit whose gradient is not finite adds zero. Weights that are not finite end training.
    - A trainer with `model_init` makes a new model for each `train()`, and all of them spend one budget.

    Args:
        config: the privacy parameters.
        max_tokens_per_device: compute physical batches of at most so many tokens instead, padding included (or of one unit):
            texts of like length in one, with padding cut off. Faster and leaner where lengths differ.
        strategy: see `ClippingEngine`. Like `max_tokens_per_device` it changes speed and memory, never what is released.
        public_state: names of buffers and frozen parameters that may change in training, as what they hold comes from no data
            (a step counter, say); any other that changes is an error, see `WatchedState`.

    Raises:
        ValueError: the configuration is not a PrivacyConfig.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        *,
        max_tokens_per_device: int | None = None,
        strategy: Strategy = "auto",
        public_state: Collection[str] = (),
    ) -> None:
        if not isinstance(config, PrivacyConfig):
            raise invalid("config", expected="a PrivacyConfig", actual=config, remedy="write DPCallback(PrivacyConfig(...))")
        self.config, self.max_tokens_per_device, self.strategy = config, max_tokens_per_device, strategy
        self.public_state = tuple(public_state)
        self._training: PrivateTraining | None = None  # stays after `detach`, to report
        self._trainer: Any = None  # while attached
        self._own: dict[str, Callable[..., Any]] = {}  # methods of the trainer that ours call
        self._attached = ExitStack()  # what `detach` undoes
        self._while_training: ExitStack | None = None  # what the end of `train` undoes
        self._saving: Path | None = None  # the checkpoint that is being written
        self._evaluation = EvaluationData()
        self._logs = PrivateLogs(self._evaluation)

    def attach(self, trainer: Trainer) -> DPCallback:
        """Make this trainer train privately.

        Attach after everything that the trainer is to have: data, callbacks, adapters, frozen parameters. `detach` undoes it.

        Args:
            trainer: with its model, data and arguments; it is changed in place.

        Returns:
            The callback itself.

        Raises:
            UnsupportedError: for settings under which privacy would be lost, with nothing changed; where this callback is
                attached already, or the trainer has another one.
            ValueError: an argument is out of range, or no noise keeps the budget, with nothing changed.
        """
        require_transformers_trainer(trainer)
        if self._trainer is not None:
            raise UnsupportedError("this DPCallback is attached already; make one for each trainer, or detach() it first")
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(callback, DPCallback) and callback is not self for callback in callbacks):
            raise UnsupportedError("the trainer has another DPCallback; attach one only")
        own = own_methods.methods_of(trainer)
        refuse_settings(trainer, own, self._evaluation)
        args = trainer.args
        training = PrivateTraining(
            self.config,
            trainer.train_dataset,
            TrainerAdapter(trainer),
            expected_batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            steps=args.max_steps if args.max_steps > 0 else None,
            epochs=args.num_train_epochs,
            max_examples=args.per_device_train_batch_size,
            max_tokens=self.max_tokens_per_device,
            strategy=self.strategy,
            public_state=self.public_state,
        )
        overrides: dict[str, Callable[..., Any]] = {
            "train": self._train,
            "log": lambda *logged, **kwargs: self._logs.log(trainer, own["log"], training.mechanism, *logged, **kwargs),
            "evaluate": partial(self._evaluation.evaluate, trainer, trainer.evaluate),
            "_save_checkpoint": self._save_checkpoint,
            "_get_num_items_in_batch": self._num_items,
            "get_train_dataloader": self._train_dataloader,
            "training_step": self._training_step,
            "num_examples": self._num_examples,
            "_clip_grad_norm": lambda *args, **kwargs: None,  # would rescale by a norm taken before noise
            "_get_grad_norm": lambda *args, **kwargs: None,  # would log that norm
            "hyperparameter_search": refuse_search,
            "floating_point_ops": lambda *args, **kwargs: 0,  # would log how many tokens were drawn
        }
        if hasattr(trainer, "_sync_replicated_trainable_parameters"):  # which older versions have not
            # Would also add gradients of adapters on a sharded model up as they arise, before they are clipped.
            overrides["_sync_replicated_trainable_parameters"] = lambda model: Ranks().make_equal(model)
        called = ("train", "log", "_save_checkpoint", "_get_num_items_in_batch", "num_examples")
        own.update((name, getattr(trainer, name)) for name in called)
        with ExitStack() as undo:
            for name, override in overrides.items():
                replace_attribute(undo, trainer, name, override)
            undo.callback(self._restate, trainer, _stated(trainer).get(type(self).__name__))
            put_first(undo, callbacks, self)  # so that no other callback is shown a gradient without noise
            self._attached = undo.pop_all()
        self._training, self._trainer, self._own = training, trainer, own
        return self

    def detach(self) -> None:
        """Undo `attach`: the trainer is as it was before, attribute by attribute, and trains without privacy from now on.

        What training itself changes stays: weights, optimizer, history. So does `report()`. A callback that was added to the
        trainer before `attach` is in its list again, and attaches itself when `train` is called, unless it is removed.
        Attributes that somebody else replaced since `attach` are put back too. Where nothing is attached, nothing happens.

        Raises:
            PrivacyError: the trainer is training; the rest would be without noise.
        """
        if self._while_training is not None:
            raise PrivacyError(
                "detach() during training, whose remaining steps would be without noise: end it first "
                "(control.should_training_stop = True)"
            )
        if self._trainer is None:
            return
        self._attached.close()
        self._trainer, self._own = None, {}

    def _restate(self, trainer: Any, before: Any) -> None:
        """Put back what the trainer's state said of this callback, which `train` changes."""
        _stated(trainer).pop(type(self).__name__, None)
        if before is not None:
            _stated(trainer)[type(self).__name__] = before

    def train_with(self, trainer: Trainer, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attach to this trainer and train it by `train`, not by the method of a subclass, which may have called this."""
        self.attach(trainer)
        own, self._own["train"] = self._own["train"], train
        try:
            return self._train(*args, **kwargs)
        finally:
            self._own["train"] = own

    @property
    def attached(self) -> bool:
        """Whether it has a trainer."""
        return self._trainer is not None

    @property
    def planned(self) -> bool:
        """Whether it was ever attached, so that there is something to report."""
        return self._training is not None

    @property
    def training(self) -> PrivateTraining:
        """What is planned and done. Raises PrivacyError before `attach`."""
        if self._training is None:
            raise PrivacyError(
                "DPCallback was not attached: give it to the trainer as one of its callbacks, or call "
                "DPCallback(config).attach(trainer) before trainer.train()"
            )
        return self._training

    @property
    def trainer(self) -> Any:
        """The trainer that it is attached to. Raises PrivacyError where it is not."""
        if self._trainer is None:
            raise PrivacyError(
                "DPCallback is not attached, as this training did not begin with Trainer.train: call "
                "DPCallback(config).attach(trainer) before, or remove it with trainer.remove_callback to train without privacy"
            )
        return self._trainer

    @property
    def mechanism(self) -> DPSGD:
        """What releases gradients, and the account of what was spent. Raises PrivacyError before `attach`."""
        return self.training.mechanism

    @property
    def engine(self) -> ClippingEngine | None:
        """What clips; None before training. Raises PrivacyError before `attach`."""
        return self.training.engine

    def report(self) -> PrivacyReport:
        """What was spent so far, and on which assumptions. Raises PrivacyError before `attach`."""
        return self.training.report()

    def state(self) -> dict[str, Any]:
        """What `Trainer` saves of this callback with every checkpoint: what was spent, and the checkpoint's files."""
        if not self.attached:  # it asks for that of every callback that it is given
            return {"args": {}, "attributes": {}}
        files = {} if self._saving is None else {"files": checkpoints.manifest(self._saving)}
        return {"args": {}, "attributes": {"privacy": self.mechanism.state_dict(), **files}}

    # Events.

    def on_train_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, loader = self.trainer, kwargs["train_dataloader"]
        if self._while_training is None or not isinstance(getattr(loader, "batch_sampler", None), PoissonBatches):
            raise PrivacyError(
                "the training data loader is not the one DPCallback installed: call dp.detach() and dp.attach(trainer) once "
                "everything else is set up"
            )
        taken = self.mechanism.account.taken
        if taken != state.global_step:
            raise PrivacyError(
                f"training begins after {state.global_step} steps and accounts for {taken}: part was not private; train from "
                "the beginning"
            )
        trl_trainers.call_the_head(self._while_training, trainer)
        model = trained_module(trainer, kwargs["optimizer"])
        start_without_unused(self.training, model, kwargs["optimizer"], loader, self._while_training)

    def on_pre_optimizer_step(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mechanism.release()

    def on_step_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.mechanism.account.steps_left <= 0:
            control.should_training_stop = True
            control.should_save = control.should_save or (
                state.global_step < state.max_steps and args.save_strategy in ("steps", "epoch")  # as at a planned end
            )

    def on_log(  # noqa: D102
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._logs.mark_added(logs or {}, state.log_history[-1])
        if self._trainer is not None:
            show_epsilon(self._trainer, logs)

    # What replaces the trainer's own methods.

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        if self not in trainer.callback_handler.callbacks:
            raise PrivacyError(
                "DPCallback was removed from the trainer, which would train without noise; add it again with dp.detach() and "
                "dp.attach(trainer)"
            )
        if trainer.callback_handler.callbacks[0] is not self:
            raise PrivacyError(
                "DPCallback is no longer the first of the trainer's callbacks: one before it would be shown gradients without "
                "noise; call dp.detach() and dp.attach(trainer)"
            )
        refuse_settings(trainer, self._own, self._evaluation)  # again: they may have changed since attach
        account, log = self.mechanism.account, Path(trainer.args.output_dir) / FILE_NAME
        ranks = Ranks()
        found: Checkpoint | None = None
        with ranks.all_ranks_or_none():
            if ranks.first:
                found = checkpoints.to_resume(
                    resume_from_checkpoint, trainer.args.output_dir, log, callback=type(self).__name__
                )
        checkpoint: Checkpoint | None = ranks.shared(found)
        if checkpoint is None and account.steps_left <= 0:
            raise self._spent()
        with ExitStack() as self._while_training:
            self._while_training.callback(self._end_training)
            beside = checkpoints.privacy_states(trainer.args.output_dir, type(self).__name__)
            self.training.open_spend_log(log, None if checkpoint is None else checkpoint.privacy, beside)
            if checkpoint is not None and account.taken < checkpoint.step:
                raise PrivacyError(
                    f"{checkpoint.path} took {checkpoint.step} steps but accounts for {account.taken}: part of its training "
                    "was not private; train from the beginning"
                )
            if account.steps_left <= 0:
                if checkpoint is None:
                    raise self._spent()
                return self._finished(checkpoint.path)
            return self._own["train"](None if checkpoint is None else str(checkpoint.path), *args, **kwargs)

    def _end_training(self) -> None:
        self._while_training = None
        self.training.stop()

    def _spent(self) -> PrivacyError:
        account = self.mechanism.account
        plan, log = account.plan, account.spend_log
        steps = plan.steps + sum(taken for _, taken in plan.spent)
        own = "choose another output_dir for a training of its own budget, which on the same data adds to this one"
        where = "" if log is None else f" (they are in {log.path}); {own}"
        return PrivacyError(f"the {steps} planned steps are spent; more would exceed the privacy budget{where}")

    def _finished(self, checkpoint: Path) -> TrainOutput:
        """Load a checkpoint after which no step is left: `Trainer` would take one more."""
        trainer = self.trainer
        logger.warning(f"no step is left to take: training ends with the weights of {checkpoint}")
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE_FILE))
        return TrainOutput(trainer.state.global_step, 0.0, {})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer = self.trainer
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        with Ranks().all_ranks_or_none():
            require_finite_weights(trainer.model, "nothing was saved")
        self._saving = folder
        try:
            with checkpoints.whole_or_removed(folder, writes=trainer.args.should_save):
                self._own["_save_checkpoint"](model, trial)
        finally:
            self._saving = None

    def _train_dataloader(self) -> DataLoader[Any]:
        trainer, args, training = self.trainer, self.trainer.args, self.training
        given = trainer.train_dataset
        if given is not training.dataset or (training.rows is None and len(given) != training.n_units):
            raise PrivacyError(
                "train_dataset changed since attach: call dp.detach() and dp.attach(trainer) once the data are final"
            )
        data = own_methods.training_data(trainer, self._own, self.config.privacy_unit)
        if data.order is not None:
            logger.warning(f"rows are not taken in the order of {data.order}: each step draws its units at random, all alike")
        account = self.mechanism.account
        sampler = account.plan.sampler
        workers = args.dataloader_num_workers
        steps = steps_per_epoch(sampler.n_units, sampler.expected_batch_size)
        return training.loader(
            data.dataset,
            data.collate,
            steps=steps,
            first_step=account.taken - (0 if args.ignore_data_skip else account.taken % steps),  # which the trainer passes over
            splits=args.gradient_accumulation_steps,
            lengths=lengths_of_units(given, training.rows, args.length_column_name)
            if getattr(args, "train_sampling_strategy", "random") == "group_by_length"
            else None,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
        )

    def _training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        trainer = self.trainer
        model.train()
        train_mode = getattr(trainer.optimizer, "train", None)
        if callable(train_mode):
            train_mode()  # schedule-free optimizers
        mean = self.training.add(inputs).to(trainer.args.device)
        parts = 1 if self.max_tokens_per_device is not None else trainer.args.gradient_accumulation_steps
        return mean / parts  # the trainer adds up the parts of a step

    def _num_items(self, batches: list[dict[str, Any]], device: torch.device) -> Any:
        # In training, it would divide every unit's loss by what others hold; evaluation is the trainer's own.
        return None if batches and UNITS in batches[0] else self._own["_get_num_items_in_batch"](batches, device)

    def _num_examples(self, dataloader: DataLoader[Any]) -> int:
        """What the trainer logs, and computes its speed from."""
        if self.config.public_n_units is not None and isinstance(dataloader.dataset, WithUnits):
            return self.config.public_n_units
        return int(self._own["num_examples"](dataloader))


def _stated(trainer: Any) -> dict[str, Any]:
    """What the trainer's state says of its callbacks."""
    states: dict[str, Any] = trainer.state.stateful_callbacks
    return states
