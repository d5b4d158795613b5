"""`dp-flash recipes`: what there is, and copies to change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import dp_flash_hf
from dp_flash_hf.cli.main import main
from tests.cli import printed_rows

FOLDER = Path(dp_flash_hf.__file__).parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_recipes_ls_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "ls"])
    rows = printed_rows(capsys.readouterr().out)
    assert [name for name, _ in rows if name] == RECIPES
    assert {"quickstart", "full_finetune", "lora_finetune", "classification"} <= set(RECIPES)
    assert all(text for _, text in rows)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_cp_copies_both_files_and_overwrites_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["recipes", "cp", name, str(tmp_path / "new")])
    for suffix in (".py", ".yaml"):
        original = (FOLDER / name).with_suffix(suffix)
        assert (tmp_path / "new" / original.name).read_bytes() == original.read_bytes()
    (tmp_path / "new" / f"{name}.py").unlink()
    (tmp_path / "new" / f"{name}.yaml").write_text("mine: 1\n")
    with pytest.raises(SystemExit):
        main(["recipes", "cp", name, str(tmp_path / "new")])
    assert "exists" in capsys.readouterr().err
    assert not (tmp_path / "new" / f"{name}.py").exists()
    assert yaml.safe_load((tmp_path / "new" / f"{name}.yaml").read_text()) == {"mine": 1}
