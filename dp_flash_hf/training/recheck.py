"""When the checks are repeated while training goes on: at secret random steps, for at most a hundredth of its time."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

import torch

from dp_flash_hf.accounting.run_account import RunAccount
from dp_flash_hf.distributed import Ranks
from dp_flash_hf.errors import PrivacyError, UnsupportedError
from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.training.preflight import Checks

logger = logging.getLogger(__name__)

SHARE = 0.005  # of the training's time, for whole checks and for the smallest ones each
_EARLY = 4  # one of the first so many steps is checked, where that can be afforded


class RecheckSchedule:
    """At which steps one kind of check runs.

    A step is chosen at random, with as many checks expected in the steps left as the share of time that is left pays for. The
    time of all steps is counted from those taken so far, and the time of a check from the last one, so what all of them take
    stays below the share, but for how far these estimates are off at the end. One of the first four steps is checked for
    certain where the whole training pays for one.

    Times depend on how many units were drawn, and so does which steps are checked; whether a step is checked changes nothing
    that is released.

    Args:
        share: of the training's time.
        chance: which steps.
    """

    def __init__(self, share: float, chance: random.Random) -> None:
        self._share, self._chance = share, chance
        self._early = chance.randint(2, _EARLY)
        self._cost: float | None = None  # seconds of the last check; not known before the first
        self._spent = 0.0

    def due(self, number: int, steps_left: int, seconds_a_step: float) -> bool:
        """Whether to check now.

        Args:
            number: of the step that begins, from 1.
            steps_left: that step and those after it.
            seconds_a_step: as measured.
        """
        budget = self._share * seconds_a_step * (number - 1 + steps_left) - self._spent
        cost = seconds_a_step if self._cost is None else self._cost
        if budget < cost:
            return False
        return number == self._early or self._chance.random() < budget / (cost * steps_left)

    def paid(self, seconds: float) -> None:
        """A check took so long."""
        self._cost = seconds
        self._spent += seconds


class Rechecks:
    """Repeats the checks of a training before some of its steps.

    Two kinds take turns: whole checks (`Checks.again`), which may cost as much as a step, and the smallest ones
    (`Checks.glance`), which are so much more frequent. On several ranks all check before the same steps, as the first one
    decides by its clock. A check that fails ends the training before that step's release: nothing of the step leaves.

    Args:
        checks: of this training.
        loss: what they compute with.
        account: of the training, for how many steps are left.
    """

    def __init__(self, checks: Checks, loss: UnitLoss, account: RunAccount) -> None:
        self._account = account
        chance = random.SystemRandom()
        self._kinds: list[tuple[RecheckSchedule, Callable[[], None]]] = [
            (RecheckSchedule(SHARE, chance), lambda: checks.again(loss)),
            (RecheckSchedule(SHARE, chance), lambda: checks.glance(loss)),
        ]
        self._taken = -1  # steps when the last one began
        self._number = 0  # of the step that began last, from 1
        self._begun = 0.0
        self._elapsed = 0.0  # seconds in steps, checks left out
        self._failed: PrivacyError | None = None

    def before_step(self) -> None:
        """Check, if it is time to, before anything of a step is added; a further call in the same step does nothing.

        Raises:
            PrivacyError: a check failed, now or earlier in this training.
        """
        if self._failed is not None:
            raise self._failed
        if self._account.taken == self._taken:
            return
        now = time.monotonic()
        if self._number > 1:  # the first one compiles, learns and warms up
            self._elapsed += now - self._begun
        self._taken, self._number = self._account.taken, self._number + 1
        if self._number > 2:
            self._check(self._elapsed / (self._number - 2))
        self._begun = time.monotonic()

    def _check(self, seconds_a_step: float) -> None:
        left = self._account.steps_left
        due = Ranks().shared([schedule.due(self._number, left, seconds_a_step) for schedule, _ in self._kinds])
        for (schedule, check), now in zip(self._kinds, due, strict=True):
            if not now:
                continue
            begun = time.monotonic()
            try:
                with Ranks().all_ranks_or_none():
                    check()
            except PrivacyError as error:
                self._failed = PrivacyError(
                    f"while training, before step {self._taken + 1}, of which nothing was released: {error}. The steps taken "
                    "count, and were computed with what was refused now"
                )
                raise self._failed from error
            except (UnsupportedError, torch.OutOfMemoryError) as error:  # of a unit that a step would refuse, or halve
                logger.info(f"a check of other units before step {self._taken + 1} could not be computed: {error}")
            schedule.paid(time.monotonic() - begun)
