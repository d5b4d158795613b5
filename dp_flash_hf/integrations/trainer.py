"""Private training with `Trainer`: `DPCallback(config).attach(trainer)`."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from dp_flash_hf.accounting.spend_log import FILE_NAME
from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.integrations import checkpoints
from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.integrations.trainer_settings import _refuse_settings
from dp_flash_hf.layers.compiled import is_compiled
from dp_flash_hf.mechanisms.config import PrivacyConfig
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training.batches import UNITS, PoissonBatches, steps_per_epoch
from dp_flash_hf.training.dp_sgd import DPSGD
from dp_flash_hf.training.preflight import length_of
from dp_flash_hf.training.session import PrivateTraining, require_finite_weights, unwrapped

logger = logging.get_logger(__name__)


class DPCallback(TrainerCallback, ExportableState):
    """Differentially private training for a `Trainer` or `Seq2SeqTrainer`, and TRL's SFT, DPO and reward trainers.

        dp = DPCallback(PrivacyConfig(target_epsilon=8.0, target_delta=1e-6)).attach(trainer)
        trainer.train()
        print(dp.report().to_text())

    The expected batch size is `per_device_train_batch_size * gradient_accumulation_steps`, times the number of processes. The
    units of a step are drawn by Poisson sampling and computed in physical batches of at most `per_device_train_batch_size`
    rows; a unit is never split. With DDP or FSDP2 every process computes its share of one draw.
    `TrainingArguments.max_grad_norm` is not used: `PrivacyConfig.max_grad_norm` clips every unit instead.

    Every noisy step is written to a spend record in `output_dir` before it is released, so that steps lost in a crash count,
    and those of earlier trainings in that folder. `trainer.train(resume_from_checkpoint=True)` continues the newest checkpoint
    that is whole.

    max_tokens_per_device: compute physical batches of at most so many tokens instead, padding included (or of one unit): texts
        of like length together, and padding cut off. Faster and leaner where lengths differ.
    strategy: see `ClippingEngine`. Both change speed and memory, never the numbers.
    """

    def __init__(self, config: PrivacyConfig, *, max_tokens_per_device: int | None = None, strategy: Strategy = "auto") -> None:
        if not isinstance(config, PrivacyConfig):
            raise invalid("config", expected="a PrivacyConfig", actual=config, remedy="DPCallback(PrivacyConfig(...))")
        self.config, self.max_tokens_per_device, self.strategy = config, max_tokens_per_device, strategy
        self._training: PrivateTraining | None = None
        self._trainer: Any = None
        self._saving: Path | None = None  # the checkpoint that is being written

    def attach(self, trainer: Trainer) -> DPCallback:
        """Make this trainer train privately, and return the callback itself.

        Raises UnsupportedError, with nothing changed, for settings under which privacy would be lost; ValueError when the
        budget cannot be met.
        """
        if self._trainer is not None:
            raise UnsupportedError("this DPCallback is attached already; make one for each trainer")
        if any(isinstance(callback, DPCallback) and callback is not self for callback in trainer.callback_handler.callbacks):
            raise UnsupportedError("the trainer has another DPCallback; attach one only")
        _refuse_settings(trainer)
        args = trainer.args
        self._training = PrivateTraining(
            self.config,
            trainer.train_dataset,
            expected_batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            steps=args.max_steps if args.max_steps > 0 else None,
            epochs=args.num_train_epochs,
            max_examples=args.per_device_train_batch_size,
            max_tokens=self.max_tokens_per_device,
            strategy=self.strategy,
            rows_per_example=trl_trainers.rows_per_example(trainer),
        )
        self._trainer = trainer
        trl_trainers.call_the_head(trainer)
        self._original_train, self._original_log, self._original_save = trainer.train, trainer.log, trainer._save_checkpoint
        self._original_num_items = trainer._get_num_items_in_batch
        overrides: dict[str, Callable[..., Any]] = {
            "train": self._train,
            "log": self._log,
            "_save_checkpoint": self._save_checkpoint,
            "get_train_dataloader": self._train_dataloader,
            "training_step": self._training_step,
            "_clip_grad_norm": lambda *args, **kwargs: None,  # would rescale by a norm taken before noise
            "_get_grad_norm": lambda *args, **kwargs: None,  # would log that norm
            "_get_num_items_in_batch": self._num_items,
            "floating_point_ops": lambda *args, **kwargs: 0,  # would log how many tokens were drawn
            # Would also add gradients of adapters on a split model up as they arise, before they are clipped.
            "_sync_replicated_trainable_parameters": lambda model: Ranks().make_equal(model),
        }
        for name, override in overrides.items():
            setattr(trainer, name, override)
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)  # the first, so that no other callback is shown a gradient without noise
        return self

    @property
    def training(self) -> PrivateTraining:
        """What is planned and done. Raises PrivacyError before `attach`."""
        if self._training is None:
            raise PrivacyError("DPCallback was not attached: call DPCallback(config).attach(trainer) before trainer.train()")
        return self._training

    @property
    def mechanism(self) -> DPSGD:
        """Plan and ledger. Raises PrivacyError before `attach`."""
        return self.training.mechanism

    @property
    def engine(self) -> ClippingEngine | None:
        """What clips; None before training. Raises PrivacyError before `attach`."""
        return self.training.engine

    def report(self) -> PrivacyReport:
        """What was spent so far, and on which assumptions."""
        return self.training.report()

    def state(self) -> dict[str, Any]:
        """What `Trainer` saves with every checkpoint."""
        files = {} if self._saving is None else {"files": checkpoints.manifest(self._saving)}
        return {"args": {}, "attributes": {"privacy": self.mechanism.state_dict(), **files}}

    # Events.

    def on_train_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        loader = kwargs["train_dataloader"]
        if not isinstance(getattr(loader, "batch_sampler", None), PoissonBatches):
            raise PrivacyError(
                "the training data loader is not the one DPCallback installed; attach again, after everything else"
            )
        taken = self.mechanism.account.taken
        if taken != state.global_step:
            raise PrivacyError(
                f"training begins after {state.global_step} steps and accounts for {taken}: part was not private; "
                "train from the beginning"
            )
        # A compiled model is only known by what wraps it.
        compiled = is_compiled(trainer.model_wrapped)
        self.training.start(trainer.model_wrapped if compiled else trainer.model, kwargs["optimizer"])
        self.training.check(
            loader,
            self._model_loss,
            lambda batch: trl_trainers.as_rows(trainer, trainer._prepare_inputs(batch)),
            reduced_precision=args.bf16,
        )
        trl_trainers.forget_metrics(trainer, "train")  # of the units that were tried

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
        for callback in self._trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None) if isinstance(callback, ProgressCallback) else None
            if bar is not None and logs is not None and "privacy/epsilon" in logs:
                bar.set_postfix(epsilon=f"{logs['privacy/epsilon']:.3f}")

    # What replaces the trainer's own methods.

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self not in self._trainer.callback_handler.callbacks:
            raise PrivacyError("DPCallback was removed from the trainer, which would train without noise; add it again")
        _refuse_settings(self._trainer)  # again: they may have changed since attach
        account, record = self.mechanism.account, Path(self._trainer.args.output_dir) / FILE_NAME
        ranks = Ranks()
        found: tuple[Path | None, dict[str, Any]] = (None, {})
        with ranks.all_ranks_or_none():
            if ranks.first:
                found = self._checkpoint(resume_from_checkpoint, record)
        checkpoint, state = ranks.shared(found)
        if checkpoint is None and account.steps_left <= 0:
            raise self._spent()
        try:
            callbacks = state.get("stateful_callbacks", {})
            self.training.open_spend_log(
                record, None if checkpoint is None else callbacks[type(self).__name__]["attributes"]["privacy"]
            )
            if checkpoint is not None and account.taken < state["global_step"]:
                raise PrivacyError(
                    f"{checkpoint} took {state['global_step']} steps but accounts for {account.taken}: part of its "
                    "training was not private; train from the beginning"
                )
            if account.steps_left <= 0:
                if checkpoint is None:
                    raise self._spent()
                return self._finished(checkpoint)
            return self._original_train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        finally:
            self.training.stop()

    def _checkpoint(self, resume: str | bool | None, record: Path) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint to continue, and what the trainer saved in it; None to train from the beginning."""
        if not resume:
            return None, {}
        if resume is not True:
            try:
                return Path(resume), self._whole(Path(resume))
            except ValueError as error:
                raise PrivacyError(
                    f"{error}; resume another checkpoint, or resume_from_checkpoint=True for the newest"
                ) from error
        folder = self._trainer.args.output_dir
        for checkpoint in checkpoints.by_age(folder):
            try:
                return checkpoint, self._whole(checkpoint)
            except ValueError as error:
                logger.warning(f"{checkpoint} is skipped, because it is incomplete: {error}")
        if not record.exists():
            raise PrivacyError(f"no whole checkpoint and no spend record is in {folder}: leave out resume_from_checkpoint")
        logger.warning(f"there is no whole checkpoint in {folder}: training starts from the beginning, and its books go on")
        return None, {}

    def _whole(self, checkpoint: Path) -> dict[str, Any]:
        """What the trainer saved in a checkpoint. Raises ValueError for one that is damaged, PrivacyError without our state."""
        state = checkpoints.read_state(checkpoint)
        saved = (state.get("stateful_callbacks") or {}).get(type(self).__name__)
        if not isinstance(saved, dict) or "privacy" not in saved.get("attributes", {}):
            raise PrivacyError(
                f"the checkpoint {checkpoint} holds no privacy state, so what was spent is unknown; train from the beginning"
            )
        checkpoints.require_whole(checkpoint, saved["attributes"].get("files", {}))
        return state

    def _spent(self) -> PrivacyError:
        account = self.mechanism.account
        plan, log = account.plan, account.spend_log
        steps = plan.steps + sum(taken for _, taken in plan.spent)
        where = "" if log is None else f" (on record in {log.path}); choose another output_dir for separate books"
        return PrivacyError(f"the {steps} planned steps are spent; more would exceed the privacy budget{where}")

    def _finished(self, checkpoint: Path) -> TrainOutput:
        """Load a checkpoint after which no step is left: `Trainer` would take one more."""
        trainer = self._trainer
        logger.warning(f"no step is left to take: training ends with the weights of {checkpoint}")
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return TrainOutput(trainer.state.global_step, 0.0, {})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer = self._trainer
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        with Ranks().all_ranks_or_none():
            require_finite_weights(trainer.model, "nothing was saved")
        self._saving = folder
        try:
            with Ranks().all_ranks_or_none():
                self._original_save(model, trial)
        except Exception as error:
            if trainer.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise RuntimeError(
                f"the checkpoint {folder} could not be written ({error}), and what there was of it was removed; free space "
                "or mend the folder, then resume: the steps since the last checkpoint are lost, but counted"
            ) from error
        finally:
            self._saving = None

    def _train_dataloader(self) -> DataLoader[Any]:
        trainer, args, training = self._trainer, self._trainer.args, self.training
        dataset, collator = trainer.train_dataset, trainer.data_collator
        if hasattr(dataset, "column_names"):
            dataset = trainer._remove_unused_columns(dataset, description="training")
        else:
            collator = trainer._get_collator_with_removed_columns(collator, description="training")
        sampler = self.mechanism.account.plan.sampler
        if trainer.train_dataset is not training.dataset or (training.rows is None and len(dataset) != sampler.n_units):
            raise PrivacyError(
                f"train_dataset changed since attach, when it had {sampler.n_units} units; attach after the data are final"
            )
        workers = args.dataloader_num_workers
        steps = steps_per_epoch(sampler.n_units, sampler.expected_batch_size)
        return training.loader(
            dataset,
            collator,
            steps=steps,
            skipped=0 if args.ignore_data_skip else self.mechanism.account.taken % steps,
            splits=args.gradient_accumulation_steps,
            lengths=self._lengths() if getattr(args, "train_sampling_strategy", "random") == "group_by_length" else None,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
        )

    def _lengths(self) -> Tensor:
        """Tokens of the longest row of each unit: int64 (units,)."""
        dataset, column = self._trainer.train_dataset, self._trainer.args.length_column_name
        given = column in getattr(dataset, "column_names", ())
        of_row = torch.tensor(dataset[column] if given else [length_of(dataset[row]) for row in range(len(dataset))])
        rows = self.training.rows
        return of_row if rows is None else torch.stack([of_row[own].max() for own in rows])

    def _training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        trainer = self._trainer
        model.train()
        train_mode = getattr(trainer.optimizer, "train", None)
        if callable(train_mode):
            train_mode()  # schedule-free optimizers
        mean = self.training.add(inputs).to(trainer.args.device)
        parts = 1 if self.max_tokens_per_device is not None else trainer.args.gradient_accumulation_steps
        return mean / parts  # the trainer adds up the parts of a step

    def _model_loss(self, batch: dict[str, Any], num_items: Tensor | None) -> Tensor:
        trainer = self._trainer
        parameters = inspect.signature(trainer.compute_loss).parameters
        accepts_count = "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        with trainer.compute_loss_context_manager():
            count = {"num_items_in_batch": num_items} if accepts_count else {}
            with trl_trainers.on_one_rank(trainer):
                collated = trl_trainers.as_collated(trainer, batch)
                loss: Tensor = trainer.compute_loss(unwrapped(trainer.model_wrapped), collated, **count)
        if not trainer.model.training:
            trl_trainers.forget_metrics(trainer, "eval")  # a look at how the model computes is no evaluation
        return loss

    def _num_items(self, batches: list[dict[str, Any]], device: torch.device) -> Any:
        # In training, it would divide every unit's loss by what others hold; evaluation is the trainer's own.
        return None if batches and UNITS in batches[0] else self._original_num_items(batches, device)

    def _log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        for name in ("loss", "train_loss"):
            if name in logs:
                logs[f"not_private/{name}"] = logs.pop(name)
        for name in ("grad_norm", "total_flos"):  # in case another trainer computes them: they hold no noise
            logs.pop(name, None)
        logs["privacy/epsilon"] = self.mechanism.epsilon()
        trl_trainers.mark_metrics(self._trainer)
        self._original_log(logs, *(() if start_time is None else (start_time,)))
