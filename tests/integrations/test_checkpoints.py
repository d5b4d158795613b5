"""Which checkpoint is resumed, and what becomes of one that is not whole; runs that are killed are in tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dp_flash_hf.errors import PrivacyError
from dp_flash_hf.integrations.checkpoints import STATE_FILE, by_age, manifest, to_resume, whole, whole_or_removed


def saved(output_dir: Path, step: int, *, private: bool = True) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * step)
    attributes = {"privacy": {"taken": step}, "files": manifest(folder)}
    callbacks = {"DPCallback": {"attributes": attributes}} if private else {}
    (folder / STATE_FILE).write_text(json.dumps({"global_step": step, "stateful_callbacks": callbacks}))
    return folder


def resumed(output_dir: Path, resume: str | bool | None) -> int | None:
    found = to_resume(resume, str(output_dir), output_dir / "spend", callback="DPCallback")
    assert found is None or found.privacy == {"taken": found.step}
    return None if found is None else found.step


@pytest.mark.parametrize("resume", [None, False])
def test_nothing_is_resumed_unless_asked(resume: bool | None, tmp_path: Path) -> None:
    saved(tmp_path, 2)
    assert resumed(tmp_path, resume) is None


def test_the_newest_whole_checkpoint_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 10, 9):
        saved(tmp_path, step)
    assert [path.name for path in by_age(tmp_path)] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert resumed(tmp_path, True) == 10
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"other")
    (tmp_path / "checkpoint-9" / STATE_FILE).write_text("{")
    assert resumed(tmp_path, True) == 2
    assert caplog.text.count("is skipped, because it is incomplete") == 2
    with pytest.raises(PrivacyError, match=r"weights is damaged.*resume another checkpoint, or resume_from_checkpoint=True"):
        resumed(tmp_path, str(tmp_path / "checkpoint-10"))


def test_without_a_checkpoint_a_spend_log_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PrivacyError, match="no whole checkpoint and no spend log"):
        resumed(tmp_path, True)
    (tmp_path / "spend").touch()
    assert resumed(tmp_path, True) is None
    assert "what was spent counts" in caplog.text


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_without_privacy_state_is_never_skipped(named: bool, tmp_path: Path) -> None:
    saved(tmp_path, 2)
    folder = saved(tmp_path, 4, private=False)
    with pytest.raises(PrivacyError, match="checkpoint-4 holds no privacy state"):
        resumed(tmp_path, str(folder) if named else True)


@pytest.mark.parametrize("writes", [False, True])
def test_a_checkpoint_that_fails_is_removed_by_who_writes_it(writes: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)

    def failing() -> None:
        with whole_or_removed(folder, writes=writes):
            raise OSError("no space left on device")

    with pytest.raises(RuntimeError, match=r"could not be written \(no space left on device\)"):
        failing()
    assert folder.exists() != writes


def test_what_is_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)
    assert whole(folder, "DPCallback") == (folder, 2, {"taken": 2})
    (folder / "weights").unlink()
    with pytest.raises(ValueError, match="weights is missing"):
        whole(folder, "DPCallback")
