"""A training killed at random times, again and again: nothing that was released is ever forgotten, and it finishes."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.spend_log import FILE_NAME, SpendLog
from dp_flash_hf.integrations import checkpoints
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.reporting.report import PrivacyReport
from tests.support import ROOT

ONE_PROCESS = (sys.executable,)
# As torchrun starts them, but in one process group: torchrun's own workers would outlive it.
TWO_RANKS = (
    "bash",
    "-c",
    f"""export WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 PYTHON={shlex.quote(sys.executable)}
    export MASTER_PORT=$($PYTHON -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    RANK=0 LOCAL_RANK=0 $PYTHON "$0" "$@" & first=$!
    RANK=1 LOCAL_RANK=1 $PYTHON "$0" "$@" && wait $first""",
)
LAUNCHERS = {"one process": ONE_PROCESS, "two ranks": TWO_RANKS}
MOST_SECONDS = 300.0  # of one start, which takes seconds: beyond, something hangs


def count(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def start(launcher: Sequence[str], folder: Path, steps: int) -> subprocess.Popen[bytes]:
    """The training in a session of its own, so that all its processes can be killed at once."""
    return subprocess.Popen(
        [*launcher, str(ROOT / "tests" / "storm.py"), str(folder), str(steps)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("wb"),
        start_new_session=True,
    )


def wait(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> bool:
    """Whether it came to that while the process ran."""
    end = time.monotonic() + MOST_SECONDS
    while process.poll() is None:
        if until():
            return True
        assert time.monotonic() < end, "the training hangs"
        time.sleep(0.002)
    return False


def storm(folder: Path, *, kills: int, steps: int, launcher: Sequence[str] = ONE_PROCESS, seed: int = 0) -> int:
    """Train for `steps` steps, and more if it gets there before all kills. Returns the steps it was given at last."""
    chance = random.Random(seed)
    killed = 0
    while True:
        begun, moment, more = count(folder / "released"), time.monotonic() + chance.uniform(0.0, 10.0), chance.randint(1, 9)

        def due(begun: int = begun, moment: float = moment, more: int = more, number: int = killed) -> bool:
            if number == kills:
                return False
            if number % 5 == 4:  # anywhere: while starting, most of the time
                return time.monotonic() > moment
            return count(folder / "released") >= begun + more  # while training, or saving

        process = start(launcher, folder, steps)
        try:
            if wait(process, due):
                time.sleep(chance.uniform(0.0, 0.05))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), (folder / "stderr").read_text()[-3000:]
        if code == 0 and killed == kills:
            return steps
        if code == 0:  # before it could be killed: it goes on for longer
            steps += 50
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
    assert report.epsilon == on_record.epsilon(1e-3)
    newest, *_ = checkpoints.by_age(folder / "run")
    state = checkpoints.read_state(newest)
    assert state["global_step"] == steps
    checkpoints.require_whole(newest, state["stateful_callbacks"]["DPCallback"]["attributes"]["files"])


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_few_kills(launcher: Sequence[str], tmp_path: Path) -> None:
    check(tmp_path, storm(tmp_path, kills=2, steps=12, launcher=launcher))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_storm(launcher: Sequence[str], tmp_path: Path) -> None:
    """At least 30 kills over at least 200 steps."""
    steps = storm(tmp_path, kills=30, steps=200, launcher=launcher)
    check(tmp_path, steps)
    print(f"{steps} steps in the weights, {count(tmp_path / 'released')} released")
