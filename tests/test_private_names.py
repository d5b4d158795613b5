"""docs/extending/private_names.md lists what the library leans on, all of it, and the installed versions have it."""

from __future__ import annotations

import pytest

from tests.support import ROOT
from tests.support.private_names import Listed, exists, listed, read_by_the_library

LISTED = listed()
# Of these names, versions have one or the other.
_EITHER = {"_fsdp_param_group", "_fsdp_param_groups"}
# Older versions have none of these: see their rows.
_NEWER = {"_sync_replicated_trainable_parameters", "_is_expert_parallel"}


@pytest.mark.parametrize("row", LISTED, ids=lambda row: row.path)
def test_the_installed_versions_have_it(row: Listed) -> None:
    pytest.importorskip(row.path.partition(".")[0])
    if row.name in _EITHER:
        owner = row.path.rpartition(".")[0]
        assert any(exists(f"{owner}.{name}") for name in _EITHER)
    elif not exists(row.path) and row.name in _NEWER:
        pytest.skip("not in this version")
    else:
        assert exists(row.path), f"{row.path} is gone: {row.when_gone}"


def test_everything_that_is_read_is_listed() -> None:
    known = {(name, file) for row in LISTED for name in row.path.split(".") for file in row.files}
    read = read_by_the_library()
    missing = {f"{name} ({file}:{line})" for (name, file), line in read.items() if (name, file) not in known}
    assert not missing, f"not listed in docs/extending/private_names.md: {sorted(missing)}"


def test_everything_that_is_listed_is_read() -> None:
    for row in LISTED:
        for file in row.files:
            path = ROOT / file if file.startswith("patches/") else ROOT / "dp_flash_hf" / file
            assert path.is_file(), f"{row.path}: there is no {file}"
            name = row.name.removeprefix("_global")  # put together from the names of a module's own tables
            assert name in path.read_text(encoding="utf-8"), f"{file} no longer reads {row.path}"


def test_what_is_not_there_is_not_found() -> None:
    for path in ("transformers.Trainer._no_such_thing", "transformers.NoSuchTrainer._metrics", "no_such_package._thing"):
        assert not exists(path)
