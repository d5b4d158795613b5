"""The wings of the package: which of them may import which, and how long files and functions may grow."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import ROOT, sizes

PACKAGE = ROOT / "dp_flash_hf"
# From the bottom floor up. A file imports from wings below its own, and from its own where that makes no circle; `__init__` is
# the package's own file. Transformers and its relatives are known from `attention` upwards, but for the engine.
WINGS = (
    "errors",
    "validation",
    "units",
    "mechanisms",
    "kernels",
    "distributed",
    "accounting",
    "evaluation",
    "reporting",
    "layers",
    "attention",
    "engine",
    "testing",
    "patches",
    "forward_privacy",
    "benchmarks",
    "training",
    "auditing",
    "integrations",
    "__init__",
    "cli",
    "recipes",
)
WITHOUT_TRANSFORMERS = {*WINGS[: WINGS.index("attention")], "engine", "testing"}
# Objects of others, with an attribute named like one of ours.
NOT_OURS = {"spec.loader", "module.__spec__.loader", "options.delta"}
TRANSFORMERS = {"transformers", "accelerate", "peft", "trl", "datasets"}


def wing_of(module: str) -> str:
    """The wing of a dotted name below the package."""
    first = module.removeprefix("dp_flash_hf").lstrip(".").partition(".")[0]
    return first if first in WINGS else "__init__"


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every file of the package by its dotted name; the folders beside it by the names they are imported by."""
    found = {}
    for folder in ("dp_flash_hf", "patches", "recipes"):
        for path in (root / folder).rglob("*.py"):
            if any(part.is_symlink() for part in path.parents):
                continue
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            found[name if folder == "dp_flash_hf" else f"dp_flash_hf.{name}"] = path
    return found


MODULES = modules()


def imported(path: Path, modules: Mapping[str, Path] = MODULES) -> set[str]:
    """Every module that a file names in an import, wherever it stands, also inside functions and for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in inner}
    return found


def test_every_wing_is_on_the_list() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert folders | files <= set(WINGS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    own = WINGS.index(wing_of(name))
    ours = {other for other in imported(MODULES[name]) if other.partition(".")[0] == "dp_flash_hf"}
    upwards = {other for other in ours if WINGS.index(wing_of(other)) > own}
    assert not upwards, f"{name} imports from wings above it"


@pytest.mark.parametrize("name", MODULES)
def test_lower_wings_do_not_know_transformers(name: str) -> None:
    if wing_of(name) in WITHOUT_TRANSFORMERS:
        assert not {other for other in imported(MODULES[name]) if other.partition(".")[0] in TRANSFORMERS}


def test_there_are_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(imported(MODULES[name]) & MODULES.keys()):
            if other != "dp_flash_hf":  # its public names are loaded when they are asked for
                visit(other, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


def stored(path: Path) -> dict[ast.Attribute, str]:
    """Every attribute that a file sets or deletes, with the class in whose body that stands, "" outside of classes."""
    found: dict[ast.Attribute, str] = {}

    def visit(node: ast.AST, owner: str) -> None:
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            found[node] = owner
        for child in ast.iter_child_nodes(node):
            visit(child, node.name if isinstance(node, ast.ClassDef) else owner)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def declared(path: Path) -> set[tuple[str, str]]:
    """(class, attribute) for those that a file's classes annotate in their bodies, as dataclasses do."""
    classes = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef))
    annotated = ((owner, line.target) for owner in classes for line in owner.body if isinstance(line, ast.AnnAssign))
    return {(owner.name, target.id) for owner, target in annotated if isinstance(target, ast.Name)}


def test_state_is_changed_by_its_owner_only() -> None:
    """Attributes of the package's own classes are set in the bodies of these classes, and classes of modules by `ClassSwap`."""
    every = {path: stored(path) for name, path in MODULES.items() if wing_of(name) != "recipes"}  # their trainers are not ours
    owners: dict[str, set[str]] = {}
    for path, attributes in every.items():
        own = {(owner, node.attr) for node, owner in attributes.items() if owner and ast.unparse(node.value) == "self"}
        for owner, name in own | declared(path):
            owners.setdefault(name, set()).add(owner)
    outside = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path, attributes in every.items()
        for node, owner in attributes.items()
        if ast.unparse(node) not in NOT_OURS
        and ast.unparse(node.value) != "ctx"  # of autograd
        and (
            (node.attr in owners and owner not in owners[node.attr]) or (node.attr == "__class__" and path.stem != "class_swap")
        )
    ]
    assert not outside, "give the owner a method:\n" + "\n".join(outside)


def test_files_and_functions_stay_short() -> None:
    too_long = [found for found in sizes.too_long(MODULES) if found.name not in sizes.EXCEPTIONS]
    assert not too_long, "\n".join(map(str, too_long))
    assert set(sizes.EXCEPTIONS) <= {found.name for found in sizes.too_long(MODULES)}, "an exception that is none any more"
