"""What a `Trainer` evaluates on, and whether results decide anything: training data must not choose by them, without noise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

from transformers import EarlyStoppingCallback, Trainer

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.training.refusals import refuse, takes_metrics
from dp_flash_hf.training.shared_rows import rows_in_training

logger = logging.getLogger(__name__)

NOT_PRIVATE = "not_private/"  # what the names of values without noise begin with


def chosen_by_results(trainer: Trainer) -> bool:
    """Whether results of evaluations decide which model is kept, when training ends, or what the learning rate is.

    Known are the trainer's settings, schedulers whose `step` takes a metric, and `EarlyStoppingCallback`; a callback of one's
    own that acts on results is not.
    """
    args = trainer.args
    return bool(
        args.load_best_model_at_end
        or args.save_strategy == "best"
        or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        or takes_metrics(trainer.lr_scheduler)  # given in optimizers=
        or any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)
    )


class EvaluationData:
    """Evaluation datasets of a trainer, each compared with its training data once: see `rows_in_training`."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, Any, str]] = []  # training data, evaluation data, what is wrong with them
        self._said: set[str] = set()
        self._now: Literal["", "held out", "training"] = ""  # which data are being evaluated

    def of_training(self, trainer: Trainer, given: Any = None) -> str:
        """What of the evaluation data is training data, in words; "" where nothing was found, or they are None.

        Args:
            trainer: with its datasets, as they are now.
            given: as to `Trainer.evaluate`: a dataset, a name of one, a dict of them, or None for the trainer's own.
        """
        own: Any = trainer.eval_dataset
        data = own if given is None else {given: own[given]} if isinstance(given, str) else given
        several = {f"eval_dataset[{name!r}]": one for name, one in data.items()} if isinstance(data, dict) else None
        named = {"eval_dataset": data} if several is None else several
        found = [self._compared(trainer.train_dataset, one, name) for name, one in named.items()]
        return next(filter(None, found), "")

    def refusals(self, trainer: Trainer) -> dict[str, bool]:
        """For `refuse`: that rows of the training data would choose, and what to do instead."""
        found = self.of_training(trainer) if chosen_by_results(trainer) else ""
        return {
            f"{found}: learning rates or models would be chosen without noise; hold data out, and drop rows that both have": (
                bool(found)
            )
        }

    def evaluate(
        self, trainer: Trainer, evaluate: Callable[..., Any], eval_dataset: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of `Trainer.evaluate`, which is called: results on training data are logged as what they are.

        Raises:
            UnsupportedError: in a training in which they would choose something; the data may have changed since it began.
        """
        data = trainer.eval_dataset if eval_dataset is None else eval_dataset
        # Of several, each comes here by itself.
        found = "" if isinstance(data, dict) else self.of_training(trainer, data)
        if found and trainer.is_in_train:
            refuse(self.refusals(trainer))
        if found and found not in self._said:
            self._said.add(found)
            logger.warning(
                f"{found}: results on them hold no noise and are private. They are logged as not_private/..., and nothing may "
                "be chosen by them; evaluate on data that were held out"
            )
        trl_trainers.forget_evaluations(trainer)
        self._now = "training" if found else "held out"
        try:
            return evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._now = ""

    @property
    def on_held_out(self) -> bool:
        """Whether held-out data are being evaluated."""
        return self._now == "held out"

    def named(self, logs: dict[str, Any]) -> dict[str, Any]:
        """What is logged, under other names while training data are evaluated."""
        if self._now != "training":
            return logs
        return {name if name == "epoch" else f"{NOT_PRIVATE}{name}": value for name, value in logs.items()}

    def _compared(self, training: Any, data: Any, name: str) -> str:
        if data is None or training is None:
            return ""
        for known, other, words in self._known:
            if known is training and other is data:
                return words
        if _is_same(data, training):
            words = f"{name} is train_dataset"
        else:
            ranks = Ranks()
            with ranks.all_ranks_or_none():
                here = rows_in_training(training, data) if ranks.first else (0, 0)
            found, read = ranks.shared(here)  # of samples, which differ
            words = f"{found} of {read} rows of {name} that were read are rows of train_dataset" if found else ""
        self._known.append((training, data, words))
        return words


def _is_same(data: Any, other: Any) -> bool:
    """Whether two datasets are one, or made of one in the same way, as TRL prepares both that it is given."""
    fingerprint = getattr(data, "_fingerprint", None)
    return data is other or (fingerprint is not None and fingerprint == getattr(other, "_fingerprint", None))
