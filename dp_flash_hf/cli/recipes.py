"""`dp-flash train` and `dp-flash recipes`: run a recipe, list them, or copy one to change it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_flash_hf.cli.common import show, table
from dp_flash_hf.errors import invalid

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from dp_flash_hf.cli.common import Commands


def add_parsers(commands: Commands) -> None:
    """Add `train` and `recipes` to the command line."""
    run = commands.add_parser("train", help="run a recipe", description="Run a recipe with the keys of its YAML file.")
    run.add_argument("recipe", help="a name from `dp-flash recipes ls`, or the path of a copied script")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a line of the YAML file")
    run.set_defaults(command=train)

    own = commands.add_parser("recipes", help="list or copy recipes").add_subparsers(required=True, metavar="COMMAND")
    own.add_parser("ls", help="list them").set_defaults(command=list_recipes)
    copy = own.add_parser("cp", help="copy a recipe's script and YAML file, to change them")
    copy.add_argument("recipe", help="a name from `dp-flash recipes ls`")
    copy.add_argument("folder", type=Path, help="where to; nothing is overwritten")
    copy.set_defaults(command=copy_recipe)


def train(options: argparse.Namespace) -> None:
    """Run `options.recipe` with `options.overrides`.

    Raises:
        FileNotFoundError: If it ends in .py and there is no such file.
        ValueError: If it is neither a file nor the name of a recipe.
    """
    from importlib import import_module

    path = Path(options.recipe)
    recipe = _imported(path) if path.suffix == ".py" else import_module(f"dp_flash_hf.recipes.{_known(options.recipe)}")
    recipe.main(options.overrides)


def list_recipes(options: argparse.Namespace) -> None:
    """Print a table of every recipe and the first line of its docstring."""
    import ast

    listed = table("recipe", "what it does")
    for name in _names():
        docstring = ast.get_docstring(ast.parse((_folder() / f"{name}.py").read_text(encoding="utf-8")))
        listed.add_row(name, (docstring or "").partition("\n")[0])
    show(listed)


def copy_recipe(options: argparse.Namespace) -> None:
    """Copy the script and the YAML file of `options.recipe` to `options.folder`, and print how to run the copy.

    Raises:
        ValueError: If there is no such recipe.
        FileExistsError: If one of the files is there already; then nothing is written.
    """
    name = _known(options.recipe)
    copies = [options.folder / f"{name}{suffix}" for suffix in (".py", ".yaml")]
    for target in copies:
        if target.exists():
            raise FileExistsError(f"{target} exists; remove it or name another folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    for target in copies:
        target.write_bytes((_folder() / target.name).read_bytes())
    print(f"dp-flash train {copies[0]}")


def _imported(path: Path) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    name = f"dp_flash_recipe_{path.stem}"  # never the name of a package
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    recipe = module_from_spec(spec)
    sys.modules[name] = recipe  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    return recipe


def _folder() -> Traversable:
    from importlib.resources import files

    return files("dp_flash_hf.recipes")


def _names() -> list[str]:
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def _known(name: str) -> str:
    if name not in _names():
        raise invalid("recipe", expected=f"one of {', '.join(_names())}", actual=name, remedy="or give the path of a .py file")
    return name
