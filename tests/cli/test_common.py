"""What commands share: how errors are reported."""

from __future__ import annotations

import pytest

from dp_flash_hf.cli.common import run


def test_a_bug_is_not_hidden() -> None:
    def command() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run(command)
