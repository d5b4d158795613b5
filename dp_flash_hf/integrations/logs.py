"""What a private `Trainer` logs: the two epsilons, and under `not_private/` what was computed without noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.integrations.evaluation import NOT_PRIVATE, EvaluationData
from dp_flash_hf.training.dp_sgd import DPSGD

_OF_TRAINER = ("epoch", "step")  # what `Trainer.log` itself adds


class PrivateLogs:
    """In place of a trainer's `log`, which is called: everything that may be computed from rows of training is named so.

    Also what a subclass's own `log` adds, which TRL's trainers do, is `not_private/...`, unless it comes with results on
    held-out data: see `mark_added`.

    Args:
        evaluation: knows what is being evaluated.
    """

    def __init__(self, evaluation: EvaluationData) -> None:
        self._evaluation = evaluation
        self._given: set[str] | None = None  # names of what is being logged, before the trainer adds to it

    def log(
        self,
        trainer: Trainer,
        own: Callable[..., Any],
        mechanism: DPSGD,
        logs: dict[str, Any],
        start_time: float | None = None,
    ) -> None:
        """Log with `own`, the trainer's method, under the names that `mark` gives."""
        named = self._evaluation.named(logs)
        mark(named, mechanism)
        if f"{NOT_PRIVATE}loss" in named:
            named.update((f"{NOT_PRIVATE}{name}", value) for name, value in trl_trainers.stored_metrics(trainer).items())
        self._given = given = set(named)
        try:
            own(named, *(() if start_time is None else (start_time,)))
        finally:
            self._given = None
        if named is not logs:  # TRL's trainers add metrics to what `evaluate` returns
            logs.update((name.removeprefix(NOT_PRIVATE), value) for name, value in named.items() if name not in given)

    def mark_added(self, *entries: dict[str, Any]) -> None:
        """Rename in these entries, of callbacks and of the history, what the trainer's `log` added.

        Beside results on held-out data only TRL's count of tokens is of training.
        """
        for entry in entries if self._given is not None else ():
            for name in [name for name in entry if name not in (*(self._given or ()), *_OF_TRAINER)]:
                of_training = not self._evaluation.on_held_out or name.endswith("num_tokens")
                if of_training and not name.startswith(NOT_PRIVATE):
                    entry[f"{NOT_PRIVATE}{name}"] = entry.pop(name)


def mark(logs: dict[str, Any], mechanism: DPSGD) -> None:
    """Name losses as what they are, leave out norms taken before noise and counts of what was drawn, and add the epsilons."""
    for name in ("loss", "train_loss"):
        if name in logs:
            logs[f"{NOT_PRIVATE}{name}"] = logs.pop(name)
    for name in ("grad_norm", "total_flos"):  # in case another trainer computes them: they hold no noise
        logs.pop(name, None)
    logs["privacy/epsilon"] = mechanism.epsilon()
    logs["privacy/spent_epsilon"] = mechanism.spent_epsilon()


def show_epsilon(trainer: Trainer, logs: dict[str, Any] | None) -> None:
    """Show both epsilons on the trainer's progress bar, where it has one."""
    for callback in trainer.callback_handler.callbacks:
        bar = getattr(callback, "training_bar", None) if isinstance(callback, ProgressCallback) else None
        if bar is not None and logs is not None and "privacy/epsilon" in logs:
            bar.set_postfix(
                epsilon=f"{logs['privacy/epsilon']:.3f}", spent=f"{logs['privacy/spent_epsilon']:.3f}", refresh=False
            )
