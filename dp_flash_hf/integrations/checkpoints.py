"""Checkpoints of a `Trainer`: which one to continue, whether it is whole, and what was spent until then.

A kill or a full disk may leave any part of a checkpoint. So the trainer's state, which is written last, holds a manifest of
all other files.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dp_flash_hf.distributed import Ranks
from dp_flash_hf.errors import PrivacyError

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # written last
_NAME = re.compile(r"checkpoint-(\d+)")
_READ_AT_ONCE = 1 << 22


class Checkpoint(NamedTuple):
    """A whole checkpoint: its folder, the step it was taken after, and the privacy state saved in it."""

    path: Path
    step: int
    privacy: dict[str, Any]


def to_resume(resume: str | bool | None, output_dir: str, spend_log: Path, *, callback: str) -> Checkpoint | None:
    """The checkpoint that a training continues; None to train from the beginning.

    Args:
        resume: `resume_from_checkpoint` of `Trainer.train`: True is the newest checkpoint in `output_dir` that is whole. Where
            there is none, but a spend log, the run was killed before its first checkpoint, and starts again: its steps count.
        output_dir: of the trainer.
        spend_log: the file of the spend log.
        callback: the name under which `Trainer` saves the state of the callback.

    Raises:
        PrivacyError: there is nothing to resume, the checkpoint asked for is damaged, or one holds no privacy state.
    """
    if not resume:
        return None
    if resume is not True:
        try:
            return whole(Path(resume), callback)
        except ValueError as error:
            raise PrivacyError(f"{error}; resume another checkpoint, or resume_from_checkpoint=True for the newest") from error
    for folder in by_age(output_dir):
        try:
            return whole(folder, callback)
        except ValueError as error:
            logger.warning(f"{folder} is skipped, because it is incomplete: {error}")
    if not spend_log.exists():
        raise PrivacyError(f"no whole checkpoint and no spend log is in {output_dir}: leave out resume_from_checkpoint")
    logger.warning(
        f"there is no whole checkpoint in {output_dir}: training starts from the beginning, and what was spent counts"
    )
    return None


def whole(folder: Path, callback: str) -> Checkpoint:
    """A checkpoint that was saved to the end.

    Raises:
        ValueError: naming the file, where one is missing or damaged.
        PrivacyError: it holds no privacy state.
    """
    state = read_state(folder)
    saved = _privacy_in(state, folder, callback)
    require_whole(folder, saved.get("files", {}))
    return Checkpoint(folder, state["global_step"], saved["privacy"])


def privacy_states(output_dir: str | Path, callback: str) -> dict[Path, dict[str, Any]]:
    """The privacy states in a folder's checkpoints, the newest first, by their folders; of those whose state can be read."""
    found = {}
    for folder in by_age(output_dir):
        with suppress(ValueError, PrivacyError):
            found[folder] = _privacy_in(read_state(folder), folder, callback)["privacy"]
    return found


@contextmanager
def whole_or_removed(folder: Path, *, writes: bool) -> Iterator[None]:
    """Within the context a checkpoint is written; one that fails, on any rank, is removed. writes: whether this rank does."""
    try:
        with Ranks().all_ranks_or_none():
            yield
    except Exception as error:
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint {folder} could not be written ({error}), and what there was of it was removed; free space or "
            "repair the folder, then resume: the steps since the last checkpoint are lost, but counted"
        ) from error


def manifest(folder: Path) -> dict[str, list[int]]:
    """[size in bytes, crc32] of every file in a checkpoint, by path within it.

    Left out are the state file, which will hold the manifest, and random states that other processes may still be writing.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _crc32(path)]
        for path in files
        if path.name != STATE_FILE and not path.name.startswith("rng_state_")
    }


def by_age(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, the newest first, whole or not."""
    found = [(int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def read_state(folder: Path) -> dict[str, Any]:
    """What the trainer saved last. Raises ValueError, naming the file, where that is missing or damaged."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state["global_step"], int):
            raise ValueError("no trainer's state")
        return state
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / STATE_FILE} is missing or damaged ({error})") from error


def require_whole(folder: Path, files: dict[str, list[int]]) -> None:
    """Raise ValueError, naming the file, unless all files are as the manifest says."""
    for name, (size, crc32) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size or _crc32(path) != crc32:
            raise ValueError(f"{path} is damaged: it is not as it was saved")


def _privacy_in(state: dict[str, Any], folder: Path, callback: str) -> dict[str, Any]:
    """What the callback saved in a trainer's state. Raises PrivacyError where it saved nothing."""
    saved: dict[str, Any] = ((state.get("stateful_callbacks") or {}).get(callback) or {}).get("attributes") or {}
    if not isinstance(saved.get("privacy"), dict):
        raise PrivacyError(
            f"the checkpoint {folder} holds no privacy state, so what was spent is unknown; train from the beginning"
        )
    return saved


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            value = zlib.crc32(block, value)
    return value
