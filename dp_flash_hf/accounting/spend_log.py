"""What was spent, on disk before anything of it can be seen: a write-ahead log beside the checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dp_flash_hf.accounting.dataset_fingerprint import fingerprint_of
from dp_flash_hf.accounting.ledger import Ledger
from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.mechanisms.sampling import sampler_from_dict

FILE_NAME = "_privacy_spend.jsonl"  # `Trainer.push_to_hub` leaves out files whose name begins so

# What is known of spend logs: the hash of a log's first line, by which it is told from others -> how many lines it had, and the
# hash of the last of them. The hashes tell nothing of the data: the first line holds a secret key.
Heads = dict[str, tuple[int, str]]


class SpendLog:
    """An append-only file of all noisy steps of a folder, each written and synced before it is released.

    Its life::

        log = SpendLog(path)        # locks the file; reads what it holds
        log.begin(run, others={})   # of what kind the next steps are
        log.append()                # returns when the step is on disk: now noise may be drawn
        log.close()

    Formal guarantee: whenever noise of a step was drawn after its `append` returned, every later `SpendLog` of that file counts
    the step, or raises. A process killed between `append` and the release has counted a step too many, never one too few.

    A line is a JSON object with a hash of itself and all lines before. The first line of a run says who counts, and of what
    kind the steps are; it is written with the first of them. Each run that opens the file counts under a new name: two copies
    of it that both go on have no name in common for what they add, so nothing is lost where they are merged.

    ============================================== ====================================================================
    Case                                           Result
    ============================================== ====================================================================
    a last line that is cut short                  removed: it was never synced, so its step was not released
    any other line changed or missing              PrivacyError on opening, naming the line
    whole lines cut off the end, or an older copy  PrivacyError from `require_continues`, from what a checkpoint knows of it;
                                                   lines after the newest checkpoint are not missed
    a copy that went on by itself                  the same, for a checkpoint of the other one
    another run holds the file                     PrivacyError on opening; the lock ends with its process
    a full disk, a deleted or read-only file       PrivacyError from `append`: nothing may be released; the log is closed
    `append` after `close`                         PrivacyError
    a run without a step                           leaves no line
    ============================================== ====================================================================

    Never publish the file: it holds a hash of private text, and its key, with which guesses at the text can be checked. It is
    created with mode 0600, and its usual name, `FILE_NAME`, is one that `Trainer.push_to_hub` leaves out. The lock is `flock`:
    the file system has to support it between all machines that may write there.

    Args:
        path: The file; it and its folder are created where they do not exist.

    Attributes:
        path: The file.
        name: Under which this run counts; no other run has it.
        ledgers: By run, the steps of this file, and those that its runs had taken in other places before.
        written: By run, how many steps this file's own lines count.
        last: What the latest run was, as given to `begin`; None in a new file.

    Raises:
        PrivacyError: A file that cannot be written, locked or read back, or that another run holds.
    """

    # Logs that this process holds open. A fork handler takes no arguments and cannot be removed, so it must find them here; and
    # it is the process, not an object, that a lock belongs to.
    _open: ClassVar[weakref.WeakSet[SpendLog]] = weakref.WeakSet()

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = secrets.token_hex(8)  # of this run, and of no other
        self.ledgers: dict[str, Ledger] = {}  # by run: those of this file, and of other places before
        self.written: dict[str, int] = {}  # how many steps of each run this file's own lines count
        self.last: dict[str, Any] | None = None  # the latest run
        self._writer = ""  # whose steps the latest lines are
        self._key, self._fingerprint = secrets.token_hex(16), ""
        self._run: dict[str, Any] | None = None  # of the next steps, if not yet in the file
        self._hashes: list[str] = []  # of all lines
        self._end = 0
        self._file: int | None = None
        try:
            made = [folder for folder in self.path.parents if not folder.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise PrivacyError(f"the spend log {self.path} is not a file: remove it, or choose another folder")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (self.path.parent, *(one.parent for one in made)):  # which hold what is new
                _sync_folder(folder)
            self._read()
        except BlockingIOError as error:
            self.close()
            raise PrivacyError(
                f"another run is writing {self.path}: two runs cannot share a folder and its spend log; wait for it to end, "
                "or choose another folder"
            ) from error
        except OSError as error:
            self.close()
            raise PrivacyError(
                f"the spend log {self.path} cannot be opened ({error}), so steps could be lost uncounted; choose "
                "a folder on a disk that can be written and locked"
            ) from error
        except BaseException:
            self.close()
            raise
        self._open.add(self)

    def require_dataset(self, dataset: Any) -> None:
        """Remember the dataset that the next steps draw from.

        Args:
            dataset: As for `fingerprint_of`: anything with a length and random access.

        Raises:
            PrivacyError: It is not the one that earlier runs of this log drew from.
        """
        fingerprint = fingerprint_of(dataset, self._key)
        if self.last is not None and fingerprint != self._fingerprint:
            raise PrivacyError(
                f"the dataset changed since the earlier runs in {self.path.parent}, and what was spent on one says nothing "
                "about another: give the same data, in the same order and with the same columns, or choose another folder"
            )
        self._fingerprint = fingerprint

    def begin(self, run: Mapping[str, Any], others: Mapping[str, Ledger]) -> None:
        """Let the next steps be of this kind; it is written with the first of them.

        Args:
            run: JSON data with "sampler" (its `to_dict`) and "noise_multiplier" at least.
            others: By run, what was spent before in other places and is not in this log.
        """
        self._run = {
            "writer": self.name,
            "key": self._key,
            "fingerprint": self._fingerprint,
            "run": {**run},
            "others": {name: ledger.state_dict() for name, ledger in others.items()},
        }

    def append(self) -> None:
        """Count one step. When this returns it is on disk, and its noise may be drawn.

        Raises:
            PrivacyError: The step is not on disk, and nothing may be released.
        """
        if self._run is not None:
            self._write(self._run)
            self._take(self._run)
            self._run = None
        line = {"step": self.written[self.name] + 1}
        self._write(line)
        self._take(line)

    @property
    def head(self) -> Heads:
        """Which log this is, and how far it goes; {} without a line."""
        return {self._hashes[0]: (len(self._hashes), self._hashes[-1])} if self._hashes else {}

    def require_continues(self, known: Heads, whose: str, *, beside: bool = False) -> None:
        """Raise PrivacyError if this is the log that somebody knows, and does not hold all that it held then.

        Args:
            known: `head` as it was, and perhaps those of other logs.
            whose: Who knows it, for the message: a checkpoint.
            beside: Whether that lies beside this file, which then is not a new one.
        """
        lines, last = known.get(self._hashes[0], (0, "")) if self._hashes else (0, "")
        if beside and known and not self._hashes:
            raise PrivacyError(
                f"the spend log {self.path} is missing, and {whose} is of a run that wrote one: it was deleted, or the "
                "checkpoint was copied here without it. Put the file back; or train in another folder, where what a checkpoint "
                "says is counted if it is resumed by its path, and steps lost after it are not"
            )
        if lines > len(self._hashes) or (lines and self._hashes[lines - 1] != last):
            found = f"it has {len(self._hashes)}" if lines > len(self._hashes) else "they are not the same"
            raise PrivacyError(
                f"steps are missing from the spend log {self.path}: {whose} knows {lines} lines of it, and {found}. Lines were "
                "cut off its end, or it is an older copy, or a copy of its folder went on by itself. Put back the file that "
                f"belongs to {whose}; or train in another folder, where what a checkpoint says is counted if it is resumed "
                "there, and what only this file holds has to be added by you"
            )

    def replica(self) -> SpendLogReplica:
        """What other ranks need to know of this log."""
        return SpendLogReplica(self.path, self.name, self.ledgers, self.written, self.last, self.head)

    def close(self) -> None:
        """Let another run write the file; to close twice does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @classmethod
    def close_all(cls) -> None:
        """In a forked process: a worker of a data loader may outlive a killed run, and must not hold its lock."""
        for log in cls._open:
            log.close()

    def _read(self) -> None:
        assert self._file is not None
        with open(os.dup(self._file), "rb") as file:
            content = file.read()
        whole, newline, torn = content.rpartition(b"\n")
        for number, text in enumerate(whole.split(b"\n") if newline else (), start=1):
            try:
                line = json.loads(text)
                found = line.pop("hash")
                if found != self._chained(line):
                    raise ValueError("its hash does not follow from the lines before")
                if "record" in line:
                    raise PrivacyError(
                        f"{self.path} was written by an earlier version, in which copies of a folder counted under one name, "
                        "so steps of theirs may be missing: start again in another folder, and count what was spent here too"
                    )
                self._take(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PrivacyError(
                    f"{self.path}, line {number}: damaged ({error}), so what was spent is unknown. Restore a copy of "
                    "the file, if no step was taken since; or start again in another folder, and count what was spent here too"
                ) from error
            self._hashes.append(found)
            self._end += len(text) + 1
        if torn:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)

    def _take(self, line: dict[str, Any]) -> None:
        """Count what a line says."""
        if "step" in line:
            if self.last is None or line["step"] != self.written[self._writer] + 1:
                raise ValueError("a step is missing before it")
            run = self.last
            self.ledgers[self._writer].record(sampler_from_dict(run["sampler"]), run["noise_multiplier"])
            self.written[self._writer] += 1
            return
        if self.last is not None and line["key"] != self._key:
            raise ValueError("it is of another log")
        self._writer, self._key, self._fingerprint = line["writer"], line["key"], line["fingerprint"]
        self.last = line["run"]
        self.ledgers.setdefault(self._writer, Ledger())
        self.written.setdefault(self._writer, 0)
        for name, state in line["others"].items():
            other = Ledger()
            other.load_state_dict(state)
            self.ledgers.setdefault(name, Ledger()).merge_max(other)

    def _chained(self, line: Mapping[str, Any]) -> str:
        before = self._hashes[-1] if self._hashes else ""
        return hashlib.sha256(f"{before}{json.dumps(line, sort_keys=True)}".encode()).hexdigest()[:32]

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            raise PrivacyError(f"the spend log {self.path} is closed: nothing may be released any more; start the run again")
        found = self._chained(line)
        text = json.dumps({**line, "hash": found}).encode() + b"\n"
        try:
            if os.fstat(self._file).st_nlink == 0:
                raise OSError("it was deleted while in use")
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            self._undo()
            raise PrivacyError(
                f"the spend log {self.path} could not be written ({error}), so the step was not released; free disk space "
                "or repair the folder, then resume"
            ) from error
        self._hashes.append(found)
        self._end += len(text)

    def _undo(self) -> None:
        """Back to the last good line; nothing is written after a line that may be torn."""
        assert self._file is not None
        with contextlib.suppress(OSError):  # an incomplete line is removed when the file is opened again, too
            os.ftruncate(self._file, self._end)
        self.close()


@dataclasses.dataclass
class SpendLogReplica:
    """The spend log that the first of several ranks writes, as the others know it: the same ledgers, and nothing to write.

    They release a step only after the first has put it on disk: `DPSGD.release` has all ranks wait for each other before noise.
    Attributes are those of `SpendLog`; `head` is as it was when the replica was made.
    """

    path: Path
    name: str
    ledgers: dict[str, Ledger]
    written: dict[str, int]
    last: dict[str, Any] | None
    head: Heads

    def begin(self, run: Mapping[str, Any], others: Mapping[str, Ledger]) -> None:
        """The first rank does it."""

    def require_continues(self, known: Heads, whose: str) -> None:
        """The first rank does it."""

    def append(self) -> None:
        """Count with the first rank, which writes."""
        self.written[self.name] = self.written.get(self.name, 0) + 1

    def close(self) -> None:
        """The first rank does it."""


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


os.register_at_fork(after_in_child=SpendLog.close_all)
