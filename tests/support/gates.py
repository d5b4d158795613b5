"""Release gates on a toy model, with and without a spend log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.spend_log import SpendLog
from dp_flash_hf.engine.clipping_engine import ClippingEngine
from dp_flash_hf.engine.strategies import Strategy
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support.models import Toy
from tests.support.trainers import config

N, EXPECTED, STEPS = 50, 5, 3


def dpsgd(steps: int = STEPS, n: int = N, expected: int = EXPECTED, **changes: Any) -> DPSGD:
    """A release gate that was not started. changes: of the configuration."""
    chosen = config(**changes)
    return DPSGD(chosen, PrivacyPlan.from_config(chosen, n_units=n, expected_batch_size=expected, steps=steps))


def started(
    model: nn.Module, optimizer: Any = None, *, strategy: Strategy = "auto", **changes: Any
) -> tuple[DPSGD, ClippingEngine, Any]:
    mechanism = dpsgd(**changes)
    engine = ClippingEngine(model, max_grad_norm=mechanism.config.max_grad_norm, strategy=strategy)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    mechanism.start(engine, optimizer)
    return mechanism, engine, optimizer


def taken(mechanism: DPSGD, steps: int) -> DPSGD:
    """The same after so many steps."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mechanism.start(ClippingEngine(model, max_grad_norm=mechanism.config.max_grad_norm), optimizer)
    for _ in range(steps):
        mechanism.release()
        optimizer.step()
        optimizer.zero_grad()
    return mechanism


def logged(path: Path, **changes: Any) -> tuple[DPSGD, Any]:
    """A started one that writes a spend log, and its optimizer."""
    mechanism, _, optimizer = started(Toy(), **changes)
    mechanism.account.open_spend_log(SpendLog(path))
    return mechanism, optimizer


def step(mechanism: DPSGD, optimizer: Any) -> None:
    mechanism.release()
    optimizer.step()
    optimizer.zero_grad()


def run(mechanism: DPSGD, optimizer: Any, steps: int) -> None:
    """So many steps, after which another may write the log."""
    for _ in range(steps):
        step(mechanism, optimizer)
    mechanism.account.close()


def read(path: Path) -> SpendLog:
    """What a log holds, closed again."""
    log = SpendLog(path)
    log.close()
    return log


def steps_in(path: Path) -> int:
    return sum(ledger.steps for ledger in read(path).ledgers.values())
