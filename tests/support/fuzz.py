"""How property tests and state machines are run: on other examples each time, and the one that fails is printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

from dp_flash_hf.training.losses import UnitLoss
from dp_flash_hf.training.preflight import Checks
from dp_flash_hf.training.recheck import Rechecks


def examples(n: int, *, steps: int = 30) -> settings:
    """So many examples, and of a state machine at most so many steps each; no limit of time, for machines differ."""
    return settings(
        max_examples=n,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@contextmanager
def unchecked(loss: UnitLoss) -> Iterator[None]:
    """Trainings start at once, with this loss; what their checks would try is for other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checks, "before_training", lambda self: loss)
        patch.setattr(Checks, "tried_batch", lambda self: ({}, None))
        patch.setattr(Checks, "longest_unit", lambda self: 0)
        patch.setattr(Rechecks, "before_step", lambda self: None)
        patch.setattr("dp_flash_hf.training.session.shares_random_numbers", lambda *args, **settings: False)
        patch.setattr("dp_flash_hf.training.session.UnitReader.batch", lambda self, units: ({}, None))
        yield
