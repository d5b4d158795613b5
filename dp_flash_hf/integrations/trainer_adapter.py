"""How a `Trainer` computes the loss of a batch: its own `compute_loss`, for some units of a draw at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dp_flash_hf.engine.model_loss import takes
from dp_flash_hf.integrations import trl as trl_trainers
from dp_flash_hf.training.session import unwrapped


@dataclass(frozen=True)
class TrainerAdapter:
    """The `TrainingAdapter` of Transformers' trainers and of those of TRL that were examined.

    Args:
        trainer: whose `compute_loss`, device, precision and layout of rows are used, as they are when a batch is computed.
    """

    trainer: Any

    @property
    def rows_per_example(self) -> int:
        """2 for TRL's trainers of pairs, else 1."""
        return trl_trainers.rows_per_example(self.trainer)

    @property
    def reduced_precision(self) -> bool:
        """Whether the trainer computes under bfloat16 autocast."""
        return bool(self.trainer.args.bf16)

    def to_rows(self, collated: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as `_prepare_inputs` of the trainer moves it, laid out by rows."""
        return trl_trainers.as_rows(self.trainer, self.trainer._prepare_inputs(collated))

    def model_loss(self, batch: dict[str, Any], num_items: Tensor | None) -> Tensor:
        """What `compute_loss` of the trainer returns, of these rows and this rank alone."""
        trainer = self.trainer
        given = {"num_items_in_batch": num_items} if takes(trainer.compute_loss, "num_items_in_batch") else {}
        with ExitStack() as stack:
            stack.enter_context(trainer.compute_loss_context_manager())
            stack.enter_context(trl_trainers.on_one_rank(trainer))
            if not trainer.model.training:  # a look at how the model computes is no evaluation
                stack.enter_context(trl_trainers.without_metrics(trainer))
            loss: Tensor = trainer.compute_loss(
                unwrapped(trainer.model_wrapped), trl_trainers.as_collated(trainer, batch), **given
            )
        return loss

    def without_metrics(self) -> AbstractContextManager[None]:
        """Within the context TRL's trainers note no metrics."""
        return trl_trainers.without_metrics(self.trainer)
