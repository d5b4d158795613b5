"""Ownership of `.grad`: nothing is added to it but clipped sums, and no batch in part.

Sums are *shown*, and stand in `.grad`, or, for a mechanism that puts noise on them, *withheld*: `.grad` is then empty until
they are taken, and `drop` gives them up in place of `zero_grad()`. Between two `zero_grad()` they are in one of these states,
and a batch takes them through the first three:

===========  ==========================================  ===================================================================
state        `.grad` holds                               entered by
===========  ==========================================  ===================================================================
whole        the clipped sums of whole batches, or None  `zero_grad()`, the end of `adding`
set aside    what autograd leaves there, which escaped   `apart`; ends with `put_back`, or with the context, whatever ended
             the rules: the engine looks, and clears it  it: `.grad` is then what it was before
adding       sums to which a batch is being added, one   `adding`; for strategy "two_pass", whose second backward pass adds
             parameter after the other                   to sums directly, `begin`, before `put_back`
interrupted  perhaps parts of a batch                    whatever ends `adding`, or `whole_batch` after its first part: an
                                                         interrupt, too
taken        the caller's tensors                        `take`, from "whole" only
===========  ==========================================  ===================================================================

Interrupted sums are given to no caller, and nothing is added to them, until `zero_grad()`. Where nothing was in them before the
batch, it can be taken out again by dropping them; else the step is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_flash_hf.distributed import Ranks, as_gradient, local
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.layers.gradient_records import GradientRecord

MOST_ROUNDING = 2**14  # times 2^-24 C


@dataclass
class _Sum:
    """One parameter's clipped sum, and how it was left in `.grad`.

    total: what is added to, float32 (float64), of this rank's part of the parameter. gradient: what `.grad` was set to: `total`
    itself where it has the parameter's dtype, else rounded from it; None of a sum that is withheld. version: how often that had
    been changed in place by then.
    """

    total: Tensor
    gradient: Tensor | None
    version: int = 0

    def widen(self) -> None:
        """The total is float64 from now on."""
        self.total = self.total.double()

    def publish(self) -> None:
        """The total was added to: the gradient follows."""
        if self.gradient is None:
            return
        gradient = local(self.gradient)
        if gradient.dtype != self.total.dtype:
            gradient.copy_(self.total)
        self.version = gradient._version


class GradientBuffer:
    """The clipped sums of a model's trained parameters, which stand in their `.grad`.

    Sums are float32, or float64 of float64 parameters, whatever dtype `.grad` has to have; of a sharded parameter there is this
    rank's part. A `.grad` that anything else has set, or changed in place, is noticed by its identity and version, and refused.

    **Rounding.** A sum of k units is no longer than k C, so adding a part to it in float32 moves it by at most 2^-24 k C, a
    rounding that depends on all units. Sums become float64 before these add up to `MOST_ROUNDING`, on all ranks together, which
    is what `mechanisms.gaussian_noise.SENSITIVITY` charges for.

    Args:
        model: in which trained parameters that are new since the engine was made are looked for.
        parameters: the trained ones and their names.
        sharded: those among them that FSDP2 sharded.

    Attributes:
        interrupted: whether parts of a batch may be in the sums.
        units: how many are in the sums.
        wide: whether all sums are float64.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[nn.Parameter, str], sharded: Collection[nn.Parameter] = ()
    ) -> None:
        self._model, self._parameters, self._sharded = model, parameters, sharded
        self._withheld = False
        self._most_rounding = MOST_ROUNDING if Ranks().size == 1 else MOST_ROUNDING / 2 / Ranks().size
        self._rounding = 0.0
        self.wide = False
        self.units = 0
        self._sums: dict[nn.Parameter, _Sum] = {}
        self._aside: dict[nn.Parameter, Tensor | None] = {}  # `.grad` of every parameter, between `apart` and `put_back`
        self.interrupted = False
        self._batches = 0  # or parts of batches, added to the end

    def __bool__(self) -> bool:
        """Whether there are sums that `take` did not hand over yet."""
        return bool(self._sums)

    @property
    def holds(self) -> bool:
        """Whether some trained parameter has a `.grad`, or a sum that is withheld."""
        return (self._withheld and bool(self._sums)) or any(p.grad is not None for p in self._parameters)

    def withhold(self, value: bool) -> None:
        """From now on sums are withheld, or shown. Those so far are dropped, and `.grad` is empty."""
        self.drop()
        self._withheld = value

    def widen(self) -> None:
        """From now on sums are float64, until they are taken or dropped."""
        self.wide = True
        for own in self._sums.values():
            own.widen()

    # What is there.

    @torch.no_grad()
    def total(self, parameter: nn.Parameter) -> Tensor:
        """The clipped sum of one parameter, zeros if nothing was added: see `ClippingEngine.clipped_sum`.

        Raises:
            PrivacyError: where its `.grad` was not made here, or was changed since; zeros count as `zero_grad()`.
        """
        own = self._sums.get(parameter)
        if own is not None and self._withheld and parameter.grad is None:
            return own.total
        if parameter.grad is None or own is None:
            if parameter.grad is not None:
                raise PrivacyError(
                    f"{self._parameters[parameter]}.grad was not made by the engine: it is not clipped; zero_grad() first"
                )
            return self._hold(parameter, torch.zeros_like(local(parameter), dtype=torch.float32))
        if own.gradient is None or parameter.grad is not own.gradient or local(own.gradient)._version != own.version:
            if bool((local(parameter.grad) == 0).all()):  # zero_grad(set_to_none=False), which is public knowledge
                parameter.grad = None
                return self.total(parameter)
            raise PrivacyError(f"{self._parameters[parameter]}.grad was changed since the engine made it: zero_grad() first")
        return own.total

    def take(self) -> dict[nn.Parameter, Tensor]:
        """Hand over all sums; `.grad` is the caller's from then on.

        Returns:
            The sum of every trained parameter, of its shape, or this rank's part of it.

        Raises:
            PrivacyError: as `total`, and where parts of a batch may be in the sums.
        """
        self.require_whole()
        sums = {parameter: self.total(parameter) for parameter in self._parameters}
        self._begin_sums()
        return sums

    def drop(self) -> None:
        """No sums and no gradients from now on."""
        self._begin_sums()
        self.interrupted = False
        self.clear_gradients()

    def _begin_sums(self) -> None:
        self._sums, self.wide, self.units, self._rounding = {}, False, 0, 0.0

    def require_whole(self) -> None:
        """Raise PrivacyError where parts of a batch may be in the sums, unless `zero_grad()` gave them up."""
        if not self.interrupted:
            return
        shown = any(p.grad is not None and bool((local(p.grad) != 0).any()) for p in self._parameters)
        if shown or (self._withheld and self._sums):
            raise _of_parts()
        self.drop()

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """Within the context there are no sums and no gradients; afterwards those of before are there again."""
        gradients, sums, interrupted = {p: p.grad for p in self._parameters}, self._sums, self.interrupted
        counted = self.wide, self.units, self._rounding
        try:
            self.drop()
            yield
        finally:
            self._sums, self.interrupted = sums, interrupted
            self.wide, self.units, self._rounding = counted
            for parameter, gradient in gradients.items():
                parameter.grad = gradient

    # A batch, in this order.

    @contextmanager
    def whole_batch(self) -> Iterator[None]:
        """Within the context a batch is added, in one part or several: `interrupted` where an error ends it after the first."""
        before = self._batches
        try:
            yield
        except BaseException:
            self.interrupted = self.interrupted or self._batches != before
            raise

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within the context backward starts with every `.grad` empty; the sums are back when it ends, if not before.

        Raises:
            PrivacyError: where `.grad` holds anything but whole sums, or a trained parameter is new.
            UnsupportedError: where hooks on parameters would see gradients that are not clipped, or none.
        """
        self.require_whole()
        self._require_same_parameters()
        for parameter in self._parameters:
            if parameter.grad is not None:
                self.total(parameter)
            elif not self._withheld:
                self._sums.pop(parameter, None)  # zero_grad() gave it up
        if not self._sums:
            self._begin_sums()
        self._aside = {p: p.grad for p in self._parameters}
        self.clear_gradients()
        try:
            yield
        finally:
            self.put_back()

    def clear_gradients(self) -> None:
        """Empty every `.grad`."""
        for parameter in self._parameters:
            parameter.grad = None

    def in_place(self, units: int) -> dict[nn.Parameter, Tensor]:
        """The sums that a backward pass of so many units may add to directly: no float64 ones, none of sharded parameters.

        Raises:
            PrivacyError: where that was begun before: the same batch would be added twice.
        """
        if self.interrupted:
            raise _of_parts()
        self._make_room(units)
        there = {} if self.wide else self._sums
        return {parameter: own.total for parameter, own in there.items() if parameter not in self._sharded}

    def put_back(self) -> None:
        """End what `apart` began: `.grad` is what it was before."""
        for parameter, gradient in self._aside.items():
            parameter.grad = gradient
        self._aside = {}

    def begin(self) -> None:
        """From now on, and until `adding` ends, parts of a batch may be in the sums."""
        self.interrupted = True

    @contextmanager
    def adding(self, units: int, *, begun: bool = False) -> Iterator[None]:
        """Within the context a batch of so many units is added.

        Raises PrivacyError where one was begun already, unless it is this one.
        """
        if self.interrupted and not begun:
            raise _of_parts()
        self._make_room(units)
        self.begin()
        yield
        self._batches += 1
        self._rounding += self.units + units if self.units else 0
        self.units += units
        self.interrupted = False

    def _make_room(self, units: int) -> None:
        """Sums become float64 where so many more units would round them too far."""
        if not self.wide and self.units and self._rounding + self.units + units > self._most_rounding:
            self.widen()

    @torch.no_grad()
    def add_all(self, found: dict[nn.Parameter, Tensor]) -> None:
        """Add what was found, and nothing to the sums of other parameters; `found` is used up.

        A sum itself among what was found, see `in_place`, has been added to already.
        """
        for parameter in self._parameters:
            added, own = found.pop(parameter, None), self._sums.get(parameter)
            if added is None:
                self.total(parameter)
            elif own is not None and added is own.total:
                self._sums[parameter].publish()
            else:
                self.add(parameter, added)

    @torch.no_grad()
    def add(self, parameter: nn.Parameter, added: Tensor) -> None:
        """Add to one parameter's sum; where there is none, `added` becomes it."""
        if parameter not in self._sums:
            self._hold(parameter, added)
        else:
            self.total(parameter).add_(added)
            self._sums[parameter].publish()

    @torch.no_grad()
    def add_record(self, parameter: nn.Parameter, record: GradientRecord, factors: Tensor) -> None:
        """Add the units' recorded gradients times `factors` (units,)."""
        if parameter not in self._sums or self.wide:
            self.add(parameter, record.clipped_sum(factors))
        else:
            record.add_clipped_sum_(self.total(parameter), factors)
            self._sums[parameter].publish()

    def _hold(self, parameter: nn.Parameter, total: Tensor) -> Tensor:
        """Make a new sum the parameter's own."""
        total = total.to(torch.float64 if self.wide else torch.promote_types(parameter.dtype, torch.float32))
        if self._withheld:
            self._sums[parameter] = _Sum(total, None)
            return total
        parameter.grad, total = as_gradient(parameter, total)
        self._sums[parameter] = _Sum(total, parameter.grad, local(parameter.grad)._version)
        return total

    def _require_same_parameters(self) -> None:
        added = [name for name, p in self._model.named_parameters() if p.requires_grad and p not in self._parameters]
        if added:
            raise PrivacyError(
                f"trainable since the engine was made, and so not clipped: {added[:8]}; stop training, detach() and make a new "
                "engine (a Trainer: dp.detach(), dp.attach(trainer), trainer.train() again). What was spent goes on counting"
            )
        hooked = [name for p, name in self._parameters.items() if p._post_accumulate_grad_hooks]
        if hooked:
            raise UnsupportedError(
                f"hooks run as soon as gradients of {hooked[:8]} accumulate, before they are clipped (an optimizer that steps "
                "inside backward?); use an optimizer that steps after it"
            )
        changed = [name for p, name in self._parameters.items() if p._backward_hooks]
        if changed:
            raise UnsupportedError(
                f"register_hook on {changed[:8]}: clipped sums are formed without autograd, so the hook would not run; "
                "change the model's output or freeze the parameter instead"
            )


def _of_parts() -> PrivacyError:
    return PrivacyError(
        "something failed while a batch was being added (the second pass of strategy='two_pass', say), so the sums may hold "
        "parts of it: zero_grad() and begin the step again, with smaller batches if memory ran out"
    )
