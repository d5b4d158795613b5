"""What a wheel contains, and what importing it makes visible."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

SIBLINGS = {"dp_flash_hf.patches": "patches", "dp_flash_hf.recipes": "recipes"}


def _pyproject() -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _packages() -> dict[str, Path]:
    """Every folder with an __init__.py that users import, by the name they import it by."""
    inside = [
        path.parent for path in (ROOT / "dp_flash_hf").rglob("__init__.py") if not any(p.is_symlink() for p in path.parents)
    ]
    named = {".".join(folder.relative_to(ROOT).parts): folder for folder in inside}
    return named | {name: ROOT / folder for name, folder in SIBLINGS.items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():  # built in a copy: a build leaves folders behind
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


def test_packages_in_pyproject_are_the_folders() -> None:
    setuptools = _pyproject()["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(_packages())  # type: ignore[call-overload]
    assert setuptools["package-dir"] == SIBLINGS


def test_wheel_holds_every_module_and_recipe_and_nothing_else(wheel: Path) -> None:
    expected = {"dp_flash_hf/py.typed", "dp_flash_hf/constraints.txt"}
    for name, folder in _packages().items():
        for file in folder.iterdir():
            if file.suffix == ".py" or (name == "dp_flash_hf.recipes" and file.suffix == ".yaml"):
                expected.add(f"{name.replace('.', '/')}/{file.name}")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == expected


def test_wheel_declares_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "dp-flash = dp_flash_hf.cli.main:main" in archive.read(name).decode()


def test_siblings_are_importable_only_under_the_package(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path)!r})
import dp_flash_hf, dp_flash_hf.patches, dp_flash_hf.recipes
assert dp_flash_hf.__file__.startswith({str(tmp_path)!r}), dp_flash_hf.__file__
for name in ("patches", "recipes", "tests"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(name + " was imported")
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["patches", "recipes"])
def test_siblings_refuse_a_second_identity(name: str) -> None:
    """With the checkout on sys.path the folders are there, and still must not be imported by their bare names."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert f"import dp_flash_hf.{name}, not {name}" in done.stderr


def test_constraints_pin_every_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    project = _pyproject()["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]  # type: ignore[misc]
    for requirement in needed:
        name = requirement.replace("[", ">").replace("<", ">").partition(">")[0].lower()
        assert name in pinned or name == "dp-flash-hf", requirement
    assert not [line for line in lines if "+" in line or "==" not in line]
