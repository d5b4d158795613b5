"""What every recipe needs besides its own lines: options, data, and where the results go."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from accelerate.utils.operations import broadcast_object_list
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from dp_flash_hf.accounting.spend_log import FILE_NAME
from dp_flash_hf.errors import invalid
from dp_flash_hf.integrations import checkpoints
from dp_flash_hf.integrations.trainer import DPCallback
from dp_flash_hf.mechanisms.config import PrivacyConfig

_HEADING = "## Differential privacy"  # of report.to_model_card()
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")  # the default of Trainer, also on a CPU

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_options(script: str, overrides: Sequence[str], *kinds: type) -> tuple[Any, ...]:
    """One instance of each dataclass in `kinds`, from the YAML file beside `script` and then `key=value` overrides.

    Keys are flat. A key that several dataclasses have goes to the first of them, except `seed`: that of PrivacyConfig would
    replay the noise, so recipes cannot set it. Values get their types from HfArgumentParser, in the file and in overrides alike
    (YAML itself takes 1e-3 for a string); a list or dict is written as in YAML, and null means the default.

    Raises ValueError for an unknown key or a value of the wrong type, FileNotFoundError if the YAML file is missing.
    """
    path = Path(script).with_suffix(".yaml")
    owners = {
        f.name: kind for kind in reversed(kinds) for f in dataclasses.fields(kind) if f.init and (kind, f.name) != _NOISE_SEED
    }
    values = {}
    for key, value in (*_read_yaml(path).items(), *map(_override, overrides)):
        if key not in owners:
            raise invalid(
                "options", expected="keys of the recipe, PrivacyConfig or TrainingArguments", actual=key, remedy=f"see {path}"
            )
        values[key] = value
    return tuple(_parse(kind, {key: value for key, value in values.items() if owners[key] is kind}) for kind in kinds)


def load_rows(source: str, split: str) -> Dataset:
    """The rows of a csv, json, jsonl or parquet file, of a folder that datasets can read, or of a dataset on the Hub.

    `split` matters for folders and Hub names; a file has one.
    """
    path = Path(source).expanduser()
    if path.suffix in _FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        return load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(source, split=split)


def require_columns(rows: Dataset, *columns: str) -> None:
    """Raise ValueError unless the rows have these columns."""
    for column in columns:
        if column not in rows.column_names:
            raise invalid(
                "column", expected=f"one of {', '.join(rows.column_names)}", actual=column, remedy="name a column of the data"
            )


def encoded(rows: Dataset, encode: Callable[[dict[str, Any]], dict[str, Any]], unit: str | None) -> Dataset:
    """Every row as `encode` makes it, with the column that names its privacy unit, if one does."""
    if unit is not None:
        require_columns(rows, unit)
    return rows.map(encode, remove_columns=[name for name in rows.column_names if name != unit], desc="tokenizing")


def tokenize_texts(
    rows: Dataset, tokenizer: Any, max_length: int, *, text: str, prompt: str | None, unit: str | None = None
) -> Dataset:
    """Rows of input_ids and labels for a causal language model: the prompt (no labels), the text, the end-of-text token.

    `text`, `prompt` and `unit` name columns; the last is kept, for `PrivacyConfig.privacy_unit`. Each row is cut to
    `max_length` tokens by itself; rows are never packed, because a packed row would hold several privacy units.
    """
    require_columns(rows, text, *([] if prompt is None else [prompt]))

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        before = [] if prompt is None else tokenizer(f"{row[prompt]}\n", add_special_tokens=True)["input_ids"]
        after = [*tokenizer(row[text], add_special_tokens=prompt is None)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": (before + after)[:max_length], "labels": ([-100] * len(before) + after)[:max_length]}

    return encoded(rows, encode, unit)


def docstrings(library: Path) -> list[str]:
    """The docstrings of the Python files below a folder, in the order of files and lines, without tests and other packages.

    What this Python cannot parse (templates, Python 2) is left out.
    """
    skipped = {"test", "tests", "site-packages", "dist-packages"}
    sources = sorted(path for path in library.rglob("*.py") if not skipped.intersection(path.relative_to(library).parts))
    texts = []
    for path in track(sources, f"reading docstrings of {library.name}", disable=not sys.stderr.isatty()):
        try:
            with warnings.catch_warnings(action="ignore"):  # about other people's escape sequences
                nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    texts.append(text)
    return texts


@contextmanager
def leaving_nothing_behind(folder: str) -> Iterator[None]:
    """Remove the empty output folder that a Trainer makes, if setting it up fails inside."""
    path = Path(folder)
    missing = [part for part in (path, *path.parents) if not part.exists()]
    try:
        yield
    except BaseException:
        for part in missing:
            if part.is_dir() and not any(part.iterdir()):
                part.rmdir()
        raise


def checkpoint(args: TrainingArguments, *, private: bool = True) -> str | bool | None:
    """What `trainer.train` is to resume: what `resume_from_checkpoint` names; with `true` the newest whole one, if any.

    A run that is killed and started again by the same command needs no other one the first time. Where training is private,
    DPCallback chooses, and continues the spend log of a run that was killed before its first checkpoint. Every process gets the
    answer of the first, since folders on a network may look different from each machine for a while.
    """
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        return asked
    folder = Path(str(args.output_dir))
    newest = next((str(path) for path in checkpoints.by_age(folder) if _is_whole(path)), None)
    begun = bool(checkpoints.by_age(folder)) or (folder / FILE_NAME).exists()
    answer: list[str | bool | None] = [(begun or None) if private else newest]
    broadcast_object_list(answer)
    if args.process_index == 0:
        print(f"no checkpoint in {folder}: from the first step" if newest is None else f"resuming from {newest}")
    return answer[0]


def _is_whole(path: Path) -> bool:
    try:
        checkpoints.read_state(path)
    except ValueError:
        return False
    return True


def save(trainer: Trainer, dp: DPCallback | None) -> None:
    """Save the model, and beside it the privacy report: report.json, and README.md for a model card.

    None (training without privacy) saves the model alone.
    """
    trainer.save_model()
    if dp is not None and trainer.is_world_process_zero():
        folder, report = Path(str(trainer.args.output_dir)), dp.report()
        (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        card = folder / "README.md"  # peft writes one, which is kept above
        above = card.read_text(encoding="utf-8").partition(_HEADING)[0] if card.exists() else f"# {folder.name}\n\n"
        card.write_text(above + report.to_model_card(), encoding="utf-8")


def show_progress(trainer: Trainer) -> None:
    """Show training as one line that changes with each step, in place of all that a Trainer prints; see `Progress`."""
    for usual in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(usual)
    trainer.add_callback(Progress())
    transformers.logging.disable_progress_bar()  # of the weights that are written


class Progress(ProgressCallback):
    """A bar with the loss and epsilon of the last step that was logged; in a file or a pipe, a line for each tenth of training.

    What is measured on held-out data during training gets lines of its own. The loss is that of the training data, and not
    private: epsilon does not cover what this shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._training, self._begun, self._tenths = False, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self._training, self._begun = state.is_world_process_zero, time.monotonic()
        if sys.stderr.isatty() and not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        pass

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        if not self._training:
            return
        names = {"not_private/loss": "loss", "loss": "loss", "privacy/spent_epsilon": "epsilon spent"}
        figures = {name: f"{logs[key]:.3f}" for key, name in names.items() if key in logs}
        measured = {key: f"{value:.4g}" for key, value in logs.items() if _MEASURED.match(key) and isinstance(value, float)}
        if measured:
            self._say(state, measured)
        elif "loss" in figures and self.training_bar is not None:
            self.training_bar.set_postfix(figures)
        elif "loss" in figures and 10 * state.global_step // state.max_steps > self._tenths:
            self._tenths = 10 * state.global_step // state.max_steps
            self._say(state, figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self._training = False
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _say(self, state: Any, figures: dict[str, str]) -> None:
        text = ", ".join(f"{name} {figure}" for name, figure in figures.items())
        line = f"step {state.global_step} of {state.max_steps}: {text}, {time.monotonic() - self._begun:.0f} s"
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


_MEASURED = re.compile(r"eval_(?!runtime|\w*_per_second|model_preparation_time)")  # but not how long it took


def show_rows(rows: dict[str, str]) -> None:
    """Print a table of names and what belongs to them."""
    table = Table(box=box.ROUNDED, show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    Console().print(table, markup=False)


def command() -> str:
    """What to type for `dp-flash` here: a virtual environment need not be activated."""
    beside = Path(sys.executable).with_name("dp-flash")
    return os.path.relpath(beside) if shutil.which("dp-flash") is None and beside.exists() else "dp-flash"


_NOISE_SEED = (PrivacyConfig, "seed")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise, where argparse would print pages of usage and leave."""
        raise ValueError(re.sub(r"(?:argument )?--(\w+)(?:/--[\w-]+)?", r"\1", message))


def _parse(kind: type, values: dict[str, Any]) -> Any:
    arguments = []
    for key, value in values.items():
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    parser: Any = _Parser
    return parser([kind], allow_abbrev=False).parse_args_into_dataclasses(arguments, look_for_args_file=False)[0]


def _read_yaml(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        typed, written = yaml.safe_load(text), yaml.load(text, Loader=yaml.BaseLoader)  # `no` must stay "no"
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(typed, dict):
        raise invalid(str(path), expected="lines of `key: value`", actual=typed, remedy="copy a recipe to start from")
    return {key: _scalar_as_written(typed[key], written[str(key)]) for key in typed}


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise invalid("options", expected="key=value", actual=text, remedy="write for example learning_rate=1e-3")
    try:
        return key, _scalar_as_written(yaml.safe_load(value), value)
    except yaml.YAMLError:
        return key, value


def _scalar_as_written(typed: Any, written: Any) -> Any:
    return typed if typed is None or isinstance(typed, (list, dict)) else written
