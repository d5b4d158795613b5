"""Three ways to the same clipped sum of a physical batch, which differ in time and memory only.

============  =====================  ===================================  ==========================================
strategy      passes over the batch  held beside one plain backward pass  exact when
============  =====================  ===================================  ==========================================
bookkeeping   1 forward, 1 backward  every layer's input and output       rules cover all uses of trained parameters
                                     gradient until the norms are known
two_pass      2 forward, 2 backward  those of one layer at a time         as bookkeeping, and the second pass repeats
                                                                          the first (random numbers of torch, numpy
                                                                          and Python do)
microbatch    1 of each for a unit   one more set of float32 sums         always
============  =====================  ===================================  ==========================================

Book-keeping (Bu et al. 2022, arXiv 2210.00038) computes per-unit norms and the clipped sum from the same records of one
backward pass. Two passes are ghost clipping (Li et al. 2022, arXiv 2110.05679): the first gives norms, and the second, once
clip factors are known, adds each layer's clipped sum as soon as backward reaches it. In both the norm of a layer is taken from
its input and output gradient, without forming per-unit gradients where that is cheaper (`layers.cost_model`). One unit at a
time is what the definition says, and the reference that `ClippingEngine.check` compares with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dp_flash_hf.distributed import Shards, accelerators, add_own_parts, device_of, local, own_part_of_sum
from dp_flash_hf.engine.clipper import Clipper
from dp_flash_hf.engine.gradient_buffer import GradientBuffer
from dp_flash_hf.engine.physical_batch import PhysicalBatch
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.layers.gradient_records import full_precision
from dp_flash_hf.layers.recorder import Recorder, TwoPassError
from dp_flash_hf.mechanisms.fresh_randomness import repeated_randomness

_MOST_IN_FLOAT32 = 64  # units of one part that are added one by one

Strategy = Literal["auto", "bookkeeping", "two_pass", "microbatch"]
WholeBatchStrategy = Literal["bookkeeping", "two_pass"]


class UncoveredParametersError(PrivacyError):
    """Gradients were taken of parameters outside the rules: their per-unit norms are unknown.

    parameters: those parameters, as far as this rank knows them. what: what is the matter with them, in words.

    Attributes:
        parameters: as given.
        fault: `what`, and their names.
    """

    def __init__(self, parameters: Mapping[nn.Parameter, str], what: str) -> None:
        self.parameters = set(parameters)
        shown = shown_names(sorted(parameters.values()) or ["parameters named on another rank"])
        self.fault = f"{what} {shown}"
        super().__init__(f"{self.fault}; use engine.backward with strategy='auto', freeze them, or register a rule.")


def shown_names(names: list[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Strategies:
    """Adds a physical batch to a gradient buffer, in whichever of the three ways is called.

    Each call returns the loss as the batch's loss function gave it, detached, and sets the clipper's norms. The caller has
    emptied `.grad` (`GradientBuffer.apart`), knows the layouts (`LayoutProbe`), and stops the recorder afterwards.

    Attributes:
        reached: parameters that the last batch's loss depended on.
        inconclusive: whether the last batch, on any rank, came in shapes whose layout was not proven.
    """

    def __init__(
        self,
        parameters: Mapping[nn.Parameter, str],
        clipper: Clipper,
        recorder: Recorder,
        shards: Shards,
        buffer: GradientBuffer,
    ) -> None:
        self.reached: set[nn.Parameter] = set()
        self.inconclusive = False
        self._parameters, self._clipper, self._recorder = parameters, clipper, recorder
        self._shards, self._buffer = shards, buffer

    def bookkeeping(self, batch: PhysicalBatch) -> Tensor:
        """One forward and one backward pass. Raises UncoveredParametersError before anything is added."""
        self._recorder.start("record", batch.units)
        loss = self._loss(batch)
        _plain_backward(loss)
        self.require_coverage()
        self.add_recorded(batch.scale)
        return loss.detach()

    def two_pass(self, batch: PhysicalBatch) -> Tensor:
        """Norms first, then sums. Raises TwoPassError and UncoveredParametersError before anything is added, except that the
        second pass may find a parameter in use that the first did not: sums that existed may then hold parts of the batch.
        """
        loss, factors = self._norms_pass(batch)
        # Sums that exist are added to in place, and new ones made in backward: memory for no second set.
        sums = self._buffer.in_place(batch.units.n)
        begun = bool(sums)
        parts: dict[nn.Parameter, Tensor] = {}
        self._recorder.start("sum", batch.units, factors, sums)
        with self._shards.at_ends(lambda done: add_own_parts(done, sums, parts)):
            again = batch.loss_fn(batch.inputs)
            if self._shards.any(not torch.allclose(again, loss, rtol=1e-5, atol=1e-6, equal_nan=True)):
                raise TwoPassError(
                    f"strategy='two_pass': the second pass gave loss {float(again.detach())} after {float(loss)}; the model "
                    "draws random numbers from a generator of its own, use strategy='bookkeeping'"
                )
            if begun:
                self._buffer.begin()
            _plain_backward(again)
        self.require_coverage()
        self._recorder.stop()
        add_own_parts(self._shards.of_any_rank(sums), sums, parts)
        sums |= parts
        parts.clear()
        self._buffer.put_back()
        with self._buffer.adding(batch.units.n, begun=begun):
            self._buffer.add_all(sums)
        return loss

    def microbatch(self, batch: PhysicalBatch, *, same_on_all_ranks: bool) -> Tensor:
        """One unit after the other, by plain autograd; a unit without items adds zero.

        same_on_all_ranks: whether every rank computes this very batch, without which sharded models are refused.
        """
        if self._shards and not same_on_all_ranks:
            raise UnsupportedError(
                "one unit at a time on a model sharded by FSDP2: a unit's gradient would be averaged over ranks; use 'auto', "
                "'bookkeeping' or 'two_pass'"
            )
        parameters, units = self._parameters, batch.units
        # Every unit is added by itself, so float32 would round as often: see `GradientBuffer`.
        wide = torch.float64 if units.n > _MOST_IN_FLOAT32 else torch.float32
        sums = {p: torch.zeros_like(local(p), dtype=torch.promote_types(p.dtype, wide)) for p in parameters}
        total = torch.zeros(())
        norms = []
        self.reached = set()
        for unit in range(units.n):
            squared = self._clipper.like.new_zeros(1, self._clipper.n_groups)
            if units.sizes[unit]:
                loss = batch.loss_fn(batch.select(batch.inputs, unit))
                with self._shards.synchronizing(True):  # of one batch on all ranks, the mean is the gradient itself
                    _plain_backward(loss)
                total = total.to(loss.device) + loss.detach()
                found = {p: local(p.grad) for p in parameters if p.grad is not None}
                self.reached |= found.keys()
                for group, own in self._by_group(found):
                    squared[0, group] += self._shards.square(own, squared)
            factors = self._clipper.factors(squared, None if batch.scale is None else batch.scale[unit : unit + 1])
            norms.append(self._clipper.norms)
            for p in parameters:
                factor = float(factors[0, self._clipper.groups[p]]) * self._shards.copies(p)
                if p.grad is not None and factor != 0.0:
                    sums[p].add_(local(p.grad).to(sums[p].dtype), alpha=factor)
                p.grad = None
        self._clipper.set_norms(torch.cat(norms))
        self._buffer.put_back()
        with self._buffer.adding(units.n):
            self._buffer.add_all(sums)
        return total

    # Steps that `ClippingEngine.batch`, whose forward and backward the user runs, has in common with these.

    def require_coverage(self) -> None:
        """Set `inconclusive`. Raises UncoveredParametersError if backward, on any rank, left a gradient outside the rules."""
        left_over = self._recorder.left_over | self._recorder.unplaced
        found = {p: name for p, name in self._parameters.items() if p.grad is not None or p in left_over}
        self.inconclusive = self._shards.any(self._recorder.layouts.inconclusive)
        if self._shards.any(bool(found)):
            raise UncoveredParametersError(found, "no rule covers how the model uses")
        if not self._recorder.all_taps_recorded:
            raise UncoveredParametersError(self._parameters, "compiled code does not record every use of")

    @torch.no_grad()
    def add_recorded(self, scale: Tensor | None) -> None:
        """Clip what was recorded since the recorder's start, and add it."""
        groups = self._clipper.groups
        factors = self._clipper.factors(self._recorder.squared_norms(self._clipper.like), scale)
        records = self._recorder.records
        self.reached = self._recorder.reached
        self._buffer.put_back()
        with self._buffer.adding(len(factors)), full_precision(factors.device):
            for parameter in self._parameters:
                record, own = records.pop(parameter, None), factors[:, groups[parameter]].to(device_of(parameter))
                if parameter in self._shards.parameters:
                    whole = None if record is None else record.clipped_sum(own)
                    self._buffer.add(parameter, own_part_of_sum(parameter, whole))
                elif record is None:
                    self._buffer.total(parameter)
                else:
                    self._buffer.add_record(parameter, record, own)
        self._recorder.stop()

    def abandon(self) -> None:
        """Drop what an attempt recorded, and the gradients that it left."""
        self._recorder.stop()
        self._buffer.clear_gradients()

    def _loss(self, batch: PhysicalBatch) -> Tensor:
        loss = batch.loss_fn(batch.inputs)
        early = self._recorder.reached
        if early:  # as adversarial losses do: part of that gradient, or its own gradient, is not what was recorded
            found = {p: self._parameters[p] for p in early}
            raise UncoveredParametersError(found, "the loss function takes gradients itself, of")
        return loss

    def _norms_pass(self, batch: PhysicalBatch) -> tuple[Tensor, Tensor]:
        """The first of two passes: the loss, and the factors (units, groups)."""
        with repeated_randomness(accelerators(self._parameters)):  # both passes must see the same dropout
            self._recorder.start("norms", batch.units)
            loss = self._loss(batch)
            _plain_backward(loss)
            loss = loss.detach()  # its graph goes before the next one comes
            self.require_coverage()
            self.reached = self._recorder.reached
            return loss, self._clipper.factors(self._recorder.squared_norms(self._clipper.like), batch.scale)

    def _by_group(self, found: dict[nn.Parameter, Tensor]) -> Iterator[tuple[int, dict[nn.Parameter, Tensor]]]:
        groups: dict[int, dict[nn.Parameter, Tensor]] = {}
        for parameter in self._parameters:  # in the same order on all ranks
            if parameter in found:
                groups.setdefault(self._clipper.groups[parameter], {})[parameter] = found[parameter]
        yield from groups.items()


def _plain_backward(loss: Tensor) -> None:
    if loss.dim() != 0:
        raise invalid("loss_fn", expected="a scalar", actual=tuple(loss.shape), remedy="sum the units' losses")
    with torch.autocast(loss.device.type, enabled=False):  # backward runs in the dtypes that forward chose
        loss.backward()
