"""`dp-flash`: the parser that names every command, and what happens to a command's errors.

Importing a command's file is cheap: each imports what it works with when it runs, so that `--help` and mistakes are answered
at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dp_flash_hf import __version__
from dp_flash_hf.cli import bench, doctor, plan, recipes
from dp_flash_hf.cli.common import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `dp-flash` command.

    Args:
        arguments: Those of the command line, without the program's name; None takes them from `sys.argv`.

    Raises:
        SystemExit: Status 0 after `--help` or `--version`; status 2, after one line on stderr, for an error that the user can
            correct. With `--traceback` such an error is raised as it is.
    """
    options = _parser().parse_args(arguments)
    run(lambda: options.command(options), traceback=options.traceback)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print its usage too."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dp-flash", description="Differentially private fine-tuning for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (recipes, plan, doctor, bench):
        command.add_parsers(commands)
    return parser
