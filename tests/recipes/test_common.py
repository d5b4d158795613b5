"""What the recipes have in common: options from a flat file, rows, checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import (
    ByT5Tokenizer,
    TrainingArguments,
)

from dp_flash_hf import PrivacyConfig
from dp_flash_hf.accounting.spend_log import FILE_NAME
from dp_flash_hf.recipes import common


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(
        "target_epsilon: 8\ntarget_delta: 1e-5\nlearning_rate: 1e-3\nsave_strategy: no\nseed: 3\n"
    )
    return str(tmp_path / "mine.py")


def test_values_are_typed_in_the_file_and_in_overrides(script: str) -> None:
    overrides = ["bf16=false", "warmup_steps=7", 'lr_scheduler_kwargs={"num_cycles": 2}', "target_epsilon=3"]
    privacy, args = common.read_options(script, overrides, PrivacyConfig, TrainingArguments)
    assert privacy == PrivacyConfig(target_epsilon=3.0, target_delta=1e-5)
    assert args.learning_rate == 1e-3
    assert args.save_strategy == "no"
    assert args.warmup_steps == 7
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_shared_keys_have_one_owner(script: str) -> None:
    """max_grad_norm clips units; seed never fixes the noise."""
    privacy, args = common.read_options(script, ["max_grad_norm=0.25"], PrivacyConfig, TrainingArguments)
    assert privacy.max_grad_norm == 0.25
    assert args.max_grad_norm == TrainingArguments(output_dir="").max_grad_norm
    assert (privacy.seed, args.seed) == (None, 3)


def test_null_means_the_default(script: str) -> None:
    overrides = ["target_epsilon=null", "noise_multiplier=2", "learning_rate=null"]
    privacy, args = common.read_options(script, overrides, PrivacyConfig, TrainingArguments)
    assert (privacy.target_epsilon, privacy.noise_multiplier) == (None, 2.0)
    assert args.learning_rate == TrainingArguments(output_dir="").learning_rate


@dataclasses.dataclass
class _Lists:
    names: list[str] = dataclasses.field(default_factory=list)


def test_lists_reach_list_options(script: str) -> None:
    lists, _, _ = common.read_options(script, ["names=[a, b]"], _Lists, PrivacyConfig, TrainingArguments)
    assert lists.names == ["a", "b"]


def test_a_file_that_is_not_keys_and_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("just words\n")
    with pytest.raises(ValueError, match="key: value"):
        common.read_options(str(tmp_path / "mine.py"), [], PrivacyConfig)
    (tmp_path / "mine.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        common.read_options(str(tmp_path / "mine.py"), [], PrivacyConfig)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder", "folder of csv"])
def test_rows_load_from_files_and_folders(kind: str, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a", "b,\nc"], "label": ["x", "y"]})
    source = tmp_path / f"rows.{kind}" if "folder" not in kind else tmp_path / "rows"
    if kind == "csv":
        rows.to_csv(source)
    elif kind == "jsonl":
        rows.to_json(source)
    elif kind == "parquet":
        rows.to_parquet(source)
    elif kind == "folder":
        rows.save_to_disk(source)
    else:
        source.mkdir()
        rows.to_csv(source / "train.csv")
    assert common.load_rows(str(source), "train").to_dict() == rows.to_dict()


def test_prompts_are_read_but_not_learnt() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows = Dataset.from_dict({"ask": ["ab", "x" * 50], "answer": ["c", "d"]})
    first, second = common.tokenize_texts(rows, tokenizer, 12, text="answer", prompt="ask")
    assert tokenizer.decode(first["input_ids"]) == "ab\n</s>c</s>"
    assert [label for label in first["labels"] if label != -100] == first["input_ids"][-2:]
    assert len(second["input_ids"]) == len(second["labels"]) == 12
    (plain, _) = common.tokenize_texts(rows, tokenizer, 12, text="answer", prompt=None)
    assert plain["labels"] == plain["input_ids"]


def test_the_column_that_names_the_unit_stays() -> None:
    rows = Dataset.from_dict({"user": ["a", "b"], "text": ["c", "d"]})
    kept = common.tokenize_texts(rows, ByT5Tokenizer(extra_ids=0), 12, text="text", prompt=None, unit="user")
    assert kept["user"] == ["a", "b"]
    assert "text" not in kept.column_names
    with pytest.raises(ValueError, match="users"):
        common.tokenize_texts(rows, ByT5Tokenizer(extra_ids=0), 12, text="text", prompt=None, unit="users")


def test_a_refused_setup_leaves_no_folder_but_keeps_what_was_there(tmp_path: Path) -> None:
    def refused(folder: Path) -> None:
        with common.leaving_nothing_behind(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            raise ValueError("refused")

    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "old", tmp_path / "old" / "new" / "run"):
        with pytest.raises(ValueError, match="refused"):
            refused(folder)
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """Privately DPCallback chooses it; it is asked to as soon as there are checkpoints or a spend log."""
    folder = tmp_path / "run"

    def asked(value: str | None, *, private: bool) -> str | bool | None:
        args = TrainingArguments(output_dir=str(folder), resume_from_checkpoint=value, use_cpu=True)
        return common.checkpoint(args, private=private)

    assert asked("true", private=True) is asked("true", private=False) is None
    folder.mkdir()
    (folder / FILE_NAME).touch()
    assert asked("true", private=True) is True
    assert asked("true", private=False) is None
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-12", "checkpoint-13", "checkpoint-old", "checkpoint-99-copy"):
        (folder / name).mkdir()
        if name != "checkpoint-12":  # killed before its last file, or ...
            text = '{"global_' if name == "checkpoint-13" else '{"global_step": 1}'  # ... while it was written
            (folder / name / "trainer_state.json").write_text(text)
    assert asked("True", private=True) is True
    assert asked("True", private=False) == str(folder / "checkpoint-10")
    assert asked(None, private=True) is asked("false", private=True) is None
    assert asked("runs/other/checkpoint-3", private=True) == "runs/other/checkpoint-3"


def test_docstrings_come_from_what_parses_and_is_no_test(tmp_path: Path) -> None:
    for name, text in {
        "a": '"""One."""\nclass B:\n    """Two."""\n',
        "b": "{{ template }} not python",
        "tests/c": '"""No."""',
    }.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    assert common.docstrings(tmp_path) == ["One.", "Two."]
