"""Recipes run for real, on small data, and leave a model with its privacy report."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ByT5Tokenizer,
    LlamaConfig,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import dp_flash_hf
from dp_flash_hf import PrivacyReport
from dp_flash_hf.cli import main as cli
from dp_flash_hf.recipes import common
from tests.cli import printed_rows

FOLDER = Path(dp_flash_hf.__file__).parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLIC = {"pretrain_tiny"}  # recipes that train on public text, without privacy
NOISED = {"dp_forward"}  # recipes that release texts with noise, and train on that
PLAIN = ["report_to=none", "save_strategy=no", "disable_tqdm=true", "use_cpu=true", "target_delta=1e-3"]
# By rdp, for which noise is calibrated in no time; the quickstart is run with the default.
SMALL = [*PLAIN, "accountant=rdp"]


class _Stopped(Exception):  # noqa: N818  # not an error
    """Raised in place of a recipe's work."""


def _options(name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What a recipe reads before it does anything."""
    module = importlib.import_module(f"dp_flash_hf.recipes.{name}")
    found: list[tuple[Any, ...]] = []

    def reading(*args: Any) -> None:
        found.append(common.read_options(*args))
        raise _Stopped

    monkeypatch.setattr(module, "read_options", reading)
    with pytest.raises(_Stopped):
        module.main(overrides)
    return found[0]


def test_every_script_has_its_yaml() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "common"}
    assert scripts == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_first_comment_is_a_command_and_an_override_that_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    found = re.match(rf"# dp-flash train {name} .*: dp-flash train {name} (.+)\)$", first)
    assert found, first
    plain = _options(name, [], monkeypatch)
    changed = _options(name, shlex.split(found[1]), monkeypatch)
    keys = [part.partition("=")[0] for part in shlex.split(found[1])]
    for key in keys:
        assert any(getattr(new, key, None) != getattr(old, key, None) for old, new in zip(plain, changed, strict=True)), key


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_what_is_not_private_says_so_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (*_, args) = _options(name, [], monkeypatch)
    assert args.output_dir == f"runs/{name}"
    module = importlib.import_module(f"dp_flash_hf.recipes.{name}")
    assert "WITHOUT privacy" in (module.__doc__ or "").partition("\n")[0]
    assert "NOT private" in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.parametrize("name", sorted(set(RECIPES) - PUBLIC - NOISED))
def test_yaml_is_flat_and_private(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, privacy, args = _options(name, [], monkeypatch)
    assert privacy.target_epsilon == 8
    assert privacy.seed is None
    assert options.attn_implementation == "dp_flash"
    assert args.output_dir == f"runs/{name}"


# Options.


# Data.


# Whole runs.


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("decoder"))
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, bos_token_id=None
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("classifier"))
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 rows whose label can be read off the first letter."""
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows([("aaaa" if i % 2 else "bbbb") + str(i), "yes" if i % 2 else "no"] for i in range(128))
    return path


def _report(folder: Path) -> PrivacyReport:
    return PrivacyReport.from_json((folder / "report.json").read_text(encoding="utf-8"))


def _classify(rows: Path, model: str, output: Path, *overrides: str) -> None:
    data = [f"dataset={rows}", f"eval_dataset={rows}", "label_column=category", "max_length=8"]
    batch = ["per_device_train_batch_size=16", "gradient_accumulation_steps=2"]
    cli.main(["train", "classification", f"model={model}", f"output_dir={output}", *data, *batch, *SMALL, *overrides])


def test_classification_is_private_and_says_what_it_guarantees(
    rows: Path, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _classify(rows, classifier, tmp_path / "run", "max_steps=2")
    printed = capsys.readouterr().out
    report = _report(tmp_path / "run")
    assert report.private
    assert (report.n_units, report.expected_batch_size, report.steps) == (128, 32, 2)
    assert report.epsilon <= 8
    assert report.to_text() in printed
    assert report.to_model_card() in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert saved["label2id"] == {"no": 0, "yes": 1}
    assert "accuracy on 128 held-out rows" in printed


def test_classification_without_privacy_learns_and_says_so(
    rows: Path, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _classify(rows, classifier, tmp_path / "run", "max_steps=30", "learning_rate=1e-2", "private=false")
    printed = capsys.readouterr().out
    assert "NOT private" in printed
    assert "accuracy on 128 held-out rows: 1.0000" in printed
    assert not (tmp_path / "run" / "report.json").exists()


def test_classification_with_an_adapter_trains_the_adapter_alone(rows: Path, classifier: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _classify(rows, classifier, tmp_path / "run", "max_steps=1", "lora_rank=2")
    assert _report(tmp_path / "run").steps == 1
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")  # what peft says about the adapter stays
    assert card.count("## Differential privacy") == 1


def test_dp_forward_releases_every_text_once_and_trains_on_that(
    rows: Path, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"dataset={rows}", f"eval_dataset={rows}", "label_column=category", "max_length=8", "target_epsilon=16"]
    shape = ["num_train_epochs=3", "per_device_train_batch_size=16", "release_batch_size=50"]
    command = ["train", "dp_forward", f"model={classifier}", f"output_dir={tmp_path / 'run'}", *data, *shape, *PLAIN]
    cli.main(command)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert 15.99 <= report["epsilon"] <= 16  # of one release, though classifier and evaluation read it often
    assert report["calls"] == 2 * 3  # batches of 50 of 128 texts, to train on and to test
    assert report["places"] == ["likeness"]
    assert report["private_inputs"] == ["input_ids"]
    said = re.search(r"epsilon <= ([\d.]+) at delta = 0.001", printed)
    assert said
    assert report["epsilon"] <= float(said[1]) <= 16  # rounded up
    assert "accuracy on 128 held-out rows" in printed


def test_an_unknown_label_is_refused_before_training(
    rows: Path, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("text,category\nc,maybe\n")
    with pytest.raises(SystemExit):
        _classify(rows, classifier, tmp_path / "run", f"eval_dataset={other}")
    assert "'maybe'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("refused", ["target_delta=0.1", "fp16=true", "gradient_accumulation_steps=64"])
def test_a_budget_that_cannot_be_met_leaves_nothing(
    refused: str, rows: Path, classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _classify(rows, classifier, tmp_path / "new" / "run", "max_steps=2", refused)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dp-flash: ")
    assert not (tmp_path / "new").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["classification", "full_finetune"])
def test_all_rows_of_a_user_are_one_unit(recipe: str, rows: Path, classifier: str, decoder: str, tmp_path: Path) -> None:
    table = Dataset.from_csv(str(rows))
    data = tmp_path / "users.csv"
    table.add_column("user", [f"user {row // 2}" for row in range(len(table))]).to_csv(data)
    unit = ["privacy_unit=user", "max_examples_per_unit=2", "max_steps=2"]
    if recipe == "classification":
        _classify(data, classifier, tmp_path / "run", *unit)
    else:
        sizes = ["max_length=8", "per_device_train_batch_size=16", "gradient_accumulation_steps=2", "warmup_steps=0"]
        columns = ["prompt_column=category", "text_column=text", f"eval_dataset={data}"]
        command = ["train", recipe, f"model={decoder}", f"dataset={data}", *columns, f"output_dir={tmp_path / 'run'}"]
        cli.main([*command, *sizes, *SMALL, *unit])
    report = _report(tmp_path / "run")
    assert (report.n_units, report.steps) == (64, 2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["full_finetune", "lora_finetune"])
def test_language_models_train_on_a_csv(
    name: str, rows: Path, decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "lora_finetune":
        pytest.importorskip("peft")
    data = [f"dataset={rows}", f"eval_dataset={rows}", "prompt_column=category", "text_column=text", "max_length=16"]
    batch = ["per_device_train_batch_size=16", "gradient_accumulation_steps=2", "max_steps=2", "warmup_steps=0"]
    cli.main(["train", name, f"model={decoder}", f"output_dir={tmp_path / 'run'}", *data, *batch, *SMALL])
    report = _report(tmp_path / "run")
    assert (report.n_units, report.steps) == (128, 2)
    weights = "adapter_model.safetensors" if name == "lora_finetune" else "model.safetensors"
    assert (tmp_path / "run" / weights).is_file()
    assert re.search(r"loss per token on 128 held-out rows: \d", capsys.readouterr().out)


def test_a_finished_run_that_is_started_again_spends_nothing(
    rows: Path, decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"dataset={rows}", "eval_dataset=null", "prompt_column=category", "text_column=text", "max_length=16"]
    batch = ["per_device_train_batch_size=16", "gradient_accumulation_steps=2", "num_train_epochs=1", "warmup_steps=0"]
    again = ["save_strategy=steps", "save_steps=2", "resume_from_checkpoint=true", f"output_dir={tmp_path / 'run'}"]
    for found in (f"no checkpoint in {tmp_path / 'run'}", f"resuming from {tmp_path / 'run' / 'checkpoint-4'}"):
        cli.main(["train", "full_finetune", f"model={decoder}", *data, *batch, *SMALL, *again])
        assert found in capsys.readouterr().out
        report = _report(tmp_path / "run")
        assert report.steps == 4
        assert report.epsilon <= 8


@pytest.mark.sampled(4)
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("unit", [None, "user"])
def test_sft_answers_prompts_without_padding(
    chat: bool, unit: str | None, rows: Path, decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    table = Dataset.from_csv(str(rows))
    data = tmp_path / "users.csv"
    table.add_column("user", [f"user {row // 2}" for row in range(len(table))]).to_csv(data)
    model = decoder
    if chat:
        model = str(tmp_path / "chat")
        shutil.copytree(decoder, model)
        tokenizer = ByT5Tokenizer.from_pretrained(model)
        tokenizer.chat_template = "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}"
        tokenizer.save_pretrained(model)
    columns = [f"dataset={data}", f"eval_dataset={data}", "prompt_column=category", "text_column=text", "max_length=16"]
    batch = [
        "per_device_train_batch_size=16",
        "gradient_accumulation_steps=2",
        "max_steps=2",
        "warmup_steps=0",
        "max_tokens=64",
    ]
    users = [] if unit is None else [f"privacy_unit={unit}", "max_examples_per_unit=2"]
    command = ["train", "sft_lora", f"model={model}", f"output_dir={tmp_path / 'run'}", "max_tokens=64"]
    cli.main([*command, *columns, *batch, *SMALL, *users])
    report = _report(tmp_path / "run")
    assert (report.n_units, report.steps) == (128 if unit is None else 64, 2)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert re.search(r"loss per token on 128 held-out rows: \d", capsys.readouterr().out)


def test_sft_cuts_each_row_by_itself() -> None:
    sft_lora = importlib.import_module("dp_flash_hf.recipes.sft_lora")
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}, {"input_ids": [5], "labels": [5]}])
    assert sft_lora.truncated(rows, 3)[:] == {"input_ids": [[1, 2, 3], [5]], "labels": [[-100, 2, 3], [5]]}


@pytest.mark.complete
def test_sft_holds_prompts_out_and_shows_answers(
    rows: Path, decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    table = Dataset.from_csv(str(rows))
    data = tmp_path / "asked.csv"
    table.add_column("ask", [f"ask {row // 4}" for row in range(len(table))]).to_csv(data)
    columns = [f"dataset={data}", "eval_dataset=null", "held_out=0.25", "prompt_column=ask", "max_length=16"]
    batch = ["per_device_train_batch_size=16", "gradient_accumulation_steps=1", "max_steps=1", "warmup_steps=0"]
    show = ["samples=2", "max_new_tokens=3"]
    command = ["train", "sft_lora", f"model={decoder}", f"output_dir={tmp_path / 'run'}", "text_column=text"]
    cli.main([*command, *columns, *batch, *show, *SMALL])
    printed = capsys.readouterr().out
    count = re.search(r"loss per token on (\d+) held-out rows: [\d.]+ before training, [\d.]+ after", printed)
    assert count
    assert 0 < int(count[1]) < 64
    assert int(count[1]) % 4 == 0  # all rows of a prompt, or none
    assert _report(tmp_path / "run").n_units == 128 - int(count[1])
    prompts = re.findall(r"^prompt: (ask \d+)$", printed, re.MULTILINE)
    assert len(set(prompts)) == printed.count("before training: ") == printed.count("after training: ") == 2

    cli.main([*command, *columns, *batch, *SMALL, "private=false", f"output_dir={tmp_path / 'not'}"])
    assert "NOT private" in capsys.readouterr().out
    assert not (tmp_path / "not" / "report.json").exists()
    with pytest.raises(SystemExit):
        cli.main([*command, *columns, *batch, *SMALL, "samples=2", "held_out=0"])
    assert "samples: " in capsys.readouterr().err


def test_rows_are_held_out_by_their_own_value_alone() -> None:
    pytest.importorskip("trl")
    sft_lora = importlib.import_module("dp_flash_hf.recipes.sft_lora")
    rows = Dataset.from_dict({"ask": [f"ask {row // 2}" for row in range(2000)]})
    learnt, apart = sft_lora.held_out_apart(rows, "ask", 0.1)
    assert not set(learnt["ask"]) & set(apart["ask"])
    assert len(learnt) + len(apart) == 2000
    assert 120 < len(apart) < 280
    (_, fewer) = sft_lora.held_out_apart(rows.select(range(1000)), "ask", 0.1)
    assert fewer["ask"] == [ask for ask in apart["ask"] if ask in set(fewer["ask"])]


def test_a_model_of_public_text_is_one_to_start_from(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain_tiny = importlib.import_module("dp_flash_hf.recipes.pretrain_tiny")
    monkeypatch.setattr(pretrain_tiny, "docstrings", lambda folder: [f"Return the {i}." for i in range(2000)])
    (tmp_path / "notes.txt").write_text("A text of one's own, ünusual too.")
    public = [f"texts=[{tmp_path / 'notes.txt'}, {rows}]", "packages=false", "vocab_size=300"]
    size = ["hidden_size=16", "num_layers=1", "num_heads=2", "max_length=32", "max_steps=2", "warmup_steps=0"]
    model = tmp_path / "tiny"
    command = ["train", "pretrain_tiny", f"output_dir={model}", "report_to=none", "use_cpu=true", "disable_tqdm=true"]
    cli.main([*command, *public, *size])
    printed = capsys.readouterr().out
    assert "NOT private" in printed
    assert "2129 texts" in printed
    assert re.search(r"loss per token on \d+ held-out blocks: \d", printed)
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "NOT private" in card
    assert "installed packages" not in card
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer("never seen: Ω\n")["input_ids"]) == "never seen: Ω\n"
    assert AutoModelForCausalLM.from_pretrained(model).config.vocab_size == len(tokenizer) == 300

    pytest.importorskip("trl")
    columns = [f"dataset={rows}", "eval_dataset=null", "prompt_column=category", "max_length=32"]
    batch = ["per_device_train_batch_size=16", "gradient_accumulation_steps=2", "max_steps=1", "warmup_steps=0"]
    cli.main(
        ["train", "sft_lora", f"model={model}", f"output_dir={tmp_path / 'run'}", "text_column=text", *columns, *batch, *SMALL]
    )
    assert _report(tmp_path / "run").private


def test_pretraining_reads_installed_packages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain_tiny = importlib.import_module("dp_flash_hf.recipes.pretrain_tiny")
    monkeypatch.setattr(pretrain_tiny, "docstrings", lambda folder: [f"In {folder.name}.", "In both."])
    texts = pretrain_tiny.read_texts(pretrain_tiny.Options())
    assert texts[1] == "In both."
    assert texts.count("In both.") == texts.count("In site-packages.") == 1
    assert any("differential" in text.lower() for text in texts[2:])  # the description of a package


@pytest.mark.complete
@pytest.mark.parametrize("prompt", ["prompt", "null"])
def test_dpo_trains_on_pairs(prompt: str, decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    pairs = [{"prompt": f"{i}:", "good": f"{i}:aa" * 2, "bad": f"{i}:bbb", "user": i // 4} for i in range(64)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    columns = [
        f"dataset={data}",
        f"eval_dataset={data}",
        f"prompt_column={prompt}",
        "chosen_column=good",
        "rejected_column=bad",
    ]
    batch = ["per_device_train_batch_size=4", "gradient_accumulation_steps=2", "max_steps=2", "warmup_steps=0", "max_tokens=80"]
    users = ["privacy_unit=user", "max_examples_per_unit=2"] if prompt == "null" else []
    command = ["train", "dpo_lora", f"model={decoder}", f"output_dir={tmp_path / 'run'}", f"prompt_column={prompt}"]
    cli.main([*command, *columns, *batch, *SMALL, *users])
    report = _report(tmp_path / "run")
    assert (report.n_units, report.steps) == (16 if users else 64, 2)
    assert report.unit == ("all rows with the same 'user'" if users else "one pair of texts")
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert re.search(r"preferred in [\d.]+ of 64 held-out pairs", capsys.readouterr().out)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_progress_is_one_line_with_loss_and_epsilon(
    terminal: bool, private: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a file or a pipe one for each tenth of training; what is measured on held-out data has a line of its own in both."""
    screen = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    args, control = TrainingArguments(output_dir="", use_cpu=True, disable_tqdm=False), TrainerControl()
    state = TrainerState(max_steps=40, is_world_process_zero=True)
    progress = common.Progress()
    progress.on_log(args, state, control, logs={"eval_loss": 9.0})  # before training: the recipe says it
    progress.on_train_begin(args, state, control)
    for state.global_step in range(1, 41):
        progress.on_step_end(args, state, control)
        loss = {"not_private/loss": 2.0, "privacy/spent_epsilon": state.global_step / 10} if private else {"loss": 2.0}
        progress.on_log(args, state, control, logs={**loss, "learning_rate": 0.1})
        if state.global_step == 20:
            progress.on_log(args, state, control, logs={"eval_loss": 3.0, "eval_runtime": 1.0, "eval_samples_per_second": 1.0})
    progress.on_log(args, state, control, logs={"not_private/train_loss": 2.0, "privacy/spent_epsilon": 4.0})
    progress.on_train_end(args, state, control)
    progress.on_log(args, state, control, logs={"eval_loss": 9.0})
    printed = capsys.readouterr().out
    lines = printed.splitlines() + [line for line in screen.getvalue().splitlines() if line.startswith("step")]
    assert "step 20 of 40: eval_loss 3, 0 s" in lines
    assert "9" not in "".join(lines)
    if terminal:
        assert len(lines) == 1
        last = screen.getvalue().rstrip().rpartition("\r")[2]
        assert "training: 100%" in last
        assert ("loss=2.000, epsilon spent=4.000" if private else "loss=2.000") in last
    else:
        assert len(lines) == 10 + 1
        assert lines[-1] == f"step 40 of 40: loss 2.000{', epsilon spent 4.000' if private else ''}, 0 s"


QUICK = ["hidden_size=16", "num_layers=1", "num_heads=2", "max_length=32", "logging_steps=1", "per_device_eval_batch_size=256"]


@pytest.mark.complete
def test_quickstart_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dp_flash_hf.recipes.quickstart", "max_steps=2", f"output_dir={tmp_path}", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    report = _report(tmp_path)
    assert report.private
    assert report.steps == 2
    assert report.epsilon <= 8
    rows = dict(printed_rows(done.stdout))
    assert rows["epsilon"] == f"{report.epsilon:.3f} at delta {report.delta:g}"
    assert rows["steps"].startswith("2 in ")
    assert rows["sample"][1:].startswith("Return the ")
    assert re.search(r"Privacy +epsilon 8 at delta 1e-05", done.stdout)
    assert re.findall(r"^step (\d) of 2: loss [\d.]+, epsilon spent [\d.]+, \d+ s$", done.stdout, re.MULTILINE) == ["1", "2"]
    assert "Next" in done.stdout
    assert not re.search(r"\{'\w+/?\w*':", done.stdout)  # nothing that was logged is printed as it is
    assert not done.stderr


def test_a_copied_recipe_runs_with_its_own_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", "cp", "quickstart", "."])
    path = tmp_path / "quickstart.yaml"
    path.write_text(re.sub(r"target_epsilon: \d+", "target_epsilon: 5", path.read_text(encoding="utf-8")), encoding="utf-8")
    source = (tmp_path / "quickstart.py").read_text(encoding="utf-8")
    (tmp_path / "quickstart.py").write_text(source.replace("def read_docstrings() -> list[str]:\n", _FEW), encoding="utf-8")
    cli.main(["train", "quickstart.py", "max_steps=1", "gradient_accumulation_steps=1", *QUICK])
    report = _report(tmp_path / "runs" / "quickstart")
    assert report.target_epsilon == 5
    assert report.n_units == 300  # of 320, one in 16 held out: the copy's own lines ran
    assert "320 docstrings of" in capsys.readouterr().out


_FEW = """def read_docstrings() -> list[str]:
    return [f"Return the {number}." for number in range(320)]


def all_docstrings() -> list[str]:
"""


@pytest.mark.slow
def test_the_whole_quickstart_learns(tmp_path: Path) -> None:
    """From uniform over bytes (ln 259 = 5.56) to knowing the common letters and words."""
    command = [sys.executable, "-m", "dp_flash_hf.recipes.quickstart", f"output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    losses = re.search(r"([\d.]+) before training, ([\d.]+) after", done.stdout)
    assert losses
    assert float(losses[1]) > 5
    assert float(losses[2]) < 3
    report = _report(tmp_path)
    assert report.steps == report.planned_steps
    assert report.epsilon <= 8
