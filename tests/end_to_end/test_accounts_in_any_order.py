"""Runs, their spend logs and checkpoints, in any order: what was counted counts once, and for ever."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from dp_flash_hf.accounting.plan import PrivacyPlan
from dp_flash_hf.accounting.run_account import RunAccount
from dp_flash_hf.accounting.spend_log import SpendLog
from dp_flash_hf.errors import PrivacyError
from tests.support.fuzz import examples
from tests.support.trainers import config

N, EXPECTED, STEPS = 50, 5, 4
SETTINGS: list[dict[str, Any]] = [{}, {"noise_multiplier": 2.0}, {"expected": 6}, {"max_grad_norm": 3.0}, {"steps": 7}]
BUDGETS: list[dict[str, Any]] = [{"target_epsilon": 6.0, "noise_multiplier": None}]
INCOMPATIBLE: list[dict[str, Any]] = [{"n": 60}, {"seed": 1}, {"privacy_unit": "user", "max_examples_per_unit": 2}]


CHANGE = st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5])  # which of the settings
TORN = st.integers(0, 60)  # octets of a line that were written


def account_of(n: int = N, expected: int = EXPECTED, steps: int = STEPS, **changes: Any) -> RunAccount:
    chosen = config(accountant="pld", **changes)
    return RunAccount(chosen, PrivacyPlan.from_config(chosen, n_units=n, expected_batch_size=expected, steps=steps))


Lines = tuple[bytes, ...]
Counted = tuple[frozenset[int], frozenset[int]]  # the steps that a log has to know of, and those that its own lines count


@dataclass(eq=False)
class Folder:
    """Where a log is, and who writes it."""

    path: Path
    held: Run | None = None

    @property
    def lines(self) -> Lines:
        return tuple(self.path.read_bytes().split(b"\n")[:-1]) if self.path.exists() else ()


@dataclass(eq=False)
class Run:
    """An account, and the numbers of all steps that it has to know of; in the weights are `taken` of them.

    logs: what logs held when checkpoints that it loaded saw them. saw: what its own held when it was opened or last written.
    """

    account: RunAccount
    folder: Folder | None = None
    known: set[int] = field(default_factory=set)
    logs: set[Lines] = field(default_factory=set)
    saw: Lines = ()
    taken: int = 0
    broken: bool = False  # its log could not be written
    alive: bool = True


@dataclass(eq=False)
class Saved:
    """What a checkpoint holds."""

    state: dict[str, Any]
    known: frozenset[int]
    logs: frozenset[Lines]
    taken: int


def missed(lines: Lines, known: Iterable[Lines]) -> bool | None:
    """Whether a log holds less than somebody knows of it; None where it is another's, and a longer one hides that."""
    same = [other for other in known if lines and other and other[0] == lines[0]]
    less = [other for other in same if lines[: len(other)] != other]
    if not less:
        return False
    longest = max(map(len, same))
    return True if all(other in less for other in same if len(other) == longest) else None


class Accounts(RuleBasedStateMachine):
    """Every step has a number. An account knows those that it counted, and what it was told by logs and checkpoints."""

    settings: ClassVar = SETTINGS
    forks = False

    folders = Bundle("folders")
    runs = Bundle("runs")
    saves = Bundle("saves")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.counted = self.released = 0
        self.all: list[Run] = []
        self.n_folders = 0
        self.of_line: dict[bytes, Counted] = {b"": (frozenset(), frozenset())}  # what a log counts that ends with it

    def _counted(self, folder: Folder) -> Counted:
        return self.of_line[folder.lines[-1] if folder.lines else b""]

    def _wrote(self, run: Run, before: Lines, *steps: int) -> None:
        """What the new lines of its log count: the last ones a step each, and one before them, if any, what the run knew."""
        assert run.folder is not None
        counted, own = self.of_line[before[-1] if before else b""]
        new = run.folder.lines[len(before) :]
        counted = counted | run.known
        for line, step in zip(new, [None] * (len(new) - len(steps)) + list(steps), strict=True):
            if step is not None:
                counted, own = counted | {step}, own | {step}
            self.of_line[line] = (counted, own)
        run.saw = run.folder.lines

    def teardown(self) -> None:
        for run in self.all:
            if run.alive and run.known:
                account = run.account
                assert account.epsilon() >= account.spent_epsilon() * (1 - 1e-9)
                if account.config.target_epsilon is not None and account.steps_left:
                    assert account.epsilon() <= account.config.target_epsilon
            run.account.close()
        shutil.rmtree(self.root)

    def _new_folder(self) -> Path:
        self.n_folders += 1
        return self.root / str(self.n_folders) / "spend.jsonl"

    @initialize(target=folders)
    def first_folder(self) -> Folder:
        return Folder(self._new_folder())

    @rule(target=folders, folder=folders)
    def copy_a_folder(self, folder: Folder) -> Any:
        """One in use, too."""
        if not folder.path.exists():
            return multiple()
        path = self._new_folder()
        path.parent.mkdir()
        shutil.copy(folder.path, path)
        return Folder(path)

    @rule(folder=folders, lines=st.integers(1, 3))
    def cut(self, folder: Folder, lines: int) -> None:
        """Whole lines off the end of a log."""
        if folder.held is None and folder.path.exists():
            folder.path.write_bytes(b"".join(line + b"\n" for line in folder.lines[:-lines]))

    # A run begins.

    def _begun(self, account: RunAccount, folder: Folder, saved: Saved | None, torn: int) -> Any:
        if folder.held:
            with pytest.raises(PrivacyError, match="another run is writing"):
                SpendLog(folder.path)
            self.kill(folder.held, torn)
        run = Run(account)
        log = SpendLog(folder.path)
        state = None if saved is None else copy.deepcopy(saved.state)
        if not self._told(run, folder.lines, self._counted(folder)[0], saved, lambda: account.begin(log, state)):
            log.close()
            return multiple()
        run.folder, folder.held, run.saw = folder, run, folder.lines
        run.taken = 0 if saved is None else saved.taken
        self.all.append(run)
        return run

    def _told(self, run: Run, lines: Lines, counted: Set[int], saved: Saved | None, operation: Callable[[], None]) -> bool:
        """Whether a run is told what a log and a checkpoint hold, which is refused where a log lacks what was known of it."""
        logs = {*run.logs, run.saw} | (saved.logs if saved is not None else set())
        lacks = missed(lines, logs)
        if lacks:
            self._refused(run, operation, "steps are missing from the spend log")
            return False
        try:
            operation()
        except PrivacyError:
            if lacks is None:
                return False
            raise
        except ValueError:  # no noise keeps the budget after it
            assert run.account.config.target_epsilon is not None
            assert run.account.steps_left == 0
        run.logs = logs
        run.known |= counted | (saved.known if saved is not None else set())
        return True

    @rule(target=runs, folder=folders, change=CHANGE, torn=TORN)
    def train(self, folder: Folder, change: int, torn: int) -> Any:
        return self._begun(account_of(**self.settings[change % len(self.settings)]), folder, None, torn)

    @rule(target=runs, folder=folders, saved=saves, change=CHANGE, torn=TORN)
    def resume(self, folder: Folder, saved: Saved, change: int, torn: int) -> Any:
        return self._begun(account_of(**self.settings[change % len(self.settings)]), folder, saved, torn)

    @rule(target=runs, change=CHANGE)
    def train_without_a_log(self, change: int) -> Run:
        self.all.append(Run(account_of(**self.settings[change % len(self.settings)])))
        return self.all[-1]

    @rule(folder=folders, change=st.sampled_from(INCOMPATIBLE))
    def train_what_cannot_be_added_up(self, folder: Folder, change: dict[str, Any]) -> None:
        if folder.held or not folder.lines:
            return
        account, log = account_of(**change), SpendLog(folder.path)
        before = folder.path.read_bytes()
        with pytest.raises(PrivacyError, match="cannot be added up"):
            account.begin(log)
        assert (account.steps, account.spend_log) == (0, None)
        log.close()
        assert folder.path.read_bytes() == before

    @rule(run=runs, folder=folders)
    def open_a_log(self, run: Run, folder: Folder) -> None:
        if run.alive and run.folder is None and not folder.held:
            log = SpendLog(folder.path)
            if self._told(run, folder.lines, self._counted(folder)[0], None, lambda: run.account.open_spend_log(log)):
                run.folder, folder.held, run.saw = folder, run, folder.lines
            else:
                log.close()

    # It takes steps.

    @rule(target=saves, run=runs, steps=st.integers(1, 3))
    def go_on(self, run: Run, steps: int) -> Saved:
        """As trainings do; what could be saved before it."""
        for _ in range(steps):
            saved = self._saved(run)
            self.count(run, True)
        return saved

    @rule(run=runs, completes=st.booleans())
    def count(self, run: Run, completes: bool) -> None:
        if not run.alive or run.account.steps_left <= 0:
            return
        if run.broken:
            self._refused(run, lambda: run.account.count_step(), "is closed")
            return
        before = () if run.folder is None else run.folder.lines
        run.account.count_step()
        self.counted += 1
        if run.folder is not None:
            self._wrote(run, before, self.counted)
        run.known.add(self.counted)
        if completes:  # else it is killed between the log and the noise, or all is interrupted there
            run.account.complete_step()
            self.released += 1
            run.taken += 1

    @rule(run=runs, line=st.integers(1, 2))
    def the_disk_is_full(self, run: Run, line: int) -> None:
        """At the first line that is written, or at the second where there are two."""
        if not run.alive or run.folder is None or run.broken or run.account.steps_left <= 0:
            return
        assert isinstance(run.account.spend_log, SpendLog)
        lines = 1 if run.account.spend_log._run is None else 2
        if line > lines:
            return
        left, before = line, run.folder.lines

        def full(file: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise OSError("no space left")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full)
            self._refused(run, lambda: run.account.count_step(), "could not be written")
        run.broken = True
        run.folder.held = None
        self._wrote(run, before)

    def _refused(self, run: Run, operation: Callable[[], None], match: str) -> None:
        before = self._seen(run)
        with pytest.raises(PrivacyError, match=match):
            operation()
        assert self._seen(run) == before

    @staticmethod
    def _seen(run: Run) -> Any:
        account = run.account
        state = {name: value for name, value in account.state_dict().items() if name not in ("spend_logs", "checksum")}
        return (state, account.steps, account.steps_left, account.plan, account.writer, account.recorded)

    # It ends.

    @rule(run=consumes(runs), torn=TORN)
    def kill(self, run: Run, torn: int) -> None:
        """Nothing is closed but what the system closes; a line may have been begun, and was not synced."""
        if not run.alive:
            return
        run.alive = False
        log = run.account.spend_log
        if run.folder is None or run.broken:
            return
        assert isinstance(log, SpendLog)
        assert log._file is not None
        os.write(log._file, b'{"hash": "0123456789abcdef0123456789abcdef", "step": 12345678}'[:torn])
        os.close(log._file)
        log._file = None
        run.folder.held = None

    @rule(run=runs)
    def stop(self, run: Run) -> None:
        if run.alive:
            run.account.close()
            if run.folder is not None and not run.broken:
                run.broken, run.folder.held = True, None

    @rule(target=saves, run=runs)
    def save(self, run: Run) -> Saved:
        return self._saved(run)

    def _saved(self, run: Run) -> Saved:
        return Saved(json.loads(json.dumps(run.account.state_dict())), frozenset(run.known), self._logs(run), run.taken)

    @staticmethod
    def _logs(run: Run) -> frozenset[Lines]:
        return frozenset({*run.logs, run.saw})

    @rule(run=runs, saved=saves)
    def load(self, run: Run, saved: Saved) -> None:
        if run.alive and self._told(
            run, run.saw, set(), saved, lambda: run.account.load_state_dict(copy.deepcopy(saved.state))
        ):
            run.taken = saved.taken

    @rule(run=runs, saved=saves, what=st.sampled_from(["taken", "steps", "noise_multiplier", "ledgers", "checksum"]))
    def load_what_is_damaged(self, run: Run, saved: Saved, what: str) -> None:
        if run.alive:
            state = copy.deepcopy(saved.state)
            state[what] = {} if what == "ledgers" and state[what] else -1 if what == "ledgers" else state[what] + 1
            self._refused(run, lambda: run.account.load_state_dict(state), "damaged")

    @rule(run=runs)
    def change_the_plan(self, run: Run) -> None:
        plan = run.account.plan
        run.account.plan = replace(plan, steps=plan.steps + 1)
        self._refused(run, lambda: run.account.require_as_planned(run.account.config), "were changed")
        run.account.plan = plan
        run.account.require_as_planned(run.account.config)

    @rule(folder=folders, steps=st.integers(1, 5), dies_at=st.integers(1, 8))
    def another_process(self, folder: Folder, steps: int, dies_at: int) -> None:
        """Takes steps, and ends without a word while it writes or syncs."""
        if not self.forks or folder.held:
            return
        run, before = Run(account_of(), folder, set(self._counted(folder)[0])), folder.lines
        released, begun = _of_a_process(folder.path, steps, dies_at)
        found = sum(b'"step"' in line for line in folder.lines[len(before) :])
        assert released <= found <= begun
        new = range(self.counted + 1, self.counted + 1 + found)
        self._wrote(run, before, *new)
        self.counted += found
        self.released += released

    # What always holds.

    @invariant()
    def every_step_counts_once(self) -> None:
        assert self.counted >= self.released
        for run in self.all:
            account = run.account
            if run.alive:
                assert account.steps == len(run.known)
                assert account.taken == run.taken <= account.steps
                assert account.steps_left >= 0
                if run.folder is None or run.folder.held is run:
                    assert account.recorded == (run.folder is not None and run.known <= self._counted(run.folder)[1])
                account.require_as_planned(account.config)


class AllAccounts(Accounts):
    """With budgets, whose noise is calibrated again and again, and with processes that die."""

    settings: ClassVar = [*SETTINGS, *BUDGETS]
    forks = True


def _of_a_process(path: Path, steps: int, dies_at: int) -> tuple[int, int]:
    """(steps released, steps begun) by a fork that takes so many, and exits at its so many-th sync of the log."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        sync, left = os.fsync, dies_at

        def dying(file: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                os._exit(1)
            sync(file)

        with suppress(BaseException):
            account = account_of(steps=100)
            os.fsync = dying  # type: ignore[assignment]
            account.begin(SpendLog(path))
            for _ in range(steps):
                os.write(write, b"b")
                account.count_step()
                os.write(write, b"r")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told.count(b"r"), told.count(b"b")


@pytest.mark.parametrize(
    ("machine", "n", "steps"), [(Accounts, 60, 30), pytest.param(AllAccounts, 100, 60, marks=pytest.mark.complete)]
)
def test_a_step_that_was_counted_counts_once_and_for_ever(machine: type[Accounts], n: int, steps: int) -> None:
    run_state_machine_as_test(machine, settings=examples(n, steps=steps))
