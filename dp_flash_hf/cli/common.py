"""What several commands need: how errors are reported, argument types, tables, and models by their name."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from typing import TYPE_CHECKING, Any, TypeAlias

from dp_flash_hf.errors import PrivacyError

if TYPE_CHECKING:
    from rich.table import Table

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]  # what `add_subparsers` returns

# Heads that a command can put on a model, by the name that --task gives them.
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def run(command: Callable[[], None], *, traceback: bool = False) -> None:
    """Call `command`, and turn an error that the user can correct into one line on stderr and exit status 2.

    Those are ValueError, PrivacyError, OSError and ImportError. Any other error is a bug, and is raised as it is.

    Of several processes of one training, as torchrun starts them, the first one prints what it prints; all print errors.

    Args:
        command: What is called, without arguments.
        traceback: Raise every error as it is.

    Raises:
        SystemExit: With status 2, for an error that the user can correct.
    """
    try:
        with ExitStack() as stack:
            if os.environ.get("RANK", "0") != "0":
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            command()
    except (ValueError, PrivacyError, OSError, ImportError) as error:
        if traceback:
            raise
        print(f"dp-flash: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def add_task(parser: argparse._ActionsContainer) -> None:
    """Give a command the option --task, the key of a class in AUTO_CLASSES."""
    parser.add_argument(
        "--task", choices=sorted(AUTO_CLASSES), default="causal-lm", help="which head the model has (default: causal-lm)"
    )


def above_zero(text: str) -> float:
    """The type of an argument that is a finite number above 0.

    >>> above_zero("1e-5")
    1e-05
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def whole(text: str) -> int:
    """The type of an argument that is a whole number above 0.

    >>> whole("1e3")
    1000
    """
    value = above_zero(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(value)


def several(text: str) -> list[float]:
    """The type of an argument that is one or several comma-separated numbers above 0."""
    return [above_zero(part) for part in text.split(",")]


def several_whole(text: str) -> tuple[int, ...]:
    """The type of an argument that is one or several comma-separated whole numbers above 0."""
    return tuple(whole(part) for part in text.split(","))


def table(*columns: str, justify: Any = "left") -> Table:
    """An empty table with these headings."""
    from rich.table import Table

    empty = Table()
    for column in columns:
        empty.add_column(column, justify=justify)
    return empty


def show(table: Table) -> None:
    """Print a table on stdout."""
    from rich.console import Console

    Console().print(table)


def config_of(name: str) -> Any:
    """The configuration of a model, read from the Hub or a folder, with a padding token.

    Raises:
        OSError: If there is none under this name.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(f"{name}: {error}") from None
    if config.pad_token_id is None:
        config.pad_token_id = 0  # classifiers look for the last token that is not padding
    return config
