"""The write-ahead record: nothing is released that is not in it, and whatever happens to it is noticed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf

from dp_flash_hf.accounting.dataset_fingerprint import fingerprint_of
from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.accounting.spend_log import FILE_NAME, SpendLog
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.sampling import PoissonSampler
from dp_flash_hf.reporting.report import PrivacyReport
from dp_flash_hf.training import dp_sgd as mechanism_module
from dp_flash_hf.training.dp_sgd import DPSGD
from tests.support.forks import exit_code, start
from tests.support.models import Toy
from tests.support.trainers import attached, texts, trainer_for
from tests.training.test_dp_sgd import EXPECTED, N, dpsgd, started

RUN = {"sampler": PoissonSampler(N, EXPECTED).to_dict(), "noise_multiplier": 1.0, "config": {}, "steps": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "spend.jsonl"


def written(path: Path, steps: int) -> None:
    record = SpendLog(path)
    record.begin(RUN, {})
    for _ in range(steps):
        record.append()
    record.close()


def read(path: Path) -> SpendLog:
    record = SpendLog(path)
    record.close()
    return record


def steps_in(path: Path) -> int:
    return sum(ledger.steps for ledger in read(path).ledgers.values())


def test_every_step_is_read_back(path: Path) -> None:
    written(path, 2)
    written(path, 3)
    record = read(path)
    first, second = record.ledgers
    assert record.name not in (first, second)
    assert record.ledgers[first].entries == (((PoissonSampler(N, EXPECTED), 1.0), 2),)
    assert record.ledgers[second].entries == (((PoissonSampler(N, EXPECTED), 1.0), 3),)
    assert record.written == {first: 2, second: 3}
    assert record.last == RUN
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, None, 1, 2, 3]


def test_a_run_whose_kind_of_step_changes_counts_on(path: Path) -> None:
    record = SpendLog(path)
    for sigma in (1.0, 2.0):
        record.begin({**RUN, "noise_multiplier": sigma}, {})
        record.append()
    record.close()
    again = read(path)
    assert again.written == {record.name: 2}
    assert again.ledgers[record.name].entries == record.ledgers[record.name].entries
    assert [steps for _, steps in record.ledgers[record.name].entries] == [1, 1]


@pytest.mark.parametrize("before", [0, 2])
def test_a_run_without_a_step_leaves_no_line(before: int, path: Path) -> None:
    if before:
        written(path, before)
    old = path.read_bytes() if before else b""
    record = SpendLog(path)
    with pytest.raises(KeyError):
        record.append()  # of no kind, and not one of an earlier run's
    record.begin(RUN, {})
    record.close()
    assert path.read_bytes() == old


def test_a_file_of_an_earlier_version_is_refused(path: Path) -> None:
    """Its name for all runs was that of its copies too."""
    path.parent.mkdir()
    content, last = "", ""
    run_line = {"record": "record-0123456789abcdef", "key": KEY, "fingerprint": "", "run": RUN, "others": {}}
    for line in (run_line, {"step": 1}):
        last = hashlib.sha256(f"{last}{json.dumps(line, sort_keys=True)}".encode()).hexdigest()[:32]
        content += json.dumps({**line, "hash": last}, sort_keys=True) + "\n"
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


def test_the_hub_does_not_get_it() -> None:
    """Pushing an output folder leaves out names that begin so: the file's key and hash would tell of private text."""
    for push in (hf.Trainer.push_to_hub, hf.Trainer._push_from_checkpoint):
        assert 'ignore_patterns=["_*"' in inspect.getsource(push)
    assert fnmatch(FILE_NAME, "_*")  # as the Hub's client does


def test_two_runs_cannot_write_one_record(path: Path) -> None:
    record = SpendLog(path)
    with pytest.raises(PrivacyError, match="another run is writing"):
        SpendLog(path)
    record.close()
    SpendLog(path).close()


def killed_beside_a_worker(path: Path) -> None:
    """Opens the log, forks as a data loader does, and is killed while the worker goes on."""
    log = SpendLog(path)
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
    log.close()  # kept open until here


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
    record = SpendLog(path)
    record.begin(RUN, {})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, old[1]))
    try:
        with pytest.raises(PrivacyError, match="could not be written"):
            record.append()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes().endswith(b"\n")
    assert steps_in(path) == 2


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrivacyError, match=r"file/run/spend cannot be opened .*choose a folder"):
        SpendLog(tmp_path / "file" / "run" / "spend")
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(PrivacyError, match="is not a file"):
        SpendLog(tmp_path / "link")


def test_a_record_deleted_while_in_use_stops_the_run(path: Path) -> None:
    record = SpendLog(path)
    record.begin(RUN, {})
    record.append()
    path.unlink()
    with pytest.raises(PrivacyError, match="deleted while in use"):
        record.append()


# The mechanism and its record.


def kept(path: Path, **changes: Any) -> tuple[DPSGD, Any]:
    mechanism, _, optimizer = started(Toy(), **changes)
    mechanism.account.open_spend_log(SpendLog(path))
    return mechanism, optimizer


def step(mechanism: DPSGD, optimizer: Any) -> None:
    mechanism.release()
    optimizer.step()
    optimizer.zero_grad()


def run(mechanism: DPSGD, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        step(mechanism, optimizer)
    mechanism.account.close()


def killed_while_noise_is_drawn(path: Path) -> None:
    mechanism, optimizer = kept(path)
    step(mechanism, optimizer)
    vars(mechanism_module)["add_gaussian_noise_"] = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    mechanism.release()


def test_a_step_is_on_disk_before_its_noise_is_drawn(path: Path) -> None:
    assert exit_code(killed_while_noise_is_drawn, path) == -signal.SIGKILL
    assert steps_in(path) == 2
    again, _ = kept(path)
    assert (again.account.steps, again.account.taken, again.report().lost_steps) == (2, 0, 2)


def test_the_record_is_synced_before_noise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, noise = os.fsync, vars(mechanism_module)["add_gaussian_noise_"]
    mechanism, _ = kept(path)

    def synced(file: int) -> None:
        fsync(file)
        done.append("fsync")

    def noised(*args: Any, **kwargs: Any) -> None:
        done.append("noise")
        noise(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(mechanism_module, "add_gaussian_noise_", noised)
    mechanism.release()
    assert done == ["fsync", "fsync", "noise"]  # what the run is, and its first step


def test_a_fresh_start_continues_the_books(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With noise given, all steps that are wanted are taken, and epsilon is that of all."""
    mechanism, optimizer = kept(path)
    run(mechanism, optimizer, 2)
    again, optimizer = kept(path)
    assert again.account.steps_left == 3
    run(again, optimizer, 3)
    report = again.report()
    assert (report.steps, report.lost_steps, report.planned_steps) == (5, 2, 5)
    assert report.epsilon == again.account.plan.epsilon(5) > mechanism.account.plan.epsilon(3)
    assert not any("lost in a crash" in gap.lower() for gap in report.not_covered)
    assert any("lost in a crash" in gap for gap in dpsgd().report().not_covered)


def test_with_a_budget_lost_steps_are_not_taken_again(path: Path) -> None:
    budget: dict[str, Any] = {"target_epsilon": 2.0, "noise_multiplier": None}
    mechanism, optimizer = kept(path, steps=8, **budget)
    run(mechanism, optimizer, 5)
    again, optimizer = kept(path, steps=8, **budget)
    assert again.account.plan == mechanism.account.plan
    assert again.account.steps_left == 3
    run(again, optimizer, 3)
    assert again.epsilon() == mechanism.account.plan.epsilon() <= 2.0
    with pytest.raises(PrivacyError, match="planned steps are spent"):
        again.release()


def test_a_checkpoint_does_not_count_twice_beside_its_record(path: Path) -> None:
    mechanism, optimizer = kept(path, steps=20)
    run(mechanism, optimizer, 2)
    early = mechanism.state_dict()
    again, optimizer = kept(path, steps=20)
    again.load_state_dict(early)
    assert (again.account.steps, again.account.taken) == (2, 2)
    run(again, optimizer, 3)
    late, optimizer = kept(path, steps=20)
    late.load_state_dict(early)
    assert (late.account.steps, late.account.taken, late.report().lost_steps) == (5, 2, 3)
    run(late, optimizer, 0)


def test_steps_of_another_folder_are_carried_over(path: Path, tmp_path: Path) -> None:
    """Resumed elsewhere, the new record knows what came before, also when all that followed is lost."""
    mechanism, optimizer = kept(path, steps=20)
    run(mechanism, optimizer, 4)
    elsewhere = tmp_path / "elsewhere"
    moved, optimizer = kept(elsewhere, steps=20)
    moved.load_state_dict(mechanism.state_dict())
    run(moved, optimizer, 3)
    fresh, optimizer = kept(elsewhere, steps=20)
    assert fresh.account.steps == 7
    fresh.load_state_dict(mechanism.state_dict())
    assert fresh.account.steps == 7
    run(fresh, optimizer, 1)
    assert steps_in(elsewhere) == 8
    assert steps_in(path) == 4


def test_an_older_copy_of_the_record_does_not_hide_steps_of_a_checkpoint(path: Path) -> None:
    mechanism, optimizer = kept(path, steps=20)
    run(mechanism, optimizer, 2)
    old = path.read_bytes()
    again, optimizer = kept(path, steps=20)
    run(again, optimizer, 3)
    path.write_bytes(old)
    restored, optimizer = kept(path, steps=20)
    restored.load_state_dict(again.state_dict())
    assert restored.account.steps == 5
    run(restored, optimizer, 1)
    assert steps_in(path) == 6


@pytest.mark.parametrize("alive", [False, True])
def test_copies_of_a_folder_that_both_went_on_are_put_together(alive: bool, path: Path) -> None:
    """Both began with the same steps, and took others then: all of them count, whichever checkpoint is resumed where."""
    first, first_optimizer = kept(path, steps=30)
    for _ in range(4):
        step(first, first_optimizer)
    if not alive:
        run(first, first_optimizer, 0)
    copy = path.parent.with_name("copy") / path.name
    shutil.copytree(path.parent, copy.parent)
    if alive:
        here = first
        run(here, first_optimizer, 3)
    else:
        here, optimizer = kept(path, steps=30)
        here.load_state_dict(first.state_dict())
        run(here, optimizer, 3)
    there, optimizer = kept(copy, steps=30)
    run(there, optimizer, 2)
    assert (here.account.steps, there.account.steps) == (4 + 3, 4 + 2)

    for place, brought in ((path, there), (copy, here)):
        together, optimizer = kept(place, steps=30)
        together.load_state_dict(brought.state_dict())
        assert together.account.steps == 4 + 3 + 2
        run(together, optimizer, 1)
        assert steps_in(place) == 4 + 3 + 2 + 1
        assert together.report().parts == (
            {"steps": 10, "sampler": together.account.plan.sampler.to_dict(), "noise_multiplier": 1.0},
        )


def test_a_checkpoint_of_a_copied_output_folder(tmp_path: Path) -> None:
    """As `Trainer` resumes it: 2 steps in both folders, 2 more here, 1 more there, and then 1."""

    def trained(folder: Path, steps: int, resume: Path | None) -> PrivacyReport:
        trainer = trainer_for("gpt2", folder, max_steps=steps, save_strategy="steps", save_steps=1)
        dp = attached(trainer)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return dp.report()

    here, there = tmp_path / "here", tmp_path / "there"
    trained(here, 2, None)
    shutil.copytree(here, there)
    assert trained(here, 4, here / "checkpoint-2").steps == 4
    assert trained(there, 3, there / "checkpoint-2").steps == 3
    report = trained(there, 5, here / "checkpoint-4")
    assert (report.steps, report.lost_steps) == (2 + 2 + 1 + 1, 1)


def test_what_a_copy_took_is_not_on_record_here(path: Path) -> None:
    """What it lost after its checkpoint is not known, also where its run began in this folder."""
    first, optimizer = kept(path, steps=30)
    step(first, optimizer)
    copy = path.parent.with_name("copy") / path.name
    shutil.copytree(path.parent, copy.parent)
    run(first, optimizer, 1)
    there, optimizer = kept(copy, steps=30)
    assert (there.account.steps, there.account.recorded) == (1, True)
    there.load_state_dict(first.state_dict())
    assert (there.account.steps, there.account.recorded) == (2, False)
    run(there, optimizer, 1)
    later, _ = kept(copy, steps=30)  # which the record carries over
    assert (later.account.steps, later.account.recorded) == (3, False)
    here, _ = kept(path, steps=30)
    assert (here.account.steps, here.account.recorded) == (2, True)
    here.load_state_dict(there.state_dict())
    assert (here.account.steps, here.account.recorded) == (3, False)


def test_books_grow_by_one_name_for_each_run_that_took_a_step(path: Path) -> None:
    mechanism, optimizer = kept(path, steps=30)
    for runs in range(1, 4):
        run(mechanism, optimizer, 2)
        state = mechanism.state_dict()
        assert len(state["ledgers"]) == runs
        mechanism, optimizer = kept(path, steps=30)
        mechanism.load_state_dict(state)
        assert mechanism.state_dict()["ledgers"] == state["ledgers"]
        assert mechanism.account.recorded
    assert not any(json.loads(line).get("others") for line in path.read_text().splitlines())


def test_kinds_of_step_are_told_apart(path: Path) -> None:
    mechanism, optimizer = kept(path)
    run(mechanism, optimizer, 2)
    again, optimizer = kept(path, noise_multiplier=2.0)
    run(again, optimizer, 3)
    ledger = Ledger.total(read(path).ledgers.values(), "rdp")
    assert {sigma: steps for (_, sigma), steps in ledger.entries} == {1.0: 2, 2.0: 3}
    assert again.epsilon() == ledger.epsilon(1e-3)
    with pytest.raises(PrivacyError, match=r"seed: None in earlier runs of .*spend.jsonl, 1 now.*another folder"):
        kept(path, seed=1)


# Datasets.

KEY = "00" * 16


def shapes_of(rows: list[dict[str, Any]]) -> list[Any]:
    table = datasets.Dataset.from_list(rows)
    return [
        rows,
        [{**row, "input_ids": torch.tensor(row["input_ids"])} for row in rows],
        [{**row, "input_ids": np.array(row["input_ids"], dtype=np.int32)} for row in rows],
        table,
        table.with_format("torch"),
    ]


def test_a_dataset_is_known_again_by_its_values() -> None:
    rows = texts()
    plain, tensors, arrays, table, formatted = (fingerprint_of(data, KEY) for data in shapes_of(rows))
    assert plain == tensors == arrays == fingerprint_of(texts(), KEY)
    assert table == formatted
    assert plain != fingerprint_of(rows, "01" * 16)


@pytest.mark.parametrize("kind", range(5))
def test_a_changed_dataset_is_told(kind: int) -> None:
    rows = texts()
    whole = fingerprint_of(shapes_of(rows)[kind], KEY)
    token = [{**row, "input_ids": [*row["input_ids"][:-1], 1]} if i == 7 else row for i, row in enumerate(rows)]
    for other in (token, rows[:-1], rows[::-1], [{**row, "more": 1} for row in rows]):
        assert fingerprint_of(shapes_of(other)[kind], KEY) != whole


def test_tensors_and_tuples_are_datasets_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.arange(40)
    data = torch.utils.data.TensorDataset(x, y)
    changed = torch.utils.data.TensorDataset(x.clone().index_fill_(0, torch.tensor(3), 0.0), y)
    assert fingerprint_of(data, KEY) == fingerprint_of(torch.utils.data.TensorDataset(x.clone(), y), KEY)
    assert fingerprint_of(data, KEY) != fingerprint_of(changed, KEY)
    assert fingerprint_of(x.numpy(), KEY) == fingerprint_of(x, KEY)


def test_random_crops_do_not_look_like_other_data() -> None:
    class Crops(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 5000

        def __getitem__(self, row: int) -> Any:
            return {"pixels": torch.rand(4, 4)}

    assert fingerprint_of(Crops(), KEY) == fingerprint_of(Crops(), KEY)


def test_parts_do_not_run_into_each_other() -> None:
    assert fingerprint_of([{"a": "xy", "b": "z"}], KEY) != fingerprint_of([{"a": "x", "b": "yz"}], KEY)
    assert fingerprint_of([["a", ["b"]]], KEY) != fingerprint_of([["a", "b"]], KEY)


def test_another_dataset_is_refused(path: Path) -> None:
    for data in (texts(), texts()):
        record = SpendLog(path)
        record.require_dataset(data)
        record.begin(RUN, {})
        record.append()
        record.close()
    record = SpendLog(path)
    with pytest.raises(PrivacyError, match=r"the dataset changed since the earlier runs in .*choose another folder"):
        record.require_dataset(texts(seed=1))
    record.close()
    other = SpendLog(path.with_name("other"))
    other.require_dataset(texts(seed=1))
    other.close()
