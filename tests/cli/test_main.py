"""`dp-flash`: figures that agree with the accountant, and one line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

import dp_flash_hf
from dp_flash_hf import PrivacyConfig, PrivacyPlan
from dp_flash_hf.cli import main as cli

PACKAGE = Path(dp_flash_hf.__file__).parent
RECIPES = sorted(path.stem for path in (PACKAGE / "recipes").glob("*.yaml"))


def _rows(printed: str) -> list[list[str]]:
    """The cells of a printed table, without its heading."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for command in ("train", "plan", "recipes", "doctor", "bench"):
        assert f"\n    {command} " in printed


def test_the_command_line_imports_nothing_heavy() -> None:
    """With the package itself replaced by an empty one: what cli.py adds before a command runs."""
    script = f"""
import sys, types
package = types.ModuleType("dp_flash_hf")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["dp_flash_hf"] = package
import dp_flash_hf.cli
try:
    dp_flash_hf.cli.main(["--help"])
except SystemExit:
    pass
heavy = {{"torch", "transformers", "datasets", "dp_accounting", "numpy"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert complaint.startswith("dp-flash")
    assert says in complaint
    assert not list(tmp_path.iterdir())


def test_traceback_is_there_on_request() -> None:
    with pytest.raises(ValueError, match="quickstrat"):
        cli.main(["--traceback", "train", "quickstrat"])


def test_a_bug_is_not_hidden() -> None:
    def command() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        cli.run(command)


def test_plan_has_a_row_for_every_combination(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*PLAN, "--noise-multiplier", "1,2", "--steps", "20,40", "--delta", "1e-4"])
    rows = _rows(capsys.readouterr().out)
    for row, (noise, steps) in zip(rows, [(1.0, 20), (1.0, 40), (2.0, 20), (2.0, 40)], strict=True):
        config = PrivacyConfig(noise_multiplier=noise, target_delta=1e-4)
        plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=50, steps=steps)
        assert row == [f"{plan.epsilon():.4g}", f"{noise:.4f}", str(steps), f"{steps / 20:.2f}"]


def test_plan_calibrates_noise(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*PLAN, "--epsilon", "8", "--steps", "20", "--delta", "1e-4"])
    (row,) = _rows(capsys.readouterr().out)
    config = PrivacyConfig(target_epsilon=8.0, target_delta=1e-4)
    plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=50, steps=20)
    assert row[:2] == [f"{plan.epsilon():.4g}", f"{plan.noise_multiplier:.4f}"]


def test_plan_counts_epochs_as_steps(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "--units", "1010", "--batch", "50", "--noise-multiplier", "1", "--epochs", "2"])
    printed = capsys.readouterr().out
    (row,) = _rows(printed)
    assert row[2] == "40"  # an epoch is 20 draws, as for the Trainer
    assert f"delta {1010**-1.1:.3g}" in printed


def test_plan_counts_the_steps_a_budget_affords(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*PLAN, "--epsilon", "4", "--noise-multiplier", "1", "--delta", "1e-4"])
    (row,) = _rows(capsys.readouterr().out)
    config = PrivacyConfig(noise_multiplier=1.0, target_delta=1e-4)
    plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=50, steps=1)
    assert plan.epsilon(int(row[2])) <= 4 < plan.epsilon(int(row[2]) + 1)
    assert float(row[0]) == pytest.approx(plan.epsilon(int(row[2])), abs=5e-4)


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_plan_of_memory_counts_a_step(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MiB of every part, from a configuration alone: four numbers for each of AdamW's, activations with checkpointing fewer."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, use_cache=False
    )
    config.save_pretrained(tmp_path)
    command = ["plan", "--memory", "--model", str(tmp_path), "--task", task, "--batch-rows", "4", "--length", "128"]
    layer = 4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512
    numbers = 2048 * 512 + 6 * layer + 512 + (2048 * 512 if task == "causal-lm" else 2 * 512)
    tables = []
    for option in ([], ["--checkpointing"]):
        cli.main([*command, *option])
        printed = capsys.readouterr().out
        assert "free on cpu" in printed.lower()
        rows = {name: [int(part.replace(",", "")) for part in parts] for name, *parts in _rows(printed)}
        assert list(rows) == ["non-private", "bookkeeping", "two_pass"]
        for weights, gradients, states, activations, records, total in rows.values():
            assert abs(weights - 4 * numbers / 2**20) <= 1
            assert abs(gradients - 4 * numbers / 2**20) <= 1
            assert abs(states - 8 * numbers / 2**20) <= 1
            assert abs(total - sum((weights, gradients, states, activations, records))) <= 3  # rounding
        tables.append(rows)
    without, with_checkpointing = tables
    assert with_checkpointing["non-private"][3] < without["non-private"][3]
    assert with_checkpointing["bookkeeping"][4] > 0
    cli.main([*command, "--lora", "4", "--dtype", "bfloat16", "--optimizer", "sgd"])
    adapters = _rows(capsys.readouterr().out)
    assert [row[3] for row in adapters] == ["0"] * 3
    assert all(abs(int(row[1]) - 2 * numbers / 2**20) <= 1 for row in adapters)
    cli.main([*command, "--autocast"])
    printed = capsys.readouterr().out
    assert "in float32 under bfloat16 autocast" in printed
    mixed = {name: int(parts[3]) for name, *parts in _rows(printed)}
    assert mixed["non-private"] < without["non-private"][3]
    cli.main([*command, "--ranks", "4"])
    printed = capsys.readouterr().out
    assert "one of 4 ranks, split up by FSDP2" in printed
    assert "with the weights that FSDP2 gathers" in printed
    for name, *parts in _rows(printed):
        weights, gradients, states, activations, _, _ = (int(part.replace(",", "")) for part in parts)
        assert abs(weights - numbers / 2**20) <= 1
        assert abs(gradients - numbers / 2**20) <= 1
        assert abs(states - 2 * numbers / 2**20) <= 1
        assert activations - without[name][3] > 4 * layer / 2**20


def test_recipes_ls_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["recipes", "ls"])
    rows = _rows(capsys.readouterr().out)
    assert [name for name, _ in rows if name] == RECIPES
    assert {"quickstart", "full_finetune", "lora_finetune", "classification"} <= set(RECIPES)
    assert all(text for _, text in rows)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_cp_copies_both_files_and_overwrites_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["recipes", "cp", name, str(tmp_path / "new")])
    for suffix in (".py", ".yaml"):
        original = (PACKAGE / "recipes" / name).with_suffix(suffix)
        assert (tmp_path / "new" / original.name).read_bytes() == original.read_bytes()
    (tmp_path / "new" / f"{name}.py").unlink()
    (tmp_path / "new" / f"{name}.yaml").write_text("mine: 1\n")
    with pytest.raises(SystemExit):
        cli.main(["recipes", "cp", name, str(tmp_path / "new")])
    assert "exists" in capsys.readouterr().err
    assert not (tmp_path / "new" / f"{name}.py").exists()
    assert yaml.safe_load((tmp_path / "new" / f"{name}.yaml").read_text()) == {"mine": 1}


def test_doctor_tells_versions_and_attention(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    cli.main(["doctor"])
    rows = dict(_rows(capsys.readouterr().out))
    assert rows["torch"] == torch.__version__
    assert "computed by torch" in rows["attention"]


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_doctor_accounts_for_every_parameter_of_a_model(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=30, num_attention_heads=2, num_key_value_heads=1
    )
    config.save_pretrained(tmp_path)
    cli.main(["doctor", "--model", str(tmp_path), "--task", task, "--length", "9"])
    trial = _rows(capsys.readouterr().out.partition("Llama")[2])
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    head = 60 * 16 if task == "causal-lm" else 2 * 16
    assert sum(int(row[3].replace(",", "")) for row in trial) == 60 * 16 + 2 * layer + 16 + head  # 2 of the 30 layers
    assert {row[0] for row in trial} == {"Embedding", "Linear", "LlamaRMSNorm"}


def test_the_trial_keeps_one_layer_of_each_kind() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    config = LlamaConfig(num_hidden_layers=6)
    config.layer_types = kinds
    cli._keep_few_layers(config)
    assert config.num_hidden_layers == 4
    assert config.layer_types == kinds[:4]
