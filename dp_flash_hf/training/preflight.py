"""What is learnt and proved on the user's own data and model before the first step, and again while training goes on.

Each check computes the same units in two ways that must agree if a unit's gradient depends on that unit alone. A few units are
compared, chosen to differ in all they hold, and their labels are changed: a check finds what couples units by the way model,
loss and collator are made, and not what only happens to others of the data. Training itself clips whatever comes; what these
checks add is that what is clipped is the gradient of one unit.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.layout_probing import training_mode
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.training.adapter import TrainingAdapter
from dp_flash_hf.training.batches import without_trailing_padding
from dp_flash_hf.training.collator_checks import check_collator
from dp_flash_hf.training.losses import UnitLoss, ZeroLossError, learn_loss
from dp_flash_hf.training.tried_units import LOOKED_AT, choose_units, known_values, length_of, relabelled, spread_units
from dp_flash_hf.training.unit_checks import check_alone, check_interaction, check_packing, check_training_mode
from dp_flash_hf.training.unit_reader import UnitReader
from dp_flash_hf.training.untraced import rounds_within, untraced, without_autocast
from dp_flash_hf.units import IGNORED, Units, select_unit

_GROUPS = 16  # times that other units are looked at, where those before have no label or no gradient
_ROUNDS = 32  # of check_interaction before the first step, and of check_collator: at most, and at least a quarter
_SECONDS = 20.0  # for all rounds of check_interaction
_LATER = 8  # rounds of a whole check while training


class Checks:
    """The checks of one training, on other units of its data each time.

    Args:
        engine: attached to the model that is trained.
        adapter: of the integration.
        reader: of the training data.
        cut_padding: whether trailing padding will be cut off physical batches, as with `max_tokens`.
    """

    def __init__(self, engine: ClippingEngine, adapter: TrainingAdapter, reader: UnitReader, *, cut_padding: bool) -> None:
        self.engine, self.adapter, self.reader, self.cut_padding = engine, adapter, reader, cut_padding
        self._needs_autocast = False  # known once it was tried without
        self._tried: list[int] = []  # before training

    def before_training(self) -> UnitLoss:
        """Learn how the loss divides, and prove isolation and exactness, on units chosen from all over the data.

        In this order: the collator leaves the rows of others alone, in its batch and in later ones (`check_collator`); the loss
        is a mean or a sum over labels, and is made a sum over units (`learn_loss`); each chosen unit has a finite loss, and one
        of them a label and a gradient; texts of a packed row do not see each other (`check_packing`); gradients of the batch
        are those of every unit alone, with the labels of the data and with changed ones (`ClippingEngine.check`); none depends
        on how far it is padded (`check_alone`); in training mode none depends on the others either (`check_training_mode`); and
        the loss stays a sum over units whatever random numbers it draws (`check_interaction`).

        What no check can see: coupling that appears only on other inputs than the ones tried, as of a router that overflows in
        larger batches; and code that couples units on a condition that the checks do not meet.

        Forward and backward passes run, without a trace; see `untraced`. All ranks try the same units.

        Returns:
            The loss as a sum over units, for `ClippingEngine.backward`.

        Raises:
            PrivacyError: units are coupled, a value is not finite, or there is nothing to compare.
            UnsupportedError: the loss or the batch's layout is none of those known.
        """
        chance = _secret_chance()
        with untraced(self.engine, self.adapter):
            examples = self._looked_at(chance)
            chosen = choose_units(examples)
            with Ranks().all_ranks_or_none():  # each has a collator of its own
                check_collator(self.reader, self.reader.keys(chosen), chance, rounds=_ROUNDS // 2)
            self._try_without_autocast(chosen)
            with self._precisely() as precise:
                loss, chosen = self._learnt_from(chosen, chance, tolerance=1e-4 if precise else 1e-2)
                self._require_packing(loss, chosen, tolerance=1e-3 if precise else 0.05, precise=precise)
            self._tried = chosen = self._with_gradients(loss, examples, chosen, chance)
            batch, units = self.reader.batch(chosen)
            if self._lowered:  # as it will be computed, whatever that rounds away
                self._compare(loss, chosen, [batch], units, chance, precise=False)
            with self._precisely() as precise:
                batches = self._with_other_labels(loss, batch, units, examples, chance)
                self._compare(loss, chosen, batches, units, chance, precise=precise)
                rounds = rounds_within(_SECONDS, least=_ROUNDS // 4, most=_ROUNDS, late_anywhere=self._anywhere)
                self._interact(loss, batches, units, chance, rounds, precise=precise)
        return loss

    def again(self, loss: UnitLoss) -> None:
        """Repeat the checks on other units, chosen again; how the loss divides stays what was learnt.

        Where numbers are coarser than float32, only batches of equal shapes are compared, whose rounding is equal too.

        Args:
            loss: of `before_training`.

        Raises:
            PrivacyError: units are coupled.
        """
        chance = _secret_chance()
        with untraced(self.engine, self.adapter), self._precisely() as precise:
            examples = self._looked_at(chance, most=2 * _LATER)
            chosen = choose_units(examples)
            with Ranks().all_ranks_or_none():
                check_collator(self.reader, self.reader.keys(chosen), chance, rounds=_LATER // 2)
            batch, units = self.reader.batch(chosen)
            if not self._comparable(loss, batch, units):
                return
            batches = self._with_other_labels(loss, batch, units, examples, chance)
            self._require_packing(loss, chosen, tolerance=0.01 if precise else 0.05, precise=precise)
            if precise:
                self._compare(loss, chosen, batches[:2], units, chance, precise=True, later=True)
            self._interact(loss, batches, units, chance, iter(range(_LATER)), precise=precise)

    def glance(self, loss: UnitLoss) -> None:
        """The smallest check of all, of four random units: two rounds of `check_collator` and of `check_interaction`.

        Args, Raises: as `again`.
        """
        chance = _secret_chance()
        with untraced(self.engine, self.adapter), self._precisely() as precise:
            examples = self._looked_at(chance, most=4)
            chosen = choose_units(examples)
            with Ranks().all_ranks_or_none():
                check_collator(self.reader, self.reader.keys(chosen), chance, rounds=1)
            batch, units = self.reader.batch(chosen)
            if self._comparable(loss, batch, units):
                batches = self._with_other_labels(loss, batch, units, examples, chance)
                self._interact(loss, batches, units, chance, iter(range(2)), precise=precise)

    # What is tried.

    def longest_unit(self) -> int:
        """One that stands for the longest: that of 64 from all over the data."""
        lengths = {unit: length_of(example) for unit, example in self._looked_at(_secret_chance()).items()}
        return max(lengths, key=lengths.__getitem__)

    def _looked_at(self, chance: random.Random, most: int = LOOKED_AT) -> dict[int, Any]:
        return self.reader.first_examples(spread_units(self.reader.n_units, chance, most))

    def _with_gradients(self, loss: UnitLoss, examples: dict[int, Any], chosen: list[int], chance: random.Random) -> list[int]:
        """These units, or others, of which one has a label and a gradient: where all are zero, nothing is compared.

        A hinge may be zero for all labels that the data hold, so a gradient with another label will do.
        """
        labelled = looked_at = 0
        for _ in range(_GROUPS):
            looked_at += len(chosen)  # those collated
            batch, units = self.reader.batch(chosen)
            scale = loss.scale(batch, units)
            if bool(scale.any()):
                labelled += int((scale > 0).sum())
                for tried in (batch, *self._with_other_labels(loss, batch, units, examples, chance)[1:]):
                    with training_mode(self.engine.model, False), self.engine.without_microbatching(), self.engine.eagerly():
                        try:
                            self.engine.backward(loss, tried, units, scale)
                        except RuntimeError as error:
                            if "inplace operation" not in str(error):
                                raise
                            raise _overwrites() from error
                        self.engine.model.zero_grad()
                    if bool((self.engine.norms > 0).any()):
                        return chosen
            examples = self._looked_at(chance)
            chosen = choose_units(examples)
        if not labelled:
            raise PrivacyError(
                f"none of {looked_at} units looked at, from all over the data, has a label (all are {IGNORED}): steps would "
                "spend budget on nothing. Look at what the collator makes of labels, at prompts that are masked, and at where "
                "texts are cut"
            )
        raise PrivacyError(
            f"none of {looked_at} units tried has a gradient, whatever its label: there is nothing to compare. Either the "
            "loss compares rows (a ranking, a margin, a correlation), and couples them, or it does not depend on what is "
            "trained. Use a loss that is a sum over rows"
        )

    def _with_other_labels(
        self, loss: UnitLoss, batch: dict[str, Any], units: Units, examples: dict[int, Any], chance: random.Random
    ) -> list[dict[str, Any]]:
        """The batch, and behind it the same with labels that its loss can be taken of."""
        n_classes = getattr(getattr(self.engine.model, "config", None), "num_labels", None)
        changed = relabelled(batch, units, known_values(examples.values()), n_classes, chance)
        return [batch, *(other for other in changed if self._takes(loss, other))]

    def _comparable(self, loss: UnitLoss, batch: dict[str, Any], units: Units) -> bool:
        """Whether other units than those of the first checks can be compared: of NaN or without labels, they add zero."""
        return units.n > 1 and bool(loss.scale(batch, units).any()) and self._takes(loss, batch)

    def _takes(self, loss: UnitLoss, batch: dict[str, Any]) -> bool:
        with training_mode(self.engine.model, False), self.engine.eagerly(), torch.no_grad():
            try:
                return math.isfinite(float(loss(batch)))
            except (ValueError, IndexError, RuntimeError):  # a label that is none
                return False

    def tried_batch(self) -> tuple[dict[str, Any], Units]:
        """A batch of the units that were tried before training."""
        return self.reader.batch(self._tried)

    # In which precision.

    @property
    def _lowered(self) -> bool:
        """Whether training computes with less than float32 somewhere, as far as is known."""
        return self.adapter.reduced_precision or self.engine.reduces_precision

    @contextmanager
    def _precisely(self) -> Iterator[bool]:
        """Within the context numbers are float32 or finer, if that can be: it yields whether they are."""
        if not self._lowered:
            yield True
        elif (
            self._needs_autocast
            or self.engine.sharded  # FSDP2 lowers precision by itself
            or any(p.dtype.itemsize < 4 for p in self.engine.model.parameters())
        ):
            yield False
        else:
            with self.engine.eagerly(), without_autocast(self.engine):
                yield True

    def _try_without_autocast(self, chosen: Sequence[int]) -> None:
        """Some kernels take bfloat16 only, and what is computed again in backward is autocast whatever is said here."""
        batch, _ = self.reader.batch(chosen)
        with self._precisely() as precise:
            if not precise or not self._lowered:
                return
            try:
                with training_mode(self.engine.model, False):
                    loss = self.adapter.model_loss(batch, None)
                    if not self.engine.sharded:
                        torch.autograd.grad(loss, list(self.engine.parameters), allow_unused=True)
            except (TypeError, ValueError, RuntimeError):
                self._needs_autocast = True

    def _with_equal_shapes(self, precise: bool) -> float:
        """A tolerance where there is little rounding to allow for."""
        return 1e-5 if precise else 1e-3

    def _anywhere(self, late: bool) -> bool:
        return Ranks().any(late) if self.engine.sharded else late

    # How it is compared.

    def _learnt_from(self, chosen: list[int], chance: random.Random, *, tolerance: float) -> tuple[UnitLoss, list[int]]:
        """The loss as a sum over units, learnt of these or of others, which are returned: a loss of 0 says nothing."""
        for _ in range(_GROUPS):
            try:
                return self._learnt(chosen, tolerance=tolerance), chosen
            except ZeroLossError:
                chosen = choose_units(self._looked_at(chance))
        return self._learnt(chosen, tolerance=tolerance), chosen

    def _learnt(self, chosen: Sequence[int], *, tolerance: float) -> UnitLoss:
        """The loss as a sum over units. Raises PrivacyError where that of one of them is not finite."""
        model = self.engine.model
        batch, units = self.reader.batch(chosen)
        with training_mode(model, False), self.engine.eagerly():  # it tries many shapes, and looks at values only
            loss = learn_loss(
                self.adapter.model_loss,
                batch,
                units,
                n_classes=getattr(getattr(model, "config", None), "num_labels", None),
                rows_per_example=self.adapter.rows_per_example,
                tolerance=tolerance,
            )
            with torch.no_grad():
                for number, unit in enumerate(chosen):
                    if not math.isfinite(alone := float(loss(select_unit(batch, units, number)))):
                        raise PrivacyError(
                            f"the loss of unit {unit} (counted from 0) is {alone}: look for NaN among its inputs and labels; "
                            "a loss that compares rows may have none of one row. While training, a unit without a finite "
                            "gradient adds zero; repair the data or leave such units out"
                        )
        return loss

    def _require_packing(self, loss: UnitLoss, chosen: Sequence[int], *, tolerance: float, precise: bool) -> None:
        batch, units = self.reader.batch(chosen)
        if units.kind == "tokens":
            exactly = self._with_equal_shapes(precise)
            with self.engine.eagerly():
                check_packing(self.engine.model, loss, batch, units, tolerance=tolerance, with_equal_shapes=exactly)

    def _compare(
        self,
        loss: UnitLoss,
        chosen: Sequence[int],
        batches: Sequence[dict[str, Any]],
        units: Units,
        chance: random.Random,
        *,
        precise: bool,
        later: bool = False,
    ) -> None:
        """Losses, norms and sums of the batches against those of every unit by itself."""
        engine, batch = self.engine, batches[0]
        # While training, gradients shrink, and rounding does not.
        tolerance = (1e-3 if precise else 0.05) * (10 if later else 1)
        scale = loss.scale(batch, units)

        def alone(number: int) -> dict[str, Any]:
            own = self.reader.batch([chosen[number]])[0]
            return without_trailing_padding(own) if self.cut_padding else own

        with engine.without_microbatching():
            for other in batches:
                engine.check(loss, other, units, loss.scale(other, units), tolerance=tolerance)
            with engine.eagerly():
                check_alone(engine, loss, batch, units, scale, alone, tolerance=tolerance)
            if not (precise and self._lowered):  # what checkpointing computes again is autocast as it was before
                check_training_mode(engine, loss, batch, units, scale, chance, tolerance=self._with_equal_shapes(precise))

    def _interact(
        self,
        loss: UnitLoss,
        batches: Sequence[dict[str, Any]],
        units: Units,
        chance: random.Random,
        rounds: Iterator[int],
        *,
        precise: bool,
    ) -> None:
        engine = self.engine
        if units.n < 2 or engine.uncovered or engine.strategy == "microbatch":
            return  # every unit is computed by itself, and sees no other
        with engine.eagerly():
            check_interaction(engine, loss, batches, units, chance, rounds, tolerance=self._with_equal_shapes(precise))


def _overwrites() -> UnsupportedError:
    return UnsupportedError(
        "in evaluation mode, in which the checks compute gradients, the model overwrites values that its backward pass needs. "
        "Where a module does so to save memory and has no dropout, keep it in training mode by a subclass with "
        "`def train(self, mode=True): return super().train(True)`"
    )


def _secret_chance() -> random.Random:
    """Which units are tried, and under which random numbers: the same on all ranks, known to nobody beforehand."""
    return random.Random(Ranks().shared(secrets.randbits(128)))
