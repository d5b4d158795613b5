"""The write-ahead log: nothing is released that is not in it, and whatever happens to it is noticed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import json
import os
import pickle
import resource
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.spend_log import FILE_NAME, SpendLog
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.training import dp_sgd
from tests.support.accounts import KEY
from tests.support.forks import exit_code, forked, start
from tests.support.gates import EXPECTED, N, logged, read, run, started, step, steps_in
from tests.support.models import Toy
from tests.support.trainers import texts

RUN = {"sampler": PoissonSampler(N, EXPECTED).to_dict(), "noise_multiplier": 1.0, "config": {}, "steps": 3}


def written(path: Path, steps: int) -> None:
    log = SpendLog(path)
    log.begin(RUN, {})
    for _ in range(steps):
        log.append()
    log.close()


def test_every_step_is_read_back(path: Path) -> None:
    written(path, 2)
    written(path, 3)
    log = read(path)
    first, second = log.ledgers
    assert log.name not in (first, second)
    assert log.ledgers[first].entries == (((PoissonSampler(N, EXPECTED), 1.0), 2),)
    assert log.ledgers[second].entries == (((PoissonSampler(N, EXPECTED), 1.0), 3),)
    assert log.written == {first: 2, second: 3}
    assert log.last == RUN
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, None, 1, 2, 3]
    assert log.head == {lines[0]["hash"]: (7, lines[-1]["hash"])}


def test_what_was_spent_in_other_places_is_kept_with_the_first_step(path: Path) -> None:
    elsewhere = Ledger()
    elsewhere.record(PoissonSampler(N, EXPECTED), 1.5, 4)
    log = SpendLog(path)
    log.begin(RUN, {"another run": elsewhere})
    log.append()
    log.close()
    again = read(path)
    assert {name: ledger.entries for name, ledger in again.ledgers.items()} == {
        "another run": elsewhere.entries,
        log.name: (((PoissonSampler(N, EXPECTED), 1.0), 1),),
    }
    assert again.written == {log.name: 1}  # none of its lines counts the others


def test_a_run_whose_kind_of_step_changes_counts_on(path: Path) -> None:
    log = SpendLog(path)
    for sigma in (1.0, 2.0):
        log.begin({**RUN, "noise_multiplier": sigma}, {})
        log.append()
    log.close()
    again = read(path)
    assert again.written == {log.name: 2}
    assert again.ledgers[log.name].entries == log.ledgers[log.name].entries
    assert [steps for _, steps in log.ledgers[log.name].entries] == [1, 1]


@pytest.mark.parametrize("before", [0, 2])
def test_a_run_without_a_step_leaves_no_line(before: int, path: Path) -> None:
    if before:
        written(path, before)
    old = path.read_bytes() if before else b""
    log = SpendLog(path)
    with pytest.raises(KeyError):
        log.append()  # of no kind, and not one of an earlier run's
    log.begin(RUN, {})
    log.close()
    assert path.read_bytes() == old


def chained(*lines: Mapping[str, Any]) -> str:
    """A file of these lines, with the hashes that belong to them."""
    content, last = "", ""
    for line in lines:
        last = hashlib.sha256(f"{last}{json.dumps(line, sort_keys=True)}".encode()).hexdigest()[:32]
        content += json.dumps({**line, "hash": last}, sort_keys=True) + "\n"
    return content


def test_a_file_of_an_earlier_version_is_refused(path: Path) -> None:
    """Its name for all runs was that of its copies too."""
    path.parent.mkdir()
    run_line = {"record": "record-0123456789abcdef", "key": KEY, "fingerprint": "", "run": RUN, "others": {}}
    content = chained(run_line, {"step": 1})
    path.write_text(content)
    with pytest.raises(PrivacyError, match=r"spend.jsonl was written by an earlier version.*another folder, and count"):
        SpendLog(path)
    assert path.read_text() == content


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_last_line_cut_short_was_never_released_and_goes(cut: int, path: Path) -> None:
    written(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert steps_in(path) == 2
    assert path.read_bytes() == whole[: whole[:-1].rindex(b"\n") + 1]
    written(path, 2)
    assert steps_in(path) == 4


def test_any_flipped_bit_is_noticed(path: Path) -> None:
    """Unless it makes the last line one that is cut short: its newline."""
    written(path, 2)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in [0, *torch.randint(len(whole) - 1, (200,), generator=generator).tolist()]:
        bit = 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(PrivacyError, match=r"spend.jsonl, line \d: damaged .*Restore a copy of the file"):
            SpendLog(path)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_line_is_noticed(lost: int, path: Path) -> None:
    written(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[lost]
    path.write_bytes(b"".join(lines))
    with pytest.raises(PrivacyError, match=f"line {lost + 1}: damaged"):
        SpendLog(path)


def test_lines_that_say_what_cannot_be_are_noticed(path: Path) -> None:
    """Also where their hashes belong to them: a step that is missing, and a run of another log, whose data may be others."""
    written(path, 2)
    run_line, one, two = (
        {name: value for name, value in json.loads(line).items() if name != "hash"} for line in path.read_text().splitlines()
    )
    another, missing = {**run_line, "writer": "another run"}, "damaged .a step is missing before it"
    path.write_text(chained(run_line, one, two, another, one))
    assert steps_in(path) == 3
    for lines, match in (
        ((one,), f"line 1: {missing}"),
        ((run_line, two), f"line 2: {missing}"),
        ((run_line, one, two, another, two), f"line 5: {missing}"),
        ((run_line, one, {**another, "key": KEY}, one), "line 3: damaged .it is of another log"),
    ):
        path.write_text(chained(*lines))
        with pytest.raises(PrivacyError, match=match):
            SpendLog(path)


def test_a_log_is_missed_beside_what_knows_it_and_may_be_new_elsewhere(path: Path) -> None:
    written(path, 2)
    log, new = SpendLog(path), SpendLog(path.with_name("new"))
    known, other = log.head, {"the first line of another log": (9, "its last one")}
    for beside in (False, True):
        log.require_continues(known | other, "the checkpoint", beside=beside)
        new.require_continues({}, "the checkpoint", beside=beside)
    log.require_continues(other, "the checkpoint")
    new.require_continues(known, "the checkpoint")
    with pytest.raises(PrivacyError, match=r"run/new is missing, and the checkpoint is of a run that wrote one"):
        new.require_continues(known, "the checkpoint", beside=True)
    ((first, (lines, last)),) = known.items()
    for held, match in (((lines + 1, last), "knows 4 lines .* it has 3"), ((lines, "another"), "they are not the same")):
        with pytest.raises(PrivacyError, match=match):
            log.require_continues({first: held}, "the checkpoint")
    log.close()
    new.close()


def test_other_ranks_count_as_the_one_that_writes(path: Path) -> None:
    written(path, 2)
    log = SpendLog(path)
    replica = pickle.loads(pickle.dumps(log.replica()))  # as ranks give it to each other
    log.begin(RUN, {})
    for _ in range(2):
        log.append()
        replica.append()
        assert replica.written == log.written
    log.close()


def test_the_hub_does_not_get_it() -> None:
    """Pushing an output folder leaves out names that begin so: the file's key and hash would tell of private text."""
    for push in (hf.Trainer.push_to_hub, hf.Trainer._push_from_checkpoint):
        assert 'ignore_patterns=["_*"' in inspect.getsource(push)
    assert fnmatch(FILE_NAME, "_*")  # as the Hub's client does


def test_two_runs_cannot_write_one_log(path: Path) -> None:
    log = SpendLog(path)
    with pytest.raises(PrivacyError, match="another run is writing"):
        SpendLog(path)
    log.close()
    SpendLog(path).close()


def test_a_fork_has_the_log_closed(path: Path) -> None:
    """It could outlive the run, and hold its lock, or write lines of its own."""
    log = SpendLog(path)
    log.begin(RUN, {})

    def append() -> bytes:
        try:
            log.append()
        except PrivacyError as error:
            return str(error).encode()
        return b"it did"

    assert b"is closed" in forked(append)
    log.append()  # and the run goes on
    log.close()
    assert steps_in(path) == 1


def killed_beside_a_worker(path: Path) -> None:
    """Opens the log, forks as a data loader does, and is killed while the worker goes on."""
    log = SpendLog(path)
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
    log.close()  # kept open until here


@pytest.mark.complete
def test_a_worker_does_not_keep_the_lock_of_a_killed_run(path: Path) -> None:
    """Data loaders fork; their workers notice some seconds late that the run is gone."""
    run = start(killed_beside_a_worker, path)
    try:
        run.join()
        assert run.exitcode == -signal.SIGKILL
        SpendLog(path).close()
    finally:
        os.killpg(run.pid, signal.SIGKILL)


# Where it cannot be written.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_releases_nothing(small_disk: Path) -> None:
    model = Toy()
    mechanism, _, optimizer = started(model, steps=100)
    mechanism.account.open_spend_log(SpendLog(small_disk / "spend"))
    with pytest.raises(PrivacyError, match=r"could not be written .*No space left.* not released; free disk space"):
        run(mechanism, optimizer, 100)
    assert all(p.grad is None for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(PrivacyError, match="without noise"):
        optimizer.step()
    with pytest.raises(PrivacyError, match="is closed: nothing may be released"):
        mechanism.release()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert 0 < mechanism.account.steps == steps_in(small_disk / "spend") < 100


def test_a_line_that_fits_in_part_is_taken_back(path: Path) -> None:
    """What stands in the file after a failed write are whole lines."""
    written(path, 2)
    log = SpendLog(path)
    log.begin(RUN, {})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, old[1]))
    try:
        with pytest.raises(PrivacyError, match="could not be written"):
            log.append()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    with pytest.raises(PrivacyError, match="is closed"):  # there is room again, but a step was not released
        log.append()
    assert path.read_bytes().endswith(b"\n")
    assert steps_in(path) == 2


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrivacyError, match=r"file/run/spend cannot be opened .*choose a folder"):
        SpendLog(tmp_path / "file" / "run" / "spend")
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(PrivacyError, match="is not a file"):
        SpendLog(tmp_path / "link")


def test_a_log_that_is_refused_or_closed_leaves_nothing_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    written(path, 1)
    before = opened()
    log = SpendLog(path)
    with pytest.raises(PrivacyError, match="another run is writing"):
        SpendLog(path)
    assert opened() == before + 1
    log.close()
    log.close()
    damaged, link = path.with_name("damaged"), path.with_name("link")
    damaged.write_bytes(path.read_bytes()[1:])
    link.symlink_to("/dev/full")
    for place, match in ((damaged, "line 1: damaged"), (link, "is not a file")):
        with pytest.raises(PrivacyError, match=match):
            SpendLog(place)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(PrivacyError, match=r"cannot be opened .*No locks available"):
        SpendLog(path)
    assert opened() == before


def test_a_log_deleted_while_in_use_stops_the_run(path: Path) -> None:
    log = SpendLog(path)
    log.begin(RUN, {})
    log.append()
    path.unlink()
    with pytest.raises(PrivacyError, match="deleted while in use"):
        log.append()


def killed_while_noise_is_drawn(path: Path) -> None:
    mechanism, optimizer = logged(path)
    step(mechanism, optimizer)
    vars(dp_sgd)["add_gaussian_noise_"] = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    mechanism.release()


def test_a_step_is_on_disk_before_its_noise_is_drawn(path: Path) -> None:
    assert exit_code(killed_while_noise_is_drawn, path) == -signal.SIGKILL
    assert steps_in(path) == 2
    again, _ = logged(path)
    assert (again.account.steps, again.account.taken, again.report().lost_steps) == (2, 0, 2)


def test_the_log_is_synced_before_noise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, noise = os.fsync, vars(dp_sgd)["add_gaussian_noise_"]
    mechanism, _ = logged(path)

    def synced(file: int) -> None:
        fsync(file)
        done.append("fsync")

    def noised(*args: Any, **kwargs: Any) -> None:
        done.append("noise")
        noise(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(dp_sgd, "add_gaussian_noise_", noised)
    mechanism.release()
    assert done == ["fsync", "fsync", "noise"]  # what the run is, and its first step


def test_a_new_log_and_a_line_that_was_removed_stay_so_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are synced of which it, and what was made for it, are entries; so is the end of a file that was cut."""
    done: list[tuple[str, int]] = []

    def noting(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def noted(file: int, *args: int) -> None:
            real(file, *args)
            done.append((name, os.fstat(file).st_ino))

        return noted

    for name in ("fsync", "ftruncate"):
        monkeypatch.setattr(os, name, noting(name))
    path = tmp_path / "folder" / "of a run" / "spend"
    SpendLog(path).close()
    file, folder, *above = (place.stat().st_ino for place in (path, *path.parents))
    assert done == [("fsync", folder), ("fsync", above[0]), ("fsync", tmp_path.stat().st_ino)]
    written(path, 2)
    os.truncate(path, path.stat().st_size - 10)
    done.clear()
    assert steps_in(path) == 1
    assert done == [("fsync", folder), ("ftruncate", file), ("fsync", file)]


def test_another_dataset_is_refused(path: Path) -> None:
    for data in (texts(), texts()):
        log = SpendLog(path)
        log.require_dataset(data)
        log.begin(RUN, {})
        log.append()
        log.close()
    log = SpendLog(path)
    with pytest.raises(PrivacyError, match=r"the dataset changed since the earlier runs in .*choose another folder"):
        log.require_dataset(texts(seed=1))
    log.close()
    other = SpendLog(path.with_name("other"))
    other.require_dataset(texts(seed=1))
    other.close()
