"""`dp-flash`: every command is named, and every mistake is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dp_flash_hf
from dp_flash_hf.cli.main import main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for command in ("train", "plan", "recipes", "doctor", "bench"):
        assert f"\n    {command} " in printed


PLAN = ["plan", "--units", "1000", "--batch", "50"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["trian"], "'trian'"),
        (["train", "quickstrat"], "'quickstrat'"),
        (["train", "gone/recipe.py"], "gone/recipe.py: no such file"),
        (["train", "quickstart", "max_stepz=3"], "'max_stepz'"),
        (["train", "quickstart", "max_steps=three"], "max_steps: invalid int value: 'three'"),
        (["train", "quickstart", "max_steps"], "key=value"),
        (["train", "quickstart", "target_delta=null"], "target_delta"),
        (["train", "quickstart", "noise_multiplier=1"], "exactly one of them"),
        (["train", "classification", "dataset=gone.csv", "eval_dataset=gone.csv"], "gone.csv: no such file"),
        (["recipes", "cp", "quickstrat", "."], "'quickstrat'"),
        ([*PLAN, "--steps", "10"], "exactly two"),
        ([*PLAN, "--steps", "10", "--epsilon", "8", "--noise-multiplier", "1"], "exactly two"),
        ([*PLAN, "--steps", "10", "--epsilon", "8", "--delta", "0.1"], "target_delta"),
        ([*PLAN, "--steps", "10", "--epsilon", "8", "--accountant", "exact"], "'exact'"),
        ([*PLAN, "--steps", "1.5", "--epsilon", "8"], "whole number"),
        ([*PLAN, "--steps", "inf", "--epsilon", "8"], "expected a finite number above 0, got 'inf'"),
        ([*PLAN, "--steps", "ten", "--epsilon", "8"], "expected a finite number above 0, got 'ten'"),
        ([*PLAN, "--epochs", "0", "--epsilon", "8"], "--epochs: expected a finite number above 0"),
        (["plan", "--units", "0", "--batch", "1", "--steps", "1", "--epsilon", "8"], "--units: expected"),
        (["plan", "--units", "9", "--batch", "1.5", "--steps", "1", "--epsilon", "8"], "--batch: expected a whole number"),
        ([*PLAN, "--noise-multiplier", "0.8", "--epsilon", "1e-4"], "does not afford one step"),
        (["plan", "--units", "10", "--batch", "50", "--steps", "10", "--epsilon", "8"], "expected_batch_size"),
        (["plan", "--batch", "50", "--steps", "10", "--epsilon", "8"], "give --units and --batch, or --memory"),
        (["plan", "--memory", "--model", "gone"], "--memory needs --model, --batch-rows and --length"),
        (["plan", "--memory", "--model", "gone", "--batch-rows", "2", "--length", "8"], "gone"),
        (["plan", "--memory", "--model", "gone", "--batch-rows", "2", "--length", "8", "--dtype", "int8"], "'int8'"),
        (["plan", "--memory", "--model", "gone", "--batch-rows", "2", "--length", "8", "--ranks", "0"], "--ranks: expected"),
        (["doctor", "--model", "gone"], "gone"),
        (["bench", "--lengths", "many"], "--lengths"),
        (["bench", "--preset", "gpu"], "'gpu' (choose from"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert complaint.startswith("dp-flash")
    assert says in complaint
    assert not list(tmp_path.iterdir())


def test_traceback_is_there_on_request() -> None:
    with pytest.raises(ValueError, match="quickstrat"):
        main(["--traceback", "train", "quickstrat"])


@pytest.mark.parametrize("command", [["-m", "dp_flash_hf.cli"], ["-c", "from dp_flash_hf.cli.main import main; main()"]])
def test_launchers_may_start_it_as_a_module(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{dp_flash_hf.__version__}\n")
