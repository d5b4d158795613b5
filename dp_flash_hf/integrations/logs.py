"""What a private `Trainer` logs: the two epsilons, and under `not_private/` what was computed without noise."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from dp_flash_hf.training.dp_sgd import DPSGD


def mark(logs: dict[str, Any], mechanism: DPSGD) -> None:
    """Name losses as what they are, leave out norms taken before noise and counts of what was drawn, and add the epsilons."""
    for name in ("loss", "train_loss"):
        if name in logs:
            logs[f"not_private/{name}"] = logs.pop(name)
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
