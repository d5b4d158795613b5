"""`dp-flash plan`: figures that agree with the accountant, and with the sizes of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from dp_flash_hf import PrivacyConfig, PrivacyPlan
from dp_flash_hf.cli.main import main
from tests.cli import printed_rows

PLAN = ["plan", "--units", "1000", "--batch", "50"]


def test_plan_has_a_row_for_every_combination(capsys: pytest.CaptureFixture[str]) -> None:
    main([*PLAN, "--noise-multiplier", "1,2", "--steps", "20,40", "--delta", "1e-4"])
    rows = printed_rows(capsys.readouterr().out)
    for row, (noise, steps) in zip(rows, [(1.0, 20), (1.0, 40), (2.0, 20), (2.0, 40)], strict=True):
        config = PrivacyConfig(noise_multiplier=noise, target_delta=1e-4)
        plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=50, steps=steps)
        assert row == [f"{plan.epsilon():.4g}", f"{noise:.4f}", str(steps), f"{steps / 20:.2f}"]


def test_plan_calibrates_noise(capsys: pytest.CaptureFixture[str]) -> None:
    main([*PLAN, "--epsilon", "8", "--steps", "20", "--delta", "1e-4"])
    (row,) = printed_rows(capsys.readouterr().out)
    config = PrivacyConfig(target_epsilon=8.0, target_delta=1e-4)
    plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=50, steps=20)
    assert row[:2] == [f"{plan.epsilon():.4g}", f"{plan.noise_multiplier:.4f}"]


def test_plan_counts_epochs_as_steps(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--units", "1010", "--batch", "50", "--noise-multiplier", "1", "--epochs", "2"])
    printed = capsys.readouterr().out
    (row,) = printed_rows(printed)
    assert row[2] == "40"  # an epoch is 20 draws, as for the Trainer
    assert "delta 0.000495" in printed  # 1010 ** -1.1 = 0.00049568, rounded down


def test_plan_counts_the_steps_a_budget_affords(capsys: pytest.CaptureFixture[str]) -> None:
    main([*PLAN, "--epsilon", "4", "--noise-multiplier", "1", "--delta", "1e-4"])
    (row,) = printed_rows(capsys.readouterr().out)
    config = PrivacyConfig(noise_multiplier=1.0, target_delta=1e-4)
    plan = PrivacyPlan.from_config(config, n_units=1000, expected_batch_size=50, steps=1)
    assert plan.epsilon(int(row[2])) <= 4 < plan.epsilon(int(row[2]) + 1)
    assert float(row[0]) == pytest.approx(plan.epsilon(int(row[2])), abs=5e-4)


@pytest.mark.complete
@pytest.mark.parametrize("task", ["causal-lm", pytest.param("classification", marks=pytest.mark.complete)])
def test_plan_of_memory_counts_a_step(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MiB of every part, from a configuration alone: 4 values per parameter with AdamW, fewer activations if checkpointed."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, use_cache=False
    )
    config.save_pretrained(tmp_path)
    command = ["plan", "--memory", "--model", str(tmp_path), "--task", task, "--batch-rows", "4", "--length", "128"]
    layer = 4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512
    values = 2048 * 512 + 6 * layer + 512 + (2048 * 512 if task == "causal-lm" else 2 * 512)
    tables = []
    for option in ([], ["--checkpointing"]):
        main([*command, *option])
        printed = capsys.readouterr().out
        assert "free on cpu" in printed.lower()
        rows = {name: [int(part.replace(",", "")) for part in parts] for name, *parts in printed_rows(printed)}
        assert list(rows) == ["non-private", "bookkeeping", "two_pass"]
        for weights, gradients, states, activations, records, total in rows.values():
            assert abs(weights - 4 * values / 2**20) <= 1
            assert abs(gradients - 4 * values / 2**20) <= 1
            assert abs(states - 8 * values / 2**20) <= 1
            assert abs(total - sum((weights, gradients, states, activations, records))) <= 3  # rounding
        tables.append(rows)
    without, with_checkpointing = tables
    assert with_checkpointing["non-private"][3] < without["non-private"][3]
    assert with_checkpointing["bookkeeping"][4] > 0
    main([*command, "--lora", "4", "--dtype", "bfloat16", "--optimizer", "sgd"])
    adapters = printed_rows(capsys.readouterr().out)
    assert [row[3] for row in adapters] == ["0"] * 3
    assert all(abs(int(row[1]) - 2 * values / 2**20) <= 1 for row in adapters)
    main([*command, "--autocast"])
    printed = capsys.readouterr().out
    assert "in float32 under bfloat16 autocast" in printed
    mixed = {name: int(parts[3]) for name, *parts in printed_rows(printed)}
    assert mixed["non-private"] < without["non-private"][3]
    main([*command, "--ranks", "4"])
    printed = capsys.readouterr().out
    assert "one of 4 ranks, sharded by FSDP2" in printed
    assert "with the weights that FSDP2 gathers" in printed
    for name, *parts in printed_rows(printed):
        weights, gradients, states, activations, _, _ = (int(part.replace(",", "")) for part in parts)
        assert abs(weights - values / 2**20) <= 1
        assert abs(gradients - values / 2**20) <= 1
        assert abs(states - 2 * values / 2**20) <= 1
        assert activations - without[name][3] > 4 * layer / 2**20
