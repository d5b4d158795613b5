"""What an integration knows about a batch and the training session does not: one object, supplied once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from dp_flash_hf.training.batches import UNITS, units_of
from dp_flash_hf.units import Units


class TrainingAdapter(Protocol):
    """How one integration computes with a batch. `PrivateTraining` is given one and asks it whenever it needs to know.

    Implement it to train privately in a loop that is neither a `Trainer`'s nor `make_private`'s: `integrations.accelerate` has
    the shortest one.
    """

    @property
    def rows_per_example(self) -> int:
        """Rows that the collator makes of one example.

        1, or 2 where an example is a pair: all first rows stand before all second ones.
        """
        ...

    @property
    def reduced_precision(self) -> bool:
        """Whether the loss is computed in bfloat16 somewhere though parameters are float32; the checks allow for that."""
        ...

    def to_rows(self, collated: Mapping[str, Any]) -> dict[str, Any]:
        """What the collator made, on the model's device, with an entry for every row in every tensor laid out by rows."""
        ...

    def model_loss(self, batch: dict[str, Any], num_items: Tensor | None) -> Tensor:
        """The loss of a batch, or of some of its units, as non-private training would compute it: a scalar with gradient.

        Args:
            batch: rows of `to_rows`, all of them or those of some units.
            num_items: scalar, what to divide a sum of label losses by, where the loss takes that; None leaves it to the model.
        """
        ...

    def without_metrics(self) -> AbstractContextManager[None]:
        """Within the context the loss notes nothing for the logs: batches are computed that are no part of training."""
        ...


def prepared(adapter: TrainingAdapter, collated: Mapping[str, Any]) -> tuple[dict[str, Any], Units]:
    """A batch of `UnitCollator` on the model's device, and the units of its rows or tokens."""
    batch = dict(collated)
    of_example = batch.pop(UNITS)
    batch = dict(adapter.to_rows(batch))
    return batch, units_of(batch, of_example, adapter.rows_per_example)
