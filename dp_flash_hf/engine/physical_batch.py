"""What one call of `ClippingEngine.backward` is given, read and validated once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dp_flash_hf.units import Batch, Select, Units, select_items, selector, subset

LossFunction = Callable[[Any], Tensor]  # a batch, or one unit's part of it -> scalar


@dataclass(frozen=True, eq=False)
class PhysicalBatch:
    """Some units of a logical batch, computed at once where memory allows.

    loss_fn: inputs -> scalar, a sum of terms that each depend on one unit alone.
    inputs: what the model is given.
    scale: (units,) finite factors of the units' gradients, or None for ones.
    select: (inputs, unit) -> that unit's inputs.
    divisible: whether the inputs are laid out by rows or tokens, so that any units of them make a batch.
    """

    loss_fn: LossFunction
    inputs: Batch
    units: Units
    scale: Tensor | None
    select: Select
    divisible: bool

    def part(self, chosen: list[int]) -> PhysicalBatch:
        """The batch of these units, ascending, each with at least one row or token."""
        items = torch.isin(self.units.of_item, torch.tensor(chosen)).nonzero().flatten()
        return self._of(items, subset(self.units, items), chosen)

    def in_other_company(self) -> PhysicalBatch:
        """Where every row is a unit: row 0 stays, the others move up by one, and a copy of row 0 follows them."""
        order = [0, *range(2, self.units.n), 0]
        return self._of(torch.tensor(order), Units.rows(self.units.n), order)

    def _of(self, items: Tensor, units: Units, chosen: list[int]) -> PhysicalBatch:
        inputs, scale = select_items(self.inputs, self.units, items), None if self.scale is None else self.scale[chosen]
        return replace(self, inputs=inputs, units=units, scale=scale, select=selector(units))
