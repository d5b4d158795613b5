"""Which strategy computes a batch, and what happens where that one cannot."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from dp_flash_hf.distributed import Shards
from dp_flash_hf.engine.compiled_execution import CompiledExecution
from dp_flash_hf.engine.layout_probing import LayoutProbe
from dp_flash_hf.engine.physical_batch import PhysicalBatch
from dp_flash_hf.engine.strategies import Strategies, Strategy, UncoveredParametersError, WholeBatchStrategy
from dp_flash_hf.layers import cost_model
from dp_flash_hf.layers.recorder import TwoPassError
from dp_flash_hf.units import Batch, Units, leading_shape


class TrainedShapes:
    """The shapes of a model's trained parameters, as far as they say how long a strategy takes."""

    def __init__(self, model: nn.Module, parameters: Mapping[nn.Parameter, str]) -> None:
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        products = [p for p in parameters if p.dim() == 2 and p not in tables]
        self._first = next(iter(parameters))
        self._products = Counter((p.shape[0], p.shape[1]) for p in products)
        self._others = sum(p.numel() for p in parameters) - sum(p.numel() for p in products)

    def microbatch_is_faster(self, inputs: Batch, units: Units) -> bool:
        """Whether one unit at a time is faster than book-keeping, by `cost_model`; shapes are all it looks at."""
        dtype = self._first.dtype
        # A second dimension of floating-point numbers may be features, of one row each.
        has_length = any(isinstance(x, Tensor) and x.dim() > 1 + x.is_floating_point() for x in inputs.values())
        rows = math.prod(leading_shape(inputs)[1:]) if units.kind == "rows" and has_length else 1
        sizes = [size * rows for size in units.sizes if size]
        speed = cost_model.speed_of(self._first.device, dtype)
        return cost_model.microbatch_is_faster(self._products, self._others, sizes, dtype, speed)


class StrategySelector:
    """Picks a strategy for each batch. One asked for by name computes all batches, or raises; "auto" falls back where needed.

    strategy: as asked for. probe, compiled: what has to be known of a batch before whole batches can be computed.

    What "auto" does, in this order:

    - parameters that no rule covers, known from earlier batches: microbatch;
    - units so long that microbatch is the faster (`layers.cost_model`), outside `without_microbatching`: microbatch;
    - else `chosen`. If two_pass turns out to be impossible for this model, bookkeeping now and later. If parameters turn out
      to be uncovered, microbatch for this batch; and for all later ones, unless it was the batch that did not show where its
      units are (constant inputs, say).

    Sharded models are never computed unit by unit: their units' gradients would be averaged over ranks.

    Attributes:
        chosen: what "auto" computes whole batches by.
        uncovered: parameters that are known to be used in ways that no rule covers.
    """

    def __init__(
        self,
        strategy: Strategy,
        strategies: Strategies,
        probe: LayoutProbe,
        compiled: CompiledExecution,
        shapes: TrainedShapes,
        shards: Shards,
    ) -> None:
        self.chosen: WholeBatchStrategy = "bookkeeping"
        self.uncovered: set[nn.Parameter] = set()
        self.strategy, self._strategies, self._probe, self._compiled = strategy, strategies, probe, compiled
        self._shapes, self._shards = shapes, shards
        self._units_are_long = False  # whether the last batch was computed unit by unit because that is faster
        self._avoids_microbatch = False
        self._same_on_all_ranks = False

    def choose(self, strategy: WholeBatchStrategy) -> None:
        """See `ClippingEngine.choose`."""
        self.chosen = strategy

    @property
    def works_unit_by_unit(self) -> bool:
        """Whether the last batch was computed by microbatch, as far as that was decided before it began."""
        return bool(self.uncovered) or self.strategy == "microbatch" or (self.strategy == "auto" and self._units_are_long)

    def add(self, batch: PhysicalBatch) -> Tensor:
        """Add a batch, and return its loss, detached."""
        self._compiled.notice(batch.loss_fn)
        with self._compiled.suspended():
            if self.strategy == "auto":
                free = not self._avoids_microbatch and not self._shards
                self._units_are_long = free and self._shapes.microbatch_is_faster(batch.inputs, batch.units)
            if self.strategy == "microbatch" or (self.strategy == "auto" and (self.uncovered or self._units_are_long)):
                return self._microbatch(batch)
            try:
                return self._whole(batch)
            except UncoveredParametersError as error:
                if self._strategies.inconclusive:  # constant or NaN inputs: the next batch may tell
                    self._probe.forget()
                if self.strategy != "auto" or self._shards:
                    raise
                if self._strategies.inconclusive:
                    slow = "in this batch: each of its units is computed by itself, exact, but slower"
                else:
                    self.uncovered |= error.parameters
                    slow = "so every unit is computed by itself from now on, exact, but slower; freeze them or register a rule"
                warnings.warn(f"{error.fault}, {slow}", stacklevel=6)
                self._strategies.abandon()
                return self._microbatch(batch)

    @contextmanager
    def without_microbatching(self) -> Iterator[None]:
        """See `ClippingEngine.without_microbatching`."""
        before, self._avoids_microbatch = self._avoids_microbatch, True
        try:
            yield
        finally:
            self._avoids_microbatch = before

    @contextmanager
    def checking(self, *, unit_by_unit: bool) -> Iterator[None]:
        """Within the context all ranks compute the same batches, one unit at a time or as asked for."""
        before, self._same_on_all_ranks = self.strategy, True
        if unit_by_unit:
            self.strategy = "microbatch"
        try:
            yield
        finally:
            self.strategy, self._same_on_all_ranks = before, False

    def _whole(self, batch: PhysicalBatch) -> Tensor:
        whole = self.chosen if self.strategy == "auto" else self.strategy
        add = self._two_pass if whole == "two_pass" else self._strategies.bookkeeping
        inputs, units = batch.inputs, batch.units
        known = self._shards.all(self._probe.knows(inputs, units))
        if known or (batch.divisible and self._probe.extend(batch.loss_fn, inputs, units)):
            try:
                return self._compiled.run(add, batch)
            except UncoveredParametersError:
                if not self._strategies.inconclusive:
                    raise
                self._strategies.abandon()
        self._probe.probe(batch.loss_fn, inputs, batch.select, units)
        return self._compiled.run(add, batch)

    def _two_pass(self, batch: PhysicalBatch) -> Tensor:
        try:
            return self._strategies.two_pass(batch)
        except TwoPassError as error:
            if self.strategy != "auto" or self._shards:
                raise
            warnings.warn(f"{error}. strategy='auto' uses book-keeping from now on, which takes more memory.", stacklevel=3)
            self.choose("bookkeeping")
            self._strategies.abandon()
            return self._strategies.bookkeeping(batch)

    def _microbatch(self, batch: PhysicalBatch) -> Tensor:
        return self._strategies.microbatch(batch, same_on_all_ranks=self._same_on_all_ranks)
