"""Planted faults in the lines that carry a promise, and whether a test finds each: `python -m tests.support.mutants`.

A mutant is the package with one expression or statement changed: a comparison, a sign, a number, a truth value, a condition, a
refusal or a call left out. It is killed if one of the tests that belong to its file fails. One that survives is a promise
without a test, unless `mutants.toml` says why it changes nothing that matters.

    python -m tests.support.mutants                     all of them: hours
    python -m tests.support.mutants --sample 20         so many, chosen anew for each commit
    python -m tests.support.mutants training/dp_sgd.py  those of one file
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tests.support import ROOT

EXPLAINED = Path(__file__).with_name("mutants.toml")
# The privacy core, and the tests that are to find faults there.
TESTS: dict[str, tuple[str, ...]] = {
    "mechanisms/gaussian_noise.py": ("tests/mechanisms/test_gaussian_noise.py",),
    "mechanisms/generators.py": ("tests/mechanisms/test_generators.py",),
    "mechanisms/clipping.py": ("tests/mechanisms/test_clipping.py",),
    "mechanisms/sampling.py": ("tests/mechanisms/test_sampling.py",),
    "kernels/keystream.py": ("tests/kernels/test_keystream.py",),
    "accounting/epsilon.py": ("tests/accounting/test_epsilon.py", "tests/accounting/test_plan.py"),
    "accounting/ledger.py": ("tests/accounting/test_ledger.py", "tests/accounting/test_run_account.py"),
    "accounting/privacy_filter.py": ("tests/accounting/test_privacy_filter.py",),
    "accounting/run_account.py": ("tests/accounting/test_run_account.py", "tests/accounting/test_spend_log.py"),
    "accounting/spend_log.py": ("tests/accounting/test_spend_log.py",),
    "engine/clipper.py": ("tests/engine/test_clipper.py", "tests/engine/test_clipping_engine.py"),
    "engine/gradient_buffer.py": ("tests/engine/test_gradient_buffer.py", "tests/engine/test_halving.py"),
    "training/dp_sgd.py": ("tests/training/test_dp_sgd.py",),
    "training/batches.py": ("tests/training/test_batches.py",),
}
_SECONDS = 300  # after which a mutant counts as killed: it hangs
_COMPARED = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
_COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
}
_CALLED = {
    "add_": "sub_",
    "sub_": "add_",
    "mul_": "div_",
    "div_": "mul_",
    "cos": "sin",
    "sin_": "cos_",
    "any": "all",
    "all": "any",
}


@dataclass(frozen=True)
class Mutant:
    """One fault. file: below the package. start, end: of the text that `new` replaces, in characters of the file."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What `mutants.toml` names it by: it has no line number, which moves."""
        return self.file, self.old, self.new

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.old} -> {self.new}"


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file: none of docstrings, messages, annotations and what is raised."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))

    def place(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    for node, new in _changes(ast.parse(source)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        replaced = f"({new})" if isinstance(node, ast.expr) else new
        yield Mutant(file, node.lineno, start, end, " ".join(source[start:end].split()), replaced)


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """(node, what stands there instead), of a tree."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "exc", "cause", "msg", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
                yield from _changes(child)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
        yield node, ast.unparse(ast.Compare(node.left, [_COMPARED[type(node.ops[0])]()], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        yield node, ast.unparse(ast.BinOp(node.left, _COMPUTED[type(node.op)](), node.right))
    elif isinstance(node, ast.Attribute) and node.attr in _CALLED:
        yield node, ast.unparse(ast.Attribute(node.value, _CALLED[node.attr]))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, ast.unparse(ast.BoolOp(other, node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node, ast.unparse(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield node, repr(node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield node.test, f"not ({ast.unparse(node.test)})"
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node, "pass"


def all_mutants(files: Sequence[str] = tuple(TESTS)) -> list[Mutant]:
    """Those of these files, in their order."""
    return [one for file in files for one in mutants_of(file, (ROOT / "dp_flash_hf" / file).read_text(encoding="utf-8"))]


def explained() -> dict[tuple[str, str, str], str]:
    """Why these survive."""
    entries = tomllib.loads(EXPLAINED.read_text(encoding="utf-8")).get("mutant", [])
    return {(entry["file"], entry["old"], entry["new"]): entry["because"] for entry in entries}


class Copies:
    """Copies of the checkout in which mutants are planted, one for each worker."""

    def __init__(self, folder: Path, number: int) -> None:
        self._free: Queue[Path] = Queue()
        for index in range(number):
            copy = folder / str(index)
            ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", ".*_cache")
            shutil.copytree(ROOT, copy, ignore=ignored)  # the links to patches and recipes become real folders
            self._free.put(copy)

    def fails(self, tests: Sequence[str], mutant: Mutant | None = None) -> bool:
        """Whether one of these tests fails, or never ends, with this mutant."""
        copy = self._free.get()
        path = copy / "dp_flash_hf" / mutant.file if mutant is not None else copy
        source = path.read_text(encoding="utf-8") if mutant is not None else ""
        try:
            if mutant is not None:
                path.write_text(source[: mutant.start] + mutant.new + source[mutant.end :], encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
            environment = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, check=False, timeout=_SECONDS, text=True
            )
            return done.returncode != 0
        except subprocess.TimeoutExpired:
            return True
        finally:
            if mutant is not None:
                path.write_text(source, encoding="utf-8")
            self._free.put(copy)


def survivors(chosen: Sequence[Mutant], workers: int) -> list[Mutant]:
    """Those of these mutants that no test finds. Raises RuntimeError where the tests fail without any."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies = Copies(Path(folder), workers)
        files = sorted({mutant.file for mutant in chosen})
        for file, broken in zip(files, pool.map(lambda file: copies.fails(TESTS[file]), files), strict=True):
            if broken:
                raise RuntimeError(f"tests fail without a mutant: {' '.join(TESTS[file])}")
        found = []
        for number, (mutant, killed) in enumerate(
            zip(chosen, pool.map(lambda mutant: copies.fails(TESTS[mutant.file], mutant), chosen), strict=True), start=1
        ):
            print(f"{number}/{len(chosen)} {'killed  ' if killed else 'SURVIVES'} {mutant}", flush=True)
            if not killed:
                found.append(mutant)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what came of each mutant; 1 if one survives that is not explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="below dp_flash_hf (default: all of the privacy core)")
    parser.add_argument("--sample", type=int, help="so many only, chosen at random")
    parser.add_argument("--seed", default="0", help="of the sample")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    reasons = explained()
    chosen = [mutant for mutant in all_mutants(options.files or tuple(TESTS)) if mutant.key not in reasons]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    alive = survivors(chosen, options.workers)
    print(f"{len(chosen)} mutants, {len(chosen) - len(alive)} killed, {len(alive)} survive; {len(reasons)} explained")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
