"""Exact clipped sums of per-unit gradients, in one backward pass where layers have rules, one unit at a time where not."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dp_flash_hf.distributed import Shards, add_own_parts, device_of, local, own_part_of_sum
from dp_flash_hf.engine.batch_guard import BatchGuard, refuse_model
from dp_flash_hf.engine.gradient_buffer import GradientBuffer
from dp_flash_hf.engine.layout_probing import LayoutProbe, training_mode
from dp_flash_hf.errors import PrivacyError, UnsupportedError, invalid
from dp_flash_hf.layers import cost_model, rules
from dp_flash_hf.layers.compiled import CompiledLayers, is_compiled, is_compiled_function
from dp_flash_hf.layers.gradient_records import full_precision
from dp_flash_hf.layers.recorder import MAX_LOGIT_BYTES, Recorder, TwoPassError
from dp_flash_hf.mechanisms.clipping import clip_factors, groups_of
from dp_flash_hf.mechanisms.config import Clipping
from dp_flash_hf.units import Batch, Select, Units, leading_shape, select_items, selector, subset

Strategy = Literal["auto", "bookkeeping", "two_pass", "microbatch"]
WholeBatchStrategy = Literal["bookkeeping", "two_pass"]
LossFunction = Callable[[Any], Tensor]


class ClippingEngine:
    """Attaches to a model and leaves in `.grad` the sum of per-unit clipped gradients.

        engine = ClippingEngine(model, max_grad_norm=1.0)
        engine.backward(lambda batch: model(**batch, num_items_in_batch=1).loss, batch)

    No noise is added here. The sum has sensitivity `max_grad_norm` with respect to adding or removing one unit, provided that
    the loss is a sum of terms that each depend on one unit alone; `check` tests that on a batch.

    model: the module whose parameters with `requires_grad` are trained. It may be in any dtype; sums accumulate in float32
        (float64 for float64 parameters).
    max_grad_norm: C > 0.
    clipping: "flat", "automatic" or "per_layer" (a layer is the module that owns the parameters); see `clipping.clip_factors`.
    strategy: "bookkeeping" (one backward), "two_pass" (two forward and backward passes, least memory), "microbatch" (one unit
        at a time), or "auto": bookkeeping, or two_pass once `choose` asked for it because memory is scarce, and microbatch for
        models with parameters that no rule covers and for batches for which it is the faster. All give the same values. A
        strategy asked for by name runs or raises PrivacyError.
    max_logit_bytes: logits of at least so many bytes, in float32, are deferred: a cross entropy of them is computed in blocks,
        and they are formed only if something else reads them. Gradients are the same; this trades time for memory.

    A model given to `torch.compile`, whole or in part, runs compiled where that is exact: on batches of rows, with bookkeeping
    and two_pass, if layers with a variant in `layers.compiled` hold all trained parameters. Else it runs eagerly, as do the
    passes that learn layouts.

    Raises ValueError for arguments out of range, UnsupportedError for models that couple units (batch normalisation) or have
    nothing to train.
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
        if not isinstance(max_grad_norm, (int, float)) or not 0 < max_grad_norm < float("inf"):
            raise invalid(
                "max_grad_norm", expected="a finite number above 0", actual=max_grad_norm, remedy="1.0 is a usual choice"
            )
        if clipping not in get_args(Clipping):
            raise invalid("clipping", expected=f"one of {get_args(Clipping)}", actual=clipping, remedy="choose one of them")
        if strategy not in get_args(Strategy):
            raise invalid("strategy", expected=f"one of {get_args(Strategy)}", actual=strategy, remedy="choose one of them")
        refuse_model(model)
        self._shards = Shards(model)
        if self._shards and strategy == "microbatch":
            raise UnsupportedError(
                "strategy='microbatch' on a model split up by FSDP2: a unit's gradient would be averaged over ranks; use "
                "'auto', 'bookkeeping' or 'two_pass'"
            )
        self._is_compiled = is_compiled(model)
        if self._shards and self._is_compiled:
            raise UnsupportedError("torch.compile on a model split up by FSDP2 is not supported; use one of them")
        model = getattr(model, "_orig_mod", model)
        self.model, self.max_grad_norm, self.clipping, self.strategy = model, float(max_grad_norm), clipping, strategy
        self.chosen: WholeBatchStrategy = "bookkeeping"  # what strategy="auto" computes whole batches by, see `choose`
        self.parameters = {p: name for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UnsupportedError("the model has no parameter with requires_grad=True; unfreeze what is to be trained")
        self.norms = torch.zeros(0)  # per-unit gradient norms of the last batch, scaled, before clipping
        # Units whose norm was not finite, since the engine was made; counted without noise: keep it secret.
        self.dropped_units = 0
        self._uncovered: set[nn.Parameter] = set()
        self._long_units = False  # whether the last batch was computed unit by unit because that is faster
        self._avoids_microbatch = False  # see `without_microbatching`
        self._adds = True  # False while this rank only takes part, see `participate`
        self._same_everywhere = False  # whether all ranks compute the same batch, as in `check`
        self._inconclusive = False  # whether layouts are, on some rank
        self._reached: set[nn.Parameter] = set()  # parameters that the last batch's loss depended on
        self._sums = GradientBuffer(model, self.parameters, self._shards.parameters)
        self._groups = groups_of(model, self.parameters, clipping)
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        products = [p for p in self.parameters if p.dim() == 2 and p not in tables]
        self._products = Counter((p.shape[0], p.shape[1]) for p in products)
        self._others = sum(p.numel() for p in self.parameters) - sum(p.numel() for p in products)
        self._n_groups = len(set(self._groups.values()))
        self._recorder = Recorder(self._groups, max_logit_bytes)
        self._refuse_batch = BatchGuard(model)
        self._attached: list[nn.Module] = []
        self._detached = False
        self._attach()
        self._probe = LayoutProbe(model, self.parameters, self._attached, self._recorder, self._shards)
        self._compiled = CompiledLayers(self._attached, self._recorder)
        self._runs_compiled = True  # until a batch shows that autograd sees more of the parameters than the layers do

    def backward(
        self,
        loss_fn: LossFunction,
        batch: Batch,
        units: Tensor | Units | None = None,
        loss_scale: Tensor | None = None,
        select: Select | None = None,
    ) -> Tensor:
        """Add the clipped sum of this physical batch to `.grad` and return the loss, detached, as `loss_fn` gave it.

        loss_fn: batch -> scalar, a sum of terms that each depend on one unit alone. It is called again on parts of the batch
            whenever the engine works unit by unit, and must then give those units' terms.
        batch: mapping of model inputs.
        units: the unit of every row (int64 (rows,)) or token (int64 (rows, length)), or int32 cumulative sequence lengths of
            one packed row; default: each row is a unit.
        loss_scale: (units,), finite; multiplies each unit's gradient before clipping (1 / label count makes means of sums).
        select: (batch, unit) -> that unit's batch, for batches whose tensors are not laid out by rows.

        Either the whole batch is added, or an exception is raised and `.grad` is what it was before. Not so if something fails
        while the batch is being added, which with strategy "two_pass" is during its second backward if other batches are there
        already: what the step has so far is then refused until `zero_grad()`.
        """
        if not isinstance(batch, Mapping):
            raise invalid("batch", expected="a mapping of model inputs", actual=type(batch).__name__, remedy="pass a dict")
        resolved = Units.of_batch(units, batch)
        self._refuse_batch(batch)
        scale = self._scale(loss_scale, resolved)
        if resolved.n == 0 and not self._shards:
            self.norms = torch.zeros(0)
            return torch.zeros(())
        with self._sums.whole_batch():
            return self._in_memory(loss_fn, batch, resolved, scale, select or selector(resolved), can_split=select is None)

    def participate(self, loss_fn: LossFunction, batch: Batch, units: Units) -> None:
        """Add nothing, while other ranks call `backward`.

        A model that FSDP2 split up computes on all ranks together, also where one has no unit left; what this batch holds is
        computed and dropped.
        """
        norms, self._adds = self.norms, False
        try:
            self.backward(loss_fn, batch, units)
        finally:
            self._adds, self.norms = True, norms[:0]

    def _in_memory(
        self, loss_fn: LossFunction, batch: Batch, units: Units, scale: Tensor | None, select: Select, *, can_split: bool
    ) -> Tensor:
        """`_once`, or where the batch does not fit in memory, its halves one after the other, which is the same sum."""
        held, dropped = any(p.grad is not None for p in self.parameters), self.dropped_units
        try:
            return self._once(loss_fn, batch, units, scale, select)
        except (RuntimeError, MemoryError) as error:
            owners = [unit for unit, size in enumerate(units.sizes) if size]
            if not _is_out_of_memory(error) or not can_split or len(owners) < 2 or self._shards:
                raise
            if self._sums.interrupted and held:
                raise self._dropped() from error
        # Here, not in the except block: there the traceback keeps what the attempt had allocated.
        if self._sums.interrupted:
            self._sums.drop()
        self.dropped_units = dropped
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            "out of memory in a physical batch: it is computed again in two halves. Smaller physical batches "
            "(per_device_train_batch_size with more accumulation, or max_tokens_per_device) save that time.",
            stacklevel=3,
        )
        total, norms, added = torch.zeros(()), torch.zeros(units.n), False
        try:
            for half in (owners[: len(owners) // 2], owners[len(owners) // 2 :]):
                items = torch.isin(units.of_item, torch.tensor(half)).nonzero().flatten()
                part, own = select_items(batch, units, items), subset(units, items)
                own_scale = None if scale is None else scale[half]
                loss = self._in_memory(loss_fn, part, own, own_scale, selector(own), can_split=True)
                added = True
                norms = norms.to(self.norms)
                norms[half] = self.norms
                total = total.to(loss.device) + loss
        except Exception as error:
            if added:  # the first half is in the sums, and cannot be taken out again
                raise self._dropped() from error
            raise
        self.norms = norms
        return total

    def _dropped(self) -> PrivacyError:
        self._sums.drop()
        return PrivacyError(
            "a batch that ran out of memory could be added in part only, so the whole step's sums were dropped, and nothing "
            "was released; begin the step again with smaller physical batches, or resume from the last checkpoint with them"
        )

    def _once(self, loss_fn: LossFunction, batch: Batch, units: Units, scale: Tensor | None, select: Select) -> Tensor:
        self._is_compiled = self._is_compiled or is_compiled_function(loss_fn)
        with self._isolated(), self._not_compiled():
            if self.strategy == "auto":
                alone_pays = not self._avoids_microbatch and not self._shards
                self._long_units = alone_pays and self._microbatch_is_faster(batch, units)
            if self.strategy == "microbatch" or (self.strategy == "auto" and (self._uncovered or self._long_units)):
                return self._microbatch(loss_fn, batch, units, scale, select)
            whole = self.chosen if self.strategy == "auto" else self.strategy
            run = partial(self._compiled_or_not, self._two_pass if whole == "two_pass" else self._bookkeeping)
            try:
                if self._shards.all(self._probe.knows(batch, units)):
                    try:
                        return run(loss_fn, batch, units, scale)
                    except UncoveredParametersError:
                        if not self._inconclusive:
                            raise
                        self._recorder.stop()
                        self._sums.clear_gradients()
                self._probe.probe(loss_fn, batch, select, units)
                return run(loss_fn, batch, units, scale)
            except UncoveredParametersError as error:
                if self._inconclusive:  # constant or NaN inputs: the next batch may tell
                    self._recorder.layouts.forget()
                if self.strategy != "auto" or self._shards:
                    raise
                if not self._inconclusive:
                    self._uncovered |= error.parameters
                warnings.warn(f"{error} Every unit is now computed by itself: exact, but slower.", stacklevel=4)
                self._recorder.stop()
                self._sums.clear_gradients()
                return self._microbatch(loss_fn, batch, units, scale, select)

    @contextmanager
    def batch(self, units: Tensor | Units | None = None, loss_scale: Tensor | None = None) -> Iterator[None]:
        """The thin primitive under `backward`: run one forward of the model and one backward inside it.

            with engine.batch():
                model(**inputs, num_items_in_batch=1).loss.backward()

        Bookkeeping only, with the model called by keyword. Raises PrivacyError when a parameter's gradient escaped the rules
        (use `backward`, which then works unit by unit); `.grad` is then what it was before.
        """
        scale = None
        seen: list[Units] = []

        def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal scale
            if seen or not torch.is_grad_enabled():
                return
            inputs = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
            resolved = Units.of_batch(units, inputs)
            self._refuse_batch(inputs)
            seen.append(resolved)
            scale = self._scale(loss_scale, resolved)
            if not self._probe.knows(inputs, resolved):

                def forward(part: Batch) -> Any:
                    return module(*(part[f"argument {i}"] for i in range(len(args))), **{name: part[name] for name in kwargs})

                self._probe.probe(forward, inputs, selector(resolved), resolved)
            self._recorder.start("record", resolved)

        if self._shards:
            raise UnsupportedError(
                "engine.batch on a model split up by FSDP2: use engine.backward(loss_fn, batch) on every rank"
            )
        with self._sums.whole_batch(), self._isolated(), self._not_compiled():
            handle = self.model.register_forward_pre_hook(prepare, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
            if not seen:
                raise PrivacyError(
                    "engine.batch: the model was not called inside it; run forward and backward inside the block"
                )
            try:
                self._require_coverage()
            except UncoveredParametersError:
                if self._recorder.layouts.inconclusive:
                    self._recorder.layouts.forget()
                raise
            if not self._recorder.records:
                raise PrivacyError("engine.batch: no backward ran inside it; run forward and backward inside the block")
            self._add_recorded(seen[0], scale)

    def choose(self, strategy: WholeBatchStrategy) -> None:
        """From now on strategy="auto" computes whole batches by this strategy; a strategy asked for by name stays."""
        self.chosen = strategy

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Within the context a compiled model runs as if it were not compiled, called by the engine or not."""
        before, self._runs_compiled = self._runs_compiled, False
        try:
            with self._not_compiled():
                yield
        finally:
            self._runs_compiled = before

    @contextmanager
    def without_microbatching(self) -> Iterator[None]:
        """Within the context, strategy="auto" computes no batch unit by unit only because that is faster.

        Checks need it: units that are computed one by one cannot see each other, whatever they do in other batches.
        """
        before, self._avoids_microbatch = self._avoids_microbatch, True
        try:
            yield
        finally:
            self._avoids_microbatch = before

    def clipped_sum(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated clipped sum of one parameter, float32 (float64): `.grad` itself, or what it was rounded from.

        Of a parameter that FSDP2 split up: this rank's part of it, summed over all ranks.
        Raises PrivacyError when `.grad` holds anything else.
        """
        if parameter not in self.parameters:
            raise PrivacyError("clipped_sum: a parameter the engine does not train")
        self._sums.require_whole()
        return self._sums.total(parameter)

    def take_sums(self) -> dict[nn.Parameter, Tensor]:
        """Hand over the accumulated clipped sums, zeros where nothing was added, for noise to be put on them.

        From then on `.grad` is the caller's: the engine adds to it no more until `zero_grad()`.
        """
        return self._sums.take()

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

        Every unit is computed alone and compared with its part of the batch: the loss must be the sum of their losses, norms
        and clipped sum must agree, and the norm of one unit must not move when the others are exchanged. Every trained
        parameter must have received a gradient. `.grad` is left as it was.

        tolerance: relative; rounding of the model's dtype is what it must allow for.
        Of a model that FSDP2 split up, all ranks check the same batch.
        Raises PrivacyError on a mismatch.
        """
        resolved = Units.of_batch(units, batch)
        strategy, dropped = self.strategy, self.dropped_units
        try:
            with self._sums.afresh(), training_mode(self.model, False), self.without_microbatching():
                self._same_everywhere = True
                together = self.backward(loss_fn, batch, resolved, loss_scale, select).double()
                norms, clipped = self.norms, self.take_sums()
                unused = [name for p, name in self.parameters.items() if p not in self._reached]
                self.strategy = "microbatch"
                self._sums.drop()
                alone = self.backward(loss_fn, batch, resolved, loss_scale, select).double()
                norms_alone, clipped_alone = self.norms, self.take_sums()
                moved = None
                if resolved.kind == "rows" and resolved.identity and resolved.n > 1 and select is None:
                    order = torch.tensor([0, *range(2, resolved.n), 0])  # unit 0 stays, the others see different company
                    self.strategy = strategy
                    self._sums.drop()
                    rolled = None if loss_scale is None else torch.as_tensor(loss_scale)[order]
                    self.backward(loss_fn, select_items(batch, resolved, order), None, rolled)
                    moved = abs(float(self.norms[0]) - float(norms[0]))
        except AssertionError as error:
            raise PrivacyError(f"the model cannot be checked in evaluation mode, without dropout: {error}") from error
        finally:
            self.strategy, self.dropped_units, self._same_everywhere = strategy, dropped, False
        scale = max(float(norms_alone.max()), 1e-12) if resolved.n else 1.0
        if unused:
            raise PrivacyError(
                f"these parameters require gradients but the loss does not depend on them: {unused[:8]}; freeze them"
            )
        if not abs(float(together - alone)) <= tolerance * max(abs(float(alone)), 1e-3):  # so written, NaN fails too
            raise PrivacyError(
                f"the loss couples units: {float(together):.6g} together, {float(alone):.6g} as the sum of each alone; make "
                "the loss a sum over units (divide by a constant, not by what is in the batch)"
            )
        if moved is not None and not moved <= tolerance * scale:
            raise PrivacyError(
                "a unit's gradient changes with the other units of its batch; look for operations across the batch"
            )
        apart = float((norms - norms_alone).abs().max()) if resolved.n else 0.0
        off = float(self._shards.square({p: (clipped[p] - clipped_alone[p]) / self._shards.copies(p) for p in clipped})) ** 0.5
        if not (apart <= tolerance * scale and off <= tolerance * self.max_grad_norm * max(resolved.n, 1)):
            raise PrivacyError(
                f"gradients in the batch differ from those of each unit alone: norms by {apart:.3g} of {scale:.3g}, clipped "
                f"sum by {off:.3g}; units see each other (padding, routing, batch statistics), or a layer's rule is wrong"
            )

    def norm_methods(self) -> dict[str, str]:
        """How the last batch's gradient norm of each parameter was computed."""
        if self._uncovered or self.strategy == "microbatch" or (self.strategy == "auto" and self._long_units):
            return dict.fromkeys(self.parameters.values(), "microbatch")
        return {name: self._recorder.norm_methods[p] for p, name in self.parameters.items() if p in self._recorder.norm_methods}

    def detach(self) -> None:
        """Give the model back as it was, bit for bit; `.grad` stays."""
        self._recorder.stop()
        for module in self._attached:
            rules.detach(module)
        self._attached, self._detached = [], True

    # Attaching.

    def _attach(self) -> None:
        try:
            for module in self.model.modules():
                if rules.is_attached(module):
                    raise UnsupportedError("the model already has a ClippingEngine; call its detach() first")
            for module in list(self.model.modules()):
                owns = any(p.requires_grad for p in module.parameters(recurse=False))
                if owns or (rules.rule_for(module) is not None and any(p.requires_grad for p in module.parameters())):
                    rules.attach(module, self._recorder)
                    self._attached.append(module)
                    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                        if parameter in self._shards.parameters:
                            self._recorder.add_sharded(module, name, parameter)
        except BaseException:
            self.detach()
            raise

    # Strategies.

    def _microbatch_is_faster(self, batch: Batch, units: Units) -> bool:
        """By the planner's model; shapes are all it looks at."""
        first = next(iter(self.parameters))
        # A second dimension of floating-point numbers may be features, of one row each.
        has_length = any(isinstance(x, Tensor) and x.dim() > 1 + x.is_floating_point() for x in batch.values())
        rows = math.prod(leading_shape(batch)[1:]) if units.kind == "rows" and has_length else 1
        sizes = [size * rows for size in units.sizes if size]
        speed = cost_model.speed_of(first.device, first.dtype)
        return cost_model.microbatch_is_faster(self._products, self._others, sizes, first.dtype, speed)

    def _not_compiled(self) -> AbstractContextManager[Any]:
        # Asking the compiler would import it, which takes seconds.
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    def _compiled_or_not(
        self,
        run: Callable[[LossFunction, Batch, Units, Tensor | None], Tensor],
        loss_fn: LossFunction,
        batch: Batch,
        units: Units,
        scale: Tensor | None,
    ) -> Tensor:
        if not self._is_compiled or not self._runs_compiled or units.kind != "rows":
            return run(loss_fn, batch, units, scale)
        uncovered = self._compiled.uncovered()
        if uncovered:
            if self._recorder.layouts.learnt:
                self._run_eagerly(uncovered)
            return run(loss_fn, batch, units, scale)
        dropped = self.dropped_units
        try:
            with self._compiled.recording(units.n_items, self._like):
                return run(loss_fn, batch, units, scale)
        except UncoveredParametersError as error:
            if not self._recorder.layouts.inconclusive:
                self._run_eagerly(error.parameters)
        self.dropped_units = dropped
        self._sums.clear_gradients()
        return run(loss_fn, batch, units, scale)

    def _run_eagerly(self, uncovered: set[nn.Parameter]) -> None:
        """No batch runs compiled from now on, because of these parameters."""
        self._runs_compiled = False
        names = sorted(self.parameters[p] for p in uncovered)
        warnings.warn(
            f"compiled code does not show how the model uses {_shown(names)}: it runs eagerly from now on, exact but no "
            "faster than without torch.compile",
            stacklevel=2,
        )

    def _bookkeeping(self, loss_fn: LossFunction, batch: Batch, units: Units, scale: Tensor | None) -> Tensor:
        self._recorder.start("record", units)
        loss = self._loss(loss_fn, batch)
        _plain_backward(loss)
        self._require_coverage()
        self._add_recorded(units, scale)
        return loss.detach()

    def _two_pass(self, loss_fn: LossFunction, batch: Batch, units: Units, scale: Tensor | None) -> Tensor:
        try:
            return self._two_passes(loss_fn, batch, units, scale)
        except TwoPassError as error:
            if self.strategy != "auto" or self._shards:
                raise
            warnings.warn(f"{error}. strategy='auto' uses book-keeping from now on, which takes more memory.", stacklevel=3)
            self.choose("bookkeeping")
            self._sums.clear_gradients()
            return self._bookkeeping(loss_fn, batch, units, scale)

    def _two_passes(self, loss_fn: LossFunction, batch: Batch, units: Units, scale: Tensor | None) -> Tensor:
        devices = sorted({device_of(p).index or 0 for p in self.parameters if device_of(p).type == "cuda"})
        with torch.random.fork_rng(devices):  # both passes must see the same dropout
            self._recorder.start("norms", units)
            loss = self._loss(loss_fn, batch)
            _plain_backward(loss)
            loss = loss.detach()  # its graph goes before the next one comes
            self._require_coverage()
            self._reached = self._recorder.reached
            factors = self._factors(self._recorder.squared_norms(self._like), scale)
        # Sums that are there are added to in place, and new ones made in backward: memory for no second set.
        sums = self._sums.in_place()
        begun = bool(sums)
        parts: dict[nn.Parameter, Tensor] = {}
        self._recorder.start("sum", units, factors, sums)
        with self._shards.at_ends(lambda done: add_own_parts(done, sums, parts)):
            again = loss_fn(batch)
            if self._shards.any(not torch.allclose(again, loss, rtol=1e-5, atol=1e-6, equal_nan=True)):
                raise TwoPassError(
                    f"strategy='two_pass': the second pass gave loss {float(again.detach())} after {float(loss)}; the model "
                    "draws random numbers that torch does not replay, use strategy='bookkeeping'"
                )
            if begun:
                self._sums.begin()
            _plain_backward(again)
        self._require_coverage()
        self._recorder.stop()
        add_own_parts(self._shards.of_any_rank(sums), sums, parts)
        sums |= parts
        parts.clear()
        self._sums.put_back()
        with self._sums.adding(begun=begun):
            self._sums.add_all(sums)
        return loss

    def _microbatch(self, loss_fn: LossFunction, batch: Batch, units: Units, scale: Tensor | None, select: Select) -> Tensor:
        if self._shards and not self._same_everywhere:
            raise UnsupportedError(
                "one unit at a time on a model split up by FSDP2: a unit's gradient would be averaged over ranks; use 'auto', "
                "'bookkeeping' or 'two_pass'"
            )
        sums = {p: torch.zeros_like(local(p), dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.parameters}
        total = torch.zeros(())
        norms = []
        self._reached = set()
        for unit in range(units.n):
            squared = self._like.new_zeros(1, self._n_groups)
            if units.sizes[unit]:
                loss = loss_fn(select(batch, unit))
                with self._shards.synchronizing(True):  # of one batch on all ranks, the mean is the gradient itself
                    _plain_backward(loss)
                total = total.to(loss.device) + loss.detach()
                found = {p: local(p.grad) for p in self.parameters if p.grad is not None}
                self._reached |= found.keys()
                for group, own in self._by_group(found):
                    squared[0, group] += self._shards.square(own, squared)
            factors = self._factors(squared, None if scale is None else scale[unit : unit + 1])
            norms.append(self.norms)
            for p in self.parameters:
                factor = float(factors[0, self._groups[p]]) * self._shards.copies(p)
                if p.grad is not None and factor != 0.0:
                    sums[p].add_(local(p.grad).to(sums[p].dtype), alpha=factor)
                p.grad = None
        self.norms = torch.cat(norms)
        self._sums.put_back()
        with self._sums.adding():
            self._sums.add_all(sums)
        return total

    def _by_group(self, found: dict[nn.Parameter, Tensor]) -> Iterator[tuple[int, dict[nn.Parameter, Tensor]]]:
        groups: dict[int, dict[nn.Parameter, Tensor]] = {}
        for parameter in self.parameters:  # in the same order on all ranks
            if parameter in found:
                groups.setdefault(self._groups[parameter], {})[parameter] = found[parameter]
        yield from groups.items()

    # Shared steps.

    def _loss(self, loss_fn: LossFunction, batch: Batch) -> Tensor:
        loss = loss_fn(batch)
        early = self._recorder.reached
        if early:  # as adversarial losses do: part of that gradient, or its own gradient, is not what was recorded
            raise UncoveredParametersError(
                {p: self.parameters[p] for p in early}, "the loss function takes gradients itself, of"
            )
        return loss

    @property
    def holds_sums(self) -> bool:
        """Whether clipped sums were made that `take_sums` did not hand over yet."""
        return bool(self._sums)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 split the model up, so that all ranks compute together: see `participate`."""
        return bool(self._shards)

    @property
    def reduces_precision(self) -> bool:
        """Whether the model computes with less than float32 somewhere, as far as its parameters tell."""
        return self._recorder.reduces_precision or any(p.dtype.itemsize < 4 for p in self.model.parameters())

    @property
    def _like(self) -> Tensor:
        first = next(iter(self.parameters))
        return torch.zeros((), device=device_of(first), dtype=torch.promote_types(first.dtype, torch.float32))

    def _scale(self, loss_scale: Tensor | None, units: Units) -> Tensor | None:
        if loss_scale is None:
            return None
        scale = torch.as_tensor(loss_scale).detach()
        if scale.shape != (units.n,) or not bool(torch.isfinite(scale).all()):
            raise invalid(
                "loss_scale", expected=f"({units.n},) finite numbers", actual=scale, remedy="give one factor for every unit"
            )
        return scale.to(self._like)

    @torch.no_grad()
    def _factors(self, squared_norms: Tensor, scale: Tensor | None) -> Tensor:
        """Sets `norms`, counts what is dropped, and returns the factors (units, groups) of the unscaled gradients."""
        if scale is not None:
            squared_norms = squared_norms * scale.square().unsqueeze(1)
        if not self._adds:
            return torch.zeros_like(squared_norms)
        factors = clip_factors(squared_norms, self.max_grad_norm, self.clipping)
        norms = squared_norms.sum(1).sqrt()
        self.norms = norms
        self.dropped_units += int((~torch.isfinite(norms)).sum())
        return factors if scale is None else factors * scale.unsqueeze(1)

    @torch.no_grad()
    def _add_recorded(self, units: Units, scale: Tensor | None) -> None:
        factors = self._factors(self._recorder.squared_norms(self._like), scale)
        records = self._recorder.records
        self._reached = self._recorder.reached
        self._sums.put_back()
        with self._sums.adding(), full_precision(factors.device):
            for parameter in self.parameters:
                record, own = records.pop(parameter, None), factors[:, self._groups[parameter]].to(device_of(parameter))
                if parameter in self._shards.parameters:
                    self._sums.add(parameter, own_part_of_sum(parameter, None if record is None else record.clipped_sum(own)))
                elif record is None:
                    self._sums.total(parameter)
                else:
                    self._sums.add_record(parameter, record, own)
        self._recorder.stop()

    def _require_coverage(self) -> None:
        left_over = self._recorder.left_over | self._recorder.unplaced
        found = {p: name for p, name in self.parameters.items() if p.grad is not None or p in left_over}
        self._inconclusive = self._shards.any(self._recorder.layouts.inconclusive)
        if self._shards.any(bool(found)):
            raise UncoveredParametersError(found, "no rule covers how the model uses")
        if not self._recorder.all_taps_recorded:
            raise UncoveredParametersError(dict(self.parameters), "compiled code does not come by for every use of")

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """One batch: see `GradientBuffer.apart`."""
        if self._detached:
            raise PrivacyError("the engine was detached; make a new ClippingEngine")
        self._shards.reshard()
        with self._sums.apart():
            try:
                with self._shards.synchronizing(False):
                    yield
            finally:
                self._recorder.stop()


class UncoveredParametersError(PrivacyError):
    """Gradients were taken of parameters outside the rules: their per-unit norms are unknown."""

    def __init__(self, parameters: dict[nn.Parameter, str], what: str) -> None:
        self.parameters = set(parameters)
        shown = _shown(sorted(parameters.values()) or ["parameters named on another rank"])
        super().__init__(f"{what} {shown}; use engine.backward with strategy='auto', freeze them, or register a rule.")


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_out_of_memory(error: BaseException) -> bool:
    marks = ("can't allocate memory", "out of memory", "not enough memory")  # of torch's allocators: CPU, CUDA, CPU on Windows
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(mark in str(error).lower() for mark in marks)


def _plain_backward(loss: Tensor) -> None:
    if loss.dim() != 0:
        raise invalid("loss_fn", expected="a scalar", actual=tuple(loss.shape), remedy="sum the units' losses")
    with torch.autocast(loss.device.type, enabled=False):  # backward runs in the dtypes that forward chose
        loss.backward()
