"""A training killed at random times, again and again: nothing that was released is ever forgotten, and it finishes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.spend_log import FILE_NAME, SpendLog
from dp_flash_hf.integrations import checkpoints
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.reporting.report import PrivacyReport
from tests.support.forks import start
from tests.support.ranks import environment_of, free_port
from tests.support.storm import main as train

MOST_SECONDS = 300.0  # of one start, which takes seconds: beyond, something hangs


def count(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def launch(folder: Path, steps: int, ranks: int) -> list[Any]:
    """The training on so many ranks, each a process; what a rank printed last is in its file."""
    port = free_port()
    return [
        start(
            train,
            folder,
            steps,
            environment=environment_of(rank, ranks, port) if ranks > 1 else {},
            output=folder / f"rank {rank}",
        )
        for rank in range(ranks)
    ]


def wait(processes: list[Any], until: Callable[[], bool]) -> bool:
    """Whether it came to that while all of them ran."""
    end = time.monotonic() + MOST_SECONDS
    while all(process.is_alive() for process in processes):
        if until():
            return True
        assert time.monotonic() < end, "the training hangs"
        time.sleep(0.002)
    return False


def ended(processes: list[Any]) -> list[int]:
    """Their exit codes; one that goes on after another has failed waits for it in vain."""
    failed = False
    for process in processes:
        process.join(5.0 if failed else MOST_SECONDS)
        failed |= process.exitcode != 0
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def storm(folder: Path, *, kills: int, steps: int, ranks: int, apart: int = 9, seed: int = 0) -> int:
    """Train for `steps` steps, and more if it gets there before all kills, which are at most `apart` steps apart.

    Returns the steps that it was given at last.
    """
    chance = random.Random(seed)
    killed = 0
    while True:
        begun, moment, more = count(folder / "released"), time.monotonic() + chance.uniform(0.0, 3.0), chance.randint(1, apart)

        def due(begun: int = begun, moment: float = moment, more: int = more, number: int = killed) -> bool:
            if number == kills:
                return False
            if number % 5 == 4:  # anywhere: while starting, most of the time
                return time.monotonic() > moment
            return count(folder / "released") >= begun + more  # while training, or saving

        processes = launch(folder, steps, ranks)
        try:
            if wait(processes, due):
                time.sleep(chance.uniform(0.0, 0.05))
                for process in processes:
                    process.kill()
            codes = ended(processes)
        finally:
            for process in processes:
                process.kill()
        assert set(codes) <= {0, -signal.SIGKILL}, "\n".join(
            (folder / f"rank {rank}").read_text()[-3000:] for rank in range(ranks)
        )
        if set(codes) == {0}:
            if killed == kills:
                return steps
            steps += 50  # it ended before it could be killed, and goes on for longer
        else:
            killed += 1


def check(folder: Path, steps: int) -> None:
    released, stepped = count(folder / "released"), count(folder / "stepped")
    report = PrivacyReport.from_json((folder / "report.json").read_text())
    record = SpendLog(folder / "run" / FILE_NAME)
    record.close()
    on_record = Ledger.total(record.ledgers.values(), "rdp")
    counted = Ledger("rdp")
    counted.record(PoissonSampler(24, 4), 1.0, released)
    assert steps <= stepped <= released <= on_record.steps
    assert report.steps == on_record.steps == report.planned_steps
    assert report.lost_steps == report.steps - steps
    assert report.epsilon >= counted.epsilon(1e-3)
    assert report.epsilon == report.spent_epsilon == on_record.epsilon(1e-3)
    newest, *_ = checkpoints.by_age(folder / "run")
    state = checkpoints.read_state(newest)
    assert state["global_step"] == steps
    checkpoints.require_whole(newest, state["stateful_callbacks"]["DPCallback"]["attributes"]["files"])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.complete)])
def test_a_few_kills(ranks: int, tmp_path: Path) -> None:
    check(tmp_path, storm(tmp_path, kills=2, steps=12, ranks=ranks, apart=4))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_storm(ranks: int, tmp_path: Path) -> None:
    """At least 30 kills over at least 200 steps."""
    steps = storm(tmp_path, kills=30, steps=200, ranks=ranks)
    check(tmp_path, steps)
    print(f"{steps} steps in the weights, {count(tmp_path / 'released')} released")
