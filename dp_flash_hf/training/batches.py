"""From draws to batches: which rows a step reads, which unit each belongs to, and how they are split to fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.errors import UnsupportedError
from dp_flash_hf.mechanisms.fresh_randomness import fresh_randomness, own_generators
from dp_flash_hf.mechanisms.generators import fresh_generator
from dp_flash_hf.mechanisms.sampling import PoissonSampler, choose_rows
from dp_flash_hf.training.draws import Part, tagged
from dp_flash_hf.units import IGNORED, Units, leading_shape, select_items, subset, text_starts

_Made = TypeVar("_Made")

UNITS = "dp_units"  # key under which the collator passes on the unit of every example
# Inputs that hold something for every token; which other tensors of that width do is not known.
_BY_TOKEN = {
    "attention_mask",
    "completion_mask",
    "input_ids",
    "inputs_embeds",
    "labels",
    "position_ids",
    "special_tokens_mask",
    "token_type_ids",
}


class PoissonBatches(Sampler[list[tuple[int, int]]]):
    """A torch batch sampler that yields Poisson draws, as lists of (row, unit) keys that know their draw.

    Each of `steps` is one draw of the sampler, split into exactly `splits` parts, some of which may be empty: also an empty
    draw is a step. Units are numbered from 0 within each part, and never split between two. Between steps draws are
    independent, and there are as many batches whatever is drawn.

    On several ranks all make the same draws, from a secret they share, and each takes its own share of every one; iterate on
    all of them.

    Args:
        sampler: what draws units, int64 in 0..population-1.
        population: how many units there are, whatever the sampler's public number of them is.
        steps: how many draws.
        splits: parts of a draw, the trainer's `gradient_accumulation_steps`.
        in_one_part: put a whole draw into its first part, for `physical_batches` to split by length; else the parts are about
            equal.
        rows: for every unit, the int64 (rows,) that it owns; None where unit i is row i.
        max_examples_per_unit: how many of its rows a drawn unit brings, chosen again at every draw; with `rows`.
        lengths: int64 (units,), to put units of like length into one part; None leaves them as they were drawn.
        seed: draws that can be repeated, for tests and reproducible experiments: whoever knows it knows who was drawn. None
            draws from the operating system's entropy.
        first_step: the number of the first draw, which `release` expects; a seeded training that is resumed goes on with its
            own draws.
    """

    def __init__(
        self,
        sampler: PoissonSampler,
        *,
        population: int,
        steps: int,
        splits: int,
        in_one_part: bool,
        rows: Sequence[Tensor] | None,
        max_examples_per_unit: int | None,
        lengths: Tensor | None,
        seed: int | None,
        first_step: int,
    ) -> None:
        self.sampler, self.population = sampler, population
        self.steps, self.splits, self.in_one_part = steps, splits, in_one_part
        self.rows, self.max_examples_per_unit, self.lengths = rows, max_examples_per_unit, lengths
        self.seed, self.step = seed, first_step
        self.ranks = Ranks()

    def __len__(self) -> int:
        return self.steps * self.splits

    def __iter__(self) -> Iterator[Part]:
        shared = self.ranks.secret()
        for _ in range(self.steps):
            # In one process from the operating system for each draw, so that a fork of it draws others. Ranks cannot be forked.
            secret = self.seed if self.seed is not None else shared if self.ranks.size > 1 else self.ranks.secret()
            number = self.step
            generator = fresh_generator(seed=secret, stream=f"sampling step {number}")
            self.step += 1
            drawn = self.sampler.draw(generator, self.population)
            own = [[unit] for unit in drawn.tolist()]
            if self.rows is not None and self.max_examples_per_unit is not None:
                own = [rows.tolist() for rows in choose_rows(self.rows, drawn, self.max_examples_per_unit, generator)]
            drawn, share = drawn[self.ranks.rank :: self.ranks.size], own[self.ranks.rank :: self.ranks.size]
            if self.lengths is not None:  # the sum does not depend on which units are computed with which, but padding does
                share = [share[place] for place in self.lengths[drawn].argsort().tolist()]
            for part, places in enumerate(self._parts(len(share))):
                keys = ((row, unit) for unit, place in enumerate(places) for row in share[place])
                yield Part(keys, number, part, self.splits)

    def _parts(self, n: int) -> list[list[int]]:
        ends = [n] * (self.splits - 1) if self.in_one_part else self.splits
        return [part.tolist() for part in torch.arange(n).tensor_split(ends)]


class Read(list[tuple[Any, int]]):
    """Examples as they were read, each with its unit; the rows that they came from, and of which part of a draw, if of any."""

    def __init__(self, examples: Iterable[tuple[Any, int]], rows: Sequence[int], part: Part | None = None) -> None:
        super().__init__(examples)
        self.rows, self.part = rows, part


class WithUnits(Dataset[tuple[Any, int]]):
    """A map-style dataset read by the (row, unit) keys of `PoissonBatches`, which passes the unit on with the example.

    Every list of rows is read with fresh random numbers, which augmentation draws from; see `fresh_randomness`.

    Args:
        dataset: of the user.
        seed: `PrivacyConfig.seed`: where the same rows are read together again, the same numbers are drawn.
    """

    def __init__(self, dataset: Any, *, seed: int | None = None) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Read:
        rows = [row for row, _ in keys]
        fetch = getattr(self.dataset, "__getitems__", None)

        def read() -> list[Any]:
            return list(fetch(rows) if callable(fetch) and rows else [self.dataset[row] for row in rows])

        examples = _freshly(read, self.dataset, seed=self.seed, stream=f"reading {rows}")
        return Read(zip(examples, (unit for _, unit in keys), strict=True), rows, keys if isinstance(keys, Part) else None)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        return self.__getitems__([key])[0]


def is_empty(example: Any) -> bool:
    """Whether an example is a text without any token: its `input_ids` have length 0."""
    ids = example.get("input_ids") if isinstance(example, Mapping) else None
    return ids is not None and hasattr(ids, "__len__") and len(ids) == 0


class UnitCollator:
    """The user's collator, which also passes on the unit of each example, under the key `UNITS`, and the tag of a draw's part.

    Empty texts (`is_empty`) are left out: there is nothing to compute of them, so their gradient is zero, and models and
    collators know no such rows. The user's collator never sees an empty list: an empty draw makes a batch of `UNITS` alone.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[tuple[Any, int]]) -> dict[str, Any]:
        """The batch of these (example, unit) pairs, with `UNITS`: int64 (examples that are not empty,); `tagged` if drawn."""
        part = examples.part if isinstance(examples, Read) else None
        examples = [(example, unit) for example, unit in examples if not is_empty(example)]
        units = torch.tensor([unit for _, unit in examples], dtype=torch.long)
        batch = {**(self.collator([example for example, _ in examples]) if examples else {}), UNITS: units}
        return batch if part is None else tagged(batch, part)


class FreshCollator:
    """A collator that draws fresh random numbers for every batch, in whichever process it runs.

    They come from torch's, numpy's and Python's generators, or those that the collator holds, as far as `own_generators` finds
    them. All are put back after every batch, so evaluation with the same collator goes on as if nothing had been trained.

    Args:
        collator: what repeats a batch where these generators are repeated.
        seed: `PrivacyConfig.seed`: where the same rows are collated together again, the same numbers are drawn.
    """

    def __init__(self, collator: UnitCollator, *, seed: int | None = None) -> None:
        self.collator, self.seed = collator, seed

    def __call__(self, examples: list[tuple[Any, int]]) -> dict[str, Any]:
        """The batch that the collator makes of the examples of `WithUnits`."""
        rows = examples.rows if isinstance(examples, Read) else ()
        return _freshly(lambda: self.collator(examples), self.collator, seed=self.seed, stream=f"collating {rows}")


def _freshly(make: Callable[[], _Made], owner: object, *, seed: int | None, stream: str) -> _Made:
    """What `make` returns with fresh random numbers from all generators, those of `owner` too."""
    for _ in range(2):  # some make themselves a generator, from a seed that others may know, when they are called first
        own = own_generators(owner)
        with fresh_randomness(own=own, seed=seed, stream=stream):
            made = make()
        known = {id(generator) for generator in own}
        if all(id(generator) in known for generator in own_generators(owner)):
            return made
    raise UnsupportedError(
        f"{type(owner).__name__} makes itself a new random generator for every batch, so its random numbers cannot be kept "
        "secret: let the dataset and the collator draw from torch's, numpy's or Python's own generators, or make theirs once"
    )


def units_of(batch: Mapping[str, Any], of_example: Tensor, rows_per_example: int = 1) -> Units:
    """The units of a collated batch, whose rows are the examples, or the segments of one row that a flattening collator made.

    Args:
        batch: what the collator made, on any device.
        of_example: int64 (examples,), the unit of each.
        rows_per_example: with 2, the second rows of all examples follow the first ones, as preference collators lay out pairs.

    Returns:
        Units of rows, or of tokens where the examples were flattened into one row.

    Raises:
        UnsupportedError: rows and examples are not as many, and the batch does not say where in its one row each text starts.
    """
    of_example = of_example.cpu()
    shape = leading_shape(batch)
    if shape[0] == len(of_example) * rows_per_example:
        return Units.of(of_example.repeat(rows_per_example), shape)
    starts = text_starts(batch) if shape[0] == 1 and rows_per_example == 1 else None
    if starts is None or not bool(starts[0]) or int(starts.sum()) != len(of_example):
        raise UnsupportedError(
            f"the collator made {shape[0]} rows of {len(of_example)} examples, so it is unknown which is whose; use a collator "
            "that keeps one row per example, or DataCollatorWithFlattening, with position_ids or return_flash_attn_kwargs=True "
            "and without pad_to_multiple_of"
        )
    return Units.of(of_example[starts.cumsum(0) - 1].view(1, -1), shape)


def physical_batches(
    batch: dict[str, Any], units: Units, examples: Sequence[int], *, max_examples: int, max_tokens: int | None = None
) -> Iterator[tuple[dict[str, Any], Units]]:
    """Split a batch into parts that fit on the device, each unit whole.

    The parts' clipped sums add up to the batch's, so the split changes speed and memory, and never what is released.

    Args:
        batch: the model's inputs, laid out by rows or as one packed row.
        units: of its rows or tokens.
        examples: for each unit, how many examples it has.
        max_examples: examples in a part at most; the parts are about equal. A unit with more is a part of its own.
        max_tokens: instead, tokens in a part at most, padding included. A unit with more is a part of its own. Texts of like
            length come into one part, and trailing columns that are padding in all of it are cut off.

    Yields:
        (batch, units) of each part, units numbered from 0 in the order they have in the whole; of those that have rows or
        tokens.
    """
    owners = [unit for unit, size in enumerate(units.sizes) if size]
    if max_tokens is None:
        even = math.ceil(sum(examples) / math.ceil(sum(examples) / max_examples))
        groups = _groups(owners, lambda group: sum(examples[unit] for unit in group) <= even)
    elif units.kind == "tokens":
        groups = _groups(owners, lambda group: sum(units.sizes[unit] for unit in group) <= max_tokens)
    else:
        of_row = text_lengths(batch) + _decoder_length(batch)
        lengths = {unit: int(of_row[units.items(unit)].max()) for unit in owners}
        groups = _groups(
            sorted(owners, key=lengths.__getitem__),
            lambda group: sum(units.sizes[unit] for unit in group) * max(lengths[unit] for unit in group) <= max_tokens,
        )
    for group in groups:
        # In the order of the batch: the halves of pairs stand in it, and the texts of a packed row must stay whole.
        items = torch.isin(units.of_item, torch.tensor(group)).nonzero().flatten()
        whole = len(items) == units.n_items
        part, part_units = (batch, units) if whole else (select_items(batch, units, items), subset(units, items))
        yield part if max_tokens is None or units.kind == "tokens" else without_trailing_padding(part), part_units


def _groups(units: Iterable[int], fits: Callable[[list[int]], bool]) -> list[list[int]]:
    """Runs of units that fit, each as long as possible; a unit too large for any is alone."""
    groups: list[list[int]] = []
    for unit in units:
        if groups and fits([*groups[-1], unit]):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def text_lengths(batch: Mapping[str, Any]) -> Tensor:
    """int64 (rows,): up to which column each row holds something, 1 at least: a token that is not masked out, or a label.

    The whole width where columns are not known to be padding: without an attention mask, or beside a tensor of its width whose
    columns are not known to be tokens.
    """
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = leading_shape(batch)
        return torch.full(shape[:1], shape[-1])
    if any(name not in _BY_TOKEN and width == mask.shape[1] for name, width in _widths(batch).items()):
        return torch.full(mask.shape[:1], mask.shape[1])
    used = mask != 0
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        used = used | (labels != IGNORED)
    return (used * torch.arange(1, mask.shape[1] + 1, device=used.device)).amax(1).clamp(min=1).cpu()


def without_trailing_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch without the columns at its end that are padding in every row."""
    mask, length = batch.get("attention_mask"), int(text_lengths(batch).max())
    if not isinstance(mask, Tensor) or mask.dim() != 2 or length == mask.shape[1]:
        return batch
    return {
        name: value[:, :length].contiguous() if isinstance(value, Tensor) and value.shape[:2] == mask.shape else value
        for name, value in batch.items()
    }


def _decoder_length(batch: Mapping[str, Any]) -> int:
    """Columns of labels that are not those of the inputs: a decoder's own tokens."""
    widths = _widths(batch)
    inputs = widths.get("attention_mask", widths.get("input_ids"))
    return widths["labels"] if inputs is not None and widths.get("labels", inputs) != inputs else 0


def _widths(batch: Mapping[str, Any]) -> dict[str, int]:
    return {name: value.shape[1] for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 1}


def steps_per_epoch(n_units: int, expected_batch_size: int) -> int:
    """Draws that see every unit once on average."""
    return max(1, round(n_units / expected_batch_size))
