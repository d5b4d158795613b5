"""Planted faults in the lines that carry a promise, and whether a test finds each: `python -m tests.support.mutants`.

A mutant is the package with one expression or statement changed: a comparison, a sign, a number, a truth value, a condition, a
refusal or a call left out. It is killed if one of the tests that belong to its file fails. One that survives is a promise
without a test, unless `mutants.toml` says why it changes nothing that matters.

    python -m tests.support.mutants                     all of them: half an hour
    python -m tests.support.mutants --sample 20         so many of one file, another choice for each commit
    python -m tests.support.mutants training/dp_sgd.py  those of one file
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT
from tests.support.copies import Copies, Fault

Key = tuple[str, str, str, str]  # file, function, what stands on the line, what is to stand there
EXPLAINED = Path(__file__).with_name("mutants.toml")
# The privacy core, and the tests that are to find faults there.
TESTS: dict[str, tuple[str, ...]] = {
    "mechanisms/gaussian_noise.py": ("tests/mechanisms/test_gaussian_noise.py",),
    "mechanisms/generators.py": ("tests/mechanisms/test_generators.py",),
    "mechanisms/clipping.py": ("tests/mechanisms/test_clipping.py",),
    "mechanisms/sampling.py": ("tests/mechanisms/test_sampling.py",),
    "kernels/keystream.py": (  # and none of its kernel, which takes minutes where it is interpreted
        "tests/kernels/test_keystream.py::test_words_on_a_cpu_are_those_of_aes",
        "tests/kernels/test_keystream.py::test_no_word_comes_twice",
        "tests/kernels/test_keystream.py::test_a_cuda_device_has_chacha20_with_a_block_of_its_own_for_each_call",
        "tests/kernels/test_keystream.py::test_a_key_of_another_length_is_refused",
    ),
    "accounting/epsilon.py": (
        "tests/accounting/test_epsilon.py",
        "tests/accounting/test_ledger.py::test_a_ledger_of_the_plans_steps_spends_the_plans_epsilon",
        "tests/accounting/test_plan.py",
    ),
    "accounting/ledger.py": ("tests/accounting/test_ledger.py", "tests/accounting/test_run_account.py"),
    "accounting/privacy_filter.py": ("tests/accounting/test_privacy_filter.py",),
    "accounting/run_account.py": (
        "tests/accounting/test_run_account.py",
        "tests/accounting/test_spend_log.py",
        "tests/training/test_watched_state.py::test_settings_are_those_of_the_start",
    ),
    "accounting/spend_log.py": ("tests/accounting/test_spend_log.py",),
    "engine/clipper.py": ("tests/engine/test_clipper.py",),
    "engine/gradient_buffer.py": (
        "tests/engine/test_gradient_buffer.py",
        "tests/mechanisms/test_gaussian_noise.py::test_noise_is_wider_by_all_that_rounds_a_sum",
    ),
    "training/dp_sgd.py": (
        "tests/training/test_dp_sgd.py",
        "tests/training/test_watched_state.py::test_settings_are_those_of_the_start",
        "tests/training/test_watched_state.py::test_gradients_are_compared_by_value",
    ),
    "training/batches.py": ("tests/training/test_batches.py",),
}
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
_LEFT = (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
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
    """One fault.

    Attributes:
        file: Below the package.
        function: In which it is; "" where it is in none.
        line: The number of the line on which it starts.
        start, end: Of the text that `new` replaces, in characters of the file.
        old, new: That text, and what is planted.
        before, after: The lines in which it is, as one line.
    """

    file: str
    function: str
    line: int
    start: int
    end: int
    old: str
    new: str
    before: str
    after: str

    @property
    def fault(self) -> Fault:
        """What is planted."""
        return Fault(self.file, self.line, self.start, self.end, self.new)

    @property
    def key(self) -> Key:
        """What `mutants.toml` names it by: it has no line number, which moves."""
        return self.file, self.function, self.before, self.after

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.old} -> {self.new}"


def mutants_of(file: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file: none of docstrings, messages, annotations, what is raised, and assertions that are for mypy."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))

    def place(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    for node, new, function in _changes(ast.parse(source)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        replaced = f"({new})" if isinstance(node, ast.expr) else new
        before, after = source[starts[node.lineno - 1] : start], source[end : starts[node.end_lineno]]
        old = source[start:end]
        texts = (" ".join(text.split()) for text in (old, replaced, before + old + after, before + replaced + after))
        yield Mutant(file, function, node.lineno, start, end, *texts)


def _changes(node: ast.AST, function: str = "") -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """(node, what stands there instead, function), of a tree."""
    if isinstance(node, ast.FunctionDef):
        function = node.name
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "exc", "cause", "msg", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, _LEFT) and getattr(child, "arg", "") != "strict":
                yield from _changes(child, function)
    if (new := _changed(node)) is not None:
        yield *new, function


def _changed(node: ast.AST) -> tuple[ast.expr | ast.stmt, str] | None:
    """(node, what stands there instead) of this one, if there is a change for its kind."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARED:
        return node, ast.unparse(ast.Compare(node.left, [_COMPARED[type(node.ops[0])]()], node.comparators))
    if isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        return node, ast.unparse(ast.BinOp(node.left, _COMPUTED[type(node.op)](), node.right))
    if isinstance(node, ast.Attribute) and node.attr in _CALLED:
        return node, ast.unparse(ast.Attribute(node.value, _CALLED[node.attr]))
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return node, ast.unparse(ast.BoolOp(other, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return node, ast.unparse(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return node, str(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node, repr(node.value + 1)
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        return node.test, f"not ({ast.unparse(node.test)})"
    if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return node, "pass"
    return None


def all_mutants(files: Sequence[str] = tuple(TESTS)) -> list[Mutant]:
    """Those of these files, in their order."""
    return [one for file in files for one in mutants_of(file, (ROOT / "dp_flash_hf" / file).read_text(encoding="utf-8"))]


def explained() -> dict[Key, str]:
    """Why these survive."""
    entries = tomllib.loads(EXPLAINED.read_text(encoding="utf-8")).get("mutant", [])
    return {(entry["file"], entry["function"], entry["line"], entry["becomes"]): entry["because"] for entry in entries}


def sample(mutants: Sequence[Mutant], number: int, seed: str) -> list[Mutant]:
    """So many of one file, for the tests of each have to be measured first; a file with more mutants is chosen more often."""
    chance = random.Random(seed)
    file = chance.choice([mutant.file for mutant in mutants])
    of_file = [mutant for mutant in mutants if mutant.file == file]
    return chance.sample(of_file, min(number, len(of_file)))


def commit() -> str:
    """A seed: the name of the commit, or where git is not there a hash of the privacy core."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False, text=True)
    return (
        git.stdout.strip() or hashlib.sha256(b"".join((ROOT / "dp_flash_hf" / file).read_bytes() for file in TESTS)).hexdigest()
    )


def survivors(chosen: Sequence[Mutant], workers: int) -> list[Mutant]:
    """Those of these mutants that no test finds. Raises RuntimeError where the tests fail without any."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies = Copies(Path(folder), workers)
        files = list(dict.fromkeys(mutant.file for mutant in chosen))
        list(pool.map(lambda file: copies.measure(file, TESTS[file]), files))
        copies.ready()
        alive, begun = [], time.monotonic()
        found = pool.map(lambda mutant: copies.find(mutant.fault, TESTS[mutant.file]), chosen)
        for number, (mutant, killed) in enumerate(zip(chosen, found, strict=True), start=1):
            seconds = time.monotonic() - begun
            print(f"{number}/{len(chosen)} {seconds:5.0f} s {'killed  ' if killed else 'SURVIVES'} {mutant}", flush=True)
            if not killed:
                alive.append(mutant)
        return alive


def table(mutants: Sequence[Mutant], chosen: Sequence[Mutant], alive: Sequence[Mutant]) -> Iterator[str]:
    """What came of them, file by file; mutants: those that were planted and those that are explained."""
    yield f"{'file':32}{'mutants':>9}{'killed':>9}{'explained':>11}{'survive':>9}"
    for file in [*dict.fromkeys(mutant.file for mutant in mutants), ""]:
        every, planted, living = (sum(one.file == file or not file for one in some) for some in (mutants, chosen, alive))
        yield f"{file or 'all':32}{every:9}{planted - living:9}{every - planted:11}{living:9}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what came of each mutant; 1 if one survives that is not explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="below dp_flash_hf (default: all of the privacy core)")
    parser.add_argument("--sample", type=int, metavar="N", help="only N, of one file, another choice for each commit")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    reasons = explained()
    mutants = all_mutants(options.files or tuple(TESTS))
    chosen = [mutant for mutant in mutants if mutant.key not in reasons]
    if options.sample is not None:
        mutants = chosen = sample(chosen, options.sample, commit())
    alive = survivors(chosen, options.workers)
    for mutant in alive:  # as an entry of `mutants.toml`, but for the reason
        names = zip(("file", "function", "line", "becomes"), mutant.key, strict=True)
        print("\n[[mutant]]\n" + "\n".join(f"{name} = {json.dumps(text, ensure_ascii=False)}" for name, text in names))
    print("\n" + "\n".join(table(mutants, chosen, alive)))
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
