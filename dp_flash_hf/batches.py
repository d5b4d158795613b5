"""From draws to batches: which rows a step reads, whose they are, and how they are split to fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.noise import fresh_generator
from dp_flash_hf.sampling import PoissonSampler, choose_rows
from dp_flash_hf.units import Units, leading_shape, select_items, subset

UNITS = "dp_units"  # key under which the collator passes on the unit of every example


class PoissonBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler of (row, unit) keys: every step is one draw, split into exactly `splits` parts, some of them empty.

    Units are numbered from 0 within each part and never split. len() is the number of parts in an "epoch": as many draws as it
    takes to see each unit once on average.
    """

    def __init__(
        self,
        sampler: PoissonSampler,
        *,
        splits: int,
        rows: Sequence[Tensor] | None,
        max_examples_per_unit: int | None,
        lengths: Tensor | None,
        seed: int | None,
        first_step: int,
    ) -> None:
        self.sampler, self.splits, self.rows, self.max_examples_per_unit = sampler, splits, rows, max_examples_per_unit
        self.lengths = lengths
        self.seed, self.step = seed, first_step
        self._fresh = fresh_generator()

    def __len__(self) -> int:
        return steps_per_epoch(self.sampler.n_units, self.sampler.expected_batch_size) * self.splits

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for _ in range(len(self) // self.splits):
            generator = self._fresh
            if self.seed is not None:
                generator = fresh_generator(seed=self.seed, stream=f"sampling step {self.step}")
            self.step += 1
            drawn = self.sampler.draw(generator)
            if self.lengths is not None:  # the sum does not depend on who is computed with whom, but padding does
                drawn = drawn[self.lengths[drawn].argsort()]
            for part in drawn.tensor_split(self.splits):
                if self.rows is None or self.max_examples_per_unit is None:
                    yield [(row, unit) for unit, row in enumerate(part.tolist())]
                else:
                    own = choose_rows(self.rows, part, self.max_examples_per_unit, generator)
                    yield [(row, unit) for unit, rows in enumerate(own) for row in rows.tolist()]


class WithUnits(Dataset[tuple[Any, int]]):
    """A dataset read by (row, unit) keys, which passes the unit on with the example."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Any, int]]:
        rows = [row for row, _ in keys]
        fetch = getattr(self.dataset, "__getitems__", None)
        examples = fetch(rows) if callable(fetch) and rows else [self.dataset[row] for row in rows]
        return list(zip(examples, (unit for _, unit in keys), strict=True))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        return self.__getitems__([key])[0]


class UnitCollator:
    """The trainer's collator, which also passes on whose each example is; an empty draw makes a batch of nothing."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[tuple[Any, int]]) -> dict[str, Any]:
        """The batch of these (example, unit) pairs, with `UNITS`: int64 (examples,)."""
        units = torch.tensor([unit for _, unit in examples], dtype=torch.long)
        if not examples:
            return {UNITS: units}
        return {**self.collator([example for example, _ in examples]), UNITS: units}


def units_of(batch: Mapping[str, Any], of_example: Tensor) -> Units:
    """Units of a collated batch: its rows are the examples, or the segments of one row that a flattening collator made."""
    of_example = of_example.cpu()
    shape = leading_shape(batch)
    if shape[0] == len(of_example):
        return Units.of(of_example, shape)
    boundaries = batch.get("cu_seq_lens_q")
    if boundaries is None and isinstance(batch.get("position_ids"), Tensor) and shape[0] == 1:
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().cpu()
        boundaries = torch.cat([starts, torch.tensor([shape[-1]])])
    if boundaries is None or len(boundaries) != len(of_example) + 1:
        raise UnsupportedError(
            f"the collator made {shape[0]} rows of {len(of_example)} examples, so it is unknown whose is which; use a collator "
            "that keeps one row per example, or DataCollatorWithFlattening"
        )
    lengths = boundaries.cpu().long().diff()
    return Units.of(torch.repeat_interleave(of_example, lengths).view(1, -1), shape)


def physical_batches(batch: dict[str, Any], units: Units, max_rows: int) -> Iterator[tuple[dict[str, Any], Units]]:
    """Split the rows of a batch into about equal parts of at most `max_rows`, keeping each unit whole, and packed rows too."""
    if units.kind == "tokens" or units.n_items <= max_rows:
        yield batch, units
        return
    even = math.ceil(units.n_items / math.ceil(units.n_items / max_rows))
    chosen: list[Tensor] = []
    for unit in range(units.n):
        own = units.items(unit)
        if chosen and sum(map(len, chosen)) + len(own) > even:
            items = torch.cat(chosen)
            yield select_items(batch, units, items), subset(units, items)
            chosen = []
        chosen.append(own)
    items = torch.cat(chosen)
    yield select_items(batch, units, items), subset(units, items)


def steps_per_epoch(n_units: int, expected_batch_size: int) -> int:
    """Draws that see every unit once on average."""
    return max(1, round(n_units / expected_batch_size))
