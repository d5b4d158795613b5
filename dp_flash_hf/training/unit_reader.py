"""Reading chosen units outside of any draw: what the checks before the first step compute with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.training.adapter import TrainingAdapter, prepared
from dp_flash_hf.training.batches import FreshCollator, is_empty
from dp_flash_hf.units import Units

Key = tuple[int, int]  # (row of the dataset, number of its unit in the batch)


class UnitReader:
    """Reads units by their number, through the dataset, collator and adapter that steps use.

    In place of a unit whose texts are all empty, which adds nothing to any step, the next one stands that has something.

    Args:
        loader: of `PrivateTraining.loader`; its dataset and collator are used, nothing is drawn from it.
        adapter: of the integration.
        rows: for every unit, the int64 (rows,) that it owns; None where unit i is row i.
        max_examples_per_unit: the first so many rows of a unit are read; None reads all.
        n_units: of the whole data.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        adapter: TrainingAdapter,
        *,
        rows: Sequence[Tensor] | None,
        max_examples_per_unit: int | None,
        n_units: int,
    ) -> None:
        assert loader.collate_fn is not None
        self.dataset: Any = loader.dataset
        collate = loader.collate_fn
        # The bare collator: a check that collates twice repeats random numbers itself.
        self.collate = collate.collator if isinstance(collate, FreshCollator) else collate
        self.adapter, self.n_units = adapter, n_units
        self._rows, self._most = rows, max_examples_per_unit

    def keys(self, units: Sequence[int]) -> list[Key]:
        """The keys of all rows of these units, which are numbered from 0 in this order."""
        return [(row, number) for number, unit in enumerate(units) for row in self._rows_of(unit)]

    def examples(self, keys: Sequence[Key]) -> list[tuple[Any, int]]:
        """The (example, number of its unit) pairs that the collator is given."""
        found: list[tuple[Any, int]] = self.dataset.__getitems__(list(keys))
        return found

    def first_examples(self, units: Sequence[int]) -> dict[int, Any]:
        """By unit, its first example that is not empty, as the dataset holds it."""
        keys = [(unit if self._rows is None else int(self._rows[unit][0]), unit) for unit in units]
        read = {unit: example for example, unit in self.examples(keys)}
        return {
            unit: self.examples(self.keys([unit])[:1])[0][0] if is_empty(example) else example for unit, example in read.items()
        }

    def batch(self, units: Sequence[int]) -> tuple[dict[str, Any], Units]:
        """One batch of all rows of these units, on the model's device."""
        return prepared(self.adapter, self.collate(self.examples(self.keys(units))))

    def _rows_of(self, unit: int) -> list[int]:
        for other in (*range(unit, self.n_units), *range(unit)):
            rows = [other] if self._rows is None else self._rows[other][: self._most].tolist()
            found = [row for row in rows if not is_empty(self.dataset[row, 0][0])]
            if found:
                return found
        raise PrivacyError("every text of train_dataset is empty (its input_ids have length 0): look at how it was tokenized")
