"""Whether a checkpoint of `Trainer` is whole: a kill or a full disk may leave any part of one."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

_STATE_FILE = "trainer_state.json"  # written last
_NAME = re.compile(r"checkpoint-(\d+)")
_READ_AT_ONCE = 1 << 22


def manifest(folder: Path) -> dict[str, list[int]]:
    """[size in bytes, crc32] of every file in a checkpoint, by path within it.

    Left out are the state file, which will hold the manifest, and random states that other processes may still be writing.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _crc32(path)]
        for path in files
        if path.name != _STATE_FILE and not path.name.startswith("rng_state_")
    }


def by_age(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, the newest first, whole or not."""
    found = [(int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def read_state(folder: Path) -> dict[str, Any]:
    """What the trainer saved last. Raises ValueError, naming the file, for a checkpoint that was not saved to the end."""
    try:
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state["global_step"], int):
            raise ValueError("no trainer's state")
        return state
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / _STATE_FILE} is missing or damaged ({error})") from error


def require_whole(folder: Path, files: dict[str, list[int]]) -> None:
    """Raise ValueError, naming the file, unless all files are as the manifest says."""
    for name, (size, crc32) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size or _crc32(path) != crc32:
            raise ValueError(f"{path} is damaged: it is not as it was saved")


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            value = zlib.crc32(block, value)
    return value
