"""The life of one physical batch: from a loss function to the exact clipped sum of its units' gradients in `.grad`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from dp_flash_hf import validation
from dp_flash_hf.distributed import Shards
from dp_flash_hf.engine.attachment import attach_to, detach_from
from dp_flash_hf.engine.batch_guard import BatchGuard, refuse_model
from dp_flash_hf.engine.clipper import Clipper
from dp_flash_hf.engine.compiled_execution import CompiledExecution
from dp_flash_hf.engine.gradient_buffer import GradientBuffer
from dp_flash_hf.engine.halving import add_in_halves_if_needed
from dp_flash_hf.engine.layout_probing import LayoutProbe, training_mode
from dp_flash_hf.engine.physical_batch import LossFunction, PhysicalBatch
from dp_flash_hf.engine.recorded_forward import RecordedForward
from dp_flash_hf.engine.self_check import Trial, self_check
from dp_flash_hf.engine.strategies import Strategies, Strategy, UncoveredParametersError, WholeBatchStrategy
from dp_flash_hf.engine.strategy_selection import StrategySelector, TrainedShapes
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.layers.compiled import CompiledLayers, is_compiled
from dp_flash_hf.layers.recorder import MAX_LOGIT_BYTES, Recorder
from dp_flash_hf.mechanisms.config import Clipping
from dp_flash_hf.units import Batch, Select, Units, selector


class ClippingEngine:
    """Attaches to a model and leaves in `.grad` the sum of per-unit clipped gradients. It adds no noise.

    A *unit* is what privacy is promised to: a row, several rows, or the tokens of one text in a packed row.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> engine = ClippingEngine(model, max_grad_norm=1.0)
    >>> batch = {"x": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
    >>> loss = engine.backward(lambda part: model(part["x"]).sum(), batch)
    >>> engine.norms  # of the gradients (3, 4) and (0.3, 0.4); the first is clipped
    tensor([5.0000, 0.5000])
    >>> model.weight.grad  # (0.6, 0.8) + (0.3, 0.4)
    tensor([[0.9000, 1.2000]])
    >>> engine.detach()

    **Guarantee.** Let g_u be the gradient of unit u's part of the loss, times its `loss_scale`, over all trained parameters.
    Between two calls of `zero_grad()` the engine adds up f_u g_u over all units of all physical batches, with factors f_u (one
    for each layer with clipping="per_layer") such that every f_u g_u has L2 norm at most `max_grad_norm`; see
    `mechanisms.clipping.clip_factors`. Adding or removing one unit therefore changes the sum by at most `max_grad_norm`, up to
    the rounding of float32 (float64), provided that

    - the loss is a sum of terms that each depend on one unit alone, so it is divided by no count taken from the batch;
    - the model computes no unit from another one, in training mode, which excludes batch normalisation;
    - a unit's `loss_scale` depends on nothing but that unit;
    - every unit lies in one physical batch as a whole. One that is given in two is clipped twice, and moves the sum by twice
      as much.

    Layers known to break the second are refused when the engine is made, such batches when they come. `check` tests the first
    two on a batch of your own, the preflight of `DPCallback` and `make_private` on the training data.

    **Edge cases.**

    ==============================  ==================================================================================
    case                            what happens
    ==============================  ==================================================================================
    a unit's norm is NaN or inf     the unit adds exactly zero, and counts in `dropped_units`
    a gradient of zeros             a finite factor; the unit adds zero
    a unit without rows or tokens   norm 0; it adds zero
    rows or tokens of unit -1       padding: computed, and in no norm or sum
    an empty batch                  nothing is added; the loss is 0, `norms` is empty
    out of memory                   halves of the batch one after the other, with a warning: the same sum. One unit, batches
                                    with `select` and sharded models raise torch's error, and `.grad` is as before
    parameters with several uses    shared and tied ones have one gradient, the sum over all uses, in norms as in sums
    frozen parameters               no gradient is computed, and no `.grad` made
    parameters the loss leaves out  their sum is zero; `check` refuses them
    parameters below float32        sums are kept in float32, see `clipped_sum`; `.grad` is rounded from them
    `.grad` set by something else   PrivacyError, before anything is added
    ==============================  ==================================================================================

    A model given to `torch.compile`, whole or in part, runs compiled where that is exact: on batches of rows, with bookkeeping
    and two_pass, if layers that have a variant in `layers.compiled` hold all trained parameters. Else it runs eagerly, as do
    the passes that learn layouts. On a model sharded by FSDP2 all ranks have to call the engine at once, see `participate`.

    Args:
        model: the module whose parameters with `requires_grad` are trained, in any dtype and on any devices.
        max_grad_norm: C > 0, finite.
        clipping: "flat", "automatic" or "per_layer" (a layer is the module that owns the parameters).
        strategy: "bookkeeping" (one backward), "two_pass" (two forward and backward passes, least memory), "microbatch" (one
            unit at a time), or "auto": bookkeeping, or two_pass once `choose` asked for it because memory is scarce, and
            microbatch where no rule covers some parameter or it is the faster. All give the same values; `engine.strategies`
            says what they cost. A strategy asked for by name runs or raises PrivacyError.
        max_logit_bytes: logits of at least so many bytes, in float32, are deferred: a cross entropy of them is computed in
            blocks, and they are formed only if something else reads them. The same gradients in less memory and more time.

    Attributes:
        model: as given, or what `torch.compile` made it from.
        parameters: the trained parameters, and their names.

    Raises:
        ValueError: for arguments out of range.
        UnsupportedError: for models that couple units, that have nothing to train or an engine already, for wrappers that add
            gradients up before they are clipped (DDP: give its `.module`), and for what sharded models do not support.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        clipping: Clipping = "flat",
        strategy: Strategy = "auto",
        max_logit_bytes: int = MAX_LOGIT_BYTES,
    ) -> None:
        validation.positive("max_grad_norm", max_grad_norm, remedy="1.0 is a usual choice")
        validation.one_of("clipping", clipping, get_args(Clipping))
        validation.one_of("strategy", strategy, get_args(Strategy))
        refuse_model(model)
        self._shards = Shards(model)
        if self._shards and strategy == "microbatch":
            raise UnsupportedError(
                "strategy='microbatch' on a model sharded by FSDP2: a unit's gradient would be averaged over ranks; use "
                "'auto', 'bookkeeping' or 'two_pass'"
            )
        compiled = is_compiled(model)
        if self._shards and compiled:
            raise UnsupportedError("torch.compile on a model sharded by FSDP2 is not supported; use one of them")
        model = getattr(model, "_orig_mod", model)
        self.model = model
        self.parameters = {p: name for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UnsupportedError("the model has no parameter with requires_grad=True; unfreeze what is to be trained")
        self._guard = BatchGuard(model)
        self._clipper = Clipper(model, self.parameters, float(max_grad_norm), clipping)
        self._buffer = GradientBuffer(model, self.parameters, self._shards.parameters)
        self._recorder = Recorder(self._clipper.groups, max_logit_bytes)
        self._attached = attach_to(model, self._recorder, self._shards.parameters)
        self._detached = False
        self._probe = LayoutProbe(model, self.parameters, self._attached, self._recorder, self._shards)
        layers = CompiledLayers(self._attached, self._recorder)
        self._compiled = CompiledExecution(compiled, layers, self.parameters, self._recorder, self._clipper, self._buffer)
        self._strategies = Strategies(self.parameters, self._clipper, self._recorder, self._shards, self._buffer)
        self._selector = StrategySelector(
            strategy, self._strategies, self._probe, self._compiled, TrainedShapes(model, self.parameters), self._shards
        )

    # One batch.

    def backward(
        self,
        loss_fn: LossFunction,
        batch: Batch,
        units: Tensor | Units | None = None,
        loss_scale: Tensor | None = None,
        select: Select | None = None,
    ) -> Tensor:
        """Add the clipped sum of this physical batch to `.grad`.

        Either the whole batch is added, or an exception is raised and `.grad` is what it was before. Not so if something fails
        while the batch is being added, which with strategy "two_pass" is during its second backward if other batches are there
        already: what the step has so far is then refused until `zero_grad()`.

        Args:
            loss_fn: batch -> scalar, a sum of terms that each depend on one unit alone. It is called again on parts of the
                batch whenever the engine works unit by unit, and must then give those units' terms.
            batch: mapping of model inputs.
            units: the unit of every row (int64 (rows,)) or token (int64 (rows, length)), numbered from 0, -1 for padding; or
                int32 cumulative sequence lengths of one packed row; default: each row is a unit.
            loss_scale: (units,), finite; multiplies each unit's gradient before clipping (1 / label count makes means of
                sums).
            select: (batch, unit) -> that unit's batch, for batches whose tensors are not laid out by rows.

        Returns:
            The loss of the whole batch, detached, as `loss_fn` gave it: unscaled, and of the dtype it has there. Computed unit
            by unit, it is the sum of theirs. It is not private.

        Raises:
            ValueError: for arguments of other kinds or shapes, and a loss that is not a scalar.
            UnsupportedError: for batches in which this model would couple units, and hooks on parameters, which would see
                gradients that are not clipped.
            PrivacyError: where `.grad` holds anything but whole clipped sums, a parameter is trained that was not when the
                engine was made, the engine is detached, or a strategy asked for by name cannot be exact.
        """
        return self._compute(self._physical_batch(loss_fn, batch, units, loss_scale, select))

    def participate(self, loss_fn: LossFunction, batch: Batch, units: Units) -> None:
        """Take part in other ranks' `backward`, and add nothing.

        A model sharded by FSDP2 computes on all ranks at once, also where one has no unit left. What this batch holds is
        computed with factors of zero; nothing of it is added or counted, and `norms` is empty afterwards.

        Args:
            loss_fn, batch, units: as of `backward`, which says what is raised, too; any units, as small a batch as can be.
        """
        with self._clipper.adding_nothing():
            self.backward(loss_fn, batch, units)

    @contextmanager
    def batch(self, units: Tensor | Units | None = None, loss_scale: Tensor | None = None) -> Iterator[None]:
        """The thin primitive under `backward`: run one forward of the model and one backward inside it.

        By book-keeping only, and with the model called by keyword where its inputs have names. When the block ends the batch is
        added; if it ends with an exception, `.grad` is what it was before.

        Args:
            units, loss_scale: as of `backward`, for the inputs of the forward call.

        Raises:
            PrivacyError: when a parameter's gradient escaped the rules (use `backward`, which then works unit by unit), no
                forward or no backward ran inside, and as `backward`.
            ValueError, UnsupportedError: as `backward`, and on sharded models.
        """
        if self._shards:
            raise UnsupportedError("engine.batch on a model sharded by FSDP2: use engine.backward(loss_fn, batch) on all ranks")
        forward = RecordedForward(lambda inputs: self._read(inputs, units, loss_scale), self._probe, self._recorder)
        with self._buffer.whole_batch(), self._isolated(), self._compiled.suspended():
            with forward.of(self.model):
                yield
            try:
                self._strategies.require_coverage()
            except UncoveredParametersError:
                if self._strategies.inconclusive:
                    self._probe.forget()
                raise
            if not self._recorder.records:
                raise PrivacyError("engine.batch: no backward ran inside it; run forward and backward inside the block")
            assert forward.units is not None
            self._strategies.add_recorded(forward.scale)

    # What came of it.

    @property
    def norms(self) -> Tensor:
        """(units,) float32 or float64: L2 norms of the last batch's gradients, scaled and not yet clipped. Keep them secret."""
        return self._clipper.norms

    @property
    def dropped_units(self) -> int:
        """Units whose norm was not finite, over all batches since the engine was made. Counted without noise: keep it secret.

        A batch that is computed again, because memory ran out, say, counts once; `check` and `participate` count nothing.
        """
        return self._clipper.dropped_units

    def clipped_sum(self, parameter: nn.Parameter) -> Tensor:
        """The clipped sum so far of one parameter, zeros if nothing was added.

        Args:
            parameter: one of `parameters`, else PrivacyError.

        Returns:
            (shape of the parameter) in float32, or float64 of a float64 parameter: `.grad` itself where it has that dtype, else
            what `.grad` was rounded from. Of a sharded parameter: this rank's part of it, summed over all ranks.

        Raises:
            PrivacyError: when `.grad` holds anything else, or the sums may hold parts of a batch.
        """
        if parameter not in self.parameters:
            raise PrivacyError("clipped_sum: a parameter the engine does not train")
        self._buffer.require_whole()
        return self._buffer.total(parameter)

    def take_sums(self) -> dict[nn.Parameter, Tensor]:
        """Hand over the clipped sums so far, of every trained parameter; raises as `clipped_sum`.

        From then on `.grad` is the caller's: the engine adds to it no more until `zero_grad()`.
        """
        return self._buffer.take()

    def withhold_sums(self, value: bool = True) -> None:
        """Drop the sums so far; from now on `.grad` stays empty until `take_sums` or, with False, shows them again.

        So nothing finds sums before noise is on them. Called again it does what `zero_grad()`, with nothing to empty, cannot.
        """
        self._buffer.withhold(value)

    def sum_in_float64(self) -> None:
        """Sums are float64 until they are taken or dropped: where ranks add up more than float32 is charged for."""
        self._buffer.widen()

    @property
    def rounding(self) -> tuple[int, bool]:
        """How many units are in the sums, and whether these are float64."""
        return self._buffer.units, self._buffer.wide

    @property
    def holds_sums(self) -> bool:
        """Whether clipped sums were made that `take_sums` did not hand over yet."""
        return bool(self._buffer)

    def norm_methods(self) -> dict[str, str]:
        """How the last batch's norm was computed, by name of each parameter that had one."""
        if self._selector.works_unit_by_unit:
            return dict.fromkeys(self.parameters.values(), "microbatch")
        return {name: self._recorder.norm_methods[p] for p, name in self.parameters.items() if p in self._recorder.norm_methods}

    # How batches are computed.

    @property
    def max_grad_norm(self) -> float:
        """C, as given: noise is drawn for it, so it cannot be set."""
        return self._clipper.max_grad_norm

    @property
    def clipping(self) -> Clipping:
        """As given."""
        return self._clipper.clipping

    @property
    def strategy(self) -> Strategy:
        """As given."""
        return self._selector.strategy

    @property
    def chosen(self) -> WholeBatchStrategy:
        """What strategy="auto" computes whole batches by."""
        return self._selector.chosen

    def choose(self, strategy: WholeBatchStrategy) -> None:
        """From the next batch on, strategy="auto" computes whole batches by this strategy.

        No result changes, and a strategy asked for by name stays. On a sharded model all ranks have to choose the same. Where
        two passes turn out not to be possible, a warning says that book-keeping is used instead.
        """
        self._selector.choose(strategy)

    def without_microbatching(self) -> AbstractContextManager[None]:
        """Within the context, no batch is computed unit by unit, which would hide that units see each other, only for speed."""
        return self._selector.without_microbatching()

    def eagerly(self) -> AbstractContextManager[None]:
        """Within the context compiled code does not run, whoever calls the model.

        For checks, which try many shapes. The same gradients come out; it may be nested, and an error ends it too.
        """
        return self._compiled.eagerly()

    @property
    def runs_compiled(self) -> bool:
        """Whether batches of rows run what `torch.compile` made of the model, as far as batches have shown."""
        return self._compiled.found and self._compiled.runs

    @property
    def uncovered(self) -> list[str]:
        """Names of parameters that no rule covers. If there are any, strategy="auto" computes every unit by itself."""
        return [name for p, name in self.parameters.items() if p in self._selector.uncovered]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 sharded the model, so that all ranks compute at once: see `participate`."""
        return bool(self._shards)

    @property
    def reduces_precision(self) -> bool:
        """Whether the model computes with less than float32 somewhere, as far as its parameters tell."""
        return self._recorder.reduces_precision or any(p.dtype.itemsize < 4 for p in self.model.parameters())

    def check(
        self,
        loss_fn: LossFunction,
        batch: Batch,
        units: Tensor | Units | None = None,
        loss_scale: Tensor | None = None,
        select: Select | None = None,
        *,
        tolerance: float = 1e-3,
    ) -> None:
        """Prove on one batch, without dropout, that units do not see each other and that the fast path is exact for this model.

        Losses, norms and clipped sum must be those of the units alone, and the norm of one must not move when the others are
        exchanged. Every trained parameter must have a gradient. `.grad`, `norms` and `dropped_units` stay as they were.

        Args:
            loss_fn, batch, units, loss_scale, select: as of `backward`; all ranks of a sharded model check the same batch.
            tolerance: relative; rounding of the model's dtype is what it must allow for.

        Raises:
            PrivacyError: on a mismatch, which it names.
            ValueError, UnsupportedError: as `backward`.
        """
        checked = self._physical_batch(loss_fn, batch, units, loss_scale, select)
        with training_mode(self.model, False), self.without_microbatching():
            self_check(self._try, checked, self._shards, max_grad_norm=self.max_grad_norm, tolerance=tolerance)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the context `.grad` is empty; afterwards it, sums, `norms` and `dropped_units` are what they were before."""
        with self._clipper.kept(), self._buffer.afresh():
            yield

    def detach(self) -> None:
        """Give the model back as it was, bit for bit, with the classes its modules had; `.grad` stays.

        May be called again. From then on `backward` and `batch` raise PrivacyError.
        """
        self._recorder.stop()
        detach_from(self._attached)
        self._detached = True

    def _physical_batch(
        self,
        loss_fn: LossFunction,
        batch: Batch,
        units: Tensor | Units | None,
        loss_scale: Tensor | None,
        select: Select | None,
    ) -> PhysicalBatch:
        if not isinstance(batch, Mapping):
            raise invalid("batch", expected="a mapping of model inputs", actual=type(batch).__name__, remedy="pass a dict")
        resolved, scale = self._read(batch, units, loss_scale)
        return PhysicalBatch(loss_fn, batch, resolved, scale, select or selector(resolved), divisible=select is None)

    def _read(self, batch: Batch, units: Tensor | Units | None, scale: Tensor | None) -> tuple[Units, Tensor | None]:
        resolved = Units.of_batch(units, batch)
        self._guard(batch)
        return resolved, self._clipper.scale_of(scale, resolved)

    def _compute(self, batch: PhysicalBatch) -> Tensor:
        if batch.units.n == 0 and not self._shards:
            self._clipper.set_norms(torch.zeros(0))
            return torch.zeros(())
        with self._buffer.whole_batch():
            if self._shards:  # all ranks compute the same number of batches
                return self._add(batch)
            return add_in_halves_if_needed(self._add, batch, self._buffer, self._clipper)

    def _try(self, batch: PhysicalBatch, unit_by_unit: bool) -> Trial:
        """Compute a batch and leave nothing behind."""
        with self.aside(), self._selector.checking(unit_by_unit=unit_by_unit):
            loss = self._compute(batch).double()
            unused = [name for p, name in self.parameters.items() if p not in self._strategies.reached]
            return Trial(loss, self.norms, self.take_sums(), unused)

    def _add(self, batch: PhysicalBatch) -> Tensor:
        with self._isolated():
            return self._selector.add(batch)

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """One batch, or one half: see `GradientBuffer.apart`."""
        if self._detached:
            raise PrivacyError("the engine was detached; make a new ClippingEngine")
        self._shards.reshard()
        with self._buffer.apart():
            try:
                with self._shards.synchronizing(False):
                    yield
            finally:
                self._recorder.stop()
