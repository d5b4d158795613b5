"""What commands share: how errors are reported."""

from __future__ import annotations

import pytest

from dp_flash_hf.cli.common import run


def test_a_bug_is_not_hidden() -> None:
    def command() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run(command)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_prints(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)

    def command() -> None:
        print("the report")
        raise ValueError("an error")

    with pytest.raises(SystemExit):
        run(command)
    out, err = capsys.readouterr()
    assert out == ("the report\n" if rank == "0" else "")
    assert err == "dp-flash: an error\n"
