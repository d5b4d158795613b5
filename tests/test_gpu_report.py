"""The command that measures on a GPU: a part that fails or hangs loses nothing but itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import gpu
from tests.gpu import Part


def test_all_time_outs_are_under_nine_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS) < 9 * 60


def test_every_part_leaves_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (
        Part("Hangs", ("-c", "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"), 2),
        Part("Fails", ("-c", "print('a line'); raise SystemExit(3)"), 60),
        Part("Works", ("-c", "print('42 TFLOP/s')"), 60),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    with pytest.raises(SystemExit, match="failed: Hangs, Fails"):
        gpu.main(["--out", str(tmp_path / "found.md")])
    written = (tmp_path / "found.md").read_text()
    hangs, fails, works = written.split("\n## ")[1:]
    assert "**Stopped** after 2 seconds" in hangs
    assert "begun" in hangs
    assert "**Failed** with status 3" in fails
    assert "a line" in fails
    assert "42 TFLOP/s" in works
    assert "**" not in works
    assert "- GPU" in written
    gpu.main(["--out", str(tmp_path / "found.md"), "--only", "Works"])
    assert "Hangs" not in (tmp_path / "found.md").read_text()
